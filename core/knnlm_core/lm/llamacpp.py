"""llama.cpp behind the `CausalLM` protocol: a GGUF file's weights as they are, quantised ones included, on a CPU.

All sequences live in one KV cache of llama.cpp; a sequence is a number there:

    0 … S − 1        sequences handed out by `allocate` and `copy`
    S … S + 15       windows of `encode`, emptied after each pass
    then             kept beginnings of prompts

Forks and kept beginnings share cells with what they came from. The cache has room for every sequence at full length
and one window more, so that no pass ever lacks a cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from knnlm_core.errors import InvalidParameter, PromptTooLong
from knnlm_core.lm.gguf_identity import read_gguf
from knnlm_core.lm.key_tap import FFN_INPUT, FINAL_HIDDEN
from knnlm_core.lm.llamacpp_checks import check_probe, check_vocabulary
from knnlm_core.lm.llamacpp_context import BATCH_TOKENS, MAX_SEQUENCES, LlamaContext, LlamaModel
from knnlm_core.lm.llamacpp_prefixes import KeptPrefixes
from knnlm_core.lm.prefix_cache import PrefixCacheUse
from knnlm_core.lm.protocol import Rows, SequenceId, Span
from knnlm_core.lm.sequences import Sequences, choose_max_length
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.types import LMIdentity

_WINDOWS_AT_ONCE = 16
_MAX_PREFIXES = 32


class _Part(NamedTuple):
    """Tokens to be appended to one sequence, and how many of the last rows are wanted."""

    sequence: int
    start: int
    tokens: Sequence[int]
    rows: int


class LlamaCppLM:
    """A GGUF model run by llama.cpp. `Rows.hidden` holds the logits themselves.

    Args:
        path: the GGUF file.
        name: for people.
        key_tap: a tap by name, or None for the family's own.
        max_length: tokens per sequence; None for the model's maximum, but at most DEFAULT_MAX_LENGTH.
        max_sequences: sequences held at once; 0 for a model that only encodes.
        kv_cache_bytes: bound on the KV cache, which may lower the number of sequences. All of it is taken at once.
        prefix_cache_bytes: bound on what is kept of prompts' beginnings, inside the KV cache; 0 keeps nothing.
        threads: that compute; None for as many as torch uses.
        cache: folder of what is known of GGUF files; None for the user's.
        exact: attention in float32 instead of float16; for comparisons.
    Raises:
        ModelLoadError: the file does not load, or the extra is missing.
        UnsupportedModel: an architecture whose key was not verified, or a check fails.
        InvalidParameter: max_length beyond the model's, or no sequence fits kv_cache_bytes.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        key_tap: str | None = None,
        max_length: int | None = None,
        max_sequences: int = 0,
        kv_cache_bytes: int = 4 << 30,
        prefix_cache_bytes: int = 0,
        threads: int | None = None,
        cache: Path | None = None,
        exact: bool = False,
    ) -> None:
        if key_tap not in (None, FFN_INPUT, FINAL_HIDDEN):
            raise InvalidParameter(
                f"`key_tap` must be {FFN_INPUT!r} or {FINAL_HIDDEN!r}, got {key_tap!r}", param="key_tap"
            )
        self._context: LlamaContext | None = None
        self._sequences = Sequences(0, 0)
        self._model = LlamaModel(path)
        try:
            reading = read_gguf(path, cache)
            key_tap = key_tap or reading.facts.key_tap
            self.tokenizer = Tokenizer(reading.tokenizer, eos_token_ids=reading.facts.eos_token_ids)
            self._identity = reading.facts.identity(name, key_tap)
            check_vocabulary(path, self._model, self._identity, self.tokenizer)
            self._max_length = choose_max_length(reading.facts.context_length, max_length)
            self._token_bytes = self._model.num_layers * self._model.cells_per_layer * (4 if exact else 2)
            self._sequences = Sequences(self._count_sequences(max_sequences, kv_cache_bytes), self._max_length)
            windows = self.num_sequences + _WINDOWS_AT_ONCE
            prefixes = range(windows, windows + _MAX_PREFIXES) if self.num_sequences else ()
            # With fewer cells than sequences llama.cpp aborts the process.
            self._cells = max(self._max_length * (self.num_sequences + 1), windows + len(prefixes))
            self._prefixes = KeptPrefixes(prefixes, min(prefix_cache_bytes // self._token_bytes, self._cells))
            self._context = LlamaContext(
                self._model,
                cells=self._cells,
                sequences=windows + len(prefixes),
                key_tap=key_tap,
                threads=threads or torch.get_num_threads(),
                exact=exact,
            )
            check_probe(self, path, reading, key_tap)
        except BaseException:
            self.close()
            raise

    @property
    def identity(self) -> LMIdentity:
        return self._identity

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def num_free_sequences(self) -> int:
        return self._sequences.num_free

    @property
    def num_sequences(self) -> int:
        return self._sequences.count

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes taken by the KV cache."""
        return self._cells * self._token_bytes

    @property
    def prefix_cache_use(self) -> PrefixCacheUse:
        """How much is kept of prompts' beginnings, all of it inside the KV cache, and has been spared."""
        kept = self._prefixes
        sizes = (kept.tokens * self._token_bytes, kept.max_tokens * self._token_bytes)
        return PrefixCacheUse(kept.asked_tokens, kept.reused_tokens, *sizes)

    @property
    def numerics(self) -> str:
        """What the weights are computed in, for people."""
        return "llama.cpp"

    # -- sequences ---------------------------------------------------------------------------------------------------

    def allocate(self) -> SequenceId:
        return self._sequences.allocate()

    def length(self, sequence: SequenceId) -> int:
        return self._sequences.length(sequence)

    def rewind(self, sequence: SequenceId, length: int) -> None:
        self._sequences.rewind(sequence, length)
        self._running.forget(sequence, length)

    def copy(self, sequence: SequenceId) -> SequenceId:
        length = self._sequences.length(sequence)
        fork = self._sequences.allocate(length)
        self._running.share(sequence, fork, length)
        return fork

    def free(self, sequence: SequenceId) -> None:
        self._sequences.free(sequence)
        self._running.forget(sequence)

    def reuse_prefix(self, sequence: SequenceId, tokens: Sequence[int]) -> int:
        if self._prefixes.max_tokens:
            holder, length = self._prefixes.find(tokens)
            self._sequences.begin(sequence, length)
            if length:
                self._running.share(holder, sequence, length)
        return self._sequences.length(sequence)

    def keep_prefix(self, sequence: SequenceId, tokens: Sequence[int]) -> None:
        if not self._prefixes.max_tokens:
            return
        tokens = tokens[: self._sequences.length(sequence)]
        holder, dropped = self._prefixes.keep(tokens)
        self._empty(dropped)
        if holder is not None:
            self._running.share(sequence, holder, self._prefixes.length(holder))

    def forward(self, batch: Sequence[Span]) -> Rows:
        for span in batch:
            self._sequences.check_room(span.sequence, len(span.tokens))
        parts = [_Part(span.sequence, self.length(span.sequence), span.tokens, span.rows) for span in batch]
        live = self._sequences.num_tokens + sum(len(part.tokens) for part in parts)
        # One window's room stays free for `encode`.
        self._empty(self._prefixes.release(self._cells - self._max_length - live))
        rows = self._append(parts)
        for part in parts:
            self._sequences.extend(part.sequence, len(part.tokens))
        return rows

    # -- whole windows -----------------------------------------------------------------------------------------------

    def encode(self, windows: Sequence[Sequence[int]], first_rows: Sequence[int]) -> Rows:
        for window in windows:
            if len(window) > self._max_length:
                raise PromptTooLong(f"a window may hold at most {self._max_length} tokens, got {len(window)}")
        found = []
        for group in _groups([len(window) for window in windows], self._max_length):
            parts = [
                _Part(self.num_sequences + at, 0, windows[i], len(windows[i]) - first_rows[i])
                for at, i in enumerate(group)
            ]
            found.append(self._append(parts))
            self._empty(part.sequence for part in parts)
        if len(found) == 1:
            return found[0]
        return Rows(*(torch.cat(column) for column in zip(*found, strict=True))) if found else self._append([])

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def close(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None
        self._model.close()
        self._sequences.clear()

    # -- inside ------------------------------------------------------------------------------------------------------

    @property
    def _running(self) -> LlamaContext:
        assert self._context is not None, "the LM is used after close. This is a bug."
        return self._context

    def _append(self, parts: Sequence[_Part]) -> Rows:
        """One pass over all parts, in batches; a failure leaves every sequence as long as it was."""
        tokens = np.concatenate([np.zeros(0, np.int32), *(np.asarray(part.tokens, np.int32) for part in parts)])
        positions = np.concatenate([np.zeros(0), *(part.start + np.arange(len(part.tokens)) for part in parts)])
        sequences = np.repeat([part.sequence for part in parts], [len(part.tokens) for part in parts])
        ends = np.repeat(np.cumsum([len(part.tokens) for part in parts]), [part.rows for part in parts])
        offsets = [offset for part in parts for offset in range(part.rows, 0, -1)]
        wanted = np.zeros(len(tokens), np.int8)
        wanted[(ends - offsets).astype(np.int64)] = 1
        first = np.concatenate([[0], np.cumsum(wanted, dtype=np.int64)])  # row of the next wanted token
        keys = np.empty((int(first[-1]), self._identity.key_dim), np.float32)
        logits = np.empty((int(first[-1]), self._identity.vocab_size), np.float32)
        try:
            for start in range(0, len(tokens), BATCH_TOKENS):
                here = slice(start, start + BATCH_TOKENS)
                rows = slice(first[start], first[min(start + BATCH_TOKENS, len(tokens))])
                self._running.decode(
                    tokens[here], positions[here].astype(np.int32), sequences[here].astype(np.int32), wanted[here],
                    keys[rows], logits[rows],
                )  # fmt: skip
        except BaseException:
            for part in parts:
                self._running.forget(part.sequence, part.start)
            raise
        return Rows(torch.from_numpy(keys), torch.from_numpy(logits))

    def _empty(self, sequences: Iterator[int] | Sequence[int]) -> None:
        for sequence in sequences:
            self._running.forget(sequence)

    def _count_sequences(self, wanted: int, kv_cache_bytes: int) -> int:
        """How many sequences fit the bound beside one window; 0 where none is wanted."""
        per_slot = self._token_bytes * self._max_length
        fitting = kv_cache_bytes // per_slot - 1
        if wanted and fitting < 1:
            raise InvalidParameter(
                f"`kv_cache_bytes` must be at least {2 * per_slot} for one sequence and one window of "
                f"{self._max_length} tokens, got {kv_cache_bytes}",
                param="kv_cache_bytes",
            )
        return min(wanted, fitting, MAX_SEQUENCES - _WINDOWS_AT_ONCE - _MAX_PREFIXES) if wanted else 0


def _groups(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Neighbouring windows that go together: as many as there are sequences for, of ``max_tokens`` in all."""
    group: list[int] = []
    for i, length in enumerate(lengths):
        if group and (len(group) == _WINDOWS_AT_ONCE or sum(lengths[j] for j in group) + length > max_tokens):
            yield group
            group = []
        group.append(i)
    if group:
        yield group
