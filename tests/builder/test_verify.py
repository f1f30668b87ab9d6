"""A store that is not what its plan says is refused before it is published."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_build import build, given, opened, plan_of, prose, write_jsonl

from knnlm_builder.settings import BuildSettings
from knnlm_builder.stages.plan import Plan
from knnlm_builder.stages.verify import verify
from knnlm_core.datastore import index, layout
from knnlm_core.datastore.arrays import ValueColumns, map_keys, map_values, write_keys, write_values
from knnlm_core.datastore.manifest import Manifest
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.recall import MIN_SELF_RECALL, SELF_QUERIES
from knnlm_core.errors import DatastoreCorrupt, VerifyFailed

DIM = 64


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> BuildSettings:
    folder = tmp_path_factory.mktemp("verify")
    source = write_jsonl(folder / "pages.jsonl", [prose(seed) for seed in range(16)])
    settings = given(folder / "stores", source, window=20, stride=16, shard_entries=400, held_out_fraction=0.1)
    build(settings)
    return settings


@pytest.fixture
def plan(settings: BuildSettings, tmp_path: Path) -> Plan:
    return plan_of(settings, tmp_path / "plan")


@pytest.fixture
def folder(settings: BuildSettings, tmp_path: Path) -> Path:
    with opened(settings) as store:
        return Path(shutil.copytree(store.folder, tmp_path / "store"))


def check(folder: Path, plan: Plan) -> float:
    with Datastore.open_folder(folder) as store:
        result = verify(store, plan, nprobe=store.manifest.index.nprobe, seed=0)
    assert result.queries == SELF_QUERIES
    return result.self_recall


def sizes(folder: Path) -> list[int]:
    return [shard.entries for shard in Manifest.read(folder / layout.MANIFEST).shards]


def test_a_store_as_it_was_built_is_verified(folder: Path, plan: Plan) -> None:
    assert check(folder, plan) == 1.0
    assert len(sizes(folder)) >= 3


def _write_values(folder: Path, shard: int, change: Callable[[ValueColumns], ValueColumns]) -> None:
    path = folder / layout.shard_name(shard) / layout.VALUES
    columns = ValueColumns(*(column.copy() for column in map_values(path, sizes(folder)[shard])))
    path.unlink()
    write_values(path, change(columns))


def test_values_that_were_changed_are_found(folder: Path, plan: Plan) -> None:
    _write_values(folder, 1, lambda columns: columns._replace(values=np.roll(columns.values, 1)))
    with pytest.raises(VerifyFailed, match=r"document 'doc-\d+': its entries' values are not its tokens"):
        check(folder, plan)


def test_values_that_are_no_tokens_are_found(folder: Path, plan: Plan) -> None:
    _write_values(folder, 0, lambda columns: columns._replace(values=columns.values + 512))
    with pytest.raises(DatastoreCorrupt, match=r"values must be in 0 … 511"):
        check(folder, plan)


def test_an_index_of_other_keys_is_found(folder: Path, plan: Plan) -> None:
    """The index of one shard is rebuilt from its keys in another order, and has the right size."""
    shard = folder / layout.shard_name(1)
    entries = sizes(folder)[1]
    kept = map_keys(shard / layout.KEYS, DIM, entries).copy()
    other = folder.parent / "other"
    other.mkdir()
    write_keys(other / layout.KEYS, kept[::-1].copy())
    spec = Manifest.read(folder / layout.MANIFEST).index
    index.build_shard_index(None, spec, other, dim=DIM, entries=entries)
    shutil.copy(other / layout.INDEX, shard / layout.INDEX)
    with pytest.raises(VerifyFailed, match=rf"self-recall is 0\.\d+, at least {MIN_SELF_RECALL} is needed"):
        check(folder, plan)


def test_an_index_of_another_shard_is_found(folder: Path, plan: Plan) -> None:
    one, other = (folder / layout.shard_name(i) / layout.INDEX for i in (0, 1))
    spare = folder.parent / "spare"
    shutil.move(one, spare)
    shutil.move(other, one)
    shutil.move(spare, other)
    with pytest.raises((VerifyFailed, DatastoreCorrupt)):
        check(folder, plan)


def test_an_index_of_another_shard_of_the_same_size_is_found(tmp_path: Path) -> None:
    # Documents of 84 tokens, five to a shard.
    source = write_jsonl(tmp_path / "equal.jsonl", ["x" * i + "y" * (84 - i) for i in range(1, 30)])
    settings = given(
        tmp_path / "stores", source, window=84, stride=42, shard_entries=83 * 5, held_out_fraction=0.1, force=True
    )
    build(settings)
    with opened(settings) as store:
        folder = Path(shutil.copytree(store.folder, tmp_path / "store"))
    equal = [number for number, size in enumerate(sizes(folder)) if size == sizes(folder)[0]]
    assert len(equal) >= 3
    paths = [folder / layout.shard_name(number) / layout.INDEX for number in equal]
    files = [path.read_bytes() for path in paths]
    for path, content in zip(paths, files[1:] + files[:1], strict=True):
        path.unlink()
        path.write_bytes(content)
    plan = plan_of(settings, tmp_path / "plan")
    with pytest.raises(VerifyFailed, match="self-recall"):
        check(folder, plan)


def test_keys_that_were_changed_are_found(folder: Path, plan: Plan) -> None:
    path = folder / layout.shard_name(2) / layout.KEYS
    keys = map_keys(path, DIM, sizes(folder)[2]).copy()
    path.unlink()
    write_keys(path, keys[::-1].copy())
    with pytest.raises(VerifyFailed, match="self-recall"):
        check(folder, plan)


def test_a_store_of_another_plan_is_refused(folder: Path, plan: Plan) -> None:
    fewer = replace(plan, documents=plan.documents[:-1])
    with pytest.raises(VerifyFailed, match=rf"holds {plan.num_entries} entries, the plan has {fewer.num_entries}"):
        check(folder, fewer)
    first, *rest = plan.documents
    empty = replace(first, id="empty", num_tokens=1)
    with pytest.raises(VerifyFailed, match=rf"holds {len(rest) + 1} documents, the plan has {len(rest) + 2}"):
        check(folder, replace(plan, documents=[first, *rest, empty]))


@pytest.mark.parametrize("file", [layout.KEYS, layout.VALUES, layout.INDEX])
def test_a_flipped_bit_is_found_by_checksums(folder: Path, file: str) -> None:
    path = folder / layout.shard_name(0) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatastoreCorrupt, match="has sha256"):
        Datastore.open_folder(folder, checksums=True)


@pytest.mark.parametrize("file", [layout.KEYS, layout.VALUES, layout.INDEX])
def test_a_truncated_file_is_found_at_once(folder: Path, file: str) -> None:
    path = folder / layout.shard_name(0) / file
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DatastoreCorrupt, match="bytes, the manifest needs"):
        Datastore.open_folder(folder)
