"""The subcommands that installed packages declare as entry points, each loaded when it is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from knnlm_core.errors import UnsupportedFeature

GROUP = "knnlm.commands"
_EXAMPLES = "\n\nExamples:\n"


class EntryPointCommands(MutableMapping[str, Any]):
    """Subcommand name → command, in the order of declaration; a look-up imports the module, listing names does not.

    An entry that does not load becomes a command whose help says so and which raises `UnsupportedFeature` when called,
    so that one broken package neither hides itself nor takes the others with it.

    Args:   panels: name → panel of the help that it is listed in; others stand in the default one.
    """

    def __init__(self, panels: Mapping[str, str] | None = None) -> None:
        self._panels = panels or {}
        self._entries = {entry.name: entry for entry in entry_points(group=GROUP)}
        self._commands: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._commands:
            command = _load(self._entries[name])
            command.rich_help_panel = self._panels.get(name)
            self._commands[name] = command
        return self._commands[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._commands[name] = command

    def __delitem__(self, name: str) -> None:
        raise TypeError("commands come from entry points and cannot be removed")

    def __iter__(self) -> Iterator[str]:
        yield from self._entries
        yield from (name for name in self._commands if name not in self._entries)

    def __len__(self) -> int:
        return len(self._entries.keys() | self._commands.keys())


def _load(entry: EntryPoint) -> TyperCommand | TyperGroup:
    try:
        target = entry.load()
        return _command(entry.name, target)
    except Exception as error:  # whatever a package's import raises must not take the other commands down
        return _unavailable(entry, error)


def _command(name: str, target: object) -> TyperCommand | TyperGroup:
    if isinstance(target, typer.Typer):
        group = typer.main.get_group(target)
        group.name = name
        for command in (group, *group.commands.values()):
            command.help, command.epilog = _laid_out(command.help or "", command.epilog)
        return group
    if not callable(target):
        raise TypeError(f"expected a function or a typer.Typer, got {type(target).__name__}")
    return _function_command(name, target)


def _function_command(name: str, function: Callable[..., Any], **settings: Any) -> TyperCommand:
    app = typer.Typer(add_completion=False)
    app.command(name, **{**explanation(function)._asdict(), **settings})(function)
    command = typer.main.get_group(app).commands[name]
    assert isinstance(command, TyperCommand)
    return command


class Explanation(NamedTuple):
    """What a command's help says before and after its options."""

    help: str
    epilog: str | None


def explanation(function: Callable[..., Any]) -> Explanation:
    """Of a command, from its function's docstring; what stands under "Examples:" is the epilog."""
    return _laid_out(inspect.getdoc(function) or "", None)


def _laid_out(text: str, epilog: str | None) -> Explanation:
    """Paragraphs as one line each, since terminals are of any width; examples keep their lines."""
    told, heading, examples = inspect.cleandoc(text).partition(_EXAMPLES)
    paragraphs = (" ".join(paragraph.split()) for paragraph in told.strip().split("\n\n"))
    return Explanation("\n\n".join(paragraphs), f"{heading.strip()}\n{examples.rstrip()}" if heading else epilog)


def _unavailable(entry: EntryPoint, cause: Exception) -> TyperCommand:
    origin = f"{entry.value} of {entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
    reason = f"the subcommand {entry.name!r} ({origin}) does not load: {type(cause).__name__}: {cause}"

    def report() -> None:
        raise UnsupportedFeature(reason) from cause

    return _function_command(
        entry.name,
        report,
        help=f"Not available: {type(cause).__name__}: {cause}",
        add_help_option=False,  # `--help` must say what is wrong, not show an empty command
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
