"""llama.cpp behind a few calls: tokens at positions of sequences in, keys and logits out.

The library's own C interface through ctypes. The key is read by its evaluation callback, which is asked about every
node of the graph by name and gets the one that holds the key once it is computed:

    … ─ ffn_inp ─ norm ─┬─ ffn_norm-<last> ─ ffn ─ + ─ norm ─ result_norm ─ head
                        └ key `ffn_input`                     └ key `final_hidden`

In its last layer llama.cpp computes, after attention, only the rows whose output was asked for, in the order of the
batch: the key tensor and the logits have the same rows.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm_core.errors import EngineFailure, ModelLoadError, UnsupportedModel
from knnlm_core.lm.checkpoint import first_line
from knnlm_core.lm.key_tap import FFN_INPUT, FINAL_HIDDEN

logger = logging.getLogger(__name__)

# Architectures, as GGUF files call them, whose tensors below were compared with the Hugging Face adapter's key.
ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3"})
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
BATCH_TOKENS = 512  # of one call of llama_decode, which computes them in one graph

Ints = npt.NDArray[np.int32]
_EvalCallback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
_LEVELS = {3: logging.INFO, 4: logging.ERROR}  # of GGML_LOG_LEVEL; its warnings are of settings that we mean


def is_installed() -> bool:
    """Whether the extra `llamacpp` is there; imports nothing."""
    return find_spec("llama_cpp") is not None


class LlamaModel:
    """The weights and the vocabulary of a GGUF file, mapped.

    Raises:
        ModelLoadError: the extra is missing, or llama.cpp does not read the file.
        UnsupportedModel: of an architecture whose key was not verified.
    """

    def __init__(self, path: Path) -> None:
        self._lib = library()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        # Weights repacked for AMX crash the process on some machines: ggml-org/llama.cpp issue 20824.
        params.use_extra_bufts = False
        self.pointer = self._lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise ModelLoadError(f"{path}: llama.cpp does not read it; the log says why", param="model")
        try:
            self.architecture = self._text("general.architecture") or "unknown"
            if self.architecture not in ARCHITECTURES:
                raise UnsupportedModel(
                    f"{path}: architecture {self.architecture!r}: where llama.cpp holds the datastore key is known for "
                    f"{', '.join(sorted(ARCHITECTURES))} only; use --runtime huggingface"
                )
        except BaseException:
            self.close()
            raise
        vocab = self._lib.llama_model_get_vocab(self.pointer)
        self.vocab_size: int = self._lib.llama_vocab_n_tokens(vocab)
        self.eos_token_id: int = self._lib.llama_vocab_eos(vocab)  # −1 for none
        self.num_layers: int = self._lib.llama_model_n_layer(self.pointer)
        self.hidden_size: int = self._lib.llama_model_n_embd(self.pointer)

    @property
    def cells_per_layer(self) -> int:
        """Numbers that one token takes in one layer of the KV cache."""
        heads = self._lib.llama_model_n_head_kv(self.pointer)
        default = self.hidden_size // self._lib.llama_model_n_head(self.pointer)
        sizes = (self._text(f"{self.architecture}.attention.{part}_length") for part in ("key", "value"))
        return sum(heads * int(size or default) for size in sizes)

    def close(self) -> None:
        """Unmap the file. Every context of it must be closed before."""
        if self.pointer:
            self._lib.llama_model_free(self.pointer)
            self.pointer = None

    def _text(self, key: str) -> str | None:
        buffer = ctypes.create_string_buffer(256)
        length = self._lib.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return buffer.value.decode() if length >= 0 else None


class LlamaContext:
    """One KV cache over a model, shared by its sequences, and the pass that fills it.

    Args:
        cells: tokens that the cache holds, all sequences together; tokens that sequences share take one cell.
        sequences: ids that may be used, from 0.
        key_tap: which activation is the key.
        threads: that compute.
        exact: attention in float32 instead of float16, slower where there are many sequences; for comparisons.
    Raises: ModelLoadError: no memory for it.
    """

    def __init__(
        self, model: LlamaModel, *, cells: int, sequences: int, key_tap: str, threads: int, exact: bool = False
    ) -> None:
        self._lib = library()
        self._ggml = _ggml()
        self._dim, self._vocab_size = model.hidden_size, model.vocab_size
        self._tensor = {FFN_INPUT: f"ffn_norm-{model.num_layers - 1}", FINAL_HIDDEN: "result_norm"}[key_tap].encode()
        self._out: npt.NDArray[np.float32] | None = None  # where the callback puts keys, and how many there are
        self._filled = 0
        self._callback = self._reader()  # llama.cpp holds a bare pointer to it
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = cells, sequences
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = threads
        # One buffer for all sequences: they can share cells, one batch holds any of them in any order, and on a CPU
        # flash attention skips what other sequences hold.
        params.kv_unified = True
        params.type_k = params.type_v = self._lib.GGML_TYPE_F32 if exact else self._lib.GGML_TYPE_F16
        if exact:  # flash attention rounds to float16 whatever the cache holds
            params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cb_eval = ctypes.cast(self._callback, type(params.cb_eval))
        params.no_perf = True
        self.pointer = self._lib.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise ModelLoadError(
                f"llama.cpp cannot make a KV cache of {cells} tokens; the log says why (lower --kv-cache-bytes or "
                "--max-model-len)"
            )
        self._memory = self._lib.llama_get_memory(self.pointer)
        self._batch = _Batch(self._lib)

    def decode(
        self, tokens: Ints, positions: Ints, sequences: Ints, wanted: npt.NDArray[np.int8], keys: Any, logits: Any
    ) -> None:
        """Append up to BATCH_TOKENS tokens and fill in the rows wanted.

        Args:
            tokens, positions, sequences, wanted: (T,) each; positions follow those that the sequence holds.
            keys, logits: (R, D) and (R, V) float32 to be filled, R = Σ wanted.
        Raises: EngineFailure: llama.cpp refuses the batch; what the cache holds of its sequences is then unknown.
        """
        self._out, self._filled = keys, 0
        try:
            code = self._lib.llama_decode(self.pointer, self._batch.fill(tokens, positions, sequences, wanted))
        finally:
            self._out = None
        if code or self._filled != len(keys):
            what = f"llama_decode returned {code}" if code else f"the key tap saw {self._filled} of {len(keys)} rows"
            raise EngineFailure(f"llama.cpp failed on a batch of {len(tokens)} tokens: {what}")
        if len(logits):
            source = self._lib.llama_get_logits(self.pointer)
            ctypes.memmove(logits.ctypes.data, source, logits.nbytes)

    def forget(self, sequence: int, start: int = 0) -> None:
        """Take a sequence's tokens from a position on out of the cache."""
        if not self._lib.llama_memory_seq_rm(self._memory, sequence, start, -1):
            raise EngineFailure(f"llama.cpp cannot cut sequence {sequence} at {start}")

    def share(self, source: int, target: int, length: int) -> None:
        """Let an empty sequence hold the first ``length`` tokens of another; no data is copied."""
        self._lib.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def close(self) -> None:
        """Give the cache's memory back."""
        if self.pointer:
            self._lib.llama_free(self.pointer)
            self.pointer = None

    def _reader(self) -> Any:
        """The evaluation callback. It is asked about some thousand nodes a pass, so everything it needs is local."""
        name_of, wanted = self._ggml.ggml_get_name, self._tensor

        def read(tensor: int, ask: bool, _: None) -> bool:
            if ask:
                return bool(name_of(tensor) == wanted)
            self._take(tensor)
            return True  # go on computing

        return _EvalCallback(read)

    def _take(self, tensor: int) -> None:
        assert self._out is not None
        size = self._ggml.ggml_nbytes(tensor)
        rows = size // (4 * self._dim)
        if size == rows * 4 * self._dim and self._filled + rows <= len(self._out):
            if rows:
                self._ggml.ggml_backend_tensor_get(tensor, self._out[self._filled :].ctypes.data, 0, size)
            self._filled += rows


