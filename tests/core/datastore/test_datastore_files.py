"""What a reader accepts: nothing but the files of the manifest, whole; and how a version comes to be published."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from small_store import Plan, build, open_new, random_keys

from knnlm_core.datastore import layout
from knnlm_core.datastore import publish as publish_module
from knnlm_core.datastore.arrays import map_keys, map_values
from knnlm_core.datastore.calibration import Calibration, calibration_id, read_calibration, write_calibration
from knnlm_core.datastore.checksums import record_files, verify_files
from knnlm_core.datastore.documents import Document
from knnlm_core.datastore.index import ivf_spec, map_index
from knnlm_core.datastore.manifest import Manifest, version_of
from knnlm_core.datastore.publish import publish, set_current
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.writer import ShardWriter, is_finished
from knnlm_core.errors import (
    BuildConflict,
    BuildError,
    DatastoreCorrupt,
    DatastoreMismatch,
    DatastoreNotFound,
    InvalidParameter,
)

IVF = ivf_spec(4, nprobe=2, train_vectors=160)
FILES = (
    "documents.parquet",
    "held_out.parquet",
    "trained.faiss",
    "shard-00000/keys.arrow",
    "shard-00001/values.arrow",
    "shard-00001/index.faiss",
)


@pytest.fixture
def version_folder(tmp_path: Path) -> Path:
    plan = Plan(random_keys(200, 6), cuts=(90,), spec=IVF, held_out=(Document("held", "out"),))
    with open_new(tmp_path, plan) as store:
        return store.folder


def reopen(folder: Path, *, checksums: bool = False) -> None:
    Datastore.open(folder.parent.parent, folder.parent.name, checksums=checksums).close()


@pytest.mark.parametrize("file", FILES)
def test_a_missing_truncated_or_longer_file_is_refused_at_every_open(version_folder: Path, file: str) -> None:
    path = version_folder / file
    content = path.read_bytes()
    for changed in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(
            DatastoreCorrupt, match=f"{file} has {len(changed)} bytes, the manifest needs {len(content)}"
        ):
            reopen(version_folder)
    path.unlink()
    with pytest.raises(DatastoreCorrupt, match=f"{file} is missing"):
        reopen(version_folder)


@pytest.mark.parametrize("file", FILES)
def test_a_single_flipped_bit_is_found_by_checksums(version_folder: Path, file: str) -> None:
    path = version_folder / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatastoreCorrupt, match=f"{file} has sha256"):
        reopen(version_folder, checksums=True)


def test_verification_reads_every_byte_and_says_so(version_folder: Path) -> None:
    manifest, read = Manifest.read(version_folder / "manifest.json"), list[int]()
    verify_files(version_folder, manifest, read.append)
    assert sum(read) == manifest.num_bytes


def test_a_file_that_the_manifest_does_not_name_is_refused(version_folder: Path) -> None:
    (version_folder / "shard-00000" / "extra").write_bytes(b"")
    with pytest.raises(DatastoreCorrupt, match="shard-00000/extra is not in the manifest"):
        reopen(version_folder)


def test_a_link_in_place_of_a_file_is_refused(version_folder: Path, tmp_path: Path) -> None:
    path = version_folder / "documents.parquet"
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DatastoreCorrupt, match=r"documents\.parquet must be a regular file"):
        reopen(version_folder)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].update({"../../x": m["files"]["trained.faiss"]}), "'../../x' is not a plain relative"),
        (lambda m: m["files"].update({"/x": m["files"]["trained.faiss"]}), "'/x' is not a plain relative path"),
        (lambda m: m["files"].update({"a\\x": m["files"]["trained.faiss"]}), "is not a plain relative path"),
        (lambda m: m["files"].update({"x": m["files"]["trained.faiss"]}), "names 'x', which this format does not have"),
        (lambda m: m["files"].pop("trained.faiss"), "lacks 'trained.faiss'"),
        (lambda m: m["shards"][1].update(name="../shard-00001"), "shard 1 must be 'shard-00001' from entry 90"),
        (lambda m: m["shards"][1].update(first_entry=91), "shard 1 must be 'shard-00001' from entry 90"),
        (lambda m: m.update(entries=201), r"sum over the shards \(200\), it is 201"),
        (lambda m: m["key"].update(dim=7), "must be the LM's"),
        (lambda m: m["key"].update(dim=0), "key.dim"),
        (lambda m: m.update(metric="cosine"), "metric"),
        (lambda m: m["index"].update(by_residual=True), "index.by_residual"),
        (lambda m: m["index"].update(nprobe=5), "nprobe must be in 1 … nlist"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.pop("lm"), "lm"),
        (lambda m: m.update(name="other"), "name is 'other', its folder needs 'law'"),
        (lambda m: m.update(version="0" * 16), "version is '0000000000000000', its folder needs"),
        (lambda m: m["documents"].update(count=2), r"documents\.parquet has 1 documents, the manifest needs 2"),
        (lambda m: m["index"].update(nlist=8, factory="IVF8,SQfp16"), "nlist is 4, the manifest needs 8"),
        (lambda m: (m["lm"].update(key_dim=7), m["key"].update(dim=7)), "keys.arrow has the columns .*6.* needs .*7"),
        (lambda m: (m["shards"][0].update(entries=89), m["shards"][1].update(first_entry=89, entries=111)), "has 90"),
        (lambda m: m.update(format_version="1"), "format_version must be an integer"),
    ],
)  # fmt: skip
def test_a_manifest_that_contradicts_itself_or_the_files_is_refused(
    version_folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    change_manifest(version_folder, change)
    with pytest.raises(DatastoreCorrupt, match=message):
        reopen(version_folder)


def test_another_format_version_is_refused_naming_have_and_need(version_folder: Path) -> None:
    change_manifest(version_folder, lambda m: m.update(format_version=2, unknown="field of the future"))
    with pytest.raises(DatastoreMismatch, match="format_version is 2, this reader needs 1"):
        reopen(version_folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a": NaN}', b"[" * 10_000, b"\xff"])
def test_a_manifest_that_is_not_a_json_object_is_refused(version_folder: Path, content: bytes) -> None:
    (version_folder / "manifest.json").write_bytes(content)
    with pytest.raises(DatastoreCorrupt, match=r"manifest\.json"):
        reopen(version_folder)


def test_an_oversized_manifest_is_refused_unread(version_folder: Path) -> None:
    with (version_folder / "manifest.json").open("r+b") as file:
        file.truncate(4 * 1024 * 1024 + 1)
    with pytest.raises(DatastoreCorrupt, match="at most 4194304 bytes"):
        reopen(version_folder)


def test_the_manifest_survives_a_round_trip(version_folder: Path) -> None:
    path = version_folder / "manifest.json"
    manifest = Manifest.read(path)
    before = path.read_bytes()
    manifest.write(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("batches", [0, 2])
def test_arrays_in_any_other_number_of_batches_are_refused(tmp_path: Path, batches: int) -> None:
    schema = pa.schema([pa.field(name, pa.int32(), nullable=False) for name in ("value", "char_start", "char_end")])
    batch = pa.RecordBatch.from_arrays([pa.array([1, 2], pa.int32())] * 3, schema=schema)
    with pa.OSFile(str(tmp_path / "values.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for _ in range(batches):
            writer.write_batch(batch)
    with pytest.raises(DatastoreCorrupt, match=f"{batches} record batches, needs exactly 1"):
        map_values(tmp_path / "values.arrow", 2)


def test_compressed_arrays_are_refused(tmp_path: Path) -> None:
    schema = pa.schema([pa.field(name, pa.int32(), nullable=False) for name in ("value", "char_start", "char_end")])
    batch = pa.RecordBatch.from_arrays([pa.array([7] * 1000, pa.int32())] * 3, schema=schema)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(tmp_path / "v"), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(batch)
    with pytest.raises(DatastoreCorrupt, match="compressed"):
        map_values(tmp_path / "v", 1000)


def test_a_truncated_array_or_index_is_refused_even_without_a_manifest(version_folder: Path) -> None:
    shard = version_folder / "shard-00000"
    assert map_keys(shard / "keys.arrow", 6, 90).shape == (90, 6)
    for file, read in (
        ("keys.arrow", lambda path: map_keys(path, 6, 90)),
        ("values.arrow", lambda path: map_values(path, 90)),
        ("index.faiss", lambda path: map_index(path, IVF, dim=6, entries=90)),
    ):
        content = (shard / file).read_bytes()
        for size in (0, 7, len(content) // 3, len(content) - 100):
            (shard / file).write_bytes(content[:size])
            with pytest.raises(DatastoreCorrupt, match=file):
                read(shard / file)


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "../a", "A", ".a", "-a", "a.tmp", "calibrations", "tail", "a\n", "a" * 64, "a\0", "ä"]
)
def test_bad_names_never_become_paths(tmp_path: Path, name: str) -> None:
    for use in (lambda: Datastore.open(tmp_path, name), lambda: publish(tmp_path, name, "0" * 16)):
        with pytest.raises(InvalidParameter, match="`name` of a datastore must be"):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", ["", "0" * 15, "0" * 17, "A" * 16, "../" + "0" * 13, "0" * 16 + "\n"])
def test_bad_versions_never_become_paths(tmp_path: Path, version: str) -> None:
    with pytest.raises(InvalidParameter, match="`version` must be 16 lowercase hex digits"):
        layout.version_folder(tmp_path, "law", version)


def test_what_is_not_there_is_not_found_and_what_is_there_is_named(tmp_path: Path, version_folder: Path) -> None:
    with pytest.raises(DatastoreNotFound, match="published: law"):
        Datastore.open(tmp_path, "medicine")
    with pytest.raises(DatastoreNotFound, match=f"published: {version_folder.name}"):
        Datastore.open(tmp_path, "law", "0" * 16)
    with pytest.raises(DatastoreNotFound, match="there is no folder"):
        layout.published_names(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "line", [b"", b"0123456789abcdef\n", b"0123456789abcdef -", b"../../etc/passwd -\n", b"0" * 999]
)
def test_a_current_that_is_not_one_valid_line_is_refused(tmp_path: Path, version_folder: Path, line: bytes) -> None:
    (version_folder.parent / "CURRENT").write_bytes(line)
    with pytest.raises(DatastoreCorrupt, match="CURRENT must be one line"):
        Datastore.open(tmp_path, "law")


def test_versions_depend_on_the_inputs_and_not_on_their_order() -> None:
    assert version_of({"a": 1, "b": ["x", None]}) == version_of({"b": ["x", None], "a": 1})
    assert len({version_of({"a": value}) for value in (1, 2, "1", None, [1], True)}) == 6


def calibration_for(version: str, **changes: Any) -> Calibration:
    protocol = {"window": 512}
    settings: dict[str, Any] = {
        "id": calibration_id(version, protocol), "datastore_version": version, "k": 32, "knn_temperature": 1.5,
        "lmbda": 0.25, "protocol": protocol, "report": {"gain": 0.07}, "helps": True,
    }  # fmt: skip
    return Calibration(**(settings | changes))


def test_a_calibration_comes_with_current_and_only_for_its_version(tmp_path: Path) -> None:
    keys = random_keys(20, 4)
    first, second = build(tmp_path, Plan(keys)), build(tmp_path, Plan(keys, salt=1))
    calibration = calibration_for(first)
    folder = write_calibration(tmp_path, "law", calibration)
    assert json.loads((folder / "calibration.json").read_text())["lambda"] == 0.25
    assert read_calibration(tmp_path, "law", calibration.id) == calibration
    with pytest.raises(DatastoreMismatch, match="datastore_version"):
        publish(tmp_path, "law", second, calibration.id)
    assert layout.published_versions(tmp_path, "law") == []

    publish(tmp_path, "law", first, calibration.id)
    assert Datastore.open(tmp_path, "law").calibration == calibration
    publish(tmp_path, "law", second)
    assert Datastore.open(tmp_path, "law").calibration is None
    assert Datastore.open(tmp_path, "law", first).calibration == calibration  # its newest, CURRENT naming another
    assert Datastore.open(tmp_path, "law", first, calibration=calibration.id).calibration == calibration
    with pytest.raises(DatastoreMismatch, match="datastore_version"):
        Datastore.open(tmp_path, "law", calibration=calibration.id)
    set_current(tmp_path, "law", first, calibration.id)
    assert Datastore.open(tmp_path, "law").version == first
    with pytest.raises(BuildConflict, match="other content"):
        write_calibration(tmp_path, "law", calibration_for(first, k=64))
    with pytest.raises(ValueError, match="lmbda"):
        calibration_for(first, lmbda=1.5)
    with pytest.raises(ValueError, match="knn_temperature"):
        calibration_for(first, knn_temperature=0)


def test_a_published_version_is_never_published_again(tmp_path: Path) -> None:
    plan = Plan(random_keys(20, 4))
    version = build(tmp_path, plan)
    folder = publish(tmp_path, "law", version)
    before = record_files(folder)
    build(tmp_path, plan)
    with pytest.raises(BuildConflict, match="published already"):
        publish(tmp_path, "law", version)
    assert record_files(folder) == before


def test_a_build_with_a_wrong_file_is_not_published(tmp_path: Path) -> None:
    version = build(tmp_path, Plan(random_keys(20, 4)))
    (layout.building_folder(tmp_path, "law", version) / "keys.raw").write_bytes(b"left over")
    with pytest.raises(DatastoreCorrupt, match="not in the manifest"):
        publish(tmp_path, "law", version)
    assert layout.published_names(tmp_path) == []


@pytest.mark.parametrize("step", ["sync_file", "rename", "set_current", "replace"])
def test_a_crash_while_publishing_leaves_the_old_version_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    keys = random_keys(20, 4)
    old = build(tmp_path, Plan(keys))
    publish(tmp_path, "law", old)
    new = build(tmp_path, Plan(keys, salt=1))

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os if step in {"rename", "replace"} else publish_module, step, crash)
        with pytest.raises(KeyboardInterrupt):
            publish(tmp_path, "law", new)
    assert Datastore.open(tmp_path, "law", checksums=True).version == old
    renamed = step in {"set_current", "replace"}
    assert layout.published_versions(tmp_path, "law") == sorted([old, new] if renamed else [old])
    set_current(tmp_path, "law", new) if renamed else publish(tmp_path, "law", new)
    assert Datastore.open(tmp_path, "law", checksums=True).version == new


def append(writer: ShardWriter, keys: Any) -> None:
    n = len(keys)
    writer.append(keys, np.arange(n), np.zeros((n, 2), dtype=np.int64))


@pytest.mark.parametrize(
    ("bad", "message"),
    [(np.nan, "holds NaN or infinity"), (-np.inf, "holds NaN or infinity"), (-65_505.0, "reaches 65505")],
)
@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_keys_that_float16_cannot_hold_are_refused_and_not_written(
    tmp_path: Path, bad: float, message: str, make: Callable[[Any], Any]
) -> None:
    good = np.full((3, 4), 65_504.0, dtype=np.float32)
    wrong = good.copy()
    wrong[1, 2] = bad
    with ShardWriter(tmp_path / "shard-00000", 4) as writer:
        append(writer, make(good))
        with pytest.raises(BuildError, match=rf"entry 4 of the shard {message}"):
            append(writer, make(wrong))
        assert writer.finish() == 3
    assert (map_keys(tmp_path / "shard-00000" / "keys.arrow", 4, 3) == 65_504).all()


@pytest.mark.parametrize(
    ("keys", "values", "spans"),
    [
        (np.ones((2, 3)), [1, 2], [[0, 1]] * 2),
        (np.ones((2, 4)), [1], [[0, 1]] * 2),
        (np.ones((2, 4)), [1, 2], [[0, 1]]),
        (np.ones((1, 4)), [-1], [[0, 1]]),
        (np.ones((1, 4)), [2**31], [[0, 1]]),
        (np.ones((1, 4)), [1], [[2, 1]]),
        (np.ones((1, 4)), [1.5], [[0, 1]]),
    ],
)
def test_entries_that_do_not_fit_are_refused(tmp_path: Path, keys: Any, values: Any, spans: Any) -> None:
    with ShardWriter(tmp_path, 4) as writer:
        with pytest.raises(BuildError):
            writer.append(keys, np.array(values), np.array(spans))
        assert writer.entries == 0
        with pytest.raises(BuildError, match="no entries"):
            writer.finish()


def test_a_finished_shard_is_not_overwritten_and_an_unfinished_one_is_started_anew(tmp_path: Path) -> None:
    keys = random_keys(5, 4)
    with ShardWriter(tmp_path, 4) as writer:
        append(writer, keys)
    assert not is_finished(tmp_path)
    (tmp_path / "keys.arrow").write_bytes(b"of a crash in finish")
    (tmp_path / "values.arrow.part").write_bytes(b"of a crash in finish")
    with ShardWriter(tmp_path, 4) as writer:
        append(writer, keys[:2])
        writer.finish()
    assert sorted(os.listdir(tmp_path)) == ["keys.arrow", "values.arrow"]
    assert np.array_equal(map_keys(tmp_path / "keys.arrow", 4, 2), keys[:2])
    with pytest.raises(BuildConflict, match="finished shard"):
        ShardWriter(tmp_path, 4)
    (tmp_path / "values.raw").write_bytes(b"of a crash at the very end of finish")
    assert not is_finished(tmp_path)
    with ShardWriter(tmp_path, 4) as writer:
        append(writer, keys)
        writer.finish()
    assert sorted(os.listdir(tmp_path)) == ["keys.arrow", "values.arrow"]


_CHILD = """
import sys, numpy as np
from pathlib import Path
from knnlm_core.datastore.writer import ShardWriter
keys, spans = np.ones((2000, 64), np.float16), np.zeros((2000, 2), np.int64)
print("ready", flush=True)
for number in range(10**6):
    with ShardWriter(Path(sys.argv[1]) / f"shard-{number:05d}", 64) as writer:
        for _ in range(10):
            writer.append(keys, np.arange(2000), spans)
        writer.finish()
