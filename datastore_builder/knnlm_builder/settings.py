"""What a build can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from knnlm_core.errors import InvalidParameter
from knnlm_core.windows import WindowSizes, settle_windows


class _LMSettings(BaseModel):
    """How the language model is run."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    dtype: str = Field(default="auto", description="Weights: auto, float32, bfloat16 or float16.")
    weights: Literal["full", "int8"] = Field(
        default="full",
        description="full, or int8 for linear layers of int8 weights: on a CPU, faster, slightly worse; needs a "
        "calibration of its own.",
    )
    device: str = Field(default="auto", description="auto, cpu or cuda[:N].")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; by default what torch and FAISS choose.")
    batch_tokens: int = Field(default=4096, ge=1, description="Padded tokens per forward pass.")


class BuildSettings(_LMSettings):
    """Settings of one build; those that shape the result enter the datastore's version."""

    model: str = Field(description="Language model: hub id, folder or GGUF file.")
    inputs: tuple[Path, ...] = Field(
        min_length=1, description="Files or folders of text: txt, md, html, jsonl(.gz), parquet."
    )
    output: Path = Field(description="Root folder that the datastore is published under.")
    name: str = Field(description="Name of the datastore.")
    window: int | None = Field(
        default=None, ge=2, description="Tokens that the LM sees at once; by default 1024, or its context if shorter."
    )
    stride: int | None = Field(
        default=None, ge=1, description="Tokens that each window after the first adds; by default half the window."
    )
    max_tokens: int | None = Field(default=None, ge=2, description="Stop once the store has this many entries.")
    held_out_fraction: float = Field(
        default=0.05, gt=0, le=0.5, description="Share of the text kept out of the store to calibrate on."
    )
    held_out_max_tokens: int = Field(default=20_000, ge=64, description="Most held-out tokens.")
    shard_entries: int = Field(default=1_000_000, ge=1, description="Entries per shard, about.")
    key_tap: str | None = Field(default=None, description="Which activation is the key; by default the family's.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the held-out choice, k-means and sampling.")
    force: bool = Field(default=False, description="Publish even a store that does not help on held-out text.")

    def windowing(self, max_length: int) -> WindowSizes:
        """Window and stride for an LM of this context. Raises InvalidParameter: what was given does not fit."""
        return settle_windows(self.window, self.stride, max_length=max_length)


class CalibrateSettings(_LMSettings):
    """Settings of one calibration of a published version."""

    model: str = Field(description="Language model that the datastore was built with: hub id, folder or GGUF file.")
    datastore: Path = Field(description="The datastore, as ROOT/NAME; its current version is calibrated.")
    latency_budget_ms: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Milliseconds of retrieval per token that the default gate must keep to, on average and on this "
        "machine; by default every token is searched.",
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of what is fitted on and of the bootstrap.")
    force: bool = Field(default=False, description="Replace the calibration even if the datastore does not help.")


SettingsT = TypeVar("SettingsT", bound=BaseModel)


def read_settings(kind: type[SettingsT], **given: object) -> SettingsT:
    """Settings from arguments; None means not given. Raises InvalidParameter: naming the field and its value."""
    try:
        return kind(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise InvalidParameter(f"`{field}`: {first['msg']}, got {first.get('input')!r}", param=field) from error
