"""What was deleted or learned while serving is not written again by a build from text that still holds it."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_build import Recorder, build, given, prose, tiny_lm, write_jsonl

from knnlm_builder.pipeline import build_with
from knnlm_core.datastore.ledger import ledger_lock
from knnlm_core.datastore.maintenance.purge import purge
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import EmptyCorpus

SECRET = "nobody may read about the zyzzyva. "


def test_a_rebuild_leaves_out_what_was_purged(tmp_path: Path) -> None:
    texts = [prose(i) for i in range(12)]
    corpus = write_jsonl(tmp_path / "pages.jsonl", [*texts, SECRET + prose(99)])
    settings = given(tmp_path / "stores", corpus)
    first = build(settings)
    with Datastore.open(settings.output, "law") as store:
        assert store.document("doc-12").text.startswith(SECRET)
    purge(settings.output, "law", ["doc-12"])

    told = Recorder()
    again = build_with(tiny_lm(), settings, told)
    assert again.version != first.version
    assert "Left out: 1 documents that were deleted or learned while serving" in told.said
    with Datastore.open(settings.output, "law") as store:
        assert store.version == again.version
        assert "doc-12" not in store.document_ids()
    assert not [file for file in (settings.output / "law").rglob("*") if file.is_file() and _holds(file, b"zyzzyva")]
    assert build(settings).was_published


def test_a_corpus_of_deleted_documents_alone_is_refused_with_the_reason(tmp_path: Path) -> None:
    settings = given(tmp_path / "stores", write_jsonl(tmp_path / "pages.jsonl", [prose(1)]))
    (settings.output / "law").mkdir(parents=True)
    with ledger_lock(settings.output, "law") as ledger:
        ledger.delete(["doc-0"])
    with pytest.raises(EmptyCorpus, match="besides 1 documents that were deleted or learned while serving"):
        build(settings)


def _holds(file: Path, needle: bytes) -> bool:
    return needle in file.read_bytes()
