"""What a build publishes: the right keys and values in the right order, nothing that was held out, always the same."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_build import (
    Recorder,
    all_keys,
    all_values,
    build,
    given,
    opened,
    plan_of,
    prose,
    random_digits,
    tiny_lm,
    write_jsonl,
)

from knnlm_builder import pipeline
from knnlm_builder.corpus import is_candidate
from knnlm_builder.corpus.document import document_digest
from knnlm_builder.settings import BuildSettings
from knnlm_builder.stages.held_out import BLOCK_TOKENS, encode_held_out
from knnlm_core.datastore import index, layout, manifest
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreDoesNotHelp, EmptyCorpus, InvalidParameter
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.windows import context_length

PAGES = [prose(seed) for seed in range(10)]
KEY_TOLERANCE = 2e-3  # keys reach 5, where float16 has a spacing of 4e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("build")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    return write_jsonl(folder / "pages.jsonl", PAGES)


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def store(folder: Path, corpus: Path, recorder: Recorder) -> Datastore:
    settings = given(folder / "stores", corpus)
    build(settings, reporter=recorder)
    return opened(settings)


def reference_keys(lm: HuggingFaceLM, ids: list[int], window: int, stride: int) -> torch.Tensor:
    """(T − 1, D): each target's context fed to the LM alone, as far back as its window reaches."""
    rows = []
    for position in range(1, len(ids)):
        context = ids[position - context_length(position, len(ids), window, stride) : position]
        rows.append(lm.encode([context], [len(context) - 1]).keys[0])
    return torch.stack(rows)


def test_every_key_is_the_lms_for_that_targets_own_context(store: Datastore) -> None:
    lm = tiny_lm()
    context = store.manifest.context
    assert (context.window, context.stride) == (48, 20)
    for document_id in store.document_ids()[::3]:
        ids = lm.tokenizer.encode(store.document(document_id).text)
        assert len(ids) > 100  # several windows
        need = reference_keys(lm, ids, context.window, context.stride)
        have = store.keys(torch.arange(*store.document_entries(document_id)))
        np.testing.assert_allclose(have.numpy(), need.numpy(), atol=KEY_TOLERANCE)


def test_every_value_is_the_next_token(store: Datastore) -> None:
    for document_id in store.document_ids():
        ids = tiny_lm().tokenizer.encode(store.document(document_id).text)
        assert store.values(torch.arange(*store.document_entries(document_id))).tolist() == ids[1:]


def test_every_span_leads_to_its_tokens_text(store: Datastore) -> None:
    tokenizer = tiny_lm().tokenizer
    places = store.locate(range(store.entries))
    texts = {document_id: store.document(document_id).text for document_id in store.document_ids()}
    for place, value in zip(places, all_values(store).tolist(), strict=True):
        token = tokenizer.token_text(value)
        found = texts[place.document_id][place.char_start : place.char_end]
        assert token == found or "\ufffd" in token
    assert sum("\ufffd" not in tokenizer.token_text(v) for v in all_values(store).tolist()) > 0.9 * store.entries


def test_documents_and_their_entries_are_in_the_order_of_the_corpus(store: Datastore) -> None:
    numbers = [int(document_id.removeprefix("doc-")) for document_id in store.document_ids()]
    assert numbers == sorted(numbers)
    ranges = [store.document_entries(document_id) for document_id in store.document_ids()]
    assert [r.first for r in ranges] == [0, *(r.stop for r in ranges[:-1])]
    assert ranges[-1].stop == store.entries


def test_held_out_documents_are_not_in_the_store(store: Datastore) -> None:
    held_out = {document.id: document.text for document in store.held_out_documents()}
    assert held_out
    assert held_out.keys().isdisjoint(store.document_ids())
    assert held_out.keys() | set(store.document_ids()) == {f"doc-{i}" for i in range(len(PAGES))}
    assert all(text == PAGES[int(document_id.removeprefix("doc-"))] for document_id, text in held_out.items())
    assert store.calibration is not None
    assert store.calibration.protocol["held_out_unit"] == "documents"
    assert store.calibration.protocol["held_out_documents"] == list(held_out)


