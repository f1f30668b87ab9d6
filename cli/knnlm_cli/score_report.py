"""From scores to what is reported: totals, the interval of the change, overlap; and all of it as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from knnlm_builder.stages.calibrate import MIN_INTERVAL_BLOCKS
from knnlm_builder.stages.fit import bootstrap_gain
from knnlm_builder.stages.held_out import BLOCK_TOKENS
from knnlm_cli.score_results import DocumentRow, Scores, change
from knnlm_cli.score_used import Setting, Used
from knnlm_core.scores import Bucket, Loss, buckets, loss, overlap_sums, total_nll

SEED = 0


class Interval(NamedTuple):
    """Ends of the 95 % block-bootstrap interval of the change, and how many blocks it was drawn from."""

    low: float
    high: float
    blocks: int


class Total(NamedTuple):
    """All documents together.

    Attributes:
        change: mixed / base − 1 of the perplexities; None for the LM alone.
        interval: None too where there are too few blocks for one.
        better, worse: share of tokens whose probability retrieval raised, lowered.
        overlap: None where it was not measured.
    """

    tokens: int
    num_bytes: int
    searched: int
    followed: int
    base: Loss
    mixed: Loss
    change: float | None
    interval: Interval | None
    better: float
    worse: float
    overlap: Sequence[Bucket] | None


def total_of(scores: Scores, *, with_retrieval: bool) -> Total:
    """Sum up a run that has scored at least one token."""
    base, mixed = scores.base, scores.mixed
    num_bytes = sum(row.num_bytes for row in scores.rows)
    base_loss, mixed_loss = (loss(total_nll(log_probs), len(base), num_bytes) for log_probs in (base, mixed))
    return Total(
        tokens=len(base),
        num_bytes=num_bytes,
        searched=sum(row.searched for row in scores.rows),
        followed=sum(row.followed for row in scores.rows),
        base=base_loss,
        mixed=mixed_loss,
        change=change(base_loss, mixed_loss) if with_retrieval else None,
        interval=_interval(scores) if with_retrieval else None,
        better=float((mixed > base).mean()),
        worse=float((mixed < base).mean()),
        overlap=_overlap(scores),
    )


def _interval(scores: Scores) -> Interval | None:
    """As a build reports it: whole blocks of a document are drawn, since neighbouring tokens are not independent."""
    blocks = scores.blocks(BLOCK_TOKENS)
    count = int(blocks[-1]) + 1
    base, mixed = torch.from_numpy(scores.base), torch.from_numpy(scores.mixed)
    if count < MIN_INTERVAL_BLOCKS or not bool(torch.isfinite(base + mixed).all()):
        return None
    gain = bootstrap_gain(base, mixed, torch.from_numpy(blocks), seed=SEED)
    return Interval(-gain.high, -gain.low, count)


def _overlap(scores: Scores) -> list[Bucket] | None:
    """Tokens by the longest run, ending at and including the token, that also stands in one document of the store."""
    matches = scores.longest_match
    return None if matches is None else buckets(overlap_sums(matches, scores.base, scores.mixed))


def percent(share: float) -> str:
    """A signed percentage with a real minus."""
    return f"{100 * share:+.2f} %".replace("-", "−")


def to_json(scores: Scores, total: Total, used: Used, excluded: Sequence[str]) -> dict[str, Any]:
    """The report as one JSON object; measures are named as in `/v1/score`."""
    with_retrieval = used.datastore is not None
    return {
        "object": "score",
        "model": used.model,
        "model_fingerprint": used.model_fingerprint,
        "datastore": {"name": used.datastore, "version": used.version} if with_retrieval else None,
        "calibration": used.calibration,
        "knn": _settings(used.retrieval) if with_retrieval else None,
        **_settings(used.windows),
        "exclude_documents": list(excluded),
        "documents": [_document(row, with_retrieval) for row in scores.rows],
        "total": _total(total),
    }


def _settings(settings: Mapping[str, Setting]) -> dict[str, Any]:
    return {name: setting._asdict() for name, setting in settings.items()}


def _document(row: DocumentRow, with_retrieval: bool) -> dict[str, Any]:
    return {
        "document_id": row.id,
        "tokens": row.tokens,
        "bytes": row.num_bytes,
        "searched": row.searched,
        "followed": row.followed,
        "excluded_itself": row.excluded_itself,
        "base": row.base._asdict(),
        "mixed": row.mixed._asdict(),
        "change": row.change if with_retrieval else None,
    }


def _total(total: Total) -> dict[str, Any]:
    interval = total.interval
    return {
        "tokens": total.tokens,
        "bytes": total.num_bytes,
        "searched": total.searched,
        "searched_share": total.searched / total.tokens,
        "followed": total.followed,
        "followed_share": total.followed / total.tokens,
        "base": total.base._asdict(),
        "mixed": total.mixed._asdict(),
        "change": total.change,
        "change_interval_95": None if interval is None else [interval.low, interval.high],
        "interval_blocks": None if interval is None else interval.blocks,
        "interval_block_tokens": BLOCK_TOKENS,
        "better_share": total.better,
        "worse_share": total.worse,
        "overlap": None if total.overlap is None else [bucket.to_json() for bucket in total.overlap],
    }
