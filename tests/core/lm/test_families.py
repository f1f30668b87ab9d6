"""Family by family: whatever way tokens reach the adapter, its answers are those of `model(...)` itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from knnlm_core.errors import Overloaded, PromptTooLong
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.protocol import Rows, Span
from knnlm_core.lm.tokenizer import Tokenizer
from tiny import FAMILIES, VOCAB, tiny_model, tiny_tokenizer

LENGTH = 60  # five times the sliding windows of the tiny families
TOLERANCE = 1e-4

every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def model_of(family: str) -> Any:
    return tiny_model(family)


@cache
def adapter(family: str) -> HuggingFaceLM:
    return HuggingFaceLM(model_of(family), Tokenizer(tiny_tokenizer()), name=family, max_sequences=6)


@pytest.fixture
def lm(family: str) -> Iterator[HuggingFaceLM]:
    lm = adapter(family)
    yield lm
    for sequence in list(lm._sequences._lengths):
        lm.free(sequence)


def text(seed: int, length: int = LENGTH) -> list[int]:
    return torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def reference(family: str, ids: list[int]) -> Tensor:
    """(T, V) logits of the model as transformers runs it."""
    return model_of(family)(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def feed(lm: HuggingFaceLM, sequence: int, ids: list[int], cuts: list[int]) -> Rows:
    """Append ids in pieces and return the rows of all of them."""
    parts = [lm.forward([Span(sequence, ids[a:b], rows=b - a)]) for a, b in pairwise(cuts)]
    return Rows(*(torch.cat(column) for column in zip(*parts, strict=True)))


def distance(have: Tensor, need: Tensor) -> float:
    assert have.shape == need.shape
    return (have - need).abs().max().item()


@every_family
def test_ragged_prefill_and_single_tokens_are_the_models_own_forward(lm: HuggingFaceLM, family: str) -> None:
    ids = text(0)
    rows = feed(lm, lm.allocate(), ids, [0, 1, 8, 25, 26, 27, 28, 45, LENGTH])
    assert distance(lm.logits(rows.hidden), reference(family, ids)) <= TOLERANCE


@every_family
def test_a_mixed_batch_is_each_sequence_alone(lm: HuggingFaceLM, family: str) -> None:
    texts = [text(seed, length) for seed, length in enumerate((LENGTH, 3, 41, 17, 29, 58))]
    sequences = [lm.allocate() for _ in texts]
    order = torch.Generator().manual_seed(1)
    done = [0] * len(texts)
    rows: list[list[Tensor]] = [[] for _ in texts]
    while pending := [i for i, ids in enumerate(texts) if done[i] < len(ids)]:
        # Some sequences, in any order: most get one token, some a chunk of a prompt.
        chosen = [pending[i] for i in torch.randperm(len(pending), generator=order)[:4]]
        sizes = [int(torch.randint(1, 14, (), generator=order)) if i % 2 else 1 for i in chosen]
        spans = [texts[i][done[i] : done[i] + size] for i, size in zip(chosen, sizes, strict=True)]
        have = lm.forward([Span(sequences[i], s, rows=len(s)) for i, s in zip(chosen, spans, strict=True)])
        for i, part in zip(chosen, torch.split(have.hidden, [len(s) for s in spans]), strict=True):
            rows[i].append(part)
            done[i] += len(part)
    for ids, parts in zip(texts, rows, strict=True):
        assert distance(lm.logits(torch.cat(parts)), reference(family, ids)) <= TOLERANCE


@every_family
def test_only_the_last_rows_asked_for_come_back_span_after_span(lm: HuggingFaceLM, family: str) -> None:
    long, short = text(2, 30), text(3, 9)
    one, other, silent = (lm.allocate() for _ in range(3))
    rows = lm.forward([Span(one, long, rows=2), Span(silent, text(4, 12), rows=0), Span(other, short, rows=5)])
    need = torch.cat([reference(family, long)[-2:], reference(family, short)[-5:]])
    assert distance(lm.logits(rows.hidden), need) <= TOLERANCE
    assert (lm.length(one), lm.length(silent), lm.length(other)) == (30, 12, 9)


@every_family
def test_a_sequence_rewound_and_continued_otherwise_never_held_what_was_forgotten(
    lm: HuggingFaceLM, family: str
) -> None:
    first, second = text(5), text(6)
    sequence = lm.allocate()
    feed(lm, sequence, first, [0, 40])
    lm.rewind(sequence, 15)
    assert lm.length(sequence) == 15
    replayed = first[:15] + second[: LENGTH - 15]
    rows = feed(lm, sequence, replayed, [15, 16, 30, LENGTH])
    assert distance(lm.logits(rows.hidden), reference(family, replayed)[15:]) <= TOLERANCE
    lm.rewind(sequence, 0)
    rows = feed(lm, sequence, second, [0, 33, LENGTH])
    assert distance(lm.logits(rows.hidden), reference(family, second)) <= TOLERANCE


@every_family
def test_a_fork_and_its_origin_go_different_ways(lm: HuggingFaceLM, family: str) -> None:
    start, left, right = text(7, 30), text(8, 12), text(9, 12)
    origin = lm.allocate()
    feed(lm, origin, start, [0, 11, 30])
    fork = lm.copy(origin)
    both = lm.forward([Span(origin, left[:6], rows=6), Span(fork, right[:6], rows=6)]).hidden
    lm.free(origin)
    stranger = lm.allocate()  # takes the freed slot
    feed(lm, stranger, text(10), [0, LENGTH])
    rest = feed(lm, fork, right, [6, 7, 12]).hidden
    assert distance(lm.logits(both[:6]), reference(family, start + left[:6])[30:]) <= TOLERANCE
    forked = torch.cat([both[6:], rest])
    assert distance(lm.logits(forked), reference(family, start + right)[30:]) <= TOLERANCE


@every_family
def test_windows_and_sequences_give_the_same_keys(lm: HuggingFaceLM, family: str) -> None:
    ids = text(11)
    whole = lm.encode([ids], [0])
    pieces = feed(lm, lm.allocate(), ids, [0, 20, 21, 40, LENGTH])
    assert whole.keys.shape == (LENGTH, lm.identity.key_dim)
    assert whole.keys.dtype == torch.float32
    assert distance(pieces.keys, whole.keys) <= TOLERANCE
    assert distance(pieces.hidden, whole.hidden) <= TOLERANCE


@every_family
def test_padding_and_the_rows_left_out_change_nothing_in_a_window(lm: HuggingFaceLM, family: str) -> None:
    windows = [text(12, 50), text(13, 7), text(14, 31)]
    first_rows = [0, 3, 30]
    together = lm.encode(windows, first_rows)
    alone = [lm.encode([w], [first]) for w, first in zip(windows, first_rows, strict=True)]
    assert len(together.keys) == 50 + 4 + 1
    assert distance(together.keys, torch.cat([rows.keys for rows in alone])) <= TOLERANCE
    need = torch.cat([reference(family, w)[first:] for w, first in zip(windows, first_rows, strict=True)])
    assert distance(lm.logits(together.hidden), need) <= TOLERANCE


@every_family
def test_logits_in_chunks_are_the_logits_of_the_whole(lm: HuggingFaceLM, family: str) -> None:
    hidden = lm.encode([text(15)], [0]).hidden
    whole = lm.logits(hidden)
    assert whole.dtype == torch.float32
    chunks = torch.cat([lm.logits(part) for part in torch.split(hidden, [1, 7, 2, 50])])
    assert distance(chunks, whole) <= TOLERANCE


@every_family
def test_nothing_of_the_model_is_patched(family: str) -> None:
    model = tiny_model(family)
    before = state(model)
    lm = HuggingFaceLM(model, Tokenizer(tiny_tokenizer()), name=family, max_sequences=2)
    assert state(model) == before
    sequence = lm.allocate()
    lm.logits(lm.forward([Span(sequence, text(16, 20), rows=20)]).hidden)
    lm.encode([text(17, 20)], [3])
    lm.free(sequence)
    assert state(model) == before
    lm.close()
    assert state(model) == before


@every_family
def test_an_error_inside_a_forward_pass_leaves_no_hook_and_no_token(lm: HuggingFaceLM, family: str) -> None:
    model = model_of(family)
    before = state(model)
    ids = text(18, 20)
    sequence = lm.allocate()
    feed(lm, sequence, ids, [0, 10])
    with pytest.raises(IndexError):
        lm.forward([Span(sequence, [1, VOCAB + 7])])  # an embedding that does not exist
    with pytest.raises(IndexError):
        lm.encode([[1, VOCAB + 7]], [0])
    assert state(model) == before
    assert lm.length(sequence) == 10
    rows = feed(lm, sequence, ids, [10, 20])
    assert distance(lm.logits(rows.hidden), reference(family, ids)[10:]) <= TOLERANCE


def state(model: Any) -> dict[str, Any]:
    """Everything that a patch could touch: methods, hooks, parameters and buffers of every module."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = vars(module)
        hooks = {field: list(value) for field, value in own.items() if "hook" in field and value}
        methods = {field: value for field, value in own.items() if callable(value) and not field.startswith("_")}
        children = [(child, id(part)) for child, part in module._modules.items()]
        found[name] = (type(module), type(module).forward, module.training, hooks, methods, children, sorted(own))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"tensor {name}"] = (id(tensor), tensor.data_ptr(), tensor._version, tensor.double().sum().item())
    found["config"] = model.config.to_json_string()
    return found


