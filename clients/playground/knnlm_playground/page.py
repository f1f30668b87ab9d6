"""The page: header, tabs, and what they share."""

from __future__ import annotations

from typing import Any

import gradio as gr
from markupsafe import Markup

from knnlm_client import AsyncClient, KnnlmClientError
from knnlm_playground.advice import trouble_of
from knnlm_playground.rendering import parts
from knnlm_playground.rendering.datastores import render_list
from knnlm_playground.server import Keys, Server, Typed
from knnlm_playground.views.complete import CompleteTab
from knnlm_playground.views.datastores import DatastoresTab
from knnlm_playground.views.pickers import Catalogue, updates
from knnlm_playground.views.score import ScoreTab

TITLE = "knnlm playground"
MOST_EVENTS = 32  # of one kind that run at the same time, of all visitors together

_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_KEYS = parts.empty("They stay in this tab of the browser and go along with its requests; nothing stores them.")


def build_page(server: Server) -> gr.Blocks:
    """Put the page together; it keeps nothing of its visitors beyond their own sessions."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=False) as blocks:
        _Page(server, blocks)
    blocks.queue(default_concurrency_limit=MOST_EVENTS, api_open=False)
    return blocks


class _Page:
    def __init__(self, server: Server, blocks: gr.Blocks) -> None:
        self._server = server
        self._header = gr.HTML(_header("…"), apply_default_css=False, elem_id="knnlm-header")
        # Used by all tabs, and shown in the last.
        self._api_key = gr.Textbox(
            label="API key", type="password", placeholder="only if the server asks for one", render=False
        )
        self._admin_key = gr.Textbox(
            label="Admin key", type="password", placeholder="only to change datastores", render=False
        )
        keys = [self._api_key, self._admin_key]
        with gr.Tabs():
            with gr.Tab("Complete"):
                self._complete = CompleteTab(server, keys)
            with gr.Tab("Score"):
                self._score = ScoreTab(server, keys)
            with gr.Tab("Datastores"):
                self._datastores = DatastoresTab(server, keys)
            with gr.Tab("Keys"):
                gr.HTML(_KEYS, apply_default_css=False)
                with gr.Row():
                    self._api_key.render()
                    self._admin_key.render()
                with gr.Row(elem_classes="knnlm-buttons"):
                    apply = gr.Button("Apply", variant="primary", scale=0, min_width=140)
        self._wire(blocks, apply)

    def _wire(self, blocks: gr.Blocks, apply: Any) -> None:
        stores = self._datastores
        chosen = [*self._complete.picks, *self._score.picks, stores.name]
        outputs = [self._header, stores.list, *chosen, stores.details, stores.version]
        inputs = [self._api_key, self._admin_key, *chosen]
        blocks.load(self._first, [self._api_key, self._admin_key], outputs, **_QUIET)
        gr.on([apply.click, stores.refresh.click], self._again, inputs, outputs, **_QUIET)
        for event in stores.changed:
            event.then(self._again, inputs, outputs, **_QUIET)
        stores.name.input(
            self._describe, [self._api_key, self._admin_key, stores.name], [stores.details, stores.version], **_QUIET
        )

    async def _first(self, api_key: Typed, admin_key: Typed) -> list[Any]:
        return await self._listed(Keys(api_key, admin_key), None, None, None, None, None)

    async def _again(self, api_key: Typed, admin_key: Typed, *chosen: Any) -> list[Any]:
        return await self._listed(Keys(api_key, admin_key), *chosen)

    async def _listed(
        self,
        keys: Keys,
        model: Typed,
        stores: list[str] | None,
        score_model: Typed,
        score_stores: list[str] | None,
        name: Typed,
    ) -> list[Any]:
        """Everything that shows what the server offers. Nothing chosen by anybody yet is None."""
        try:
            async with self._server.connect(keys) as client:
                catalogue = await _catalogue(client)
                known = [*catalogue.store_names, *catalogue.stores.published]
                name = name if name in known else next(iter(known), None)
                details = await self._datastores.describe(client, name)
        except (KnnlmClientError, ValueError) as error:
            return [_header(self._server.url) + parts.trouble(trouble_of(error)), *[gr.skip()] * 8]
        words = f"{', '.join(catalogue.model_names)} with {_count(len(catalogue.store_names), 'datastore')}"
        return [
            _header(f"{words} at {self._server.url}"),
            render_list(catalogue.stores),
            *updates(catalogue, model, stores if model else None),
            *updates(catalogue, score_model, score_stores if score_model else None),
            gr.update(choices=known, value=name),
            *details,
        ]

    async def _describe(self, api_key: Typed, admin_key: Typed, name: Typed) -> tuple[Any, Any]:
        try:
            async with self._server.connect(Keys(api_key, admin_key)) as client:
                return await self._datastores.describe(client, name)
        except (KnnlmClientError, ValueError) as error:
            return parts.trouble(trouble_of(error)), gr.skip()


async def _catalogue(client: AsyncClient) -> Catalogue:
    return Catalogue(await client.models(), await client.datastores.list())


def _header(words: str) -> Markup:
    return Markup('<header class="knnlm-header"><h1>{}</h1><p>{}</p></header>').format(TITLE, words)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
