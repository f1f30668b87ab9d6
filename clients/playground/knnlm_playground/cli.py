"""``knnlm playground``."""

from __future__ import annotations

from typing import Annotated

import typer


def playground(
    url: Annotated[str, typer.Option("--url", help="Address of the knnlm server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="KNNLM_API_KEY",
            help="Sent for every visitor who enters none; whoever reaches the page then uses it.",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = 7860,
    changes: Annotated[
        bool | None,
        typer.Option(
            "--changes/--no-changes",
            help="Whether visitors may change datastores, as far as the server lets this machine; by default only on "
            "loopback.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a web page that shows where each token came from.

    Examples:
        knnlm playground --url http://127.0.0.1:8000
        knnlm playground --url https://knnlm.example.org --port 7861 --no-changes
    """
    from knnlm_playground.guard import LOOPBACK
    from knnlm_playground.run import run_page  # gradio takes seconds to import

    run_page(url, api_key, host, port, allows_changes=host in LOOPBACK if changes is None else changes)
