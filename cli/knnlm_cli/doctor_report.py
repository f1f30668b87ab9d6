"""How `knnlm doctor` tells what it found: a line per check as it is made, or one JSON object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from knnlm_cli.doctor_checks import Check, Status, worst
from knnlm_core import __version__

_STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "bold red"}
_STATUS_WIDTH = max(map(len, Status))
_NAME_WIDTH = 16


class Finding(NamedTuple):
    """A check and the group that it belongs to."""

    group: str
    check: Check


class Printer:
    """Prints findings as they come; if the process itself dies, the last line tells where."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._group: str | None = None

    def begin(self, group: str) -> None:
        """Head the group that comes next, once."""
        if group != self._group:
            self._console.print(Text(("\n" if self._group else "") + group, style="bold"))
            self._group = group

    def waiting(self, what: str) -> AbstractContextManager[object]:
        """Show on a terminal that something takes its time."""
        return self._console.status(f"{what} …") if self._console.is_terminal else nullcontext()

    def show(self, check: Check) -> None:
        """One line: status, name, what was found → what to do."""
        status = Text(check.status.value.ljust(_STATUS_WIDTH), style=_STYLES[check.status])
        told = Text(check.message)
        if check.next is not None:
            told.append(f" → {check.next}", style="bold")
        if self._console.is_terminal:
            row = Table.grid(padding=(0, 2, 0, 0))
            row.add_column(width=_STATUS_WIDTH + 2)
            row.add_column(width=_NAME_WIDTH)
            row.add_column(overflow="fold")
            row.add_row(Text.assemble("  ", status), check.name, told)
            self._console.print(row)
        else:  # scripts want a line to be a line
            self._console.print(
                Text.assemble("  ", status, "  ", check.name.ljust(_NAME_WIDTH), "  ", told), soft_wrap=True
            )

    def end(self, found: Sequence[Finding]) -> None:
        """The sum."""
        counts = Counter(finding.check.status for finding in found)
        parts = [(f"{counts[status]} {status.value}", _STYLES[status] if counts[status] else "") for status in Status]
        self._console.print(Text("\n") + Text(", ").join(Text(*part) for part in parts))


def to_json(found: Sequence[Finding]) -> dict[str, Any]:
    """What ``--json`` prints; see docs/doctor.md."""
    return {
        "object": "doctor.report",
        "version": __version__,
        "status": worst(finding.check.status for finding in found).value,
        "checks": [
            {
                "group": finding.group,
                "name": finding.check.name,
                "status": finding.check.status.value,
                "message": finding.check.message,
                "next": finding.check.next,
                "facts": dict(finding.check.facts),
            }
            for finding in found
        ],
    }
