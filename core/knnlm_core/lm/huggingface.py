"""Any Hugging Face causal LM behind the `CausalLM` protocol; its modelling code runs unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from knnlm_core.errors import InvalidParameter, UnsupportedModel
from knnlm_core.lm.attention import use_shared_heads
from knnlm_core.lm.compiled import CompiledSteps, CompileOptions
from knnlm_core.lm.fingerprint import model_fingerprint
from knnlm_core.lm.head import OutputHead
from knnlm_core.lm.int8 import INT8, Weights, use_int8_weights
from knnlm_core.lm.key_tap import find_key_tap
from knnlm_core.lm.masks import MaskBuilder
from knnlm_core.lm.prefix_cache import PrefixCache, PrefixCacheUse
from knnlm_core.lm.probe import check_adapter, check_step, rows_of_step
from knnlm_core.lm.protocol import Rows, SequenceId, Span
from knnlm_core.lm.sequences import Sequences, choose_max_length
from knnlm_core.lm.slot_cache import SlotCache
from knnlm_core.lm.step_graph import StepParts
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.types import LMIdentity

_MAX_PADDING = 1.25  # padded tokens per real token in one pass
_FREE_PADDING = 16  # tokens of padding that cost less than one more pass


class HuggingFaceLM:
    """A transformers causal LM that serves many sequences at once.

    Args:
        model: in eval mode, on its device.
        tokenizer: the model's own.
        name: for people; the last component of where it was loaded from.
        key_tap: a tap by name, or None for the family's own.
        max_length: tokens per sequence; None for the model's maximum, but at most DEFAULT_MAX_LENGTH.
        max_sequences: sequences held at once; 0 for a model that only encodes.
        kv_cache_bytes: bound on the KV cache, which may lower the number of sequences.
        prefix_cache_bytes: bound on what is kept of prompts' beginnings, beside the KV cache; 0 keeps nothing.
        weights: ``full``, or ``int8`` to run the linear layers of a float32 model by `Int8Linear`. The model's identity
            stays that of the weights given.
        compile_steps: steps to compile, for a model on a CPU with ``full`` weights and sequences.
    Raises:
        UnsupportedModel: a check of `probe.py` or of the key tap fails, or a step cannot be compiled.
        InvalidParameter: max_length beyond the model's, or no sequence fits kv_cache_bytes.
        ModelLoadError: see `CompiledSteps`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        name: str,
        key_tap: str | None = None,
        max_length: int | None = None,
        max_sequences: int = 0,
        kv_cache_bytes: int = 4 << 30,
        prefix_cache_bytes: int = 0,
        weights: Weights = "full",
        compile_steps: CompileOptions | None = None,
    ) -> None:
        self._model = model
        self._body = model.base_model
        self._device = next(model.parameters()).device
        self.tokenizer = tokenizer
        config = model.config.get_text_config()
        self._max_length = choose_max_length(config.max_position_embeddings, max_length)
        fingerprint = model_fingerprint(model, config)
        self._numerics = str(model.dtype).removeprefix("torch.")
        if weights == INT8:
            use_int8_weights(model)
            self._numerics = INT8
        use_shared_heads(model)
        self._head = OutputHead(model)
        self._tap = find_key_tap(self._body, config, key_tap)
        self._masks = MaskBuilder(config, model.dtype)
        self._cache: SlotCache | None = None
        if max_sequences:
            self._cache = self._allocate_cache(max_sequences, kv_cache_bytes)
        self._sequences = Sequences(self.num_sequences, self._max_length)
        self._prefixes: PrefixCache | None = None
        if self._cache is not None and prefix_cache_bytes:
            self._prefixes = PrefixCache(self._cache, prefix_cache_bytes)
        self._steps: CompiledSteps | None = None
        key_dim, vocab_size = check_adapter(self, model)
        self._identity = LMIdentity(
            model_fingerprint=fingerprint,
            tokenizer_fingerprint=tokenizer.fingerprint,
            model_name=name,
            vocab_size=vocab_size,
            key_tap=self._tap.name,
            key_dim=key_dim,
        )
        if compile_steps is not None:
            self._compile(compile_steps)

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
        return self._cache.num_slots if self._cache else 0

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes reserved for the KV cache."""
        return self._cache.num_bytes if self._cache else 0

    @property
    def prefix_cache_use(self) -> PrefixCacheUse:
        """How much the prefix cache holds and has spared."""
        return self._prefixes.use if self._prefixes else PrefixCacheUse(0, 0, 0, 0)

    @property
    def numerics(self) -> str:
        return self._numerics

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in, and holds its weights in unless they are int8."""
        return self._model.dtype

    # -- sequences ---------------------------------------------------------------------------------------------------

    def allocate(self) -> SequenceId:
        return self._sequences.allocate()

    def length(self, sequence: SequenceId) -> int:
        return self._sequences.length(sequence)

    def rewind(self, sequence: SequenceId, length: int) -> None:
        self._sequences.rewind(sequence, length)

    @torch.inference_mode()
    def copy(self, sequence: SequenceId) -> SequenceId:
        length = self._sequences.length(sequence)
        fork = self._sequences.allocate(length)
        assert self._cache is not None
        self._cache.copy_slot(sequence, fork, length)
        return fork

    def free(self, sequence: SequenceId) -> None:
        self._sequences.free(sequence)

    @torch.inference_mode()
    def reuse_prefix(self, sequence: SequenceId, tokens: Sequence[int]) -> int:
        if self._prefixes is not None:
            self._sequences.begin(sequence, self._prefixes.load(sequence, tokens))
        return self._sequences.length(sequence)

    @torch.inference_mode()
    def keep_prefix(self, sequence: SequenceId, tokens: Sequence[int]) -> None:
        if self._prefixes is not None:
            self._prefixes.save(sequence, tokens[: self._sequences.length(sequence)])

    @torch.inference_mode()
    def forward(self, batch: Sequence[Span]) -> Rows:
        for span in batch:
            self._sequences.check_room(span.sequence, len(span.tokens))
        keys: list[Tensor | None] = [None] * len(batch)
        hidden: list[Tensor | None] = [None] * len(batch)
        for group in _groups([len(span.tokens) for span in batch]):
            # Ordered by slot, so that neighbouring slots can be viewed instead of copied.
            group.sort(key=lambda i: batch[i].sequence)
            group_keys, group_hidden = self._pass([batch[i] for i in group])
            for row, i in enumerate(group):
                end = len(batch[i].tokens)
                keys[i] = group_keys[row, end - batch[i].rows : end]
                hidden[i] = group_hidden[row, end - batch[i].rows : end]
        return Rows(torch.cat([k for k in keys if k is not None]), torch.cat([h for h in hidden if h is not None]))

    def _pass(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """One forward pass over spans of similar length; returns padded keys (B, T, D) and hidden states (B, T, H)."""
        assert self._cache is not None
        num_new = [len(span.tokens) for span in spans]
        lengths = [self._sequences.length(span.sequence) for span in spans]
        slots, tokens = [span.sequence for span in spans], [span.tokens for span in spans]
        rows = self._steps.run(slots, tokens, lengths) if self._steps is not None else None
        keys, hidden = rows or self._eager_pass(slots, tokens, lengths)
        for span, new in zip(spans, num_new, strict=True):
            self._sequences.extend(span.sequence, new)
        return keys.float(), hidden

    def _eager_pass(
        self, slots: Sequence[SequenceId], tokens: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """`_pass` of any shape, by the model as it is."""
        assert self._cache is not None
        plan = self._cache.plan_rows(slots, lengths, [len(row) for row in tokens])
        ids = _padded(tokens, self._device)
        starts = torch.tensor(lengths, device=self._device)
        positions = starts[:, None] + torch.arange(ids.shape[1], device=self._device)
        mask = self._masks(starts, ids.shape[1], plan.kv_length)
        self._cache.plan = plan
        try:
            with self._tap.reading() as seen:
                output = self._body(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions.clamp(max=self._max_length - 1),
                    past_key_values=self._cache,
                    use_cache=True,
                ).last_hidden_state
        finally:
            self._cache.plan = None
        return self._tap.key(seen, output), output

    def _compile(self, options: CompileOptions) -> None:
        """Compile steps, and compare their rows with those of the same passes without."""
        assert self._cache is not None, "steps are of sequences. This is a bug."
        steps = CompiledSteps(StepParts(self._model, self._tap, self._masks, self._cache), options)
        eager = [rows_of_step(self, *shape) for shape in options.shapes]
        self._steps = steps
        for shape, need in zip(options.shapes, eager, strict=True):
            check_step(self, self._model, f"the compiled step {shape}", rows_of_step(self, *shape), need)

    # -- whole windows -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, windows: Sequence[Sequence[int]], first_rows: Sequence[int]) -> Rows:
        # Padding stands on the right, where causal attention never looks: no mask is needed.
        ids = _padded(windows, self._device)
        with self._tap.reading() as seen:
            output = self._body(input_ids=ids, use_cache=False).last_hidden_state
        keys = self._tap.key(seen, output)
        bounds = [(row, first, len(w)) for row, (w, first) in enumerate(zip(windows, first_rows, strict=True))]
        return Rows(
            torch.cat([keys[row, first:end] for row, first, end in bounds]).float(),
            torch.cat([output[row, first:end] for row, first, end in bounds]),
        )

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    def close(self) -> None:
        self._cache = self._prefixes = self._steps = None
        self._sequences.clear()

    @torch.no_grad()
    def _allocate_cache(self, max_sequences: int, kv_cache_bytes: int) -> SlotCache:
        """Learn the layers' shapes from two tokens, then reserve as many slots as the bound allows."""
        ids = torch.zeros((1, 2), dtype=torch.long, device=self._device)
        layers = self._body(input_ids=ids, use_cache=True).past_key_values.layers
        shapes = []
        for layer in layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or keys.ndim != 4 or keys.shape != values.shape:
                raise UnsupportedModel(
                    f"model_type {self._model.config.model_type!r}: layer cache {type(layer).__name__} holds no plain "
                    "attention keys and values, so its sequences cannot be rewound"
                )
            shapes.append((keys.shape[1], keys.shape[3]))
        element = torch.finfo(self._model.dtype).bits // 8
        per_slot = sum(2 * heads * size for heads, size in shapes) * (self._max_length + 1) * element
        num_slots = min(max_sequences, kv_cache_bytes // per_slot)
        if num_slots < 1:
            raise InvalidParameter(
                f"`kv_cache_bytes` must be at least {per_slot} for one sequence of {self._max_length} tokens, "
                f"got {kv_cache_bytes}",
                param="kv_cache_bytes",
            )
        return SlotCache(
            shapes, num_slots=num_slots, capacity=self._max_length, dtype=self._model.dtype, device=self._device
        )


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, T) token ids, right-padded with 0."""
    ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.as_tensor(tokens, dtype=torch.long)
    return ids.to(device)


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Split rows into passes of similar length, so that padding stays small; indices into ``lengths``."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    group: list[int] = []
    real = 0
    for i in order:
        together = real + lengths[i]
        if group and lengths[i] * (len(group) + 1) > max(_MAX_PADDING * together, together + _FREE_PADDING):
            yield group
            group, real = [], 0
        group.append(i)
        real += lengths[i]
    if group:
        yield group