class _Batch:
    """A llama_batch over arrays of our own, so that filling it is a few copies."""

    def __init__(self, lib: Any) -> None:
        self._tokens, self._positions, self._sequences = (np.zeros(BATCH_TOKENS, np.int32) for _ in range(3))
        self._wanted = np.zeros(BATCH_TOKENS, np.int8)
        self._counts = np.ones(BATCH_TOKENS, np.int32)  # sequences that each token belongs to
        # A pointer per token to its sequence ids.
        stride = self._sequences.itemsize
        self._pointers = self._sequences.ctypes.data + stride * np.arange(BATCH_TOKENS, dtype=np.uint64)
        self._batch = lib.llama_batch()
        for field, array in (
            ("token", self._tokens),
            ("pos", self._positions),
            ("n_seq_id", self._counts),
            ("seq_id", self._pointers),
            ("logits", self._wanted),
        ):
            kind = dict(lib.llama_batch._fields_)[field]
            setattr(self._batch, field, ctypes.cast(ctypes.c_void_p(array.ctypes.data), kind))

    def fill(self, tokens: Ints, positions: Ints, sequences: Ints, wanted: npt.NDArray[np.int8]) -> Any:
        """The batch, of up to BATCH_TOKENS tokens; good until the next one is filled."""
        count = len(tokens)
        for target, source in (
            (self._tokens, tokens),
            (self._positions, positions),
            (self._sequences, sequences),
            (self._wanted, wanted),
        ):
            target[:count] = source
        self._batch.n_tokens = count
        return self._batch


