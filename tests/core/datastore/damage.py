"""Ways to damage a published datastore, and a process of its own in which each of them is opened.

python damage.py FOLDER --seed 1     builds a small root in FOLDER, damages it case by case, prints a report as JSON
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent)]

from small_store import WORD, Plan, build, random_keys  # noqa: E402

from knnlm_core.datastore import layout  # noqa: E402
from knnlm_core.datastore.calibration import Calibration, calibration_id, write_calibration  # noqa: E402
from knnlm_core.datastore.canaries import write_canaries  # noqa: E402
from knnlm_core.datastore.checksums import record_files  # noqa: E402
from knnlm_core.datastore.documents import Document  # noqa: E402
from knnlm_core.datastore.index import ivf_spec  # noqa: E402
from knnlm_core.datastore.ledger import read_ledger  # noqa: E402
from knnlm_core.datastore.living import LivingName  # noqa: E402
from knnlm_core.datastore.publish import publish  # noqa: E402
from knnlm_core.datastore.reader import Datastore  # noqa: E402
from knnlm_core.datastore.sealed import SEAL, sealed_text  # noqa: E402
from knnlm_core.datastore.segments import NewDocument, open_segment  # noqa: E402
from knnlm_core.errors import (  # noqa: E402
    DatastoreCorrupt,
    DatastoreMismatch,
    DatastoreNotFound,
    InvalidParameter,
)

NAME, OTHER = "law", "news"
REFUSALS = (DatastoreCorrupt, DatastoreMismatch, DatastoreNotFound, InvalidParameter)
DIM, ENTRIES = 6, 200
FOLDER = "a folder in place of the file"
SHARDS = [f"shard-0000{shard}/{file}" for shard in (0, 1) for file in ("keys.arrow", "values.arrow", "index.faiss")]
VERSION = ("documents.parquet", "held_out.parquet", "trained.faiss", "canaries.arrow", *SHARDS)
SEGMENT = ("documents.parquet", "keys.arrow", "values.arrow")
REVISIONS = (1, 2)


class Damage(NamedTuple):
    """What to put in place of some files: other bytes, a folder, or nothing."""

    kind: str
    files: Mapping[str, bytes | str | None]  # by path relative to the root


class Victim(NamedTuple):
    """A root with a published name in one version, and another name to take files from."""

    root: Path
    version: str
    calibration: str
    other: str  # version of the other name, whose files have the same sizes

    def path(self, file: str) -> str:
        """A file of the version, relative to the root."""
        return f"{NAME}/{self.version}/{file}"

    @property
    def manifest(self) -> str:
        """manifest.json, relative to the root."""
        return self.path(layout.MANIFEST)

    @property
    def calibrated(self) -> str:
        """calibration.json, relative to the root."""
        return f"{NAME}/{layout.CALIBRATIONS}/{self.calibration}/{layout.CALIBRATION}"

    def segment(self, revision: int, file: str) -> str:
        """A file of what was learned, relative to the root."""
        return f"{NAME}/{layout.TAIL}/{revision:016d}/{file}"

    @property
    def ledger(self) -> str:
        """LEDGER, relative to the root."""
        return f"{NAME}/{layout.LEDGER}"

    @property
    def binary(self) -> list[str]:
        """Everything but the JSON files, relative to the root."""
        learned = [self.segment(revision, file) for revision in REVISIONS for file in SEGMENT]
        return [*(self.path(file) for file in VERSION), *learned]

    @property
    def current(self) -> str:
        """CURRENT, relative to the root."""
        return f"{NAME}/{layout.CURRENT}"

    @property
    def every_file(self) -> list[str]:
        """All that is looked at when a name is opened to be served."""
        segments = [self.segment(revision, layout.SEGMENT) for revision in REVISIONS]
        return [self.current, self.calibrated, self.manifest, self.ledger, *segments, *self.binary]

    def read(self, file: str) -> bytes:
        """What the file holds while nothing is damaged."""
        return (self.root / file).read_bytes()


def make_victim(root: Path) -> Victim:
    """Two names, each with trained lists in two shards of one size, held-out text, canaries and a calibration.

    The first has also learned two documents and forgotten one.
    """
    versions, calibrations = [], []
    for seed, name in enumerate((NAME, OTHER)):
        plan = Plan(
            random_keys(ENTRIES, DIM, seed), np.arange(ENTRIES) + seed, cuts=(ENTRIES // 2,),
            spec=ivf_spec(4, nprobe=2, train_vectors=160), held_out=(Document("held", f"out {seed}"),), name=name,
            document_sizes=(50 + seed, 0, 150 - seed), salt=seed,
        )  # fmt: skip
        version = build(root, plan)
        folder = layout.building_folder(root, name, version)
        with Datastore.open_folder(folder) as store:
            queries = store.keys(torch.arange(0, ENTRIES, 20)) + 0.25
            write_canaries(folder / layout.CANARIES, queries, store.search_exact(queries, 32), ["held"] * len(queries))
            store.manifest.model_copy(update={"files": record_files(folder)}).write(folder / layout.MANIFEST)
        protocol: dict[str, Any] = {"window": 512, "documents": ["held"]}
        calibration = Calibration(
            id=calibration_id(version, protocol), datastore_version=version, k=32, knn_temperature=1.5, lmbda=0.25,
            protocol=protocol, report={"gain": 0.07, "fits": [1e-05, {"τ": 2.5}]}, helps=True,
        )  # fmt: skip
        write_calibration(root, name, calibration)
        publish(root, name, version, calibration.id)
        versions.append(version)
        calibrations.append(calibration.id)
    with Datastore.open(root, NAME) as store:
        living = LivingName(root, NAME)
        for number in REVISIONS:
            text = Document(f"new/{number}", WORD * 9)
            spans = np.array([[8 * i, 8 * i + 8] for i in range(1, 9)])
            new = NewDocument(text, random_keys(8, DIM, number + 7), np.arange(8) + number, spans)
            living.add([new], living.snapshot(store))
        living.delete(["doc/0"])
    return Victim(root, versions[0], calibrations[0], versions[1])


def every_damage(victim: Victim, seed: int) -> Iterator[Damage]:
    """All cases, those of chance by ``seed``."""
    draw = random.Random(seed)
    yield from flipped_bits(victim, draw)
    yield from other_sizes(victim, draw)
    yield from exchanged_files(victim)
    yield from huge_claims(victim, draw)
    yield from changed_fields(victim, draw)
    yield from hostile_manifests(victim)
    yield from hostile_bytes(victim)


def flipped_bits(victim: Victim, draw: random.Random) -> Iterator[Damage]:
    """One bit, a few bits, and a run of changed bytes in every file."""
    for file in victim.every_file:
        content = victim.read(file)
        for count in [1] * 40 + [2, 3, 8, 32] * 3:
            changed = bytearray(content)
            for bit in draw.sample(range(8 * len(content)), count):
                changed[bit // 8] ^= 1 << bit % 8
            yield Damage(f"{count} flipped bits", {file: bytes(changed)})
        for _ in range(8):
            first = draw.randrange(len(content))
            run = draw.randbytes(min(len(content) - first, draw.randint(1, 512)))
            if content[first : first + len(run)] != run:
                yield Damage("random bytes", {file: content[:first] + run + content[first + len(run) :]})


def other_sizes(victim: Victim, draw: random.Random) -> Iterator[Damage]:
    """Every file shorter, longer, missing, or a folder."""
    for file in victim.every_file:
        content = victim.read(file)
        sizes = {0, 1, 7, 8, len(content) // 2, len(content) - 1, *(draw.randrange(len(content)) for _ in range(6))}
        for size in sorted(sizes):
            if size != len(content):
                yield Damage("truncated", {file: content[:size]})
        for more in (b"\0", b" ", b"\n", b"}", content, draw.randbytes(4096)):
            if more.strip(b" \n") or file in (victim.current, *victim.binary):  # it says nothing at the end of JSON
                yield Damage("extended", {file: content + more})
        yield Damage("missing", {file: None})
        yield Damage("folder", {file: FOLDER})
    yield Damage("unknown file", {victim.path("keys.raw"): b"left over"})
    yield Damage("unknown file", {victim.path("shard-00002/keys.arrow"): victim.read(victim.path("trained.faiss"))})
    yield Damage("unknown file", {victim.segment(1, "index.faiss"): b"left over"})


def exchanged_files(victim: Victim) -> Iterator[Damage]:
    """Files in each other's place: of two shards, of two kinds, of two datastores."""
    files = [*victim.binary, *(victim.segment(revision, layout.SEGMENT) for revision in REVISIONS)]
    for one, other in product(files, files):
        if one < other:
            yield Damage("exchanged", {one: victim.read(other), other: victim.read(one)})
    there = f"{OTHER}/{victim.other}/"
    for file in (*VERSION, layout.MANIFEST):
        yield Damage("of another datastore", {victim.path(file): victim.read(there + file)})
    for left_out in VERSION:
        whole = {victim.path(file): victim.read(there + file) for file in VERSION if file != left_out}
        yield Damage("of another datastore", whole | {victim.manifest: victim.read(there + layout.MANIFEST)})
        yield Damage("of another datastore", whole)
    yield Damage("of another datastore", {victim.current: victim.read(f"{OTHER}/{layout.CURRENT}")})
    calibrations = victim.root / OTHER / layout.CALIBRATIONS
    for path in calibrations.glob(f"*/{layout.CALIBRATION}"):
        yield Damage("of another datastore", {victim.calibrated: path.read_bytes()})


