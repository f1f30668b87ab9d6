"""The faiss index of a shard: chosen by size, trained once per version, built per shard, mapped by readers.

Both families hold the fp16 keys themselves, so distances are exact for the stored keys and computed directly,
without the cancellation of ‖q‖² − 2q·x + ‖x‖².
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from knnlm_core.datastore import layout
from knnlm_core.datastore.arrays import KeyArray, map_keys
from knnlm_core.datastore.manifest import IndexSpec
from knnlm_core.durable import part_of, replace_file
from knnlm_core.errors import BuildError, DatastoreCorrupt

EXACT_UP_TO = 50_000  # entries; measured: a scan of 50,000 × 576 takes 4.6 ms for one query on one core
MIN_TRAIN_PER_LIST = 39  # below it k-means leaves lists badly placed, and faiss warns
MAX_TRAIN_PER_LIST = 64
MAX_SAMPLE_BYTES = 1024**3
KMEANS_ITERATIONS = 10
_BLOCK_ROWS = 65_536  # keys held as float32 at a time


def choose_index(entries: int, dim: int, k: int, *, seed: int = 0) -> IndexSpec:
    """Choose the index by size; whether it finds enough is for the recall gate to say.

    nlist = 2^round(log2(4·√entries)); `nprobe` is where the gate starts to look.

    Args:
        entries: of the whole version: all shards share the lists.
        dim: D; the training sample stays below `MAX_SAMPLE_BYTES` where 39 vectors a list allow.
        k: neighbours per query by default; many neighbours are spread over more lists.
    """
    if entries <= EXACT_UP_TO:
        return IndexSpec(family="SQfp16", factory="SQfp16", nlist=0, nprobe=0, train_vectors=0, seed=seed)
    nlist = int(2 ** round(np.log2(4 * np.sqrt(entries))))
    affordable = max(MIN_TRAIN_PER_LIST * nlist, MAX_SAMPLE_BYTES // (4 * dim))
    return ivf_spec(
        nlist,
        nprobe=min(nlist, 32 if k < 256 else 64),
        train_vectors=min(entries, MAX_TRAIN_PER_LIST * nlist, affordable),
        seed=seed,
    )


def ivf_spec(nlist: int, *, nprobe: int, train_vectors: int, seed: int = 0) -> IndexSpec:
    """A trained index of ``nlist`` lists, whatever the size."""
    return IndexSpec(
        family="IVF_SQfp16",
        factory=f"IVF{nlist},SQfp16",
        nlist=nlist,
        nprobe=nprobe,
        train_vectors=train_vectors,
        seed=seed,
    )


def train_index(spec: IndexSpec, sample: npt.ArrayLike, path: Path) -> None:
    """Train the lists and write the empty index that every shard starts from.

    The same sample, seed, machine and thread count give the same file.

    Args:     sample: (spec.train_vectors, D) keys, float16 or float32.
    Raises:   BuildError: the family is not trained, or the sample is not of the size that the spec says.
    """
    if not spec.is_trained:
        raise BuildError(f"an index of family {spec.family!r} is not trained")
    # Keys are stored as fp16, so the lists are placed on what is stored.
    vectors = np.ascontiguousarray(np.asarray(sample, dtype=np.float16), dtype=np.float32)
    needed = MIN_TRAIN_PER_LIST * spec.nlist
    if vectors.ndim != 2 or len(vectors) != spec.train_vectors or len(vectors) < needed:
        raise BuildError(
            f"`sample` must have index.train_vectors = {spec.train_vectors} rows, and at least {MIN_TRAIN_PER_LIST} "
            f"for each of {spec.nlist} lists ({needed}); its shape is {vectors.shape}"
        )
    dim = vectors.shape[1]
    coarse = faiss.IndexFlatL2(dim)
    index = faiss.IndexIVFScalarQuantizer(
        coarse, dim, spec.nlist, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2, spec.by_residual
    )
    index.cp.seed = spec.seed
    index.cp.niter = KMEANS_ITERATIONS
    index.cp.min_points_per_centroid = MIN_TRAIN_PER_LIST
    index.cp.max_points_per_centroid = max(MAX_TRAIN_PER_LIST, -(-len(vectors) // spec.nlist))
    index.train(vectors)
    _write(index, path)


def build_shard_index(trained: Path | None, spec: IndexSpec, shard: Path, *, dim: int, entries: int) -> None:
    """Add a finished shard's keys, in order, and write its index in one step: row number = local entry id.

    Takes the index itself (2·D bytes an entry) and one block of keys as float32 in memory.

    Args:     trained: made by `train_index`; None for a family that is not trained.
    Raises:   DatastoreCorrupt: the shard's keys or the trained index are not what they should be.
    """
    keys = map_keys(shard / layout.KEYS, dim, entries)
    if spec.is_trained:
        if trained is None:
            raise BuildError(f"an index of family {spec.family!r} needs a trained index to start from")
        index = faiss.read_index(os.fspath(trained))
        check_index(index, spec, trained, dim=dim, entries=0)
    else:
        index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2)
    for first in range(0, entries, _BLOCK_ROWS):
        index.add(keys[first : first + _BLOCK_ROWS].astype(np.float32))
    _write(index, shard / layout.INDEX)


def build_in_memory(parts: Sequence[KeyArray]) -> Any:
    """An index of family ``SQfp16`` over some keys, in order, without a file."""
    index = faiss.IndexScalarQuantizer(parts[0].shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2)
    for keys in parts:
        for first in range(0, len(keys), _BLOCK_ROWS):
            index.add(keys[first : first + _BLOCK_ROWS].astype(np.float32))
    return index


def stored_keys(index: Any) -> KeyArray:
    """The keys (n, D) that an index without lists holds: a view, never to be written."""
    return keys_of_codes(index.codes.data(), index.ntotal, index.d)


def keys_of_codes(codes: Any, size: int, dim: int) -> KeyArray:
    """faiss's codes as keys (size, D): a view, never to be written."""
    stored: npt.NDArray[np.uint8] = faiss.rev_swig_ptr(codes, size * 2 * dim)
    return stored.view(np.float16).reshape(size, dim)


