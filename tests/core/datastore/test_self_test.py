"""The self-test: what a damaged index, a wrong key or wrong canaries cannot hide from."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_store import Plan, build, open_new, random_keys

from knnlm_core.datastore import canaries as module
from knnlm_core.datastore import layout
from knnlm_core.datastore.arrays import map_keys, write_keys
from knnlm_core.datastore.canaries import (
    MAX_CANARIES,
    MAX_NEIGHBORS,
    RECALL_TOLERANCE,
    Canaries,
    SelfTest,
    canaries_of,
    read_canaries,
    self_test,
    write_canaries,
)
from knnlm_core.datastore.checksums import record_files
from knnlm_core.datastore.index import build_shard_index, ivf_spec
from knnlm_core.datastore.living import LivingName
from knnlm_core.datastore.manifest import Manifest
from knnlm_core.datastore.publish import publish
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.recall import row_recall, self_recall
from knnlm_core.errors import BuildError, DatastoreCorrupt, InvalidParameter
from knnlm_core.types import Neighbors

DIM, ENTRIES = 8, 900
IVF = ivf_spec(16, nprobe=6, train_vectors=700)
CUTS = (300, 600)  # three shards of one size


def held_out(count: int = 200, seed: int = 5) -> torch.Tensor:
    keys = random_keys(ENTRIES, DIM)
    rng = np.random.default_rng(seed)
    near = keys[rng.integers(0, ENTRIES, count)] + rng.standard_normal((count, DIM)) * 0.5
    return torch.from_numpy(near.astype(np.float32))


def publish_with_canaries(root: Path, plan: Plan, queries: torch.Tensor) -> Datastore:
    """Build as the builder does: the recall that the index reaches on these queries is recorded beside them."""
    folder = layout.building_folder(root, plan.name, build(root, plan))
    with Datastore.open_folder(folder) as store:
        exact = store.search_exact(queries, MAX_NEIGHBORS)
        recall = float(row_recall(store.search(queries, MAX_NEIGHBORS), exact, MAX_NEIGHBORS).double().mean())
        write_canaries(folder / layout.CANARIES, queries, exact, [f"doc/{i}" for i in range(len(queries))])
        manifest = store.manifest
    rewrite(folder, manifest.model_copy(update={"quality": {"recall_at_32": recall}}))
    publish(root, plan.name, manifest.version)
    return Datastore.open(root, plan.name, checksums=True)


def rewrite(folder: Path, manifest: Manifest | None = None) -> None:
    """Record the files as they are now, so that nothing but the self-test can notice what was done to them."""
    manifest = manifest or Manifest.read(folder / layout.MANIFEST)
    manifest.model_copy(update={"files": record_files(folder)}).write(folder / layout.MANIFEST)


@pytest.fixture(params=["exact", "trained"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Datastore:
    spec = IVF if request.param == "trained" else None
    return publish_with_canaries(tmp_path, Plan(random_keys(ENTRIES, DIM), cuts=CUTS, spec=spec), held_out())


@pytest.fixture
def trained(tmp_path: Path) -> Datastore:
    return publish_with_canaries(tmp_path, Plan(random_keys(ENTRIES, DIM), cuts=CUTS, spec=IVF), held_out())


def refused(folder: Path, message: str) -> None:
    with Datastore.open_folder(folder, checksums=True) as store, pytest.raises(DatastoreCorrupt, match=message) as why:
        self_test(store)
    assert f"datastore 'law' version {folder.name}" in str(why.value)


def test_a_version_passes_with_the_recall_that_was_recorded(store: Datastore) -> None:
    recorded = store.manifest.quality["recall_at_32"]
    result = self_test(store)
    assert (result.queries, result.recall_at_32) == (200, pytest.approx(recorded))
    if store.manifest.index.is_trained:
        assert 0.8 < recorded < 1  # there is something to lose
        assert result.needed == pytest.approx(recorded - RECALL_TOLERANCE)
    else:
        assert recorded == result.needed == 1.0


def test_part_of_the_queries_is_held_to_what_their_number_allows(trained: Datastore) -> None:
    recorded = float(trained.manifest.quality["recall_at_32"])
    needs = []
    for queries in (1, 10, 199, 200, 10_000):
        result = self_test(trained, queries=queries)
        assert result.queries == min(queries, 200)
        assert result.needed is not None
        needs.append(result.needed)
    assert needs == sorted(needs)
    assert needs[1] == pytest.approx(
        recorded - RECALL_TOLERANCE - 4 * math.sqrt(recorded * (1 - recorded) / 10 * 190 / 199)
    )
    assert needs[3] == needs[4] == pytest.approx(recorded - RECALL_TOLERANCE)
    with pytest.raises(InvalidParameter, match="`queries` must be at least 1, got 0"):
        self_test(trained, queries=0)


def test_the_queries_asked_are_spread_over_all_of_them(trained: Datastore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    search = Datastore.search
    monkeypatch.setattr(Datastore, "search", lambda self, q, k, **kw: (asked.append(q), search(self, q, k, **kw))[1])
    self_test(trained, queries=4)
    assert torch.equal(asked[0], held_out()[[0, 50, 100, 150]])


def test_a_version_without_canaries_passes_and_says_that_nothing_was_asked(tmp_path: Path) -> None:
    with open_new(tmp_path, Plan(random_keys(40, DIM))) as store:
        assert canaries_of(store) is None
        assert self_test(store) == SelfTest(0, None, None)


def test_documents_deleted_since_the_build_do_not_matter(tmp_path: Path) -> None:
    plan = Plan(random_keys(ENTRIES, DIM), cuts=CUTS, document_sizes=[300] * 3)
    with publish_with_canaries(tmp_path, plan, held_out()) as store:
        need = self_test(store)
        living = LivingName(tmp_path, "law")
        living.snapshot(store)
        living.delete(["doc/1"])
        assert int(store.search(held_out(), 1).entry_ids.max()) >= 600  # entries 300 … 599 are hidden from everybody
        assert not bool(((store.search(held_out(), 32).entry_ids // 300) == 1).any())
        assert self_test(store) == need


@pytest.mark.parametrize("entries", [1, 31, 32, 33])
def test_a_version_smaller_than_the_neighbourhood_has_canaries_of_its_size(tmp_path: Path, entries: int) -> None:
    keys = random_keys(entries, DIM)
    with publish_with_canaries(tmp_path, Plan(keys), held_out(3)) as store:
        canaries = canaries_of(store)
        assert canaries is not None
        assert canaries.entry_ids.shape == (3, min(32, entries))
        assert self_test(store).queries == 3


def test_ties_are_no_loss(tmp_path: Path) -> None:
    keys = np.repeat(random_keys(9, DIM), 100, axis=0)  # 100 entries at every distance, of which 32 are asked for
    spec = ivf_spec(4, nprobe=4, train_vectors=400)
    with publish_with_canaries(tmp_path, Plan(keys, spec=spec), torch.from_numpy(keys[::90].astype("f4"))) as store:
        assert self_test(store).recall_at_32 == 1.0


def index_of(folder: Path, shard: int, keys: np.ndarray) -> None:
    """Replace a shard's index by one of other keys."""
    other = folder.parent / "other"
    other.mkdir()
    write_keys(other / layout.KEYS, np.ascontiguousarray(keys))
    spec = Manifest.read(folder / layout.MANIFEST).index
    trained = folder / layout.TRAINED if spec.is_trained else None
    build_shard_index(trained, spec, other, dim=DIM, entries=len(keys))
    shutil.move(other / layout.INDEX, folder / f"shard-0000{shard}" / layout.INDEX)
    rewrite(folder)


