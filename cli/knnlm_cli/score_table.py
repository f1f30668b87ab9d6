"""The report for people: a table of documents, totals, overlap, and what was used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from knnlm_builder.stages.held_out import BLOCK_TOKENS
from knnlm_cli.score_report import Total, percent
from knnlm_cli.score_results import DocumentRow, Scores, change
from knnlm_cli.score_used import Setting, Used
from knnlm_core.scores import Bucket

MAX_ROWS = 30


def print_report(console: Console, scores: Scores, total: Total, used: Used) -> None:
    """Print everything."""
    with_retrieval = used.datastore is not None
    console.print(documents_table(scores.rows, with_retrieval=with_retrieval))
    console.print(totals_table(total, with_retrieval=with_retrieval))
    if with_retrieval:
        _print_change(console, total)
    if total.overlap is not None:
        console.print(overlap_table(total.overlap, total.tokens))
    _print_used(console, scores, used)


def documents_table(rows: Sequence[DocumentRow], *, with_retrieval: bool) -> Table:
    """One row per document; of many documents those that changed most, for the better and for the worse."""
    table = Table(title="Documents", title_justify="left")
    table.add_column("document")  # the only column that gives way where the table is too wide
    for name in ("tokens", "base ppl", *(("mixed ppl", "change") if with_retrieval else ())):
        table.add_column(name, justify="right", no_wrap=True)
    first, left_out, last = _shown(rows)
    for row in first:
        table.add_row(*_cells(row, with_retrieval))
    if left_out:
        table.add_row(Text(f"… and {left_out:,} more", style="dim"))
    for row in last:
        table.add_row(*_cells(row, with_retrieval))
    return table


def _shown(rows: Sequence[DocumentRow]) -> tuple[Sequence[DocumentRow], int, Sequence[DocumentRow]]:
    """All of them in their order, or the best and the worst changes and how many stand between."""
    if len(rows) <= MAX_ROWS:
        return rows, 0, ()
    by_change = sorted(rows, key=lambda row: 0.0 if row.change is None else row.change)
    half = MAX_ROWS // 2
    return by_change[:half], len(rows) - 2 * half, by_change[-half:]


def _cells(row: DocumentRow, with_retrieval: bool) -> list[Text]:
    cells = [
        Text(row.id, no_wrap=True, overflow="ellipsis"),
        Text(f"{row.tokens:,}"),
        Text(number(row.base.perplexity, 2)),
    ]
    return [*cells, Text(number(row.mixed.perplexity, 2)), _change(row.change)] if with_retrieval else cells


def totals_table(total: Total, *, with_retrieval: bool) -> Table:
    """Perplexity and bits per byte of everything."""
    table = Table(title=f"Total: {total.tokens:,} tokens, {total.num_bytes:,} bytes", title_justify="left")
    table.add_column("")
    for name in ("perplexity", "nats per token", "bits per byte"):
        table.add_column(name, justify="right")
    for name, measured in (("base LM", total.base), *((("kNN-LM", total.mixed),) if with_retrieval else ())):
        per_token = None if measured.nll is None else measured.nll / total.tokens
        table.add_row(name, number(measured.perplexity, 3), number(per_token, 4), number(measured.bits_per_byte, 4))
    return table


def _print_change(console: Console, total: Total) -> None:
    interval = "no interval: too little text, or a token of probability zero"
    if total.interval is not None:
        interval = (
            f"95 % interval {percent(total.interval.low)} … {percent(total.interval.high)}, "
            f"{total.interval.blocks:,} blocks of {BLOCK_TOKENS} tokens"
        )
    console.print(Text.assemble("Change of perplexity: ", _change(total.change), f" ({interval})"), soft_wrap=True)
    equal = 1 - total.better - total.worse
    followed = f", pointers followed for {total.followed / total.tokens:.1%}" if total.followed else ""
    console.print(
        f"Searched for {total.searched / total.tokens:.1%} of the tokens{followed}; more probable with retrieval "
        f"{total.better:.1%}, less {total.worse:.1%}, the same {max(equal, 0.0):.1%}",
        soft_wrap=True,
    )


def overlap_table(overlap: Sequence[Bucket], tokens: int) -> Table:
    """How much stands in the datastore word for word, and what those tokens gain."""
    table = Table(title="Overlap: tokens by their longest match with a stored document", title_justify="left")
    for name in ("longest match", "tokens", "share", "base ppl", "mixed ppl", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for bucket in overlap:
        table.add_row(
            bucket.label,
            f"{bucket.tokens:,}",
            f"{bucket.tokens / tokens:.1%}",
            number(bucket.base.perplexity, 2),
            number(bucket.mixed.perplexity, 2),
            _change(change(bucket.base, bucket.mixed)),
        )
    return table


def _print_used(console: Console, scores: Scores, used: Used) -> None:
    """Settings grouped by who chose them."""
    store = "no datastore" if used.datastore is None else f"datastore {used.datastore} version {used.version}"
    lines = [f"{used.model}, {store}"]
    for source, names in _by_source({**used.retrieval, **used.windows}).items():
        lines.append(f"{source}: " + ", ".join(names))
    if itself := sum(row.excluded_itself for row in scores.rows):
        lines.append(f"kept from finding themselves in the datastore: {itself:,} of {len(scores.rows):,} documents")
    for line in lines:
        console.print(Text(line, style="dim"), soft_wrap=True)


def _by_source(settings: Mapping[str, Setting]) -> dict[str, list[str]]:
    sources: dict[str, list[str]] = {}
    for name, (value, source) in settings.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        sources.setdefault(source, []).append(f"{name} {shown}")
    return sources


def number(value: float | None, decimals: int) -> str:
    """A measure, or a dash where there is none."""
    return "—" if value is None else f"{value:,.{decimals}f}"


def _change(share: float | None) -> Text:
    if share is None:
        return Text("—")
    return Text(percent(share), style="green" if share < 0 else "red" if share > 0 else "")
