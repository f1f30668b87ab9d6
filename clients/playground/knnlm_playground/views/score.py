"""The tab that scores a text: what the datastore gained or lost, token by token."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from knnlm_client import KnnlmClientError, ScoreProgress, ScoreResult, ScoreResultEvent
from knnlm_playground.advice import trouble_of
from knnlm_playground.rendering import parts
from knnlm_playground.rendering.provenance import render_scored
from knnlm_playground.rendering.score import render_heat, render_totals
from knnlm_playground.rendering.tokens import SATURATED_NATS, scored_pieces
from knnlm_playground.server import Keys, Server, Typed
from knnlm_playground.views.pickers import build_picks, build_retrieval, knn_options, read_choice, token_text

_EMPTY = parts.empty("Paste a text and press “Score”. Each token shows what the datastore gained or lost for it.")
_CHOOSE = parts.empty("Choose a token to see its figures.")
_LEGEND = Markup(
    '<div class="knnlm-heat-legend"><span class="knnlm-scale gain">lost {0:g} nats <i class="of-gain"></i> '
    "gained {0:g} nats, log p mixed − log p of the model alone</span></div>"
).format(SATURATED_NATS)


@dataclass(frozen=True, slots=True)
class Scored:
    """What a visitor had scored last."""

    text: str
    result: ScoreResult


class ScoreTab:
    """Builds the tab where it is made, inside a `gr.Blocks`.

    Args:     keys: the components that hold API key and admin key.
    """

    def __init__(self, server: Server, keys: Sequence[Any]) -> None:
        self._server = server
        self._text = gr.Textbox(
            label="Text", lines=7, max_lines=20, placeholder="A text that the datastore may know something about",
            elem_id="knnlm-score-text",
        )  # fmt: skip
        with gr.Row(equal_height=True):
            self.picks = build_picks()
        with gr.Accordion("Retrieval", open=False):
            self._retrieval = build_retrieval()
            self._excluded = gr.Textbox(
                label="Documents that must not be found", lines=1, max_lines=6, placeholder="one id per line",
                info="A text that the datastore holds would find itself.",
            )  # fmt: skip
        with gr.Row(elem_classes="knnlm-buttons"):
            self._start = gr.Button("Score", variant="primary", elem_id="knnlm-score", scale=0, min_width=140)
        self._status = gr.HTML(elem_classes="knnlm-status")
        with gr.Column(elem_classes="knnlm-column"):
            self._totals = gr.HTML(_EMPTY, apply_default_css=False, elem_id="knnlm-totals")
        with gr.Column(elem_classes="knnlm-column knnlm-heat", visible=False) as self._heat_box:
            gr.HTML(_LEGEND, apply_default_css=False)
            self._heat = token_text(elem_id="knnlm-heat")
        with gr.Column(elem_classes="knnlm-column", visible=False) as self._panel_box:
            gr.HTML(parts.heading("The token’s figures"), apply_default_css=False)
            self._panel = gr.HTML(_CHOOSE, apply_default_css=False, elem_id="knnlm-score-panel")
        self._scored = gr.State(None)
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self._start.click(
            self._score,
            [*keys, self._text, *self.picks, *self._retrieval, self._excluded],
            [self._status, self._totals, self._heat, self._panel, self._heat_box, self._panel_box, self._scored],
            **quiet,
        )
        self._heat.select(self._choose, [self._scored], [self._panel], **quiet)

    async def _score(
        self,
        api_key: Typed,
        admin_key: Typed,
        text: Typed,
        model: Typed,
        stores: list[str] | None,
        *given: Any,
    ) -> AsyncIterator[tuple[Any, ...]]:
        retrieval, excluded = given[:6], given[6]
        same = [gr.skip()] * 6
        yield (parts.progress("Scoring"), *same)
        try:
            knn = knn_options(*retrieval)
            async with self._server.connect(Keys(api_key, admin_key)) as client, AsyncExitStack() as stack:
                asked = (await read_choice(client, model, stores, knn)).mixed()
                left_out = [line for line in (excluded or "").split("\n") if line] if stores else []
                events = await stack.enter_async_context(
                    client.stream_score(
                        [text or ""],
                        model=asked.model,
                        knn=asked.knn,
                        per_token=True,
                        exclude_documents=left_out or None,
                    )
                )
                async for event in events:
                    if isinstance(event, ScoreProgress):
                        share = event.tokens_done / event.tokens if event.tokens else None
                        yield (parts.progress(f"{event.tokens_done} of {event.tokens} tokens", share), *same)
                    elif isinstance(event, ScoreResultEvent):
                        yield ("", *_shown(Scored(text or "", event)))
        except (KnnlmClientError, ValueError) as error:
            yield (parts.trouble(trouble_of(error)), *same)

    def _choose(self, scored: Scored | None, event: gr.EventData) -> str:
        tokens = (scored.result.per_token or []) if scored is not None else []
        index = event.index
        if scored is None or not isinstance(index, int) or not 0 <= index < len(tokens):
            return _CHOOSE
        return render_scored(scored_pieces(scored.text, tokens)[index], tokens[index])


def _shown(scored: Scored) -> tuple[Any, ...]:
    shown = gr.update(visible=True)
    return render_totals(scored.result), render_heat(scored.text, scored.result), _CHOOSE, shown, shown, scored