def huge_claims(victim: Victim, draw: random.Random) -> Iterator[Damage]:
    """Numbers in headers and footers that promise more than there is, in files of the right size."""
    claims = (2**63 - 1, 2**62, 2**40, 2**33, 2**32 - 1, 2**31 - 1, 2**30)
    for file in victim.binary:
        content = victim.read(file)
        ends = [*range(0, 320, 4), *range(max(0, len(content) - 320), len(content) - 8, 4)]
        for offset in draw.sample(ends, 30):
            claim = draw.choice(claims)
            number = claim.to_bytes(4 if claim < 2**32 else 8, "little")
            changed = content[:offset] + number + content[offset + len(number) :]
            if changed != content:
                yield Damage("huge claim", {file: changed})


def lying_files(victim: Victim, draw: random.Random) -> Iterator[Damage]:
    """`huge_claims` whose checksums are right, so that whoever reads Arrow, Parquet or an index has to notice."""
    for damage in huge_claims(victim, draw):
        ((file, content),) = damage.files.items()
        if file.startswith(victim.path("")) and isinstance(content, bytes):
            manifest = json.loads(victim.read(victim.manifest))
            del manifest[SEAL]
            record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            manifest["files"][file.removeprefix(victim.path(""))] = record
            yield Damage("lying file", {file: content, victim.manifest: sealed_text(manifest).encode()})


