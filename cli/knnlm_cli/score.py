"""`knnlm score`: how well the LM, and the LM with a datastore, predict given text."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TextIO

import typer

from knnlm_cli.score_settings import ScoreSettings, option_of, read_settings
from knnlm_core.errors import EmptyCorpus, InvalidParameter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from knnlm_builder.corpus import SourceDocument
    from knnlm_cli.score_progress import Advance
    from knnlm_cli.score_results import DocumentScores, Scores
    from knnlm_cli.score_used import Used


class Scorer(Protocol):
    """Where documents are scored: here, or on a server."""

    used: Used

    def score(self, documents: Iterable[SourceDocument], advance: Advance) -> Iterator[DocumentScores]:
        """Score documents, in their order."""
        ...


# Panel of the help → settings in it.
_PANELS = {
    "What scores": ("model", "datastore", "url", "api_key"),
    "Retrieval": (
        "k", "temperature", "lmbda", "lambda_mode", "gate", "gate_threshold", "exclude_documents", "exclude_self",
    ),
    "Report": ("json", "overlap", "plot", "per_token"),
    "Windows": ("window", "stride"),
    "How the language model runs": ("dtype", "weights", "device", "threads"),
}  # fmt: skip
# What the shell offers.
_VALUES = {
    "lambda_mode": ("fixed", "bucketed", "rrc", "learned"),
    "gate": ("always", "never", "every_n", "confidence", "automaton", "learned"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "weights": ("full", "int8"),
    "device": ("auto", "cpu", "cuda"),
}


def _option(field: str, *names: str, **more: Any) -> Any:
    """A command-line option that says what the setting of the same name says."""
    if field in _VALUES:
        more["autocompletion"] = lambda: list(_VALUES[field])
    if "help" not in more:
        more["help"] = ScoreSettings.model_fields[field].description
    panel = next(panel for panel, fields in _PANELS.items() if field in fields)
    return typer.Option(*(names or (option_of(field),)), show_default=False, rich_help_panel=panel, **more)


_FILES = ScoreSettings.model_fields["files"].description


def score(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help=_FILES, show_default=False)],
    model: Annotated[str | None, _option("model")] = None,
    datastore: Annotated[str | None, _option("datastore")] = None,
    json_: Annotated[bool, _option("json", "--json", help="Print one JSON object instead of tables.")] = False,
    plot: Annotated[Path | None, _option("plot")] = None,
    per_token: Annotated[Path | None, _option("per_token")] = None,
    window: Annotated[int | None, _option("window")] = None,
    stride: Annotated[int | None, _option("stride")] = None,
    exclude_documents: Annotated[list[str] | None, _option("exclude_documents")] = None,
    exclude_self: Annotated[bool | None, _option("exclude_self", "--exclude-self/--no-exclude-self")] = None,
    overlap: Annotated[bool | None, _option("overlap", "--overlap/--no-overlap")] = None,
    k: Annotated[int | None, _option("k")] = None,
    temperature: Annotated[float | None, _option("temperature")] = None,
    lmbda: Annotated[float | None, _option("lmbda")] = None,
    lambda_mode: Annotated[str | None, _option("lambda_mode")] = None,
    gate: Annotated[str | None, _option("gate")] = None,
    gate_threshold: Annotated[float | None, _option("gate_threshold")] = None,
    url: Annotated[str | None, _option("url")] = None,
    api_key: Annotated[str | None, _option("api_key", envvar="KNNLM_API_KEY")] = None,
    dtype: Annotated[str | None, _option("dtype")] = None,
    weights: Annotated[str | None, _option("weights")] = None,
    device: Annotated[str | None, _option("device")] = None,
    threads: Annotated[int | None, _option("threads")] = None,
) -> None:
    """Score text: perplexity under the base LM and, with a datastore, under the mixture, side by side.

    Long texts go through rolling windows; each token that has a context is scored once. What --k, --temperature,
    --lambda and --gate leave open comes from the datastore's calibration. A document that the datastore holds under
    the same id does not find its own entries.

    Examples:
        knnlm score --model ./models/lm --datastore ./datastores/law judgments.jsonl
        knnlm score --model ./models/lm page.txt --json
        knnlm score --url http://127.0.0.1:8000 --datastore law --gate automaton judgments.jsonl
    """
    given = dict(locals())
    del given["json_"]
    given["files"] = tuple(files)
    given["exclude_documents"] = tuple(exclude_documents or ())
    settings = read_settings(**given)
    if settings.threads is not None:
        # Read by FAISS and torch when they are first imported, below.
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    _run(settings, as_json=json_)


def _run(settings: ScoreSettings, *, as_json: bool) -> None:
    from rich.console import Console

    from knnlm_builder.corpus import read_documents
    from knnlm_cli.score_progress import scoring_progress
    from knnlm_cli.score_results import Scores

    if settings.plot is not None:
        from knnlm_cli.score_plot import require_matplotlib

        require_matplotlib()
        if not settings.plot.parent.is_dir():
            raise InvalidParameter(f"--plot {str(settings.plot)!r} cannot be written: there is no such folder")
    messages = Console(stderr=True, highlight=False)
    characters = _count_characters(settings.files)
    scores = Scores()
    with _scorer(settings) as scorer, _per_token_file(settings.per_token) as tokens:
        if scorer.used.datastore is None:
            _refuse_without_datastore(settings)
        with scoring_progress(messages, characters) as advance:
            for document in scorer.score(read_documents(settings.files), advance):
                scores.add(document)
                if tokens is not None:
                    _write_tokens(tokens, document)
    _report(settings, scores, scorer.used, as_json=as_json)


def _count_characters(files: tuple[Path, ...]) -> int:
    """Read everything once: what cannot be read is known before a model is loaded, and how much there is to do."""
    from knnlm_builder.corpus import CorpusStats, read_documents

    stats = CorpusStats()
    try:
        for _ in read_documents(files, stats=stats):
            pass
    except EmptyCorpus:
        raise EmptyCorpus(f"nothing to score in {', '.join(map(str, files))}: {stats.summary()}") from None
    return stats.characters


def _scorer(settings: ScoreSettings) -> AbstractContextManager[Scorer]:
    if settings.url is not None:
        from knnlm_cli.score_http import http_scorer

        return http_scorer(settings)
    from knnlm_cli.score_offline import offline_scorer  # imports torch

    return offline_scorer(settings)


def _refuse_without_datastore(settings: ScoreSettings) -> None:
    """A server may turn out to mix in nothing."""
    for field in ("plot", "exclude_self", "overlap"):
        if getattr(settings, field):
            raise InvalidParameter(f"{option_of(field)} needs a datastore: --datastore, or --model LM@DATASTORE")


@contextmanager
def _per_token_file(path: Path | None) -> Iterator[TextIO | None]:
    """Opened before anything is scored, so that hours of scoring do not end at a file that cannot be written."""
    if path is None:
        yield None
        return
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise InvalidParameter(f"--per-token {str(path)!r} cannot be written: {error.strerror}") from error
    with file:
        yield file


def _write_tokens(file: TextIO, document: DocumentScores) -> None:
    for token in document.per_token or ():
        file.write(json.dumps({"document_id": document.id, **token}, ensure_ascii=False) + "\n")


def _report(settings: ScoreSettings, scores: Scores, used: Used, *, as_json: bool) -> None:
    from rich.console import Console

    from knnlm_cli.score_report import to_json, total_of
    from knnlm_cli.score_table import print_report

    if not len(scores.base):
        raise EmptyCorpus(f"nothing to score: no document in {', '.join(map(str, settings.files))} has two tokens")
    total = total_of(scores, with_retrieval=used.datastore is not None)
    if settings.plot is not None:
        from knnlm_cli.score_plot import draw_gains, save

        save(draw_gains(scores, total, used), settings.plot)
    if as_json:
        json.dump(to_json(scores, total, used, settings.exclude_documents), sys.stdout, ensure_ascii=False)
        print()
    else:
        print_report(Console(highlight=False), scores, total, used)