def test_a_store_that_helps_is_published_with_its_figures(store: Datastore, recorder: Recorder) -> None:
    calibration = store.calibration
    assert calibration is not None
    assert calibration.helps
    report: dict[str, Any] = calibration.report
    assert report["mixed"]["perplexity"] < report["base"]["perplexity"]
    assert report["base"]["perplexity"] == pytest.approx(np.exp(report["base"]["nll_per_token"]))
    assert report["gain"] == pytest.approx(1 - report["mixed"]["perplexity"] / report["base"]["perplexity"])
    assert report["blocks"] < 8
    assert report["gain_interval_95"] is None  # of so little text an interval would say nothing
    held_out_tokens = sum(len(tiny_lm().tokenizer.encode(d.text)) - 1 for d in store.held_out_documents())
    assert report["tokens"] + report["fit_tokens"] == held_out_tokens
    reported_on = [d for d in store.held_out_documents() if d.id in report["held_out_documents"]]
    assert len(reported_on) == len(report["held_out_documents"]) == 1  # the other one was fitted on
    assert report["tokens"] == len(tiny_lm().tokenizer.encode(reported_on[0].text)) - 1
    quality = store.manifest.quality
    assert (quality["helps"], quality["forced"]) == (True, False)
    assert quality["recall_at_32"] == quality["self_recall"] == 1.0
    assert recorder.said[0] == f"1 file read, 10 documents ({sum(map(len, PAGES))} characters)"
    assert recorder.said[1].startswith(f"Store: 8 documents, {store.entries:,} entries. Held out: 2 documents, ")
    assert recorder.said[-1].startswith(f"Published law version {store.version}: {store.entries:,} entries")


def test_the_protocol_says_how_to_repeat_the_calibration(store: Datastore) -> None:
    assert store.calibration is not None
    protocol: dict[str, Any] = store.calibration.protocol
    assert (protocol["window"], protocol["stride"], protocol["seed"]) == (48, 20, 0)
    assert protocol["lambda_grid"] == {"first": 0.01, "last": 0.99, "step": 0.01}
    grid = protocol["temperature_grid"]
    assert (grid["first"], grid["last"], grid["steps_per_octave"]) == (1 / 128, 8.0, 2)


def test_files_are_hashed_once_with_their_progress(recorder: Recorder, store: Datastore) -> None:
    hashed = [stage for name, stage in recorder.stages if name == "Checksums"]
    early = store.num_bytes - store.manifest.files[layout.CANARIES].bytes  # canaries come last, and are hashed then
    assert hashed == [(early, early)]


def test_every_stage_ends_with_what_it_began_with(recorder: Recorder, store: Datastore) -> None:
    stages = dict(recorder.stages)
    assert stages["Encode"] == stages["Add to index"] == (store.entries, store.entries)
    assert all(stage.total in (None, stage.done) for stage in stages.values())


