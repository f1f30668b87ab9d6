"""What `knnlm score` makes of scores: measures, the interval, tables, the plot; and what it refuses to begin."""

from __future__ import annotations

import json
import math
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from knnlm_builder.corpus import SourceDocument, SourceLocation
from knnlm_builder.stages.fit import bootstrap_gain
from knnlm_cli.main import make_app
from knnlm_cli.score_connection import Connection, _lines
from knnlm_cli.score_http import http_scorer
from knnlm_cli.score_plot import draw_gains, overlap_bins, position_bins, require_matplotlib, save
from knnlm_cli.score_progress import _TimeLeftColumn, scoring_progress
from knnlm_cli.score_report import Total, to_json, total_of
from knnlm_cli.score_results import DocumentScores, Scores
from knnlm_cli.score_settings import read_settings
from knnlm_cli.score_stored import stored_among
from knnlm_cli.score_table import MAX_ROWS, print_report
from knnlm_cli.score_used import Setting, Used, choose_retrieval, choose_windows
from knnlm_core.errors import InvalidParameter, Overloaded, ServiceError, UnsupportedFeature

USED = Used(
    model="lm@law",
    model_fingerprint="f" * 32,
    datastore="law",
    version="0123456789abcdef",
    calibration="fedcba9876543210",
    retrieval={"k": Setting(8, "command line"), "lambda": Setting(0.25, "calibration fedcba9876543210")},
    windows={"window": Setting(64, "default"), "stride": Setting(32, "default")},
)
CHECKED = '{"model": "lm", "system_fingerprint": "f"}'
TOTAL = {"object": "score.total", "model": "lm", "system_fingerprint": "f", "total": {"tokens": 0}}
LONE = Used("lm", "f" * 32, None, None, None, {}, USED.windows)


def scores_of(lengths: list[int], seed: int = 0, *, overlap: bool = True) -> Scores:
    draw = np.random.default_rng(seed)
    scores = Scores()
    for i, length in enumerate(lengths):
        base = -draw.exponential(3, length).astype(np.float32)
        mixed = (base + draw.normal(0.05, 0.3, length)).astype(np.float32)
        matches = draw.choice([0, 1, 2, 4, 8, 16, 32], length).astype(np.uint8) if overlap else None
        scores.add(
            DocumentScores(
                f"doc-{i}", 4 * length, length - length // 4, length // 4, i == 0, base, mixed, matches, None
            )
        )
    return scores


def printed(scores: Scores, used: Used, width: int = 120) -> str:
    total = total_of(scores, with_retrieval=used.datastore is not None)
    with (console := Console(width=width, force_terminal=False)).capture() as captured:
        print_report(console, scores, total, used)
    return captured.get()


# -- settings --------------------------------------------------------------------------------------------------------

CALIBRATION: dict[str, Any] = {
    "id": "fedcba9876543210", "k": 8, "temperature": 15.0, "lambda": 0.25, "lambda_mode": "rrc", "gate": "automaton",
    "gate_threshold": 2.0, "helps": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "changes", "gate", "mode"),
    [
        ({}, {}, {"gate": ("automaton", "c"), "gate_threshold": (2.0, "c")}, ("rrc", "c")),
        ({}, {"gate": "never", "gate_threshold": None}, {"gate": ("never", "c")}, ("rrc", "c")),
        ({"k": 8}, {}, {"gate": ("automaton", "c"), "gate_threshold": (2.0, "c")}, ("rrc", "c")),
        ({"k": 9}, {}, {"gate": ("always", "default")}, ("fixed", "default")),
        ({"temperature": 14.0}, {}, {"gate": ("always", "default")}, ("fixed", "default")),
        ({"lmbda": 0.5}, {}, {"gate": ("automaton", "c"), "gate_threshold": (2.0, "c")}, ("fixed", "default")),
        ({"gate": "learned"}, {}, {"gate": ("learned", "command line")}, ("rrc", "c")),
        (
            {"gate": "every_n", "gate_threshold": 3.0, "lambda_mode": "fixed"},
            {},
            {"gate": ("every_n", "command line"), "gate_threshold": (3.0, "command line")},
            ("fixed", "command line"),
        ),
    ],
)
def test_gate_and_mode_are_reported_as_they_are_used(
    options: dict[str, Any], changes: dict[str, Any], gate: dict[str, tuple[Any, str]], mode: tuple[str, str]
) -> None:
    settings = read_settings(files=(Path("x"),), model="lm", datastore="root/law", **options)
    used = choose_retrieval(settings, "law", {**CALIBRATION, **changes})
    told = {
        name: (value, "c" if source.startswith("calibration") else source) for name, (value, source) in used.items()
    }
    assert told.pop("lambda_mode") == mode
    assert {name: told[name] for name in ("gate", "gate_threshold") if name in told} == gate
    assert list(used)[:4] == ["k", "temperature", "lambda", "lambda_mode"]


