"""The tab that completes a prompt, with datastores and without, and tells where each token came from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gradio as gr
from markupsafe import Markup

from knnlm_client import KnnlmClientError, StreamCompletionOptions
from knnlm_playground.advice import trouble_of
from knnlm_playground.completing import Pair, Wish, complete
from knnlm_playground.rendering import parts
from knnlm_playground.rendering.completion import render_generation
from knnlm_playground.rendering.provenance import render_provenance
from knnlm_playground.rendering.tokens import SATURATED_GAIN
from knnlm_playground.server import Keys, Server, Typed
from knnlm_playground.sources import read_excerpts
from knnlm_playground.tokens import Generated
from knnlm_playground.views.pickers import (
    build_picks,
    build_retrieval,
    knn_options,
    optional_number,
    read_choice,
    real_number,
    token_text,
    whole_number,
)

_EMPTY = parts.empty("Write a prompt and press “Complete”.")
_EMPTY_BASE = parts.empty("The same prompt, without a datastore, for comparison.")
_CHOOSE = parts.empty("Choose a token to see which neighbours proposed it, and where they stand.")
_NO_STORE = parts.empty("No datastore is chosen, so the language model alone completes.")

_LEGEND = Markup(
    '<fieldset class="knnlm-colours"><legend>Colour</legend>'
    '<label><input type="radio" name="knnlm-colour" id="knnlm-colour-gain" checked>what it gained, p − p_lm</label>'
    '<label><input type="radio" name="knnlm-colour" id="knnlm-colour-lambda">weight of the datastore, λ</label>'
    '<label><input type="radio" name="knnlm-colour" id="knnlm-colour-gate">decision of the gate</label>'
    '<span class="knnlm-scale lambda">0 <i class="of-lambda"></i> 1</span>'
    '<span class="knnlm-scale gain">−{0} <i class="of-gain"></i> +{0}</span>'
    '<span class="knnlm-scale gate"><i class="of-gate searched"></i> searched <i class="of-gate followed"></i> followed'
    ' <i class="of-gate skipped"></i> neither</span>'
    "</fieldset>"
).format(SATURATED_GAIN)


@dataclass(frozen=True, slots=True)
class Run:
    """What a visitor had completed last; it grows while the completion runs."""

    wish: Wish
    pair: Pair = field(default_factory=Pair)
    stop: asyncio.Event = field(default_factory=asyncio.Event)  # set to end it early

    @property
    def mixed_tokens(self) -> list[Generated]:
        """Those of the first column."""
        return self.pair.mixed.tokens()

    @property
    def base_tokens(self) -> list[Generated]:
        """Those of the second column."""
        return self.pair.base.tokens()


class _Sampling(NamedTuple):
    max_tokens: Any
    temperature: Any
    top_p: Any
    top_k: Any
    min_p: Any
    seed: Any
    stop: Any


class CompleteTab:
    """Builds the tab where it is made, inside a `gr.Blocks`.

    Args:     keys: the components that hold API key and admin key.
    """

    def __init__(self, server: Server, keys: Sequence[Any]) -> None:
        self._server = server
        self._keys = list(keys)
        self.prompt = gr.Textbox(
            label="Prompt", lines=4, max_lines=14, placeholder="The beginning of a text", elem_id="knnlm-prompt"
        )
        with gr.Row(equal_height=True):
            self.picks = build_picks()
        with gr.Accordion("Sampling and retrieval", open=False):
            self._sampling = _build_sampling()
            self._retrieval = build_retrieval()
        with gr.Row(elem_classes="knnlm-buttons"):
            self._start = gr.Button("Complete", variant="primary", elem_id="knnlm-complete", scale=0, min_width=140)
            self._stop = gr.Button("Stop", interactive=False, elem_id="knnlm-stop", scale=0, min_width=140)
        self._status = gr.HTML(elem_classes="knnlm-status")
        gr.HTML(_LEGEND, apply_default_css=False, elem_id="knnlm-legend")
        with gr.Row(equal_height=True):
            with gr.Column(elem_classes="knnlm-column", min_width=300):
                gr.HTML(parts.heading("With datastores"), apply_default_css=False)
                self._mixed = token_text(value=_EMPTY, elem_id="knnlm-mixed")
            with gr.Column(elem_classes="knnlm-column", min_width=300):
                gr.HTML(parts.heading("Language model alone"), apply_default_css=False)
                self._base = token_text(value=_EMPTY_BASE, elem_id="knnlm-base")
        with gr.Column(elem_classes="knnlm-column"):
            gr.HTML(parts.heading("Where the token came from"), apply_default_css=False)
            self._panel = gr.HTML(_CHOOSE, apply_default_css=False, elem_id="knnlm-panel")
        self._run = gr.State(None)
        self._wire()

    def _wire(self) -> None:
        outputs = [self._mixed, self._base, self._panel, self._status, self._start, self._stop, self._run]
        inputs = [*self._keys, self.prompt, *self.picks, *self._retrieval, *self._sampling]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([self._start.click, self.prompt.submit], self._complete, inputs, outputs, trigger_mode="once", **quiet)
        self._stop.click(self._stopping, [self._run], None, **quiet)
        state = [*self._keys, self._run]
        self._mixed.select(self._choose_mixed, state, [self._panel], **quiet)
        self._base.select(self._choose_base, state, [self._panel], **quiet)

    async def _complete(
        self, api_key: Typed, admin_key: Typed, prompt: Typed, *given: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        (model, stores), retrieval, sampling = given[:2], given[2:8], given[8:]
        try:
            knn, options = knn_options(*retrieval), _sampling_options(*sampling)
            async with self._server.connect(Keys(api_key, admin_key)) as client, AsyncExitStack() as stack:
                wish = Wish(prompt or "", await read_choice(client, model, stores, knn), options)
                run = Run(wish)
                yield (*_columns(run, is_running=True), _CHOOSE, "", *_buttons(is_running=True), run)
                growing = await stack.enter_async_context(aclosing(complete(client, wish, run.pair)))
                async for _ in growing:
                    yield (*_columns(run, is_running=True), gr.skip(), "", *_buttons(is_running=True), run)
                    if run.stop.is_set():
                        break
            yield (*_columns(run), gr.skip(), "", *_buttons(is_running=False), run)
        except (KnnlmClientError, ValueError) as error:
            told = parts.trouble(trouble_of(error))
            yield (*[gr.skip()] * 3, told, *_buttons(is_running=False), gr.skip())

    async def _stopping(self, run: Run | None) -> None:
        # The completion ends itself: what it shows last must not be overtaken by what it showed before.
        if run is not None:
            run.stop.set()

    async def _choose_mixed(self, api_key: Typed, admin_key: Typed, run: Run | None, event: gr.EventData) -> str:
        return await self._provenance(Keys(api_key, admin_key), run, run.mixed_tokens if run else [], event.index)

    async def _choose_base(self, api_key: Typed, admin_key: Typed, run: Run | None, event: gr.EventData) -> str:
        return await self._provenance(Keys(api_key, admin_key), run, run.base_tokens if run else [], event.index)

    async def _provenance(self, keys: Keys, run: Run | None, tokens: list[Generated], index: object) -> str:
        if run is None or not isinstance(index, int) or not 0 <= index < len(tokens):
            return _CHOOSE
        token, note = tokens[index], parts.NOTHING
        try:
            async with self._server.connect(keys) as client:
                excerpts = await read_excerpts(client, run.wish, tokens, index)
        except (KnnlmClientError, ValueError) as error:
            excerpts, note = [None] * len(token.trace.neighbors), parts.trouble(trouble_of(error))
        return note + render_provenance(token.text, token.trace, excerpts)


def _build_sampling() -> _Sampling:
    with gr.Row():
        return _Sampling(
            gr.Slider(1, 1024, 48, step=1, label="Most tokens", min_width=200),
            gr.Slider(0, 2, 0, step=0.05, label="Temperature (0 takes the likeliest)", min_width=200),
            gr.Slider(0.01, 1, 1, step=0.01, label="top p", min_width=200),
            optional_number("top k", "off"),
            optional_number("min p", "off"),
            optional_number("Seed", "any"),
            gr.Textbox(label="Stop at", lines=1, max_lines=4, placeholder="one text per line", min_width=180),
        )


def _sampling_options(
    max_tokens: float,
    temperature: float,
    top_p: float,
    top_k: Typed,
    min_p: Typed,
    seed: Typed,
    stop: Typed,
) -> StreamCompletionOptions:
    options: StreamCompletionOptions = {
        "max_tokens": int(max_tokens),
        "temperature": temperature,
        "top_p": top_p,
        "top_k": whole_number("top k", top_k),
        "min_p": real_number("min p", min_p),
        "seed": whole_number("seed", seed),
    }
    if stops := [line for line in (stop or "").split("\n") if line]:
        options["stop"] = stops
    return options


def _columns(run: Run, *, is_running: bool = False) -> tuple[str, str]:
    prompt, pair = run.wish.prompt, run.pair
    base_runs = is_running and pair.base.finish_reason is None and pair.base.error is None
    mixed_runs = is_running and pair.mixed.finish_reason is None and pair.mixed.error is None
    mixed = render_generation(pair.mixed, prompt, is_running=mixed_runs) if run.wish.choice.datastores else _NO_STORE
    return mixed, render_generation(pair.base, prompt, is_running=base_runs)


def _buttons(*, is_running: bool) -> tuple[Any, Any]:
    return gr.update(interactive=not is_running), gr.update(interactive=is_running)