def changed_fields(victim: Victim, draw: random.Random) -> Iterator[Damage]:
    """Any field of the JSON files with a value of any type, checksum left as it was."""
    values: tuple[Any, ...] = (
        None, True, 0, -1, 1.5, 2**63 - 1, 2**63, 10**400, "", "x", "../x", "0" * 16, "f" * 64, [], [[]], {}, {"a": 1},
        "\ud800".encode("utf-8", "replace").decode(),
    )  # fmt: skip
    for file in (victim.manifest, victim.calibrated, victim.ledger, victim.segment(1, layout.SEGMENT)):
        content = json.loads(victim.read(file))
        places = list(_places(content))
        for _ in range(120):
            changed, place, value = json.loads(victim.read(file)), draw.choice(places), draw.choice(values)
            inside = changed
            for part in place[:-1]:
                inside = inside[part]
            if inside[place[-1]] == value and type(inside[place[-1]]) is type(value):
                continue
            inside[place[-1]] = value
            yield Damage("changed field", {file: json.dumps(changed).encode()})
        for field in content:
            if field != SEAL:
                without = {name: value for name, value in content.items() if name != field}
                yield Damage("missing field", {file: json.dumps(without).encode()})


def _places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path and path != (SEAL,):
        yield path
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in inside:
        yield from _places(value, (*path, name))