@functools.cache
def library() -> ModuleType:
    """The module `llama_cpp`, made ready once for the whole process. Raises ModelLoadError: the extra is missing."""
    try:
        import llama_cpp
    except ImportError as error:
        raise ModelLoadError(
            "the runtime llamacpp needs the extra `llamacpp` (pip install 'knnlm[llamacpp]', which compiles it)"
        ) from error
    except Exception as error:  # compiled for another machine, or half removed: its own words say it best
        raise ModelLoadError(f"the runtime llamacpp does not load: {first_line(error)}") from error
    llama_cpp.llama_log_set(_log_callback(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@functools.cache  # llama.cpp holds a bare pointer to it
def _log_callback(llama_cpp: ModuleType) -> Any:
    """llama.cpp's own log, line by line, under this module's logger."""
    line: list[str] = []
    of_line = [logging.DEBUG]

    def write(level: int, text: bytes, _: None) -> None:
        if level != 5:  # 5 goes on with the line before
            of_line[0] = _LEVELS.get(level, logging.DEBUG)
        line.append(text.decode(errors="replace"))
        if line[-1].endswith("\n"):
            logger.log(of_line[0], "llama.cpp: %s", "".join(line).strip())
            line.clear()

    return llama_cpp.llama_log_callback(write)


@functools.cache
def _ggml() -> Any:
    """Functions of the tensor library below llama.cpp, which `llama_cpp` loads but does not wrap."""
    folder = Path(str(library().__file__)).parent / "lib"
    found = sorted(folder.glob("*ggml-base.*"))
    if not found:
        raise ModelLoadError(f"llama_cpp has no ggml-base library in {folder}")
    lib = ctypes.CDLL(str(found[0]))
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_get_name": (ctypes.c_char_p, [ctypes.c_void_p]),
        "ggml_nbytes": (ctypes.c_size_t, [ctypes.c_void_p]),
        "ggml_backend_tensor_get": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
    }
    for name, (result, arguments) in signatures.items():
        function: Callable[..., Any] = getattr(lib, name)
        function.restype, function.argtypes = result, arguments  # type: ignore[attr-defined]
    return lib
