"""``knnlm build``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from knnlm_builder.settings import BuildSettings, read_settings


def _option(field: str, *names: str) -> Any:
    """A command-line option that says what the setting of the same name says, default included."""
    info = BuildSettings.model_fields[field]
    default = "" if info.is_required() or info.default in (None, False) else f" (default: {info.default})"
    return typer.Option(*names, help=f"{info.description}{default}", show_default=False)


def build(
    model: Annotated[str, _option("model", "--model")],
    inputs: Annotated[list[Path], _option("inputs", "--input")],
    output: Annotated[Path, _option("output", "--output")],
    name: Annotated[str, _option("name", "--name")],
    window: Annotated[int | None, _option("window", "--window")] = None,
    stride: Annotated[int | None, _option("stride", "--stride")] = None,
    max_tokens: Annotated[int | None, _option("max_tokens", "--max-tokens")] = None,
    held_out_fraction: Annotated[float | None, _option("held_out_fraction", "--held-out-fraction")] = None,
    held_out_max_tokens: Annotated[int | None, _option("held_out_max_tokens", "--held-out-max-tokens")] = None,
    shard_entries: Annotated[int | None, _option("shard_entries", "--shard-entries")] = None,
    key_tap: Annotated[str | None, _option("key_tap", "--key-tap")] = None,
    dtype: Annotated[str | None, _option("dtype", "--dtype")] = None,
    device: Annotated[str | None, _option("device", "--device")] = None,
    threads: Annotated[int | None, _option("threads", "--threads")] = None,
    batch_tokens: Annotated[int | None, _option("batch_tokens", "--batch-tokens")] = None,
    seed: Annotated[int | None, _option("seed", "--seed")] = None,
    force: Annotated[bool, _option("force", "--force")] = False,
) -> None:
    """Build a datastore from text and publish it: read, encode, index, calibrate, verify, publish.

    Part of the text is held out to choose k, τ and λ and to tell whether the datastore helps at all; one that does not
    is not published unless --force is given. An interrupted build goes on where it stopped when it is run again.
    """
    given = dict(locals())
    given["inputs"] = tuple(inputs)
    settings = read_settings(**given)
    if settings.threads is not None:
        # Read by FAISS and torch when they are first imported, below.
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)

    from knnlm_builder.console import ConsoleReporter  # torch is imported only when it is needed
    from knnlm_builder.pipeline import run_build

    run_build(settings, ConsoleReporter(Console(stderr=True)))