def test_sequences_are_given_out_until_none_is_left() -> None:
    lm = HuggingFaceLM(tiny_model("llama"), Tokenizer(tiny_tokenizer()), name="llama", max_sequences=2, max_length=32)
    one, other = lm.allocate(), lm.allocate()
    assert (lm.num_sequences, lm.num_free_sequences, lm.max_length) == (2, 0, 32)
    with pytest.raises(Overloaded, match="all 2 sequences are in use"):
        lm.allocate()
    with pytest.raises(Overloaded):
        lm.copy(one)
    lm.free(other)
    assert lm.num_free_sequences == 1


def test_a_batch_that_does_not_fit_appends_nothing() -> None:
    lm = HuggingFaceLM(tiny_model("llama"), Tokenizer(tiny_tokenizer()), name="llama", max_sequences=2, max_length=32)
    one, other = lm.allocate(), lm.allocate()
    with pytest.raises(PromptTooLong, match="at most 32 tokens, got 33"):
        lm.forward([Span(one, text(0, 5)), Span(other, text(1, 33))])
    assert (lm.length(one), lm.length(other)) == (0, 0)
    rows = feed(lm, other, text(1, 32), [0, 31, 32])
    assert distance(lm.logits(rows.hidden), reference("llama", text(1, 32))) <= TOLERANCE


@pytest.mark.parametrize("max_length", [2, 5, 9, 18])
def test_the_shortest_contexts_can_be_asked_for(max_length: int) -> None:
    lm = HuggingFaceLM(
        tiny_model("llama"), Tokenizer(tiny_tokenizer()), name="llama", max_sequences=1, max_length=max_length
    )
    rows = feed(lm, lm.allocate(), text(0, max_length), [0, 1, max_length])
    assert distance(lm.logits(rows.hidden), reference("llama", text(0, max_length))) <= TOLERANCE


def test_a_bound_on_the_cache_lowers_the_number_of_sequences() -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    per_sequence = HuggingFaceLM(tiny_model("llama"), tokenizer, name="l", max_sequences=1).kv_cache_bytes
    lm = HuggingFaceLM(tiny_model("llama"), tokenizer, name="l", max_sequences=8, kv_cache_bytes=3 * per_sequence + 1)
    assert lm.num_sequences == 3
    assert lm.kv_cache_bytes == 3 * per_sequence