def keys_of(folder: Path, shard: int) -> np.ndarray:
    return map_keys(folder / f"shard-0000{shard}" / layout.KEYS, DIM, 300).copy()


def test_an_index_whose_rows_are_of_other_entries_is_found(store: Datastore) -> None:
    store.close()
    index_of(store.folder, 1, keys_of(store.folder, 1)[::-1])
    refused(store.folder, r"found distance of entry \d+ is [\d.]+, its stored key needs [\d.]+")


def test_an_index_without_the_near_entries_is_found(store: Datastore) -> None:
    store.close()
    keys = keys_of(store.folder, 1)
    keys[::3] += 50  # far away: never found, so nothing that is found is wrong
    index_of(store.folder, 1, keys)
    refused(store.folder, r"200 queries: recall@32 is 0\.\d{4}, at least [01]\.\d{4} is needed")


def test_a_list_that_is_searched_no_more_is_found(trained: Datastore) -> None:
    trained.close()
    manifest = Manifest.read(trained.folder / layout.MANIFEST)
    fewer = manifest.model_copy(update={"index": manifest.index.model_copy(update={"nprobe": 5})})
    rewrite(trained.folder, fewer)
    refused(trained.folder, r"recall@32 is 0\.\d{4}, at least 0\.\d{4} is needed")


def test_shards_that_were_exchanged_as_a_whole_are_found(store: Datastore) -> None:
    store.close()
    one, other, spare = (store.folder / f"shard-0000{i}" for i in (1, 2, 9))
    one.rename(spare)
    other.rename(one)
    spare.rename(other)
    rewrite(store.folder)
    refused(store.folder, r"stored distance of entry \d+ is")


def test_results_out_of_order_are_found(store: Datastore, monkeypatch: pytest.MonkeyPatch) -> None:
    search = Datastore.search
    monkeypatch.setattr(
        Datastore, "search", lambda *args, **kw: Neighbors(*(column.flip(1) for column in search(*args, **kw)))
    )
    with pytest.raises(DatastoreCorrupt, match="entries found are not in the order of distance and id"):
        self_test(store)


