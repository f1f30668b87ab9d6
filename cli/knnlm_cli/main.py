"""The console script `knnlm`: subcommands from entry points, errors as one line, exit codes.

Exit codes: 0 done · 1 an error of ours, told in one line · 2 wrong usage · 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from knnlm_cli.commands import EntryPointCommands
from knnlm_core import __version__
from knnlm_core.errors import KnnlmError


class RootGroup(TyperGroup):
    """The top-level command: finds subcommands lazily and prints a `KnnlmError` as one line instead of a traceback."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands = EntryPointCommands()

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen subcommand.

        Raises: typer.Exit(1): it raised a `KnnlmError`; with ``--debug`` the error itself passes, with its traceback.
        """
        try:
            return super().invoke(ctx)
        except KnnlmError as error:
            if ctx.params["debug"]:
                raise
            print_error(error)
            raise typer.Exit(1) from None


def print_error(error: KnnlmError) -> None:
    """Print ``error: message (code)`` on stderr, in colour where stderr is a terminal and NO_COLOR is not set."""
    from rich.console import Console  # only errors and help need it
    from rich.text import Text

    line = Text.assemble(("error:", "bold red"), f" {error.message} ", (f"({error.code})", "dim"))
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)


def make_app() -> typer.Typer:
    """The Typer app with every subcommand that is installed."""
    app = typer.Typer(
        cls=RootGroup,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    return app


def main() -> None:
    """Run `knnlm` and exit; a reader that closes our output early is no error worth a word."""
    try:
        try:
            make_app()(prog_name="knnlm")
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more at exit; give it somewhere to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"knnlm {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Build datastores from text and serve a language model that retrieves from them, token by token."""
