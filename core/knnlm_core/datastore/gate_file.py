"""The trees of a learned gate, in a file beside the calibration that names their checksum: numbers, never code."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load, save

from knnlm_core.datastore.manifest import Positive
from knnlm_core.durable import part_of, replace_file
from knnlm_core.errors import DatastoreCorrupt, InvalidParameter
from knnlm_core.trees import Trees

GATE = "gate.safetensors"
MAX_BYTES = 64 * 1024 * 1024
MAX_FEATURES = 256


class GateTrees(BaseModel):
    """What a calibration says of them.

    Attributes:
        model_fingerprint: of the language model whose keys and predictions they were fitted to.
        features: what the trees look at, by name.
        num_trees: T.
        file_sha256, file_bytes: of the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_fingerprint: str = Field(max_length=200)
    features: tuple[str, ...] = Field(min_length=1, max_length=MAX_FEATURES)
    num_trees: Positive
    file_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    file_bytes: Positive


def describe(trees: Trees, features: tuple[str, ...], model_fingerprint: str) -> GateTrees:
    """What a calibration says of trees that will be written beside it."""
    content = save(trees.arrays())
    return GateTrees(
        model_fingerprint=model_fingerprint,
        features=features,
        num_trees=len(trees.feature),
        file_sha256=hashlib.sha256(content).hexdigest(),
        file_bytes=len(content),
    )


def write_trees(folder: Path, trees: Trees) -> None:
    """Write them into a calibration's folder."""
    path = folder / GATE
    part_of(path).write_bytes(save(trees.arrays()))
    replace_file(part_of(path), path)


def read_trees(folder: Path, described: GateTrees) -> Trees:
    """Read them back. Raises DatastoreCorrupt: the file is missing, changed, or holds no trees."""
    path = folder / GATE
    if described.file_bytes > MAX_BYTES:
        raise DatastoreCorrupt(f"{path} must have at most {MAX_BYTES} bytes, got {described.file_bytes}")
    try:
        with path.open("rb") as file:
            content = file.read(described.file_bytes + 1)
    except OSError as error:
        raise DatastoreCorrupt(f"{path}: {error.strerror or error}") from error
    if len(content) != described.file_bytes or hashlib.sha256(content).hexdigest() != described.file_sha256:
        raise DatastoreCorrupt(f"{path} is not the file that the calibration names: its sha256 differs")
    try:
        trees = Trees.of(load(content), len(described.features))
    except (SafetensorError, InvalidParameter, KeyError, TypeError, ValueError) as error:
        raise DatastoreCorrupt(f"{path}: {error}") from error
    if len(trees.feature) != described.num_trees:
        raise DatastoreCorrupt(f"{path} holds {len(trees.feature)} trees, the calibration says {described.num_trees}")
    return trees