def test_a_picture_of_the_calibration_lies_beside_it(folder: Path, store: Datastore) -> None:
    assert store.calibration is not None
    beside = layout.calibration_folder(folder / "stores", "law", store.calibration.id)
    assert (beside / "curve.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError(), "matplotlib is not installed (pip install 'knnlm[plot]')"),
        (OSError("no writable folder"), "matplotlib does not start: no writable folder"),
    ],
)
def test_without_matplotlib_the_build_says_that_there_is_no_picture(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    class Absent:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "matplotlib.figure":
                raise error

    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    recorder = Recorder()
    build(given(tmp_path, corpus), reporter=recorder)
    assert f"curve.png is not drawn: {reason}" in recorder.said
    assert layout.published_names(tmp_path) == ["law"]
    assert not list(tmp_path.rglob("curve.png"))


# -- formats ---------------------------------------------------------------------------------------------------------


def _files(folder: Path, suffix: str, wrap: Callable[[str], str]) -> None:
    for number, text in enumerate(PAGES):
        (folder / f"{number:02}{suffix}").write_text(wrap(text), encoding="utf-8")


def _gzipped(folder: Path) -> None:
    lines = "".join(json.dumps({"id": f"{i:02}", "text": text}) + "\n" for i, text in enumerate(PAGES))
    (folder / "pages.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def _parquet(folder: Path) -> None:
    table = pa.table({"id": [f"{i:02}" for i in range(len(PAGES))], "text": PAGES})
    pq.write_table(table, folder / "pages.parquet")


FORMATS: dict[str, Callable[[Path], object]] = {
    "txt": lambda folder: _files(folder, ".txt", str),
    "md": lambda folder: _files(folder, ".md", str),
    "html": lambda folder: _files(folder, ".html", lambda text: f"<html><title>t</title><body><p>{text}</p></body>"),
    "jsonl.gz": _gzipped,
    "parquet": _parquet,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_folder_of_any_format_becomes_a_store_of_its_texts(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    FORMATS[kind](source)
    settings = given(tmp_path / "stores", source)
    build(settings)
    with opened(settings) as store:
        documents = [store.document(i) for i in store.document_ids()] + list(store.held_out_documents())
        heads = [d for d in documents if not d.id.endswith("#tail")]
        assert len(heads) == len(PAGES)
        for document in heads:
            page = PAGES[int(document.id[:2])]
            assert page.strip().startswith(document.text.strip())
        lm = tiny_lm()
        first = store.document_ids()[0]
        ids = lm.tokenizer.encode(store.document(first).text)
        have = store.keys(torch.arange(*store.document_entries(first)))
        np.testing.assert_allclose(have.numpy(), reference_keys(lm, ids, 48, 20).numpy(), atol=KEY_TOLERANCE)


# -- shards, versions ------------------------------------------------------------------------------------------------


def test_several_shards_hold_what_one_holds_entry_for_entry(tmp_path: Path, corpus: Path, store: Datastore) -> None:
    settings = given(tmp_path, corpus, shard_entries=250)
    build(settings)
    with opened(settings) as several:
        sizes = [shard.entries for shard in several.manifest.shards]
        assert len(sizes) > 3
        assert all(250 <= size < 250 + 48 for size in sizes[:-1])
        assert several.entries == store.entries
        assert several.document_ids() == store.document_ids()
        assert torch.equal(all_values(several), all_values(store))
        assert several.locate(range(several.entries)) == store.locate(range(store.entries))
        # Windows share passes with other neighbours now: the last bits may differ, and be rounded to fp16 otherwise.
        torch.testing.assert_close(all_keys(several), all_keys(store), atol=KEY_TOLERANCE, rtol=1e-3)
        assert (all_keys(several) == all_keys(store)).double().mean() > 0.99
        queries = all_keys(store)[::97]
        one, other = store.search(queries, 8), several.search(queries, 8)
        torch.testing.assert_close(one.distances, other.distances, atol=0.05, rtol=1e-3)


def test_the_same_inputs_give_the_same_version_and_the_same_files(
    tmp_path: Path, corpus: Path, store: Datastore
) -> None:
    settings = given(tmp_path / "elsewhere", corpus)
    assert build(settings).version == store.version
    with opened(settings) as again:
        have = {path: record.sha256 for path, record in again.manifest.files.items()}
        assert have == {path: record.sha256 for path, record in store.manifest.files.items()}
        assert again.calibration == store.calibration


def version_of(settings: BuildSettings, folder: Path, lm: HuggingFaceLM | None = None) -> str:
    """The version that a build would publish, without building it."""
    lm = lm or tiny_lm()
    return manifest.version_of(pipeline._inputs(plan_of(settings, folder / "plan", lm), lm, settings))


@pytest.mark.parametrize(
    "change",
    [
        {"window": 40},
        {"stride": 24},
        {"seed": 1},
        {"held_out_fraction": 0.21},
        {"held_out_max_tokens": 19_999},
        {"shard_entries": 999},
        {"max_tokens": 600},
    ],
    ids=str,
)
def test_a_setting_that_shapes_the_store_gives_another_version(
    tmp_path: Path, corpus: Path, store: Datastore, change: dict[str, object]
) -> None:
    assert version_of(given(tmp_path, corpus, **change), tmp_path) != store.version


@pytest.mark.parametrize(
    "change", [{"batch_tokens": 100}, {"name": "other"}, {"force": True}, {"dtype": "float32"}], ids=str
)
def test_a_setting_that_does_not_shape_the_store_gives_the_same_version(
    tmp_path: Path, corpus: Path, store: Datastore, change: dict[str, object]
) -> None:
    assert version_of(given(tmp_path, corpus, **change), tmp_path) == store.version


def test_another_text_and_another_lm_give_other_versions(tmp_path: Path, corpus: Path, store: Datastore) -> None:
    edited = write_jsonl(tmp_path / "edited.jsonl", [*PAGES[:-1], PAGES[-1] + "One sentence more."])
    renamed = write_jsonl(tmp_path / "renamed.jsonl", PAGES, prefix="page")
    same = given(tmp_path / "stores", corpus)
    versions = {
        version_of(same, tmp_path),
        version_of(given(tmp_path, edited), tmp_path),
        version_of(given(tmp_path, renamed), tmp_path),
        version_of(same, tmp_path, tiny_lm(seed=1)),
        version_of(same, tmp_path, tiny_lm(bos=True)),
        version_of(same, tmp_path, tiny_lm(family="gpt2")),
        version_of(same, tmp_path, tiny_lm(tap="final_hidden")),
    }
    assert store.version in versions
    assert len(versions) == 7


def test_building_again_says_that_it_is_published_and_touches_nothing(tmp_path: Path, corpus: Path) -> None:
    settings = given(tmp_path, corpus)
    first = build(settings)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    recorder = Recorder()
    again = build(settings, reporter=recorder)
    assert again == first._replace(was_published=True)
    assert recorder.said[-1] == f"law version {first.version} is published already: the same text, settings and model"
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if p.name != "build.lock"} == {
        p: t for p, t in before.items() if p.name != "build.lock"
    }


def test_building_an_older_version_again_makes_it_current_again(tmp_path: Path, corpus: Path) -> None:
    old = build(given(tmp_path, corpus))
    new = build(given(tmp_path, corpus, stride=24))
    assert layout.read_current(tmp_path, "law").version == new.version
    assert build(given(tmp_path, corpus)).was_published
    with opened(given(tmp_path, corpus)) as store:
        assert (store.version, store.calibration) == (old.version, old.calibration)
    assert layout.published_versions(tmp_path, "law") == sorted([old.version, new.version])


def test_nothing_is_left_over_beside_a_published_store(tmp_path: Path, corpus: Path) -> None:
    version = build(given(tmp_path, corpus)).version
    assert sorted(path.name for path in (tmp_path / "law").iterdir()) == sorted(
        ["CURRENT", "HISTORY", "build.lock", "calibrations", version]
    )


# -- how much --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [600, 601])
def test_max_tokens_is_how_many_entries_the_store_gets(tmp_path: Path, corpus: Path, max_tokens: int) -> None:
    settings = given(tmp_path, corpus, max_tokens=max_tokens, force=True)
    assert build(settings).entries == max_tokens
    with opened(settings) as store:
        last = store.document(store.document_ids()[-1])
        # The document that fills the store ends with its last entry.
        assert store.locate([max_tokens - 1])[0].char_end == len(last.text)
        assert PAGES[int(last.id.removeprefix("doc-"))].startswith(last.text)


@pytest.mark.parametrize("max_tokens", [300, 1060])
def test_max_tokens_holds_where_the_ends_of_documents_are_held_out(tmp_path: Path, max_tokens: int) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(PAGES), encoding="utf-8")
    settings = given(tmp_path / "stores", book, max_tokens=max_tokens, force=True)
    assert build(settings).entries == max_tokens
    with opened(settings) as store:
        assert store.calibration is not None
        assert store.calibration.protocol["held_out_unit"] == "tails"


def test_a_limit_beyond_the_text_changes_nothing(tmp_path: Path, corpus: Path, store: Datastore) -> None:
    assert build(given(tmp_path, corpus, max_tokens=10**9)).version == store.version


def test_reading_stops_once_the_store_is_full_and_enough_is_held_out(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "many.jsonl", [prose(seed) for seed in range(120)])
    recorder = Recorder()
    settings = given(tmp_path / "stores", source, max_tokens=1000, held_out_max_tokens=400, force=True)
    build(settings, reporter=recorder)
    summary = recorder.said[0]
    assert summary.startswith("1 file read, ")  # it was begun
    assert int(summary.split(", ")[1].split()[0]) < 60


def test_reading_stops_although_documents_do_not_fill_what_may_be_held_out(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "many.jsonl", [prose(seed) for seed in range(120)])
    # The held-out share of 2,000 entries is all that may be held out, and no number of pages adds up to it.
    settings = given(tmp_path / "stores", source, max_tokens=2000, held_out_max_tokens=390)
    plan = plan_of(settings, tmp_path / "plan")
    assert plan.num_entries == 2000
    assert 195 <= sum(document.num_tokens for document in plan.held_out) < 390
    assert plan.stats.documents < 60


def test_no_more_is_held_out_than_asked_for(tmp_path: Path, corpus: Path) -> None:
    for most in (64, 140, 200):
        plan = plan_of(given(tmp_path, corpus, held_out_max_tokens=most), tmp_path / str(most))
        assert 0 < sum(document.num_tokens for document in plan.held_out) <= most


def test_a_document_larger_than_all_that_may_be_held_out_stays_in_the_store(tmp_path: Path) -> None:
    texts = ["".join(PAGES[i : i + 4]) for i in range(0, 8, 4)]
    source = write_jsonl(tmp_path / "chapters.jsonl", texts)
    plan = plan_of(given(tmp_path, source, held_out_fraction=0.5, held_out_max_tokens=500), tmp_path / "plan")
    assert len(plan.documents) == len(texts)
    assert plan.held_out_unit == "tails"


# -- held out --------------------------------------------------------------------------------------------------------


def test_one_large_document_has_its_end_held_out(tmp_path: Path) -> None:
    text = "".join(PAGES)
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    settings = given(tmp_path / "stores", tmp_path / "book.txt")
    for seed in range(20):  # whichever way the document's hash falls
        plan = plan_of(given(tmp_path, tmp_path / "book.txt", seed=seed), tmp_path / "plan")
        assert [document.id for document in (*plan.documents, *plan.held_out)] == ["book.txt", "book.txt#tail"]
    build(settings)
    with opened(settings) as store:
        (tail,) = store.held_out_documents()
        assert store.document("book.txt").text + tail.text == text
        share = len(tiny_lm().tokenizer.encode(tail.text)) / len(tiny_lm().tokenizer.encode(text))
        assert share == pytest.approx(0.2, abs=0.01)


def test_near_duplicates_of_the_store_go_into_the_store(tmp_path: Path) -> None:
    # Every page comes twice, the second time with another beginning. Where just one of the two could be held out,
    # the store has the other, and so it gets both.
    pages = [prose(seed) for seed in range(50)]
    rows = [(f"doc-{i}", text) for i, text in enumerate(pages)]
    rows += [(f"twin-{i}", f"Reprint. {text}") for i, text in enumerate(pages)]
    source = tmp_path / "twice.jsonl"
    source.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in rows), encoding="utf-8")
    settings = given(tmp_path / "stores", source, held_out_fraction=0.5)
    drawn = {i for i, t in rows if is_candidate(document_digest(i, t), 0.5, 0)}
    expected = {i for i in drawn if {f"doc-{i.split('-')[1]}", f"twin-{i.split('-')[1]}"} <= drawn}
    assert 0 < len(expected) < len(drawn)
    plan = plan_of(settings, tmp_path / "plan")
    assert plan.held_out_unit == "documents"
    assert {document.id for document in plan.held_out} == expected
    assert plan.near_duplicates == len(drawn) - len(expected)
    assert [document.id for document in plan.documents] == [i for i, _ in rows if i not in expected]


