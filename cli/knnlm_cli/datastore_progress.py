"""How far work on a datastore is: a bar per stage on a terminal, a line per finished stage elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from knnlm_core.datastore.maintenance.stages import StageProgress


@contextmanager
def shown_progress() -> Iterator[StageProgress]:
    """Progress on stderr, so that stdout holds the result alone."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f} / {task.total:,.0f}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks or (done == 0 and progress.tasks[tasks[stage]].completed):
                tasks[stage] = progress.add_task(stage, total=total)  # a stage may come again, for another version
            progress.update(tasks[stage], completed=done, total=total)
            if done == total and not console.is_terminal:
                console.print(f"{stage}: {total:,}")

        yield show
