"""What an interrupted build leaves, and what a corpus that repeats itself must not let through."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_build import build, given, plan_of, random_digits

from knnlm_builder import pipeline
from knnlm_builder.corpus import NgramSet, containment
from knnlm_core.datastore import layout
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreNotFound


class Killed(BaseException):
    """Stands for a kill: nothing in the build may catch it."""


def test_a_file_left_half_written_does_not_stop_the_next_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(random_digits(number, 200))
    settings = given(tmp_path / "stores", *(tmp_path / f"{number}.txt" for number in range(8)), force=True)

    def die(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_publish", die)
        with pytest.raises(Killed):
            build(settings)
    with pytest.raises(DatastoreNotFound):
        Datastore.open(settings.output, "law")
    (building,) = (settings.output / "law").glob("*.tmp")
    for file in (layout.MANIFEST, layout.DOCUMENTS, f"shard-00000/{layout.INDEX}"):
        (building / f"{file}.part").write_text("half of")

    result = build(settings)
    store = Datastore.open(settings.output, "law", checksums=True)
    assert store.version == result.version
    assert not [file for file in store.manifest.files if file.endswith(".part")]


def test_a_tail_that_stands_in_another_document_is_not_held_out(tmp_path: Path) -> None:
    shared, more = random_digits(0, 400), random_digits(1, 800)
    (tmp_path / "first-edition.txt").write_text(shared)
    (tmp_path / "second-edition.txt").write_text(shared + more)
    settings = given(tmp_path / "stores", tmp_path / "first-edition.txt", tmp_path / "second-edition.txt")
    folder = tmp_path / "plan"
    folder.mkdir()
    plan = plan_of(settings, folder)
    assert plan.held_out_unit == "tails"
    assert [tail.id for tail in plan.held_out] == ["second-edition.txt#tail"]
    assert plan.near_duplicates == 1
    store = [NgramSet.of(plan.tokens(document)) for document in plan.documents]
    (tail,) = (NgramSet.of(plan.tokens(document)) for document in plan.held_out)
    assert max(containment(tail, document) for document in store) < 0.1
