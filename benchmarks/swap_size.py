"""How long a swap takes by the size of the datastore: verified before, and at its first load on a machine.

Synthetic stores (Gaussian keys around a common mean, as wide as the LM's, documents of 1,000 entries, the index that
the builder would choose) are loaded into a running server. First load: every file is hashed and read. Swap: the name
goes to the other of two versions, both verified; timed from the request until a completion of one token that uses the
new version has been answered, minus the median of such completions alone.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, write_result
from rich.progress import track
from served import MODEL, served

from knnlm_client import Client
from knnlm_core.datastore import layout
from knnlm_core.datastore.checksums import record_files
from knnlm_core.datastore.documents import Document, DocumentsWriter
from knnlm_core.datastore.index import build_shard_index, choose_index, train_index
from knnlm_core.datastore.manifest import (
    ContextSection,
    DocumentsSection,
    KeySection,
    LMSection,
    Manifest,
    ShardSection,
    version_of,
)
from knnlm_core.datastore.publish import publish
from knnlm_core.datastore.writer import ShardWriter
from knnlm_core.lm.loading import load_lm
from knnlm_core.types import LMIdentity

SIZES, PORT, SWAPS = (100_000, 300_000, 1_000_000), 8768, 20
DOCUMENT_ENTRIES, BLOCK = 1_000, 50_000
LIMIT_S = 0.1
KNN = {"k": 1024, "temperature": 10.0, "lambda": 0.2}


def main() -> None:
    """Run and write the result."""
    args = arguments(__doc__).parse_args()
    lm = load_lm(args.model)
    identity = lm.identity
    lm.close()
    root = args.work / "sizes"
    shutil.rmtree(root, ignore_errors=True)
    names = {size: f"n{size}" for size in SIZES}
    for size in track(SIZES, description="Make datastores"):
        make_synthetic(root, names[size], size, identity)
    figures: dict[int, dict[str, float]] = {}
    small = make_synthetic(root, "small", BLOCK, identity)
    with served(args.model, root, "small", port=PORT) as server, Client(server.url, timeout=3600) as client:
        for size, name in names.items():
            first, *_ = layout.published_versions(root, name)
            started = time.perf_counter()
            client.datastores.load(name, first)
            figures[size] = {"first_load": time.perf_counter() - started}
            twin = _twin(root, name, first)
            client.datastores.load(name, twin)
            figures[size] |= _swaps(client, name, (first, twin))
    result = {
        "claim": f"swapping to a verified store of {SIZES[-1]:,} entries takes under {LIMIT_S:g} s from request to use",
        "protocol": " ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        "seconds_by_entries": figures,
        "small_store_of_the_start": small,
    }
    write_result("swap_size", result, lambda axes: _draw(axes, figures))


def _draw(axes: Any, figures: dict[int, dict[str, float]]) -> None:
    for what in ("first_load", "swap_to_first_use", "swap_request"):
        axes.plot(list(figures), [by[what] for by in figures.values()], "o-", label=what.replace("_", " "))
    axes.axhline(LIMIT_S, color="tab:gray", linestyle="--", label=f"{LIMIT_S:g} s")
    axes.set(xlabel="entries", ylabel="seconds", xscale="log", yscale="log", title="Loading and swapping by size")
    axes.legend()


def _swaps(client: Client, name: str, versions: tuple[str, str]) -> dict[str, float]:
    def complete() -> tuple[float, str]:
        started = time.perf_counter()
        answer = client.completions("The", model=f"{MODEL}@{name}", max_tokens=1, knn=KNN)
        assert answer.system_fingerprint is not None
        return time.perf_counter() - started, answer.system_fingerprint

    complete()
    alone = statistics.median(complete()[0] for _ in range(SWAPS))
    requests, uses = [], []
    for i in range(SWAPS):
        started = time.perf_counter()
        client.datastores.load(name, versions[i % 2])
        requests.append(time.perf_counter() - started)
        _, fingerprint = complete()
        uses.append(time.perf_counter() - started - alone)
        assert versions[i % 2] in fingerprint
    return {
        "swap_request": statistics.median(requests),
        "swap_to_first_use": statistics.median(uses),
        "slowest_swap_to_first_use": max(uses),
        "completion_alone": alone,
    }


def make_synthetic(root: Path, name: str, entries: int, identity: LMIdentity) -> str:
    """Publish a store of so many entries that no text stands behind; returns its version."""
    version = version_of({"synthetic": entries})
    folder = layout.building_folder(root, name, version)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(entries)
    mean = 3 * rng.standard_normal(identity.key_dim, dtype=np.float32)
    sample = []
    spec = choose_index(entries, identity.key_dim, KNN["k"])  # type: ignore[arg-type]
    every = max(1, entries // max(1, spec.train_vectors))
    shard = folder / layout.shard_name(0)
    with ShardWriter(shard, identity.key_dim) as writer:
        for first in range(0, entries, BLOCK):
            n = min(BLOCK, entries - first)
            keys = (rng.standard_normal((n, identity.key_dim), dtype=np.float32) + mean).astype(np.float16)
            starts = np.tile(np.arange(DOCUMENT_ENTRIES), -(-n // DOCUMENT_ENTRIES))[:n]
            writer.append(keys, rng.integers(0, 1000, n), np.stack([starts, starts + 1], axis=1))
            sample.append(keys[::every])
        writer.finish()
    with DocumentsWriter(folder / layout.DOCUMENTS) as documents:
        for first in range(0, entries, DOCUMENT_ENTRIES):
            documents.add(
                Document(f"document {first}", "x" * (DOCUMENT_ENTRIES + 1)), min(DOCUMENT_ENTRIES, entries - first)
            )
    trained = folder / layout.TRAINED if spec.is_trained else None
    if trained is not None:
        train_index(spec, np.concatenate(sample)[: spec.train_vectors], trained)
    build_shard_index(trained, spec, shard, dim=identity.key_dim, entries=entries)
    _manifest(folder, name, version, identity, entries, documents.documents)
    publish(root, name, version)
    return version


def _manifest(folder: Path, name: str, version: str, identity: LMIdentity, entries: int, documents: int) -> None:
    Manifest(
        name=name,
        version=version,
        lm=LMSection.of(identity),
        key=KeySection(tap=identity.key_tap, dim=identity.key_dim),
        context=ContextSection(window=1024, stride=512),
        entries=entries,
        shards=(ShardSection(name=layout.shard_name(0), first_entry=0, entries=entries),),
        index=choose_index(entries, identity.key_dim, KNN["k"]),  # type: ignore[arg-type]
        documents=DocumentsSection(count=documents),
        build={"synthetic": entries},
        quality={},
        files=record_files(folder),
    ).write(folder / layout.MANIFEST)


def _twin(root: Path, name: str, version: str) -> str:
    """Another version with the same content, in files of its own."""
    twin = version_of({"twin_of": version})
    building = layout.building_folder(root, name, twin)
    shutil.copytree(layout.version_folder(root, name, version), building)
    manifest = Manifest.read(building / layout.MANIFEST)
    manifest.model_copy(update={"version": twin}).write(building / layout.MANIFEST)
    publish(root, name, twin)
    return twin


if __name__ == "__main__":
    main()
