"""The subcommands that installed packages declare as entry points, each loaded when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from knnlm_core.errors import UnsupportedFeature

GROUP = "knnlm.commands"


class EntryPointCommands(MutableMapping[str, Any]):
    """Subcommand name → command, in the order of declaration; a look-up imports the module, listing names does not.

    An entry that does not load becomes a command whose help says so and which raises `UnsupportedFeature` when called,
    so that one broken package neither hides itself nor takes the others with it.
    """

    def __init__(self) -> None:
        self._entries = {entry.name: entry for entry in entry_points(group=GROUP)}
        self._commands: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._commands:
            self._commands[name] = _load(self._entries[name])
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
        return group
    if not callable(target):
        raise TypeError(f"expected a function or a typer.Typer, got {type(target).__name__}")
    return _function_command(name, target)


def _function_command(name: str, function: Callable[..., Any], **settings: Any) -> TyperCommand:
    app = typer.Typer()
    app.command(name, **settings)(function)
    command = typer.main.get_group(app).commands[name]
    assert isinstance(command, TyperCommand)
    return command


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
