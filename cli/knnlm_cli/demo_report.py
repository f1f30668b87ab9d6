"""What the demo shows: two completions side by side, where tokens came from, a held-out passage's perplexity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import geometric_mean
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from knnlm_client import CompletionChoice, ScoreTotal, TraceEntry

LM_ALONE = "the language model alone"


class Source(NamedTuple):
    """A run of tokens that the same document speaks for."""

    text: str
    document: str
    p_lm: float  # geometric means over the run's tokens
    p: float


def print_completions(console: Console, prompt: str, base: CompletionChoice, mixed: CompletionChoice) -> None:
    """Both completions of the prompt, side by side."""
    table = Table(title="The same prompt, completed greedily", title_justify="left", show_lines=True, expand=True)
    table.add_column("base LM", ratio=1)
    table.add_column("kNN-LM: the same LM with the datastore", ratio=1)
    columns = [Text.assemble((prompt, "dim"), (choice.text, "bold")) for choice in (base, mixed)]
    table.add_row(*columns)
    console.print(table)


def print_sources(console: Console, trace: Sequence[TraceEntry]) -> None:
    """For each run of tokens, the document that spoke for it most and what that did to their probability."""
    table = Table(title="Where the kNN-LM's tokens came from", title_justify="left", expand=True)
    table.add_column("tokens", ratio=3)
    table.add_column("document", ratio=2)
    table.add_column("p_lm → p", no_wrap=True)
    for source in sources(trace):
        table.add_row(Text(source.text.strip()), Text(source.document), f"{source.p_lm:.2f} → {source.p:.2f}")
    console.print(table)


def print_perplexity(console: Console, title: str, total: ScoreTotal) -> None:
    """Perplexity and bits per byte under the base LM and under the mixture."""
    # No title of the table's: that would be folded to its width, and brackets in an id taken for markup.
    console.print(Text(f"A passage that the datastore has not seen: {title}", style="italic"), soft_wrap=True)
    table = Table()
    table.add_column("")
    table.add_column("perplexity", justify="right")
    table.add_column("bits per byte", justify="right")
    for name, loss in (("base LM", total.base), ("kNN-LM", total.mixed)):
        table.add_row(name, _number(loss.perplexity, 2), _number(loss.bits_per_byte, 3))
    console.print(table)
    console.print(f"{total.tokens} tokens scored, {total.searched} of them with a search", style="dim")


def sources(trace: Iterable[TraceEntry]) -> list[Source]:
    """Group consecutive tokens by the document that speaks for them."""
    runs = [list(run) for _, run in groupby(trace, key=document_of)]
    return [
        Source(
            text="".join(entry.token for entry in run),
            document=document_of(run[0]),
            p_lm=_geometric_mean([entry.p_lm for entry in run]),
            p=_geometric_mean([entry.p for entry in run]),
        )
        for run in runs
    ]


def document_of(entry: TraceEntry) -> str:
    """The document whose retrieved entries gave this very token the most weight; `LM_ALONE` where none did."""
    weights: dict[str, float] = {}
    for neighbor in entry.neighbors:
        if neighbor.token == entry.token:
            name = neighbor.title or neighbor.document_id or f"entry {neighbor.entry_id}"
            weights[name] = weights.get(name, 0.0) + neighbor.weight
    return max(weights, key=weights.__getitem__, default=LM_ALONE)


def _geometric_mean(probabilities: Sequence[float]) -> float:
    return 0.0 if min(probabilities) <= 0 else geometric_mean(probabilities)


def _number(value: float | None, decimals: int) -> str:
    return "—" if value is None else f"{value:.{decimals}f}"