def test_without_a_calibration_k_tau_and_lambda_must_be_given() -> None:
    place = {"files": (Path("x"),), "model": "lm", "datastore": "root/law"}
    used = choose_retrieval(read_settings(**place, k=4, temperature=9.0, lmbda=0.5), "law", None)
    assert (used["lambda_mode"], used["gate"]) == (("fixed", "default"), ("always", "default"))
    with pytest.raises(InvalidParameter, match="no calibration, so --temperature must be given"):
        choose_retrieval(read_settings(**place, k=4, lmbda=0.5), "law", None)


# -- scores and totals -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 9))
def test_blocks_are_stretches_of_one_document(lengths: list[int], size: int) -> None:
    scores = scores_of(lengths)
    need: list[int] = []
    number = 0
    for length in lengths:
        for start in range(0, length, size):
            need += [number] * min(size, length - start)
            number += 1
    assert scores.blocks(size).tolist() == need
    assert scores.positions().tolist() == [position for length in lengths for position in range(length)]


def test_totals_are_float64_sums_over_all_tokens() -> None:
    scores = scores_of([700, 0, 1500])
    total = total_of(scores, with_retrieval=True)
    base, mixed = ([float(x) for x in column] for column in (scores.base, scores.mixed))
    assert (total.tokens, total.num_bytes, total.searched, total.followed) == (2200, 8800, 1650, 550)
    told = to_json(scores, total, USED, [])["total"]
    assert (told["searched_share"], told["followed_share"]) == (0.75, 0.25)
    assert "Searched for 75.0% of the tokens, pointers followed for 25.0%; more" in printed(scores, USED)
    for found, log_probs in ((total.base, base), (total.mixed, mixed)):
        nll = -math.fsum(log_probs)
        assert found.nll == pytest.approx(nll, rel=1e-12)
        assert found.perplexity == pytest.approx(math.exp(nll / 2200), rel=1e-12)
        assert found.bits_per_byte == pytest.approx(nll / math.log(2) / 8800, rel=1e-12)
    assert total.change == pytest.approx(math.exp((math.fsum(base) - math.fsum(mixed)) / 2200) - 1, rel=1e-9)
    assert total.better == sum(m > b for b, m in zip(base, mixed, strict=True)) / 2200
    assert total.worse == sum(m < b for b, m in zip(base, mixed, strict=True)) / 2200