def test_bootstrap_blocks_are_stretches_of_a_document_whatever_the_windows(tmp_path: Path, corpus: Path) -> None:
    lm = tiny_lm()
    found = []
    for number, (window, stride) in enumerate([(48, 20), (200, 7)]):
        plan = plan_of(given(tmp_path, corpus, window=window, stride=stride), tmp_path / str(number))
        queries = encode_held_out(lm, plan, plan.held_out, batch_tokens=4096, reporter=Recorder())
        found.append((queries.blocks.tolist(), queries.documents.tolist(), queries.targets.tolist()))
    assert found[0] == found[1]
    blocks, documents, _ = found[0]
    need: list[int] = []
    for document in plan.held_out:
        first = need[-1] + 1 if need else 0
        need += [first + i // BLOCK_TOKENS for i in range(document.num_entries)]
    assert blocks == need
    assert len(set(zip(blocks, documents, strict=True))) == len(set(blocks))  # no block spans two documents


# -- BOS -------------------------------------------------------------------------------------------------------------


def test_with_a_bos_the_first_token_of_a_document_is_an_entry_too(tmp_path: Path, corpus: Path) -> None:
    lm = tiny_lm(bos=True)
    settings = given(tmp_path, corpus)
    build(settings, lm)
    with opened(settings) as store:
        assert store.manifest.context.bos_token_ids == lm.tokenizer.bos_token_ids != ()
        first = store.document_ids()[1]
        ids = lm.tokenizer.encode(store.document(first).text)
        entries = torch.arange(*store.document_entries(first))
        assert ids[0] == lm.tokenizer.bos_token_ids[0]
        assert store.values(entries).tolist() == ids[1:]
        np.testing.assert_allclose(
            store.keys(entries).numpy(), reference_keys(lm, ids, 48, 20).numpy(), atol=KEY_TOLERANCE
        )
        place = store.locate([int(entries[0])])[0]
        assert (place.token_offset, place.char_start) == (0, 0)
        assert store.document(first).text[: place.char_end] == lm.tokenizer.token_text(ids[1])


# -- windows, small corpora, indexes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [({}, (256, 128)), ({"window": 100}, (100, 50)), ({"stride": 17}, (256, 17)), ({"window": 5, "stride": 4}, (5, 4))],
    ids=str,
)
def test_windows_default_to_the_lms_context_and_half_of_it(
    tmp_path: Path, corpus: Path, asked: dict[str, int], chosen: tuple[int, int]
) -> None:
    settings = given(tmp_path, corpus, **{"window": None, "stride": None, **asked})
    assert settings.windowing(tiny_lm().max_length) == chosen
    assert plan_of(settings, tmp_path / "plan").windowing == chosen


