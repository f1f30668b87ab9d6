"""The tab of datastores: what they are, and changing them while the server runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import gradio as gr

from knnlm_client import AccessError, AsyncClient, Datastore, DatastoreProgress, KnnlmClientError, NewDocument
from knnlm_playground.advice import trouble_of
from knnlm_playground.rendering import parts
from knnlm_playground.rendering.datastores import render_details
from knnlm_playground.server import Keys, Server, Typed

CURRENT = "current"
_NO_STORE = parts.empty("Choose a datastore.")
_NOT_LOADED = parts.empty("It is published and not loaded. “Load” makes the server serve it.")
_NO_CHANGES = parts.empty(
    "Changes are off here, since others can reach this page. Start it with --changes to let everybody make them."
)

# What a change does, and the words that tell that it is done.
Change = Callable[[AsyncClient], Awaitable[str]]


class DatastoresTab:
    """Builds the tab where it is made, inside a `gr.Blocks`; `refreshed` lists and details are wired by the page.

    Args:     keys: the components that hold API key and admin key.
    """

    def __init__(self, server: Server, keys: Sequence[Any]) -> None:
        self._server = server
        self._keys = list(keys)
        with gr.Column(elem_classes="knnlm-column"):
            self.list = gr.HTML(apply_default_css=False, elem_id="knnlm-stores")
        with gr.Row(equal_height=True):
            self.name = gr.Dropdown(label="Datastore", choices=[], value=None, interactive=True, elem_id="knnlm-store")
            self.version = gr.Dropdown(
                label="Version", choices=[CURRENT], value=CURRENT, interactive=True, elem_id="knnlm-version"
            )
        with gr.Row(elem_classes="knnlm-buttons"):
            self._load = gr.Button(
                "Load or swap",
                variant="primary",
                elem_id="knnlm-load",
                scale=0,
                min_width=180,
                visible=server.allows_changes,
            )
            self._rollback = gr.Button(
                "Roll back", elem_id="knnlm-rollback", scale=0, min_width=140, visible=server.allows_changes
            )
            self.refresh = gr.Button("Refresh", elem_id="knnlm-refresh", scale=0, min_width=140)
        self._status = gr.HTML(
            parts.NOTHING if server.allows_changes else _NO_CHANGES,
            elem_id="knnlm-store-status",
            elem_classes="knnlm-status",
        )
        with gr.Column(elem_classes="knnlm-column"):
            self.details = gr.HTML(_NO_STORE, apply_default_css=False, elem_id="knnlm-details")
        with gr.Accordion("Add a document", open=False, visible=server.allows_changes, elem_id="knnlm-add"):
            with gr.Row():
                document = [
                    gr.Textbox(label="Id", placeholder="any text that no other document has", min_width=180),
                    gr.Textbox(label="Title", placeholder="optional", min_width=180),
                    gr.Textbox(label="Licence", placeholder="optional, such as CC0-1.0", min_width=180),
                    gr.Textbox(label="Address", placeholder="optional, such as https://…", min_width=180),
                ]
            document.append(gr.Textbox(label="Document's text", lines=5, max_lines=16))
            document.append(gr.Checkbox(label="Replace what has this id", value=False))
            with gr.Row(elem_classes="knnlm-buttons"):
                self._learn = gr.Button("Add", elem_id="knnlm-learn", scale=0, min_width=140)
        with gr.Accordion("Delete a document", open=False, visible=server.allows_changes, elem_id="knnlm-delete"):
            gone = gr.Textbox(
                label="Id of the document", info="No version and no rollback brings it back.", elem_id="knnlm-gone"
            )
            with gr.Row(elem_classes="knnlm-buttons"):
                self._forget = gr.Button("Delete", variant="stop", elem_id="knnlm-forget", scale=0, min_width=140)
        self.changed = [
            self._on(self._load, self._loading, [self.version]),
            self._on(self._rollback, self._rolling_back, []),
            self._on(self._learn, self._learning, document),
            self._on(self._forget, self._forgetting, [gone]),
        ]

    def _on(self, button: Any, act: Any, inputs: list[Any]) -> Any:
        """The event of a button that changes the chosen datastore; what follows it comes after success only."""
        return button.click(
            act, [*self._keys, self.name, *inputs], [self._status], show_progress="hidden", api_visibility="private"
        )

    async def describe(self, client: AsyncClient, name: Typed) -> tuple[Any, Any]:
        """Details of a datastore, and the versions that can be loaded.

        Raises: KnnlmClientError: the server does not answer.
        """
        if not name:
            return _NO_STORE, gr.update(choices=[CURRENT], value=CURRENT)
        stores = await client.datastores.list()
        store = next((store for store in stores.loaded if store.name == name), None)
        if store is None:
            return _NOT_LOADED, gr.update(choices=[CURRENT], value=CURRENT)
        choices = [(CURRENT, CURRENT)]
        try:
            for version in await client.datastores.versions(name):
                serving = ", serving" if version.serving else ""
                choices.append((f"{version.version} ({version.documents} documents{serving})", version.version))
        except AccessError:
            pass  # who may not change datastores has no use for their versions
        return render_details(store), gr.update(choices=choices, value=CURRENT)

    async def _loading(self, api_key: Typed, admin_key: Typed, name: Typed, version: Typed) -> AsyncIterator[str]:
        store: Datastore | None = None
        try:
            async with (
                self._changing(Keys(api_key, admin_key), name) as client,
                client.datastores.stream_load(name or "", version or CURRENT) as events,
            ):
                async for event in events:
                    if isinstance(event, DatastoreProgress):
                        share = event.done / event.total if event.total else None
                        yield parts.progress(f"{event.stage} {name}", share)
                    else:
                        store = event
        except (KnnlmClientError, ValueError) as error:
            yield parts.trouble(trouble_of(error))
            return
        if store is not None:
            yield parts.done(f"{store.name} serves version {store.version}, generation {store.generation}.")

    async def _rolling_back(self, api_key: Typed, admin_key: Typed, name: Typed) -> str:
        async def roll_back(client: AsyncClient) -> str:
            store = await client.datastores.rollback(name or "")
            return f"{store.name} serves version {store.version} again, generation {store.generation}."

        return await self._change(Keys(api_key, admin_key), name, roll_back)

    async def _learning(self, api_key: Typed, admin_key: Typed, name: Typed, *given: Any) -> str:
        async def learn(client: AsyncClient) -> str:
            document_id, title, licence, uri, text, update = given
            if not document_id or not text:
                raise ValueError("a document needs an id and a text")
            document = NewDocument(
                id=document_id, text=text, title=title or None, licence=licence or None, uri=uri or None
            )
            learned = await client.datastores.learn(name or "", [document], update=bool(update))
            (one,) = learned.documents
            return (
                f"{name} knows {one.id} now: {one.tokens} tokens, {one.entries} entries, revision {learned.revision}."
            )

        return await self._change(Keys(api_key, admin_key), name, learn)

    async def _forgetting(self, api_key: Typed, admin_key: Typed, name: Typed, document_id: Typed) -> str:
        async def forget(client: AsyncClient) -> str:
            if not document_id:
                raise ValueError("name the document that is to be deleted")
            forgotten = await client.datastores.forget(name or "", document_id)
            return f"{forgotten.document_id} is deleted from {name}, revision {forgotten.revision}."

        return await self._change(Keys(api_key, admin_key), name, forget)

    async def _change(self, keys: Keys, name: Typed, change: Change) -> str:
        try:
            async with self._changing(keys, name) as client:
                return parts.done(await change(client))
        except (KnnlmClientError, ValueError) as error:
            return parts.trouble(trouble_of(error))

    def _changing(self, keys: Keys, name: Typed) -> AsyncClient:
        """A client for changes. Raises ValueError: none may be made here, or no datastore is chosen."""
        if not name:
            raise ValueError("choose a datastore first")
        return self._server.connect_to_change(keys)
