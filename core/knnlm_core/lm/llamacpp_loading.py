"""When llama.cpp runs a model, and with which options."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from knnlm_core.errors import InvalidParameter, ModelNotFound
from knnlm_core.lm.llamacpp import LlamaCppLM
from knnlm_core.lm.llamacpp_context import is_installed
from knnlm_core.lm.protocol import TextLM

if TYPE_CHECKING:
    from knnlm_core.lm.loading import LoadOptions

logger = logging.getLogger(__name__)

HUGGINGFACE, LLAMACPP = "huggingface", "llamacpp"
RUNTIMES = ("auto", HUGGINGFACE, LLAMACPP)
_WIDE_ROW_BYTES = 256 << 20  # of rows as wide as the vocabulary, held at once


def choose_runtime(model: str, options: LoadOptions, device: str) -> str:
    """The runtime to use for a model; what is chosen without being asked for is logged, with the reason.

    Args:   device: what ``options.device`` comes to here.
    Raises: InvalidParameter: no such runtime, or it does not run such a model.
    """
    wanted = options.runtime
    if wanted not in RUNTIMES:
        raise InvalidParameter(
            f"`runtime` must be {', '.join(RUNTIMES[:-1])} or {RUNTIMES[-1]}, got {wanted!r}", param="runtime"
        )
    is_gguf = model.endswith(".gguf")
    if wanted == LLAMACPP and not is_gguf:
        raise InvalidParameter(f"`runtime` llamacpp runs GGUF files only, got the model {model!r}", param="runtime")
    if wanted != "auto":
        return wanted
    chosen, reason = HUGGINGFACE, "the model is not a GGUF file"
    if is_gguf:
        if not is_installed():
            reason = "the extra llamacpp is not installed"
        elif options.dtype != "auto" or options.weights != "full":
            reason = f"dtype {options.dtype} with {options.weights} weights was asked for"
        elif options.compile_steps:
            reason = "compiled steps were asked for"
        elif device != "cpu":
            reason = f"the device is {device}"
        else:
            chosen, reason = LLAMACPP, "the model is a GGUF file"
    logger.info("runtime chosen runtime=%s because %s", chosen, reason)
    return chosen


def load_llamacpp(model: str, options: LoadOptions, *, name: str) -> LlamaCppLM:
    """Load a GGUF file to be run by llama.cpp.

    Raises:
        InvalidParameter: an option that this runtime does not have.
        ModelNotFound: no such file.
        ModelLoadError, UnsupportedModel: as `LlamaCppLM`.
    """
    for option, given, possible in (
        ("dtype", options.dtype, ("auto",)),
        ("weights", options.weights, ("full",)),
        ("device", options.device, ("auto", "cpu")),
    ):
        if given not in possible:
            raise InvalidParameter(
                f"`{option}` must be {' or '.join(possible)} with the runtime llamacpp, which runs a file's weights as "
                f"they are on a CPU; got {given!r}",
                param=option,
            )
    if options.compile_steps:
        raise InvalidParameter(
            "`compile_steps` is for the runtime huggingface: llama.cpp's steps are compiled already; got "
            f"{','.join(options.compile_steps)!r}",
            param="compile_steps",
        )
    path = Path(model).expanduser()
    if not path.is_file():
        raise ModelNotFound(f"there is no model at {model!r}: no such file", param="model")
    lm = LlamaCppLM(
        path,
        name=name,
        key_tap=options.key_tap,
        max_length=options.max_length,
        max_sequences=options.max_sequences,
        kv_cache_bytes=options.kv_cache_bytes,
        prefix_cache_bytes=options.prefix_cache_bytes,
    )
    logger.info(
        "model loaded name=%s numerics=%s device=cpu key_tap=%s sequences=%d fingerprint=%s",
        name, lm.numerics, lm.identity.key_tap, lm.num_sequences, lm.identity.model_fingerprint,
    )  # fmt: skip
    return lm


def encode_budget(lm: TextLM, wanted: int) -> int:
    """Tokens to give to one call of `encode`: ``wanted``, or fewer where its rows are as wide as the vocabulary."""
    if not isinstance(lm, LlamaCppLM):
        return wanted
    return max(1, min(wanted, _WIDE_ROW_BYTES // (4 * lm.identity.vocab_size)))
