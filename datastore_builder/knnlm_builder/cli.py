"""``knnlm build`` and ``knnlm calibrate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from rich.console import Console

from knnlm_builder.settings import BuildSettings, CalibrateSettings, read_settings

# Panel of the help → settings in it.
_PANELS = {
    "What is built": ("model", "inputs", "output", "name", "datastore"),
    "Text and entries": (
        "window", "stride", "max_tokens", "held_out_fraction", "held_out_max_tokens", "shard_entries", "key_tap",
    ),
    "Calibration and publishing": ("latency_budget_ms", "seed", "force"),
    "How the language model runs": ("dtype", "weights", "device", "threads", "batch_tokens"),
}  # fmt: skip
# What the shell offers where the setting's type does not say it.
_VALUES = {"dtype": ("auto", "float32", "bfloat16", "float16"), "device": ("auto", "cpu", "cuda")}


def _help(kind: type[BaseModel], field: str) -> str:
    """What the setting of the same name says, default included."""
    info = kind.model_fields[field]
    if info.is_required() or info.default is None or info.default is False:
        return str(info.description)
    return f"{info.description} (default: {info.default})"


def _option(field: str, *names: str, of: type[BaseModel] = BuildSettings) -> Any:
    annotation = of.model_fields[field].annotation
    values = _VALUES.get(field) or (get_args(annotation) if get_origin(annotation) is Literal else ())
    more: dict[str, Any] = {"autocompletion": lambda: list(values)} if values else {}
    panel = next(panel for panel, fields in _PANELS.items() if field in fields)
    return typer.Option(*names, help=_help(of, field), show_default=False, rich_help_panel=panel, **more)


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

    Examples:
        knnlm build --model ./models/lm --input ./texts --output ./datastores --name law
        knnlm build --model ./models/lm --input a.jsonl.gz --input b.parquet --output ./datastores --name law
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

    Examples:
        knnlm calibrate ./datastores/law --model ./models/lm
        knnlm calibrate ./datastores/law --model ./models/lm --latency-budget-ms 0.5
        knnlm calibrate ./datastores/law --model ./models/lm --weights int8
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