def hostile_manifests(victim: Victim) -> Iterator[Damage]:
    """Manifests that somebody wrote on purpose: their checksum is right."""

    def sealed(change: Callable[[dict[str, Any]], object]) -> Damage:
        content = json.loads(victim.read(victim.manifest))
        del content[SEAL]
        change(content)
        return Damage("hostile manifest", {victim.manifest: sealed_text(content).encode()})

    record = {"bytes": 4, "sha256": "0" * 64}
    for path in (
        "../x", "../../../etc/passwd", "/etc/passwd", "a/../../b", "shard-00000/../documents.parquet", "x\0", "a\\b",
        "C:x", "./documents.parquet", "documents.parquet/", "", "a" * 256, "a/" * 200, "shard-00002/keys.arrow",
        "shard-0/keys.arrow", "manifest.json", "keys.raw", "\n", "é" * 300,
    ):  # fmt: skip
        yield sealed(lambda m, path=path: m["files"].update({path: record}))  # type: ignore[misc]
        yield sealed(lambda m, path=path: m["shards"][0].update(name=path))  # type: ignore[misc]
        yield sealed(lambda m, path=path: m.update(name=path))  # type: ignore[misc]
        yield sealed(lambda m, path=path: m.update(version=path))  # type: ignore[misc]
    numbers: tuple[Any, ...] = (
        -1, 0, 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**400, -(10**400), 1.0, 1.5, 1e308, True, "7", None, [], {},
    )  # fmt: skip
    exact: tuple[Callable[[dict[str, Any], Any], object], ...] = (
        lambda m, n: m.update(entries=n),
        lambda m, n: m.update(entries=n, shards=[m["shards"][0] | {"entries": n}]),
        lambda m, n: m["shards"][0].update(entries=n),
        lambda m, n: m["shards"][1].update(entries=n),
        lambda m, n: (m["shards"][1].update(entries=n), m.update(entries=100 + n if type(n) is int else n)),
        lambda m, n: m["shards"][1].update(first_entry=n),
        lambda m, n: m["key"].update(dim=n),
        lambda m, n: (m["key"].update(dim=n), m["lm"].update(key_dim=n)),
        lambda m, n: m["documents"].update(count=n),
        lambda m, n: m["index"].update(nlist=n),
        lambda m, n: m["index"].update(nlist=n, factory=f"IVF{str(n)[:99]},SQfp16", train_vectors=n, nprobe=1),
        lambda m, n: m["files"]["documents.parquet"].update(bytes=n),
        lambda m, n: m["files"]["shard-00000/index.faiss"].update(bytes=n),
        lambda m, n: m["files"]["canaries.arrow"].update(bytes=n),
        lambda m, n: m["files"]["trained.faiss"].update(sha256=n),
    )
    for number, change in product(numbers, exact):
        yield sealed(lambda m, number=number, change=change: change(m, number))  # type: ignore[misc]
    bounded = [
        ("lm", "vocab_size"),
        *product(["context"], ["window", "stride"]),
        *product(["index"], ["seed", "nprobe"]),
    ]
    for (section, field), number in product(bounded, (-1, 2**63, 10**400, 1.5, True, "7", None)):
        yield sealed(lambda m, s=section, f=field, n=number: m[s].update({f: n}))  # type: ignore[misc]
    for number in (-1, 2**63, 1.5, True, "7", None):
        yield sealed(lambda m, number=number: m.update(revision=number))  # type: ignore[misc]
        yield sealed(lambda m, number=number: m.update(format_version=number))  # type: ignore[misc]
    for change in (
        lambda m: m.update(shards=[]),
        lambda m: m.update(shards=m["shards"] * 5000),
        lambda m: m.update(shards=list(reversed(m["shards"]))),
        lambda m: m.update(files={}),
        lambda m: m.update(files=dict(list(m["files"].items())[1:])),
        lambda m: m.update(metric="inner_product"),
        lambda m: m.update(value_dtype="int64"),
        lambda m: m["key"].update(dtype="float32"),
        lambda m: m["index"].update(family="SQfp16", factory="SQfp16", nlist=0, nprobe=0, train_vectors=0),
        lambda m: m["index"].update(family="PQ"),
        lambda m: m["index"].update(by_residual=True),
        lambda m: m.update(quality={"recall_at_32": [1]}),
        lambda m: m.update(surprise=1),
        lambda m: m.update(format_version=2),
    ):
        yield sealed(change)


