"""Whatever happens to the files, opening them ends in a refusal that says so, and nothing that is open notices."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import NAME, Damage, Runner, Victim, every_damage, flipped_bits, make_victim

from knnlm_core.datastore import reader
from knnlm_core.datastore.checksums import verify_files
from knnlm_core.datastore.reader import Datastore, find_version
from knnlm_core.errors import DatastoreCorrupt

MANY = 2_000
MOST_BYTES = 256 << 20  # of memory for the worst JSON that is small enough to be parsed at all


def damaged(folder: Path, *options: str) -> dict[str, Any]:
    """What the process reports that damages and opens; it must live to do so."""
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("damage.py")), str(folder), *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = folder / "spare" / "last"
    assert child.returncode == 0, f"{last.read_text() if last.exists() else 'before any case'}\n{child.stderr}"
    report: dict[str, Any] = json.loads(child.stdout)
    return report


@pytest.mark.slow
def test_every_damage_is_refused_within_bounds_and_nobody_notices(tmp_path: Path) -> None:
    report = damaged(tmp_path)
    outcomes = {kind: sum(counts.values()) for kind, counts in report["outcomes"].items()}
    assert report["wrong"] == []
    assert sum(outcomes.values()) >= MANY
    assert {"random bytes", "truncated", "extended", "missing", "exchanged", "huge claim", "hostile manifest"} <= {
        *outcomes
    }
    opened = sum(counts.get("opened", 0) for counts in report["outcomes"].values())
    assert opened <= 10  # JSON that lost its last line break, and the like
    assert report["bytes"] < MOST_BYTES


def test_files_that_lie_with_a_right_checksum_are_refused_or_harmless(tmp_path: Path) -> None:
    report = damaged(tmp_path, "--lying")
    assert report["wrong"] == []
    (counts,) = report["outcomes"].values()
    assert counts.keys() == {"DatastoreCorrupt", "opened"}
    assert counts["DatastoreCorrupt"] > 50


@pytest.fixture
def victim(tmp_path: Path) -> Victim:
    return make_victim(tmp_path / "root")


def test_the_cases_are_the_same_for_a_seed_and_others_for_another(victim: Victim) -> None:
    first, again, other = ([*flipped_bits(victim, random.Random(seed))] for seed in (1, 1, 2))
    assert first == again != other
    kinds = {damage.kind for damage in every_damage(victim, 1)}
    assert len(kinds) > 12


def test_what_opens_although_it_is_damaged_is_reported(
    victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spare").mkdir()
    runner = Runner(victim, tmp_path / "spare")
    keys = victim.path("shard-00000/keys.arrow")
    content = victim.read(keys)
    flipped = Damage("flip", {keys: content[:-300] + bytes([content[-300] ^ 1]) + content[-299:]})
    assert runner.run(iter([flipped] * 2))["wrong"] == []
    monkeypatch.setattr(reader, "verify_files", lambda *_, **__: None)
    assert len(runner.run(iter([flipped] * 2))["wrong"]) == 1  # the first is checked by `verify_once`


@pytest.mark.parametrize("remembered", [False, True])
@pytest.mark.parametrize("file", ["shard-00001/index.faiss", "shard-00000/keys.arrow", "documents.parquet"])
def test_nothing_is_parsed_before_its_checksum_is_compared(
    victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, remembered: bool
) -> None:
    path = victim.root / victim.path(file)
    content = path.read_bytes()
    how: dict[str, Any] = {"verified": tmp_path / "verified"} if remembered else {"checksums": True}
    Datastore.open(victim.root, NAME, **how).close()
    path.write_bytes(content[:100] + b"\xff" * 8 + content[108:])

    def parsed(*_: object, **__: object) -> None:
        raise AssertionError("a file was parsed that is not what was written")

    for module, name in ((faiss, "read_index"), (pa, "memory_map"), (pq, "ParquetFile")):
        monkeypatch.setattr(module, name, parsed)
    with pytest.raises(DatastoreCorrupt, match=f"{file} has sha256"):
        Datastore.open(victim.root, NAME, **how)
    found = find_version(victim.root, NAME)
    with pytest.raises(DatastoreCorrupt, match=f"{file} has sha256"):
        verify_files(found.folder, found.manifest)


def test_a_version_is_read_in_full_once_and_again_when_a_file_is_another(victim: Victim, tmp_path: Path) -> None:
    read = list[int]()
    for more in (True, False, True):
        before = len(read)
        Datastore.open(victim.root, NAME, verified=tmp_path / "verified", progress=read.append).close()
        assert (len(read) > before) is more
        if not more:
            path = victim.root / victim.path("trained.faiss")
            path.write_bytes(path.read_bytes())
