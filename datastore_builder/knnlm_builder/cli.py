"""``knnlm build`` and ``knnlm calibrate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console

from knnlm_builder.settings import BuildSettings, CalibrateSettings, read_settings


def _help(kind: type[BaseModel], field: str) -> str:
    """What the setting of the same name says, default included."""
    info = kind.model_fields[field]
    default = "" if info.is_required() or info.default in (None, False) else f" (default: {info.default})"
    return f"{info.description}{default}"


def _option(field: str, *names: str, of: type[BaseModel] = BuildSettings) -> Any:
    return typer.Option(*names, help=_help(of, field), show_default=False)


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
    weights: Annotated[str | None, _option("weights", "--weights")] = None,
    device: Annotated[str | None, _option("device", "--device")] = None,
    threads: Annotated[int | None, _option("threads", "--threads")] = None,
    batch_tokens: Annotated[int | None, _option("batch_tokens", "--batch-tokens")] = None,
    seed: Annotated[int | None, _option("seed", "--seed")] = None,
    force: Annotated[bool, _option("force", "--force")] = False,
) -> None:
    """Build a datastore from text and publish it: read, encode, index, calibrate, verify, publish.

    Part of the text is held out to choose k, τ, λ and the gate, and to tell whether the datastore helps at all; one
    that does not is not published unless --force is given. An interrupted build goes on where it stopped when it is run
    again.
    """
    given = dict(locals())
    given["inputs"] = tuple(inputs)
    settings = read_settings(BuildSettings, **given)
    _limit_threads(settings.threads)

    from knnlm_builder.console import ConsoleReporter  # torch is imported only when it is needed
    from knnlm_builder.pipeline import run_build

    run_build(settings, ConsoleReporter(Console(stderr=True)))


def calibrate(
    datastore: Annotated[Path, typer.Argument(help=_help(CalibrateSettings, "datastore"), show_default=False)],
    model: Annotated[str, _option("model", "--model", of=CalibrateSettings)],
    dtype: Annotated[str | None, _option("dtype", "--dtype", of=CalibrateSettings)] = None,
    weights: Annotated[str | None, _option("weights", "--weights", of=CalibrateSettings)] = None,
    device: Annotated[str | None, _option("device", "--device", of=CalibrateSettings)] = None,
    threads: Annotated[int | None, _option("threads", "--threads", of=CalibrateSettings)] = None,
    batch_tokens: Annotated[int | None, _option("batch_tokens", "--batch-tokens", of=CalibrateSettings)] = None,
    latency_budget_ms: Annotated[
        float | None, _option("latency_budget_ms", "--latency-budget-ms", of=CalibrateSettings)
    ] = None,
    seed: Annotated[int | None, _option("seed", "--seed", of=CalibrateSettings)] = None,
    force: Annotated[bool, _option("force", "--force", of=CalibrateSettings)] = False,
) -> None:
    """Choose k, τ, λ and the gate anew, on the text that the build held out, and make the result current.

    One search of the held-out text is cached; everything is fitted to it, and reported on documents that nothing was
    fitted on. The published version is not touched, and earlier calibrations stay beside it.
    """
    settings = read_settings(CalibrateSettings, **dict(locals()))
    _limit_threads(settings.threads)

    from knnlm_builder.console import ConsoleReporter
    from knnlm_builder.recalibrate import run_calibrate

    run_calibrate(settings, ConsoleReporter(Console(stderr=True)))


def _limit_threads(threads: int | None) -> None:
    if threads is not None:
        # Read by FAISS and torch when they are first imported.
        os.environ["OMP_NUM_THREADS"] = str(threads)