def test_the_interval_is_the_builders_bootstrap_over_blocks_of_128_tokens() -> None:
    scores = scores_of([700, 300, 1500])
    total = total_of(scores, with_retrieval=True)
    blocks = torch.tensor(
        [i // 128 for i in range(700)] + [6 + i // 128 for i in range(300)] + [9 + i // 128 for i in range(1500)]
    )
    need = bootstrap_gain(torch.from_numpy(scores.base), torch.from_numpy(scores.mixed), blocks, seed=0)
    assert total.interval == (-need.high, -need.low, 21)
    assert total.change == pytest.approx(-need.gain)
    assert total.interval.low < total.change < total.interval.high


def test_few_blocks_or_a_token_of_probability_zero_give_no_interval() -> None:
    assert total_of(scores_of([128 * 7]), with_retrieval=True).interval is None
    assert total_of(scores_of([128 * 8]), with_retrieval=True).interval is not None
    scores = scores_of([2000])
    impossible = np.full(3, -np.inf, np.float32)
    scores.add(
        DocumentScores("zero", 3, 3, 0, False, np.full(3, -1, np.float32), impossible, np.zeros(3, np.uint8), None)
    )
    total = total_of(scores, with_retrieval=True)
    assert (total.mixed, total.change, total.interval) == ((None, None, None), None, None)
    json.dumps(to_json(scores, total, USED, []), allow_nan=False)
    assert "—" in printed(scores, USED)


def test_every_token_is_in_one_bucket() -> None:
    scores = scores_of([900, 40])
    found = total_of(scores, with_retrieval=True).overlap
    assert found is not None
    assert [bucket.label for bucket in found] == ["0", "1", "2–3", "4–7", "8–15", "16–31", "32+"]
    matches = scores.longest_match
    assert matches is not None
    for bucket, length in zip(found, (0, 1, 2, 4, 8, 16, 32), strict=True):
        assert bucket.tokens == (matches == length).sum()
        assert bucket.base.nll == pytest.approx(-scores.base[matches == length].astype(float).sum(), rel=1e-9)
    assert sum(bucket.tokens for bucket in found) == 940
    assert total_of(scores_of([10], overlap=False), with_retrieval=True).overlap is None


# -- tables ----------------------------------------------------------------------------------------------------------


def test_many_documents_are_cut_to_the_best_and_the_worst() -> None:
    scores = scores_of([50] * 100)
    shown = [line.split()[1] for line in printed(scores, USED).splitlines() if line.startswith("│ doc-")]
    order = sorted(scores.rows, key=lambda row: row.change or 0.0)
    assert shown == [row.id for row in (*order[: MAX_ROWS // 2], *order[-MAX_ROWS // 2 :])]
    assert f"… and {100 - MAX_ROWS} more" in printed(scores, USED)
    assert "more" not in printed(scores_of([5] * MAX_ROWS), LONE)


def test_ids_are_no_markup_and_long_ones_leave_room_for_numbers() -> None:
    scores = Scores()
    one = np.full(3, -1.5, np.float32)
    scores.add(DocumentScores("[red]" + "x" * 300, 9, 3, 0, False, one, one, None, None))
    line = next(line for line in printed(scores, USED, width=80).splitlines() if "[red]xxx" in line)
    assert "…" in line
    assert "4.48" in line  # e^1.5


def test_the_lm_alone_has_no_second_column() -> None:
    shown = printed(scores_of([300], overlap=False), LONE)
    assert "kNN-LM" not in shown
    assert "mixed" not in shown
    assert "Change" not in shown
    assert "lm, no datastore" in shown


# -- the plot --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores() -> Scores:
    return scores_of([2000, 30, 700])


@pytest.fixture(scope="module")
def total(scores: Scores) -> Total:
    return total_of(scores, with_retrieval=True)


def test_the_plot_shows_winners_places_and_overlap(scores: Scores, total: Total, tmp_path: Path) -> None:
    figure = draw_gains(scores, total, USED)
    sorted_axes, places, overlap = figure.axes
    title = figure.get_suptitle()
    for part in (
        "law",
        "to lm,",
        "2,730 tokens",
        f"{total.base.perplexity:.2f} → {total.mixed.perplexity:.2f}",
        "95 %",
    ):
        assert part in title
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert "nats" in axes.get_ylabel()
        assert axes.get_title(loc="left")
    gains = scores.mixed.astype(float) - scores.base
    low, high = sorted_axes.get_ylim()
    assert low < gains.min()
    assert high > gains.max()
    said = " ".join(text.get_text() for text in sorted_axes.texts)
    assert f"{(gains > 0).mean():.1%} win: +{gains[gains > 0].sum() / 2730:.4f}" in said
    assert f"{(gains < 0).mean():.1%} lose: −{-gains[gains < 0].sum() / 2730:.4f}" in said
    assert [label.get_text() for label in overlap.get_xticklabels()] == [b.label for b in total.overlap or ()]
    assert [bar.get_height() for bar in overlap.patches] == pytest.approx(
        [(b.base.nll - b.mixed.nll) / b.tokens for b in total.overlap or ()], abs=1e-6
    )
    assert len(places.get_xticks()) == len(position_bins(scores.positions(), gains)) > 5
    save(figure, tmp_path / "gains.png")
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_nothing_in_the_plot_is_clipped(scores: Scores, total: Total) -> None:
    figure = draw_gains(scores, total, replace(USED, model="-".join(["lm"] * 30) + "@law", datastore="x" * 63))
    figure.draw_without_rendering()
    whole = figure.bbox
    for box in (*(axes.get_tightbbox() for axes in figure.axes), *(text.get_window_extent() for text in figure.texts)):
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    assert figure.texts
    assert not figure.axes[1].get_tightbbox().overlaps(figure.axes[2].get_tightbbox())


def test_without_overlap_the_plot_has_two_parts(total: Total) -> None:
    scores = scores_of([400], overlap=False)
    assert len(draw_gains(scores, total_of(scores, with_retrieval=True), USED).axes) == 2


def test_tokens_of_probability_zero_are_counted_not_drawn(scores: Scores) -> None:
    impossible = scores_of([500])
    two = np.array([-1, -2], np.float32)
    impossible.add(DocumentScores("zero", 2, 2, 0, False, two, two * np.inf, np.zeros(2, np.uint8), None))
    figure = draw_gains(impossible, total_of(impossible, with_retrieval=True), USED)
    assert "2 tokens of probability zero are not drawn" in figure.get_suptitle()


@given(st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_bins_by_position_are_means_over_octaves(lengths: list[int]) -> None:
    scores = scores_of(lengths)
    gains = scores.mixed.astype(float) - scores.base
    need: dict[str, list[float]] = {}
    for position, gain in zip(scores.positions().tolist(), gains.tolist(), strict=True):
        first = 1 << ((position + 1).bit_length() - 1)
        need.setdefault(f"{first}–{2 * first - 1}" if first > 1 else "1", []).append(gain)
    found = {b.label: b for b in position_bins(scores.positions(), gains)}
    assert found.keys() == {label for label, inside in need.items() if len(inside) >= 8}
    for label, b in found.items():
        assert (b.tokens, b.mean) == (len(need[label]), pytest.approx(np.mean(need[label])))
        assert b.error == pytest.approx(np.std(need[label], ddof=1) / math.sqrt(len(need[label])))


def test_an_empty_bucket_is_a_bin_without_gain() -> None:
    found = total_of(scores_of([10]), with_retrieval=True).overlap
    assert found is not None
    bins = overlap_bins(np.full(4, 2, np.uint8), np.array([1.0, 2.0, 3.0, 4.0]), found)
    assert [(b.label, b.tokens, b.mean) for b in bins[:3]] == [("0", 0, 0.0), ("1", 0, 0.0), ("2–3", 4, 2.5)]


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedFeature, match=r"--plot needs matplotlib: pip install 'knnlm\[plot\]'"):
        require_matplotlib()


# -- progress --------------------------------------------------------------------------------------------------------


def test_progress_says_tokens_and_rate_on_a_terminal_alone() -> None:
    terminal = Console(force_terminal=True, width=120)
    with terminal.capture() as shown, scoring_progress(terminal, 1000) as advance:
        advance(150, 400.0)
        advance(250, 600.0)
    assert "400 tokens," in shown.get()
    assert "100%" in shown.get()
    pipe = Console(force_terminal=False)
    with pipe.capture() as nothing, scoring_progress(pipe, 1000) as advance:
        advance(150, 400.0)
    assert nothing.get().strip() == ""


def test_the_time_left_goes_by_the_mean_speed_so_far() -> None:
    now = 100.0
    progress = Progress(_TimeLeftColumn(), get_time=lambda: now)
    task = progress.add_task("Score", total=1000)

    def shown() -> str:
        return _TimeLeftColumn().render(progress.tasks[0]).plain

    assert shown() == "–"
    now = 110.0
    progress.update(task, completed=250)
    assert shown() == "0:00:30 left"
    now = 3810.0
    progress.update(task, completed=1000)
    assert shown() == "took 1:01:50"


# -- what is refused before anything is loaded -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--model is needed"),
        ({"model": "m", "k": 0}, "--k needs --datastore"),
        ({"model": "m", "lmbda": 0.5}, "--lambda needs --datastore"),
        ({"model": "m", "exclude_self": True}, "--exclude-self needs --datastore"),
        ({"model": "m", "exclude_documents": ("a",)}, "--exclude-document needs --datastore"),
        ({"model": "m", "plot": Path("a.png")}, "--plot needs --datastore"),
        ({"url": "http://here", "dtype": "float32"}, "--dtype is for scoring here"),
        ({"url": "http://here", "threads": 2}, "--threads is for scoring here"),
        (
            {"model": "m", "datastore": "d", "plot": Path("a.gif")},
            "--plot must end in one of .png, .svg, .pdf, got 'a.gif'",
        ),
        ({"model": "m", "threads": 0}, "--threads: Input should be greater than or equal to 1, got 0"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        read_settings(files=(Path("a.txt"),), **settings)
    assert refused.value.message.startswith(message)


@pytest.mark.parametrize("settings", [{"exclude_self": False}, {"overlap": False}, {"exclude_documents": ()}])
def test_options_that_turn_something_off_need_no_datastore(settings: dict[str, object]) -> None:
    assert read_settings(files=(Path("a.txt"),), model="m", **settings).datastore is None


def test_windows_default_to_1024_or_the_context_and_half_of_it() -> None:
    def windows(max_length: int, **given: int) -> tuple[Setting, ...]:
        return tuple(choose_windows(read_settings(files=(Path("a"),), model="m", **given), max_length).values())

    assert windows(8192) == ((1024, "default"), (512, "default"))
    assert windows(2) == ((2, "default"), (1, "default"))
    assert windows(300, window=100) == ((100, "command line"), (50, "default"))
    assert windows(300, stride=7) == ((300, "default"), (7, "command line"))
    with pytest.raises(InvalidParameter, match="`window` must be at most"):
        windows(300, window=301)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "does not exist (input_not_found)"),
        ("binary.txt", b"\x00\x01", "is not readable as text: a NUL byte"),
        ("rows.jsonl", b'{"id": "a"}\n', "line 1: field `text` is required (unreadable_input)"),
        ("twice.jsonl", b'{"id": "a", "text": "xy"}\n{"id": "a", "text": "xy"}\n', "given twice"),
        ("blank.txt", b" \n", "nothing to score in "),
    ],
)
def test_a_file_that_cannot_be_scored_is_known_before_a_model_is_loaded(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    arguments = ["score", str(tmp_path / name), "--model", str(tmp_path / "no-model")]
    result = CliRunner(env={"NO_COLOR": "1", "COLUMNS": "400"}).invoke(make_app(), arguments)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 1
    assert line.startswith("error: ")
    assert message in line


# -- HTTP ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(min_size=1), max_size=6), st.integers(1, 7), st.booleans())
def test_lines_end_at_newlines_alone_however_they_arrive(texts: list[str], size: int, ended: bool) -> None:
    lines = [json.dumps({"token": text}, ensure_ascii=False).encode("utf-8", "surrogatepass") for text in texts]
    content = b"\n".join(lines) + (b"\n" if ended else b"")
    parts = [content[start : start + size] for start in range(0, len(content), size)]
    assert list(_lines(httpx.Response(200, content=iter(parts)))) == lines


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://here", "http://", "http://[::1", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidParameter, match="--url"):
        Connection(url, None)


@pytest.mark.parametrize(
    ("response", "error", "message"),
    [
        (httpx.Response(503, json={"error": {"message": "full", "code": "overloaded"}}), Overloaded, "full"),
        (httpx.Response(409, json={"error": {"message": "m", "code": "datastore_mismatch"}}), ServiceError, "m"),
        (httpx.Response(400, json={"error": {"message": "odd", "code": "of_a_later_release"}}), ServiceError, "odd"),
        (httpx.Response(502, text="<html>"), ServiceError, "http://here answered 502 Bad Gateway"),
        (httpx.Response(404, json={"detail": "Not Found"}), ServiceError, "http://here answered 404 Not Found"),
        (httpx.Response(200, text="[1]"), ServiceError, "http://here does not answer as a knnlm server"),
    ],
)
def test_error_bodies_become_errors_of_ours(response: httpx.Response, error: type[Exception], message: str) -> None:
    with Connection("http://here/", None) as connection, pytest.raises(error) as raised:
        connection._object(response)
    assert type(raised.value) is error
    assert str(raised.value).startswith(message)


class Shelf:
    """Holds documents, and counts the questions of those who look for them."""

    def __init__(self, held: set[str]) -> None:
        self.held = held
        self.questions: list[int] = []

    def holds_all(self, ids: Sequence[str]) -> bool:
        self.questions.append(len(ids))
        return self.held.issuperset(ids)


@given(st.lists(st.booleans(), max_size=200), st.integers(1, 40))
def test_what_is_stored_is_found_by_asking_for_some_at_once(stored: list[bool], most: int) -> None:
    ids = [str(i) for i in range(len(stored))]
    shelf = Shelf({i for i, is_stored in zip(ids, stored, strict=True) if is_stored})
    assert stored_among(ids, shelf.holds_all, most) == shelf.held
    assert all(1 <= size <= most for size in shelf.questions)


@pytest.mark.parametrize(
    ("stored", "most", "questions"),
    [
        ([True] * 1024, 1024, 1),
        ([True] * 1024, 1000, 2),
        ([False] * 1024, 1024, 1024 + 10),  # ten halvings until the first is known to be missing, the last of them
        ([True] * 500 + [False] + [True] * 523, 1024, 1 + 10 + 10),  # all of them, halving, doubling
        ([True, False] * 512, 1024, 1024 * 3 // 2 + 10),  # the worst there is
    ],
)
def test_stored_documents_are_found_in_few_questions(stored: list[bool], most: int, questions: int) -> None:
    ids = [str(i) for i in range(len(stored))]
    shelf = Shelf({i for i, is_stored in zip(ids, stored, strict=True) if is_stored})
    assert stored_among(ids, shelf.holds_all, most) == shelf.held
    assert len(shelf.questions) <= questions


class _Answers(BaseHTTPRequestHandler):
    """A server that is none of ours, or one that dies: answers POST with the next of some bodies."""

    card: ClassVar[dict[str, object]] = {"id": "lm", "max_model_len": 64}
    bodies: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._answer(json.dumps({"data": [self.card]}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer(self.bodies.pop(0))

    def _answer(self, body: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("card", "bodies", "message"),
    [
        ({"id": "lm"}, [], "does not answer as a knnlm server: there is no `max_model_len`"),
        (_Answers.card, ['{"model": "lm"}'], "does not answer as a knnlm server: there is no `system_fingerprint`"),
        (_Answers.card, ["<html>"], "does not answer as a knnlm server: b'<html>'"),
        (_Answers.card, [CHECKED, '{"object": "score.progress", "tokens": 9, "tokens_done": 0}\n'], "ended its answer"),
        (_Answers.card, [CHECKED, '{"object": "score.progr'], "does not answer as a knnlm server"),
        (_Answers.card, [CHECKED, f"{json.dumps(TOTAL)}\n"], "scored 0 of 1 texts"),
    ],
)
def test_an_answer_that_is_not_whole_is_never_taken_for_scores(
    monkeypatch: pytest.MonkeyPatch, card: dict[str, object], bodies: list[str], message: str
) -> None:
    monkeypatch.setattr(_Answers, "card", card)
    monkeypatch.setattr(_Answers, "bodies", list(bodies))
    document = SourceDocument("a", "some text", SourceLocation(Path("a.txt")))
    with HTTPServer(("127.0.0.1", 0), _Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            settings = read_settings(files=(Path("a.txt"),), url=f"http://127.0.0.1:{server.server_port}")
            with pytest.raises(ServiceError, match=re.escape(message)), http_scorer(settings) as scorer:
                list(scorer.score([document], lambda tokens, characters: None))
        finally:
            server.shutdown()
            thread.join()