def map_index(path: Path, spec: IndexSpec, *, dim: int, entries: int) -> Any:
    """Map an index without loading it. Raises DatastoreCorrupt: not the index that the manifest describes."""
    try:
        # Plain IO_FLAG_MMAP does nothing for some kinds of lists; adding to a mapped index would abort the process.
        index = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, MemoryError) as error:  # a header may claim more than there can be
        raise DatastoreCorrupt(f"{path} is not a whole faiss index: {str(error).splitlines()[0][:300]}") from error
    check_index(index, spec, path, dim=dim, entries=entries)
    return index


def check_index(index: Any, spec: IndexSpec, path: Path, *, dim: int, entries: int) -> None:
    """Raises DatastoreCorrupt: naming the first property that is not what the manifest says."""
    need: dict[str, object] = {
        "kind": faiss.IndexIVFScalarQuantizer.__name__ if spec.is_trained else faiss.IndexScalarQuantizer.__name__,
        "d": dim,
        "ntotal": entries,
        "metric_type": faiss.METRIC_L2,
        "is_trained": True,
        "code_size": 2 * dim,
        "sq.qtype": faiss.ScalarQuantizer.QT_fp16,
    }
    have: dict[str, object] = {"kind": type(index).__name__, "d": index.d, "ntotal": index.ntotal}
    if have["kind"] == need["kind"]:
        have |= {
            "metric_type": index.metric_type,
            "is_trained": index.is_trained,
            "code_size": index.code_size,
            "sq.qtype": index.sq.qtype,
        }
        if spec.is_trained:
            need |= {"nlist": spec.nlist, "by_residual": spec.by_residual, "quantizer.ntotal": spec.nlist}
            have |= {
                "nlist": index.nlist,
                "by_residual": index.by_residual,
                "quantizer.ntotal": index.quantizer.ntotal,
            }
    for field, value in have.items():
        if value != need[field]:
            raise DatastoreCorrupt(f"{path}: {field} is {value!r}, the manifest needs {need[field]!r}")


def _write(index: Any, path: Path) -> None:
    part = part_of(path)
    faiss.write_index(index, os.fspath(part))
    replace_file(part, path)