def test_windows_default_to_1024_where_the_lm_sees_more() -> None:
    assert given(Path(), Path("a"), window=None, stride=None).windowing(8192) == (1024, 512)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"window": 257}, "`window` must be at most the model's context of 256 tokens, got 257"),
        ({"window": 32, "stride": 32}, r"`stride` must be at least 1 and less than `window` \(32\), got 32"),
        ({"stride": 300}, r"`stride` must be at least 1 and less than `window` \(256\), got 300"),
    ],
    ids=str,
)
def test_windows_that_do_not_fit_are_refused_before_anything_is_read(
    tmp_path: Path, asked: dict[str, int], message: str
) -> None:
    with pytest.raises(InvalidParameter, match=message):
        build(given(tmp_path / "stores", Path("missing"), **{"window": None, "stride": None, **asked}))
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 7, 10, 20, 40, 80])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_smallest_corpora_are_built_or_refused_in_so_many_words(tmp_path: Path, tokens: int, seed: int) -> None:
    (tmp_path / "tiny.txt").write_text(random_digits(0, tokens))  # a token each
    (tmp_path / "tinier.txt").write_text("yy" if tokens else "")
    settings = given(tmp_path / "stores", tmp_path / "tiny.txt", tmp_path / "tinier.txt", seed=seed)
    if tokens >= 80:
        assert build(settings).entries >= 64
        return
    try:
        entries = build(settings).entries
    except (EmptyCorpus, DatastoreDoesNotHelp):
        return
    assert entries >= 2


def test_a_text_that_only_repeats_itself_has_nothing_to_calibrate_on(tmp_path: Path) -> None:
    (tmp_path / "again.txt").write_text("x" * 500)
    with pytest.raises(EmptyCorpus, match="none for calibration: what could be held out repeats the rest"):
        build(given(tmp_path / "stores", tmp_path / "again.txt"))


def test_a_store_beyond_exact_search_is_built_with_lists_that_pass_the_gate(
    tmp_path: Path, corpus: Path, store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "EXACT_UP_TO", 100)
    monkeypatch.setattr(index, "MIN_TRAIN_PER_LIST", 8)
    settings = given(tmp_path, corpus, shard_entries=600)
    recorder = Recorder()
    build(settings, reporter=recorder)
    with opened(settings) as lists:
        spec, quality = lists.manifest.index, lists.manifest.quality
        assert spec.nlist == 128
        assert 8 <= spec.nprobe <= 128
        assert quality["recall_at_32"] >= 0.95
        assert quality["recall_at_k"] >= 0.9
        assert lists.calibration is not None
        assert lists.calibration.report["nprobe"] == spec.nprobe
        assert (lists.folder / layout.TRAINED).is_file()
        assert dict(recorder.stages)["Train index"].done == spec.train_vectors
