"""Every build leaves canaries behind: the queries of its recall gate, and what an exact search finds for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_build import Recorder, build, given, opened, plan_of, prose, tiny_lm, write_jsonl

from knnlm_builder import pipeline
from knnlm_builder.settings import BuildSettings
from knnlm_builder.stages.held_out import encode_held_out
from knnlm_builder.stages.recall import GATE_QUERIES
from knnlm_core.datastore import layout
from knnlm_core.datastore.canaries import MAX_CANARIES, MAX_NEIGHBORS, canaries_of, self_test
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreCorrupt, VerifyFailed
from knnlm_core.types import Neighbors


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> BuildSettings:
    folder = tmp_path_factory.mktemp("canaries")
    source = write_jsonl(folder / "pages.jsonl", [prose(seed) for seed in range(16)])
    settings = given(folder / "stores", source, shard_entries=400)
    build(settings)
    return settings


def test_canaries_are_held_out_queries_with_what_an_exact_search_finds(settings: BuildSettings, tmp_path: Path) -> None:
    plan = plan_of(settings, tmp_path)
    queries = encode_held_out(tiny_lm(), plan, plan.held_out, batch_tokens=settings.batch_tokens, reporter=Recorder())
    documents = [plan.held_out[number].id for number in queries.documents.tolist()]
    with opened(settings) as store:
        canaries = canaries_of(store)
        assert canaries is not None
        assert len(canaries.queries) == min(MAX_CANARIES, len(documents)) == store.manifest.quality["recall_queries"]
        exact = store.search_exact(canaries.queries, MAX_NEIGHBORS)
    assert torch.equal(canaries.entry_ids, exact.entry_ids)
    assert torch.equal(canaries.distances, exact.distances)
    known = {(document, tuple(key)) for document, key in zip(documents, queries.keys.tolist(), strict=True)}
    kept = {(document, tuple(key)) for document, key in zip(canaries.documents, canaries.queries.tolist(), strict=True)}
    assert kept <= known
    assert len(set(canaries.documents)) > 1


def test_a_file_holds_as_many_canaries_as_the_gate_asks_queries() -> None:
    assert MAX_CANARIES == GATE_QUERIES


def test_a_published_version_passes_its_self_test(settings: BuildSettings) -> None:
    with opened(settings) as store:
        result = self_test(store)
        assert (result.queries, result.recall_at_32) == (store.manifest.quality["recall_queries"], 1.0)
        assert store.manifest.revision == 0


def test_a_build_that_fails_its_self_test_is_not_published_and_the_next_run_publishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "pages.jsonl", [prose(seed) for seed in range(16)])
    settings = given(tmp_path / "stores", source)
    write_canaries = pipeline.write_canaries

    def of_the_next_entry(path: Path, queries: torch.Tensor, exact: Neighbors, documents: list[str]) -> None:
        write_canaries(path, queries, exact._replace(entry_ids=(exact.entry_ids + 1).clamp(max=9)), documents)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_canaries", of_the_next_entry)
        with pytest.raises(VerifyFailed, match=r"finished store is refused: .* stored distance of entry \d+ is"):
            build(settings)
    assert layout.published_names(settings.output) == []
    left = list(settings.output.glob("law/*.tmp/canaries.arrow"))
    assert len(left) == 1  # of the failed build, with a manifest that names it

    version = build(settings).version
    whole = given(tmp_path / "whole", source)
    assert build(whole).version == version
    with opened(settings) as store, opened(whole) as need:
        assert store.manifest == need.manifest


def test_canaries_are_a_file_like_any_other(settings: BuildSettings) -> None:
    with opened(settings) as store:
        path = store.folder / layout.CANARIES
        record = store.manifest.files[layout.CANARIES]
    content = path.read_bytes()
    assert record.bytes == len(content)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(DatastoreCorrupt, match=r"canaries\.arrow has sha256"):
            Datastore.open(settings.output, settings.name, checksums=True)
    finally:
        path.write_bytes(content)