def hostile_bytes(victim: Victim) -> Iterator[Damage]:
    """What is hardly JSON, or far too much of it."""
    most = 4 * 1024 * 1024
    for file in (victim.manifest, victim.calibrated, victim.ledger, victim.segment(2, layout.SEGMENT)):
        good = victim.read(file)
        start = good.rstrip()[:-1] + b', "build": '
        for content in (
            b"null", b"[]", b"{}", b"1", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf" + good, good.decode().encode("utf-16"),
            good + b"x", good * 2, b"\0" + good, good.replace(b'"', b"'"), good.replace(b"\n}", b",\n}"),
            b"[" * 100_000, b"{" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000,
            start + b"[" * 5_000 + b"]" * 5_000 + b"}", start + b"9" * 5_000 + b"}", start + b"NaN}", start + b"1e999}",
            b'{"format_version": 1, ' + good.lstrip()[1:], b'{"k": 1, ' + good.lstrip()[1:],
            good.replace(b'"report": {', b'"report": {"gain": 1, ').replace(b'"lm": {', b'"lm": {"key_dim": 6, '),
            b" " * (most + 1), good + b" " * most,
            b'{"format_version":1,"build":[' + b"[]," * (most // 3 - 20) + b"0]}",
            b'{"format_version":1,"build":[' + b"{}," * (most // 3 - 20) + b"0]}",
            b'{"format_version":1,"build":{' + b",".join(b'"%d":0' % i for i in range(most // 12)) + b"}}",
        ):  # fmt: skip
            if content != good:
                yield Damage("hostile JSON", {file: content})
    good = victim.read(victim.current)
    for line in (
        b"", b"\n", good[:-1], good + b"\n", good.upper(), b" " + good, good.replace(b" ", b"\t"), b"\0" * 34,
        b"../../../etc/pas -\n", b"0" * 10_000_000, good[:17] + b"../../../../etc/\n", good[:17] + b"0" * 16 + b"\n",
        b"0" * 16 + good[16:], "０".encode() * 16 + good[16:],
    ):  # fmt: skip
        yield Damage("hostile CURRENT", {victim.current: line})


class Answers(NamedTuple):
    """What an open datastore says."""

    found: list[list[int]]
    exact: list[list[float]]
    text: str


class Runner:
    """Applies each damage, opens the datastore, and puts back what was there."""

    def __init__(self, victim: Victim, spare: Path) -> None:
        self._victim, self._spare = victim, spare
        self._last = spare / "last"
        self._verified = spare / "verified"
        self._files = spare / "files"
        for file in victim.every_file:
            (self._files / file).parent.mkdir(parents=True, exist_ok=True)
            os.link(victim.root / file, self._files / file)
        # Open all the time; what takes the place of its files are other files, as in a careless copy over them.
        self._open = Datastore.open(victim.root, NAME, verified=self._verified)
        self._state = read_ledger(victim.root, NAME)
        self._snapshot = LivingName(victim.root, NAME).snapshot(self._open)
        self._need = self._answers()

    def run(self, damages: Iterator[Damage]) -> dict[str, Any]:
        """Counts by kind and outcome, and every case that did not end as it must."""
        outcomes: dict[str, Counter[str]] = {}
        wrong: list[str] = []
        before = peak_bytes()
        for number, damage in enumerate(damages):
            self._last.write_text(f"case {number}: {damage.kind} of {', '.join(damage.files)}")
            outcome, is_right = self._try(damage, remembered=number % 4 == 0)
            outcomes.setdefault(damage.kind, Counter())[outcome] += 1
            if not is_right:
                wrong.append(f"{self._last.read_text()}: {outcome}")
            if number % 100 == 0 and self._answers() != self._need:
                wrong.append(f"{self._last.read_text()}: the open datastore answers otherwise")
        if self._answers() != self._need:
            wrong.append("the open datastore answers otherwise at the end")
        outcome, is_right = self._try(Damage("nothing", {}), remembered=True)
        if outcome != "opened":
            wrong.append(f"the undamaged datastore: {outcome}")
        return {"outcomes": outcomes, "wrong": wrong, "bytes": peak_bytes() - before}

    def _try(self, damage: Damage, *, remembered: bool) -> tuple[str, bool]:
        """The outcome, and whether it is one that may be; half-read versions are not what a server remembers."""
        self._apply(damage)
        how: dict[str, Any] = {"verified": self._verified} if remembered else {"checksums": True}
        try:
            with Datastore.open(self._victim.root, NAME, **how) as store:
                state = read_ledger(self._victim.root, NAME)
                for record in state.segments:
                    open_segment(self._victim.root, NAME, record, checksums=True).close()
                have, need = (store.manifest, store.calibration, state), (self._open.manifest, self._open.calibration)
            # 1e-05 and 1E-05 are one number: a bit that says nothing.
            says_nothing = set(damage.files) <= {self._victim.manifest, self._victim.calibrated, self._victim.ledger}
            return ("opened", damage.kind == "lying file" or (have == (*need, self._state) and says_nothing))
        except REFUSALS as error:
            return (type(error).__name__, True)
        except Exception as error:
            return (f"{type(error).__name__}: {str(error)[:200]}", False)
        finally:
            self._restore(damage)

    def _apply(self, damage: Damage) -> None:
        for file, content in damage.files.items():
            path = self._victim.root / file
            if content is None or content is FOLDER:
                path.unlink()
                if content is FOLDER:
                    path.mkdir()
                continue
            assert isinstance(content, bytes)
            path.parent.mkdir(exist_ok=True)
            part = self._spare / "part"
            part.write_bytes(content)
            os.replace(part, path)

    def _restore(self, damage: Damage) -> None:
        for file, content in damage.files.items():
            path = self._victim.root / file
            if content is FOLDER:
                path.rmdir()
            if not (self._files / file).exists():
                path.unlink()
                with suppress(OSError):  # a version's own folders are not empty
                    path.parent.rmdir()
                continue
            part = self._spare / "part"
            os.link(self._files / file, part)
            os.replace(part, path)
            part.unlink(missing_ok=True)

    def _answers(self) -> Answers:
        queries = torch.linspace(-3, 3, 5 * DIM).reshape(5, DIM)
        found, exact = self._snapshot.search(queries, 7), self._snapshot.search_exact(queries, 7)
        texts = "".join(self._snapshot.document(name).text for name in self._snapshot.document_ids())
        return Answers(found.entry_ids.tolist(), exact.distances.tolist(), texts)


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def limit_memory(more_bytes: int) -> None:
    """Let allocations fail that would take this process so much beyond what it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes,) * 2)


def main() -> None:
    """Build, damage, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--lying", action="store_true", help="files that do not match their content, but their checksum"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    victim = make_victim(args.folder / "root")
    spare = args.folder / "spare"
    spare.mkdir()
    runner = Runner(victim, spare)
    if args.lying:
        limit_memory(1 << 30)
    damages = lying_files(victim, random.Random(args.seed)) if args.lying else every_damage(victim, args.seed)
    print(json.dumps(runner.run(damages)))


if __name__ == "__main__":
    main()
