"""From what a user types after ``--model`` to a running LM."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from knnlm_core.errors import InvalidParameter, KnnlmError, ModelLoadError, ModelNotFound
from knnlm_core.lm.checkpoint import check_complete, eos_token_ids, first_line
from knnlm_core.lm.compiled import CompileOptions, parse_shapes
from knnlm_core.lm.gguf import load_gguf
from knnlm_core.lm.gguf_identity import user_cache
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.int8 import INT8, Weights
from knnlm_core.lm.llamacpp_loading import LLAMACPP, choose_runtime, load_llamacpp
from knnlm_core.lm.protocol import TextLM
from knnlm_core.lm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a model.

    Attributes:
        runtime: what runs the model: ``huggingface``, ``llamacpp`` (GGUF files, on a CPU), or ``auto``: llama.cpp for a
            GGUF file where it is installed and neither a dtype, int8 weights, compiled steps nor a GPU is to be used.
        dtype: ``auto`` (float32 on a CPU, bfloat16 on a GPU), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu`` or a CUDA device.
        key_tap, max_length, max_sequences, kv_cache_bytes, prefix_cache_bytes: see `HuggingFaceLM`, `LlamaCppLM`.
        weights: ``full``, or ``int8`` for linear layers of int8 weights, in float32 on a CPU.
        progress: show the loader's progress bar; for terminals.
        compile_steps: shapes of steps to compile, such as ``1x1``, in the runtime huggingface on a CPU with ``full``
            weights; see `compiled.py`.
        compile_cache: folder of compiled steps; None for the user's.
    """

    dtype: str = "auto"
    device: str = "auto"
    key_tap: str | None = None
    max_length: int | None = None
    max_sequences: int = 0
    kv_cache_bytes: int = 4 << 30
    prefix_cache_bytes: int = 0
    progress: bool = False
    weights: str = "full"
    runtime: str = "huggingface"
    compile_steps: tuple[str, ...] = ()
    compile_cache: Path | None = None


def load_lm(
    model: str, options: LoadOptions | None = None, report: Callable[[str], None] = lambda what: None
) -> TextLM:
    """Load a causal LM from a hub id, a local folder or a GGUF file.

    Args:
        report: is told what a load that takes minutes waits for; what it raises ends the load.
    Raises:
        ModelNotFound: no such path, or the hub has no such id or cannot be reached.
        ModelLoadError: the files are there but do not load, or the runtime is not installed.
        UnsupportedModel: it loads, but a check of the adapter fails.
        InvalidParameter: an option is out of bounds, or the runtime does not have it.
    """
    options = options or LoadOptions()
    device = _device(options.device)
    if choose_runtime(model, options, device.type) == LLAMACPP:
        with warnings.catch_warnings(), _progress_bars(options.progress):
            warnings.simplefilter("ignore")
            return load_llamacpp(model, options, name=model_name(model))
    dtype = _dtype(options.dtype, device)
    weights = _weights(options.weights, dtype, device)
    compile_steps = _compile_steps(options, weights, device, report)
    with warnings.catch_warnings(), _progress_bars(options.progress):
        # Libraries' own deprecations while loading are not the user's to mend.
        warnings.simplefilter("ignore")
        raw_model, raw_tokenizer = _load(model, dtype)
    raw_model.eval().requires_grad_(False).to(device)
    lm = HuggingFaceLM(
        raw_model,
        Tokenizer(raw_tokenizer, eos_token_ids=eos_token_ids(raw_model)),
        name=model_name(model),
        key_tap=options.key_tap,
        max_length=options.max_length,
        max_sequences=options.max_sequences,
        kv_cache_bytes=options.kv_cache_bytes,
        prefix_cache_bytes=options.prefix_cache_bytes,
        weights=weights,
        compile_steps=compile_steps,
    )
    logger.info(
        "model loaded name=%s numerics=%s device=%s key_tap=%s sequences=%d fingerprint=%s",
        lm.identity.model_name, lm.numerics, device, lm.identity.key_tap, lm.num_sequences,
        lm.identity.model_fingerprint,
    )  # fmt: skip
    return lm


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Let transformers show its bars, or not, while a model loads; then as before."""
    before = transformers_logging.is_progress_bar_enabled()
    (transformers_logging.enable_progress_bar if shown else transformers_logging.disable_progress_bar)()
    try:
        yield
    finally:
        (transformers_logging.enable_progress_bar if before else transformers_logging.disable_progress_bar)()


def model_name(model: str) -> str:
    """The name under which a model is served unless told otherwise: its last path component."""
    path = Path(model)
    return path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else path.name


def _load(model: str, dtype: torch.dtype) -> tuple[Any, Any]:
    path = Path(model).expanduser()
    if not model.strip():
        raise ModelNotFound(f"`model` must be a folder, a hub id or a GGUF file, got {model!r}", param="model")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(f"{path} is a file but not a .gguf; give a folder, a hub id or a GGUF file")
        return load_gguf(path, dtype)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"there is no model in the folder {str(path)!r}: it has no config.json", param="model")
        return _from_pretrained(str(path), dtype)
    if not _HUB_ID.match(model) or model.endswith(".gguf"):
        raise ModelNotFound(f"there is no model at {model!r}: no such folder or file, and not a hub id", param="model")
    return _from_pretrained(model, dtype)


def _from_pretrained(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    what = "model"
    try:
        # Other formats would be unpickled.
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
        check_complete(source, info)
        what = "tokenizer of model"
        return model, AutoTokenizer.from_pretrained(source)
    except OSError as error:
        if Path(source).is_dir():
            raise ModelLoadError(f"{what} {source!r} does not load: {first_line(error)}", param="model") from error
        # transformers raises OSError both for a hub that has no such id and for one that does not answer
        raise ModelNotFound(f"{what} {source!r} cannot be read: {first_line(error)}", param="model") from error
    except KnnlmError:
        raise
    except Exception as error:  # of any class: safetensors and tokenizers derive theirs from Exception itself
        raise ModelLoadError(f"{what} {source!r} does not load: {first_line(error)}", param="model") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise InvalidParameter(f"`device` must be auto, cpu or cuda[:N], got {name!r}", param="device")
    device = torch.device(name)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= found:
        raise InvalidParameter(f"`device` is {name!r}, but torch finds {found} CUDA devices here", param="device")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise InvalidParameter(f"`dtype` must be auto, {', '.join(_DTYPES)}; got {name!r}", param="dtype")
    return _DTYPES[name]


def _weights(name: str, dtype: torch.dtype, device: torch.device) -> Weights:
    if name not in get_args(Weights):
        raise InvalidParameter(f"`weights` must be full or int8, got {name!r}", param="weights")
    weights = cast(Weights, name)
    if weights == INT8 and (device.type != "cpu" or dtype != torch.float32):
        raise InvalidParameter(
            f"`weights` can be int8 in float32 on a CPU only, got {str(dtype).removeprefix('torch.')} on {device}",
            param="weights",
        )
    return weights


def _compile_steps(
    options: LoadOptions, weights: Weights, device: torch.device, report: Callable[[str], None]
) -> CompileOptions | None:
    if not options.compile_steps:
        return None
    if weights != "full" or device.type != "cpu":
        raise InvalidParameter(
            f"`compile_steps` is for full weights on a CPU, got {weights} weights on {device}; leave it out",
            param="compile_steps",
        )
    if not options.max_sequences:
        raise InvalidParameter("`compile_steps` needs sequences, got `max_sequences` 0", param="compile_steps")
    return CompileOptions(
        parse_shapes(options.compile_steps), options.compile_cache or user_cache() / "compiled", report
    )
