"""How far a run of `knnlm score` is: tokens, rate and time left, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text


class Advance(Protocol):
    """Call with what was done since the last call."""

    def __call__(self, tokens: int, characters: float) -> None:
        """``characters``: how much of the text those tokens are; what is left of it tells the time left."""


class _TokensColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        tokens = task.fields["tokens"]
        rate = tokens / task.elapsed if task.elapsed else 0.0
        return Text(f"{tokens:,} tokens, {rate:,.0f}/s")


class _TimeLeftColumn(ProgressColumn):
    """From the mean speed so far: a pass may take half a minute, which is too seldom for rich's own estimate."""

    def render(self, task: Task) -> Text:
        elapsed = task.finished_time if task.finished else task.elapsed
        if elapsed is None or not task.completed or task.total is None:
            return Text("–")
        left = elapsed * (task.total / task.completed - 1)
        return Text(f"took {_clock(elapsed)}" if task.finished else f"{_clock(left)} left")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))


@contextmanager
def scoring_progress(console: Console, characters: int) -> Iterator[Advance]:
    """Show a bar while texts of so many characters in all are scored; nothing where the console is no terminal.

    The bar counts characters: how many tokens a text has is known only when it is tokenised, perhaps elsewhere.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        _TokensColumn(),
        _TimeLeftColumn(),
    )
    tokens_done = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Score", total=characters, tokens=0)

        def advance(tokens: int, characters: float) -> None:
            nonlocal tokens_done
            tokens_done += tokens
            progress.update(task, advance=characters, tokens=tokens_done)

        yield advance