@pytest.mark.parametrize("recorded", [None, True, "0.9", 1.5, -0.1])
def test_a_trained_index_needs_a_recorded_recall(trained: Datastore, recorded: object) -> None:
    trained.close()
    manifest = Manifest.read(trained.folder / layout.MANIFEST)
    quality = {} if recorded is None else {"recall_at_32": recorded}
    rewrite(trained.folder, manifest.model_copy(update={"quality": quality}))
    refused(trained.folder, "quality.recall_at_32 must be a number in 0 … 1")


def small_canaries() -> Canaries:
    ids = torch.tensor([[0, 1], [1, -1]])
    return Canaries(torch.ones(2, 3), ids, torch.tensor([[0.5, 1.0], [2.0, math.inf]]), ("a", "b"))


def written(path: Path, canaries: Canaries) -> Path:
    write_canaries(path, canaries.queries, Neighbors(canaries.entry_ids, canaries.distances, canaries.entry_ids),
                   canaries.documents)  # fmt: skip
    return path


def test_canaries_survive_a_round_trip(tmp_path: Path) -> None:
    need = small_canaries()._replace(documents=("doc/ä", "🙂"))
    have = read_canaries(written(tmp_path / "c", need), dim=3, entries=2)
    assert all(torch.equal(column, other) for column, other in zip(have[:3], need[:3], strict=True))
    assert have.documents == need.documents


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c._replace(queries=torch.tensor([[1, 1, math.nan], [1, 1, 1]])), "a query that is not finite"),
        (lambda c: c._replace(entry_ids=torch.tensor([[0, 2], [1, -1]])), "entries -1 … 2, needs −1 … 1"),
        (lambda c: c._replace(entry_ids=torch.tensor([[-2, 0], [1, 0]])), "needs −1 … 1"),
        (lambda c: c._replace(distances=torch.tensor([[0.5, -1.0], [2.0, math.inf]])), "a distance that is none"),
        (lambda c: c._replace(distances=torch.tensor([[0.5, 1.0], [2.0, 3.0]])), "a distance that is none"),
        (lambda c: c._replace(distances=torch.tensor([[0.5, math.nan], [2.0, math.inf]])), "a distance that is none"),
        (lambda c: c._replace(queries=torch.ones(2, 4)), "has the columns .*4.* needs .*3"),
        (lambda c: c._replace(entry_ids=c.entry_ids[:, :1], distances=c.distances[:, :1]), "has the columns"),
    ],
)
def test_canaries_that_cannot_be_are_refused(
    tmp_path: Path, change: Callable[[Canaries], Canaries], message: str
) -> None:
    with pytest.raises(DatastoreCorrupt, match=message):
        read_canaries(written(tmp_path / "bad", change(small_canaries())), dim=3, entries=2)


def test_a_file_holds_between_one_and_512_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(count: int) -> Canaries:
        return Canaries(torch.zeros(count, 2), torch.zeros(count, 1).long(), torch.zeros(count, 1), ("d",) * count)

    for count in (0, MAX_CANARIES + 1):
        with pytest.raises(BuildError, match=f"got {count} queries"):
            written(tmp_path / "c", of(count))
    with pytest.raises(BuildError, match="1 documents"):
        written(tmp_path / "c", small_canaries()._replace(documents=("a",)))
    with monkeypatch.context() as patch:
        patch.setattr(module, "MAX_CANARIES", 10**6)
        written(tmp_path / "c", of(MAX_CANARIES + 1))
    with pytest.raises(DatastoreCorrupt, match=f"has {MAX_CANARIES + 1} queries, needs 1 … {MAX_CANARIES}"):
        read_canaries(tmp_path / "c", dim=2, entries=1)


def test_stored_keys_find_themselves_also_where_distances_are_rounded(tmp_path: Path) -> None:
    """Many queries at once are searched by products, whose distance of equal keys is a hair above zero."""
    keys = random_keys(900, 576, duplicates=40)
    with open_new(tmp_path, Plan(keys, spec=ivf_spec(4, nprobe=4, train_vectors=160))) as store:
        ids = torch.arange(0, 900, 3)
        assert (store.search(store.keys(ids), 1).distances > 0).any()
        assert self_recall(store, ids) == 1.0
    other = random_keys(900, 24, seed=5)
    with open_new(tmp_path / "other", Plan(other, spec=ivf_spec(4, nprobe=1, train_vectors=160), salt=1)) as store:
        shard = store._parts()[0].shard
        shard.keys = shard.keys + np.float16(0.01)  # the index holds other keys than the file
        assert self_recall(store, ids) == 0.0
