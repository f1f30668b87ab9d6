"""The console script `knnlm`: subcommands from entry points, errors as one line, exit codes.

Exit codes: 0 done · 1 an error of ours or of the system, told in one line · 2 wrong usage · 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from knnlm_cli.commands import EntryPointCommands, explanation
from knnlm_core import __version__
from knnlm_core.errors import KnnlmError

PANELS = {
    "build": "Make datastores",
    "calibrate": "Make datastores",
    "datastore": "Make datastores",
    "serve": "Use them",
    "score": "Use them",
    "playground": "Use them",
    "demo": "Begin and check",
    "model": "Begin and check",
    "doctor": "Begin and check",
}


class RootGroup(TyperGroup):
    """The top-level command: finds subcommands lazily and prints an error as one line instead of a traceback."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands = EntryPointCommands(PANELS)

    def list_commands(self, ctx: Any) -> list[str]:
        """Names as help shows them: ours by panel, then those of other packages."""
        order = list(PANELS)
        return sorted(self.commands, key=lambda name: order.index(name) if name in PANELS else len(order))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and exit unless ``standalone_mode`` is off; wrong usage is one line that says where to read on."""
        given = (args, prog_name, complete_var, False, windows_expand_args)
        if not standalone_mode:
            return super().main(*given, **extra)
        try:
            status = super().main(*given, **extra)
        except TyperException as error:
            if type(error).__name__ != "NoArgsIsHelpError":  # that one has printed the help
                _print_usage_error(error)
            status = error.exit_code
        except typer.Abort:
            _print_line("the question was not answered with yes, so nothing was done", "aborted")
            status = 1
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen subcommand.

        Raises: typer.Exit(1): it raised a `KnnlmError`, or the system refused it a file or a connection; with
            ``--debug`` the error itself passes, with its traceback.
        """
        try:
            return super().invoke(ctx)
        except KnnlmError as error:
            if ctx.params["debug"]:
                raise
            print_error(error)
        except BrokenPipeError:
            raise
        except OSError as error:
            if ctx.params["debug"]:
                raise
            _print_line(f"{_told(error)}; `knnlm --debug …` shows where", "system_error")
        raise typer.Exit(1)


def print_error(error: KnnlmError) -> None:
    """Print ``error: message (code)`` on stderr, in colour where stderr is a terminal and NO_COLOR is not set."""
    _print_line(error.message, error.code)


def _print_usage_error(error: TyperException) -> None:
    context = getattr(error, "ctx", None)
    where = f"{context.command_path} --help" if context is not None else "knnlm --help"
    message = " ".join(error.format_message().split()).rstrip(".")
    _print_line(f"{message}{'' if message.endswith('?') else '.'} See `{where}`", "usage")


def _told(error: OSError) -> str:
    """What the system says, and of which file."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([", ".join(names), error.strerror or str(error)] if names else [error.strerror or str(error)])


def _print_line(message: str, code: str) -> None:
    from rich.console import Console  # only errors and help need it
    from rich.text import Text

    line = Text.assemble(("error:", "bold red"), f" {message} ", (f"({code})", "dim"))
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)


def make_app() -> typer.Typer:
    """The Typer app with every subcommand that is installed."""
    app = typer.Typer(
        cls=RootGroup,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    told = explanation(_root)
    app.callback(help=told.help, epilog=told.epilog)(_root)
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
    """Build datastores from text and serve a language model that retrieves from them, token by token.

    Examples:
        knnlm doctor                                                 is everything here that is needed?
        knnlm build --model LM --input ./texts --output ./datastores --name law
        knnlm serve --model LM --datastores ./datastores
        knnlm score --model LM --datastore ./datastores/law page.txt
        knnlm COMMAND --help                                         options and examples of a command
    """
