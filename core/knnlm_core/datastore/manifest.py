"""The manifest: a version's JSON identity card, and the only thing that a reader believes before checking."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from knnlm_core.datastore import layout
from knnlm_core.datastore.sealed import SEAL, canonical, check_seal, sealed_text
from knnlm_core.durable import write_text
from knnlm_core.errors import DatastoreCorrupt, DatastoreMismatch, DatastoreNotFound
from knnlm_core.types import LMIdentity

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 4 * 1024 * 1024  # some 7,000 shards; parsed, the worst JSON takes fifty times its size
MAX_DIM = 65_536
MAX_VOCAB_SIZE = 2**31 - 1  # token ids are stored as int32

Digest16 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Positive = Annotated[int, Field(strict=True, ge=1, lt=2**63)]

Model = TypeVar("Model", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LMSection(_Section):
    """Which language model made the keys: the fields of `LMIdentity`."""

    model_fingerprint: str
    tokenizer_fingerprint: str
    model_name: str
    vocab_size: Annotated[int, Field(strict=True, ge=1, le=MAX_VOCAB_SIZE)]
    key_tap: str
    key_dim: Annotated[int, Field(strict=True, ge=1, le=MAX_DIM)]

    @classmethod
    def of(cls, identity: LMIdentity) -> LMSection:
        """The section that records this identity."""
        return cls(**{field: getattr(identity, field) for field in cls.model_fields})

    def identity(self) -> LMIdentity:
        """The identity as recorded."""
        return LMIdentity(**self.model_dump())

    def require_fits(self, name: str, running: LMIdentity) -> None:
        """Raises DatastoreMismatch: naming the first field in which the running LM is not the one of the keys."""
        keys_of = self.identity()
        for field in (field.name for field in fields(LMIdentity) if field.name != "model_name"):
            have, need = getattr(keys_of, field), getattr(running, field)
            if have != need:
                raise DatastoreMismatch(name, field=field, have=have, need=need)


class KeySection(_Section):
    """What a key is."""

    tap: str
    dim: Annotated[int, Field(strict=True, ge=1, le=MAX_DIM)]
    dtype: Literal["float16"] = "float16"


class ContextSection(_Section):
    """How documents were cut into windows: see `knnlm_core.windows`."""

    window: Annotated[int, Field(strict=True, ge=2, lt=2**31)]
    stride: Annotated[int, Field(strict=True, ge=1)]
    bos_token_ids: tuple[Count, ...] = ()

    @model_validator(mode="after")
    def _stride_leaves_context(self) -> Self:
        if self.stride >= self.window:
            raise ValueError(f"stride must be less than window ({self.window}), it is {self.stride}")
        return self


class ShardSection(_Section):
    """A contiguous range of entries with its own index."""

    name: str
    first_entry: Count
    entries: Positive


class IndexSpec(_Section):
    """Which index every shard has; made by `choose_index`.

    Attributes:
        family: ``SQfp16`` scans every key; ``IVF_SQfp16`` scans the keys of the ``nprobe`` nearest of ``nlist`` lists.
        factory: the same in faiss's notation, for people.
        by_residual: always false, so that the codes are the fp16 keys bit for bit and distances are exact.
        train_vectors: size of the sample that the lists were trained on.
    """

    family: Literal["SQfp16", "IVF_SQfp16"]
    factory: str
    nlist: Count
    nprobe: Count
    by_residual: Literal[False] = False
    train_vectors: Count
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**31)]

    @property
    def is_trained(self) -> bool:
        """Whether the version has a ``trained.faiss``."""
        return self.family == "IVF_SQfp16"

    @model_validator(mode="after")
    def _fits_the_family(self) -> Self:
        factory = f"IVF{self.nlist},SQfp16" if self.is_trained else "SQfp16"
        if self.factory != factory:
            raise ValueError(f"factory must be {factory!r} for this family and nlist, it is {self.factory!r}")
        if self.is_trained:
            if not 1 <= self.nprobe <= self.nlist:
                raise ValueError(f"nprobe must be in 1 … nlist ({self.nlist}), it is {self.nprobe}")
            if self.train_vectors < self.nlist:
                raise ValueError(f"train_vectors must be at least nlist ({self.nlist}), it is {self.train_vectors}")
        elif (self.nlist, self.nprobe, self.train_vectors) != (0, 0, 0):
            raise ValueError("nlist, nprobe and train_vectors must be 0 for family 'SQfp16'")
        return self


class DocumentsSection(_Section):
    """The documents table."""

    count: Positive


class FileRecord(_Section):
    """Size and checksum of one file."""

    bytes: Count
    sha256: Sha256


class Manifest(_Section):
    """Everything that must be known to read a version; `docs/datastore-format.md` explains each field."""

    format_version: Literal[1] = 1
    unit: Literal["token"] = "token"
    name: str
    version: Digest16
    parent_version: Digest16 | None = None
    revision: Count = 0
    lm: LMSection
    key: KeySection
    value_dtype: Literal["int32"] = "int32"
    metric: Literal["squared_l2"] = "squared_l2"
    context: ContextSection
    entries: Positive
    shards: Annotated[tuple[ShardSection, ...], Field(min_length=1)]
    index: IndexSpec
    documents: DocumentsSection
    build: dict[str, JsonValue]
    quality: dict[str, int | float | str | bool]
    files: dict[str, FileRecord]

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not layout.is_name(name):
            raise ValueError(f"{name[:100]!r} is not a datastore's name")
        return name

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for path in files:
            check_relative(path)
        return files

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if (self.key.tap, self.key.dim) != (self.lm.key_tap, self.lm.key_dim):
            raise ValueError(
                f"key (tap {self.key.tap!r}, dim {self.key.dim}) must be the LM's "
                f"(key_tap {self.lm.key_tap!r}, key_dim {self.lm.key_dim})"
            )
        first = 0
        for number, shard in enumerate(self.shards):
            if (shard.name, shard.first_entry) != (layout.shard_name(number), first):
                raise ValueError(
                    f"shard {number} must be {layout.shard_name(number)!r} from entry {first}, "
                    f"it is {shard.name[:100]!r} from entry {shard.first_entry}"
                )
            first += shard.entries
        if first != self.entries:
            raise ValueError(f"entries must be the sum over the shards ({first}), it is {self.entries}")
        self._check_file_names()
        return self

    def _check_file_names(self) -> None:
        needed = {layout.DOCUMENTS} | ({layout.TRAINED} if self.index.is_trained else set())
        for shard in self.shards:
            needed |= {f"{shard.name}/{file}" for file in (layout.KEYS, layout.VALUES, layout.INDEX)}
        if missing := sorted(needed - self.files.keys()):
            raise ValueError(f"files lacks {missing[0]!r}")
        if unknown := sorted(self.files.keys() - needed - {layout.CANARIES, layout.HELD_OUT}):
            raise ValueError(f"files names {unknown[0]!r}, which this format does not have")

    @property
    def num_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(record.bytes for record in self.files.values())

    @property
    def digest(self) -> str:
        """sha256 of its content: of everything about a version, the checksums of its files included."""
        return hashlib.sha256(canonical(self.model_dump(mode="json"))).hexdigest()

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read and check a manifest.

        Raises:
            DatastoreNotFound: no such file.
            DatastoreMismatch: of another format version.
            DatastoreCorrupt: too large, not JSON, or a field is missing, unknown or contradicts another.
        """
        content = read_json(path, MAX_MANIFEST_BYTES)
        require_format(content, path, path.parent.name)
        # Fields first: their errors say more.
        manifest = validate(cls, {name: value for name, value in content.items() if name != SEAL}, path)
        check_seal(content, path)
        return manifest

    def write(self, path: Path) -> None:
        """Write the manifest in one step; the same manifest gives the same bytes."""
        write_text(path, sealed_text(self.model_dump(mode="json")))


