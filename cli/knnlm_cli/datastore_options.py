"""What the subcommands of `knnlm datastore` share: arguments, and how they print."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

Given = Annotated[str, typer.Argument(metavar="ROOT/NAME", help="The datastore.", show_default=False)]
GivenVersion = Annotated[
    str,
    typer.Argument(
        metavar="ROOT/NAME[@VERSION]", help="The datastore; by default its current version.", show_default=False
    ),
]
Documents = Annotated[list[str], typer.Argument(metavar="ID", help="Ids of documents.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def console() -> Console:
    """Where results for people go."""
    from rich.console import Console

    return Console(highlight=False, markup=False)


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    typer.echo(json.dumps(content, ensure_ascii=False))
