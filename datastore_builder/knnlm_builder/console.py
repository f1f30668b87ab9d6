"""Progress on a terminal: a bar per stage with rate and ETA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from knnlm_builder.progress import Advance


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields["unit"]
        return Text(f"{speed:,.0f} {unit}/s" if speed else f"– {unit}/s")


class ConsoleReporter:
    """Reports to a console; where it is no terminal, one line per finished stage."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Show a bar while the stage runs."""
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as progress:
            task = progress.add_task(name, total=total, unit=unit)
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                progress.advance(task, count)

            yield advance
        if not self._console.is_terminal:
            self._console.print(f"{name}: {done:,} {unit}")

    def say(self, message: str) -> None:
        """Print a line above the bars."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)