"""


def test_a_killed_writer_leaves_whole_shards_or_nothing_readable(tmp_path: Path) -> None:
    building = layout.building_folder(tmp_path, "law", "0" * 16)
    building.mkdir(parents=True)
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(building)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child, child.stdout as out:
        assert out.readline() == b"ready\n"
        time.sleep(0.35)
        child.send_signal(signal.SIGKILL)
    shards = sorted(building.iterdir())
    assert shards
    for shard in shards:
        assert is_finished(shard) or shard == shards[-1]
        if is_finished(shard):
            assert map_keys(shard / "keys.arrow", 64, 20_000).shape == (20_000, 64)
            assert len(map_values(shard / "values.arrow", 20_000).values) == 20_000
    assert layout.published_names(tmp_path) == []
    with pytest.raises(DatastoreNotFound):
        Datastore.open(tmp_path, "law")
    with pytest.raises(DatastoreCorrupt, match=r"manifest\.json is missing"):
        Datastore.open_folder(building)
    # A new start discards what the crash left.
    unfinished = building / "shard-99999"
    shutil.copytree(shards[-1], unfinished)
    (unfinished / "keys.raw").write_bytes(b"left over")
    with ShardWriter(unfinished, 64) as writer:
        append(writer, np.ones((1, 64), np.float16))
        writer.finish()
    assert sorted(os.listdir(unfinished)) == ["keys.arrow", "values.arrow"]


def test_file_descriptors_do_not_leak(tmp_path: Path, version_folder: Path) -> None:
    def cycle() -> None:
        with Datastore.open(tmp_path, "law") as store:
            store.search(torch.zeros(1, 6), 3)
            store.document("doc/0")

    cycle()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        cycle()
    assert len(os.listdir("/proc/self/fd")) == before
    mapped = Path("/proc/self/maps").read_text()
    assert str(version_folder) not in mapped
    (version_folder / "trained.faiss").unlink()
    for _ in range(5):
        with pytest.raises(DatastoreCorrupt):
            reopen(version_folder)
    assert len(os.listdir("/proc/self/fd")) == before


def test_opening_maps_and_does_not_load(tmp_path: Path) -> None:
    with open_new(tmp_path, Plan(random_keys(300, 8), spec=IVF)) as store:
        mapped = Path("/proc/self/maps").read_text()
        for file in ("keys.arrow", "values.arrow", "index.faiss"):
            assert str(store.folder / "shard-00000" / file) in mapped
        with pytest.raises(ValueError, match="read-only"):
            store._parts()[0].shard.keys[0] = 0


@pytest.mark.parametrize("value", [512, 2**31 - 1])
def test_a_value_beyond_the_vocabulary_is_refused_when_it_is_found(tmp_path: Path, value: int) -> None:
    with open_new(tmp_path, Plan(np.eye(4, dtype=np.float16), values=np.array([0, 511, value, 1]))) as store:
        assert store.search(torch.eye(4)[1:2], 1).values.tolist() == [[511]]
        with pytest.raises(DatastoreCorrupt, match=f"0 … 511, some are {value}"):
            store.search(torch.eye(4)[2:3], 1)