def version_of(inputs: Mapping[str, JsonValue]) -> str:
    """Name a version, or a calibration, by what goes into it: 16 hex digits of sha256 over canonical JSON.

    Put in hashes of documents, the build's specification and the LM's identity; never numbers that encoding produced,
    since those differ between machines and thread counts.
    """
    return hashlib.sha256(canonical(inputs)).hexdigest()[:16]


def require_format(content: Mapping[str, JsonValue], path: Path, name: str) -> None:
    """Raises DatastoreMismatch, DatastoreCorrupt: a file of another format version, or of none."""
    have = content.get("format_version")
    if type(have) is not int:
        raise DatastoreCorrupt(f"{path}: format_version must be an integer, it is {str(have)[:100]!r}")
    if have != FORMAT_VERSION:
        raise DatastoreMismatch(name, field="format_version", have=have, need=FORMAT_VERSION, needed_by="this reader")


def check_relative(path: str) -> None:
    """Raises ValueError: not a plain relative POSIX path that stays inside its folder."""
    parts = path.split("/")
    if any(part in {"", ".", ".."} for part in parts) or re.search(r"[\\\x00-\x1f:]", path) or len(path) > 255:
        raise ValueError(f"{path[:100]!r} is not a plain relative path")


def read_json(path: Path, max_bytes: int) -> dict[str, JsonValue]:
    """Read a JSON object of bounded size. Raises DatastoreNotFound, DatastoreCorrupt."""
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise DatastoreNotFound(f"there is no {path}") from None
    except OSError as error:
        raise DatastoreCorrupt(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) > max_bytes:
        raise DatastoreCorrupt(f"{path} must have at most {max_bytes} bytes, it has more")
    try:
        content = pydantic_core.from_json(raw, allow_inf_nan=False)
        json.loads(raw, object_pairs_hook=_refuse_repeated)
    except ValueError as error:
        raise DatastoreCorrupt(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DatastoreCorrupt(f"{path} must be a JSON object, it is a {type(content).__name__}")
    return content


def _refuse_repeated(fields: list[tuple[str, object]]) -> None:
    """Of a field that stands twice each parser believes another one; keeps nothing of the object."""
    seen = set[str]()
    for name, _ in fields:
        if name in seen:
            raise ValueError(f"the field {name[:100]!r} stands twice in an object")
        seen.add(name)


def validate(model: type[Model], content: dict[str, JsonValue], path: Path) -> Model:
    """Check a JSON object against a model. Raises DatastoreCorrupt: naming file, field and value."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "manifest"
        value = "" if isinstance(first["input"], dict) else f", it is {str(first['input'])[:100]!r}"
        raise DatastoreCorrupt(f"{path}: {field[:200]}: {first['msg']}{value}") from error
