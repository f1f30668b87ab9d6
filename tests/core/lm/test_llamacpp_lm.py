"""llama.cpp does what the Hugging Face adapter does with the same weights, row for row, whatever the sequences."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from knnlm_core.errors import EngineFailure, InvalidParameter, Overloaded, PromptTooLong, UnsupportedModel
from knnlm_core.lm import llamacpp_context
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.llamacpp import LlamaCppLM
from knnlm_core.lm.llamacpp_context import BATCH_TOKENS, LlamaContext, LlamaModel, library
from knnlm_core.lm.protocol import CausalLM, Rows, Span
from llamacpp_models import FAMILIES, SLOTS, in_huggingface, in_llamacpp, tiny_gguf
from tiny import VOCAB

KEYS = {"atol": 2e-4, "rtol": 1e-4}
LOGITS = {"atol": 1e-3, "rtol": 1e-4}


class Pair(NamedTuple):
    path: Path
    lm: LlamaCppLM
    reference: HuggingFaceLM


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = tiny_gguf(tmp_path_factory.mktemp(request.param), request.param)
    lm = in_llamacpp(path)
    yield Pair(path, lm, in_huggingface(path))
    lm.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("llamacpp"))


@pytest.fixture
def lm(path: Path) -> Iterator[LlamaCppLM]:
    lm = in_llamacpp(path)
    yield lm
    lm.close()


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 400, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_same(lm: CausalLM, have: Rows, reference: CausalLM, need: Rows) -> None:
    torch.testing.assert_close(have.keys, need.keys, **KEYS)
    torch.testing.assert_close(lm.logits(have.hidden), reference.logits(need.hidden), **LOGITS)


def test_windows_give_the_rows_of_the_hugging_face_adapter(pair: Pair) -> None:
    windows = [tokens(50), tokens(1, 1), tokens(7, 2), tokens(200, 3), tokens(7, 2)]
    firsts = [0, 0, 6, 199, 3]
    have, need = pair.lm.encode(windows, firsts), pair.reference.encode(windows, firsts)
    assert have.keys.shape == (50 + 1 + 1 + 1 + 4, 64)
    assert_same(pair.lm, have, pair.reference, need)


def test_the_same_file_is_the_same_lm_in_both(pair: Pair) -> None:
    assert pair.lm.identity == pair.reference.identity
    assert pair.lm.max_length == pair.reference.max_length == 256
    assert pair.lm.tokenizer.fingerprint == pair.reference.tokenizer.fingerprint
    assert pair.lm.tokenizer.eos_token_ids == pair.reference.tokenizer.eos_token_ids


def test_ragged_chunks_give_the_rows_of_whole_windows(pair: Pair) -> None:
    lm, texts = pair.lm, [tokens(60, 1), tokens(31, 2), tokens(45, 3)]
    sequences = [lm.allocate() for _ in texts]
    found: list[list[Rows]] = [[] for _ in texts]
    for cuts in ([(0, 20), (0, 1), (0, 45)], [(20, 21), (1, 30)], [(21, 60), (30, 31)]):
        batch = [Span(sequences[i], texts[i][a:b], rows=b - a) for i, (a, b) in enumerate(cuts)]
        rows = lm.forward(batch)
        sizes = [span.rows for span in batch]
        for i, part in enumerate(zip(rows.keys.split(sizes), rows.hidden.split(sizes), strict=True)):
            found[i].append(Rows(*part))
    need = pair.reference.encode(texts, [0] * len(texts))
    have = Rows(
        *(torch.cat([part for parts in found for part in (getattr(p, f) for p in parts)]) for f in Rows._fields)
    )
    assert_same(lm, have, pair.reference, need)
    assert [lm.length(sequence) for sequence in sequences] == [60, 31, 45]
    for sequence in sequences:
        lm.free(sequence)


def test_any_course_of_sequences_goes_as_in_the_hugging_face_adapter(pair: Pair) -> None:
    """Two hundred random steps of everything that can be done to a sequence."""
    rng = np.random.default_rng(0)
    lms: tuple[CausalLM, CausalLM] = (pair.lm, pair.reference)
    live: list[tuple[int, int]] = []  # the same sequence in both
    for _ in range(200):
        act = rng.choice(["allocate", "forward", "forward", "rewind", "copy", "free"])
        if act == "allocate" and len(live) < SLOTS:
            live.append((lms[0].allocate(), lms[1].allocate()))
        elif act == "copy" and live and len(live) < SLOTS:
            source = live[rng.integers(len(live))]
            live.append((lms[0].copy(source[0]), lms[1].copy(source[1])))
        elif act == "free" and live:
            ids = live.pop(rng.integers(len(live)))
            for lm, sequence in zip(lms, ids, strict=True):
                lm.free(sequence)
        elif act == "rewind" and live:
            ids = live[rng.integers(len(live))]
            length = int(rng.integers(lms[0].length(ids[0]) + 1))
            for lm, sequence in zip(lms, ids, strict=True):
                lm.rewind(sequence, length)
        elif act == "forward" and live:
            chosen = rng.permutation(len(live))[: rng.integers(1, len(live) + 1)]
            spans = []
            for i in chosen:
                new = rng.integers(1, 400, rng.integers(1, 12)).tolist()
                if lms[0].length(live[i][0]) + len(new) <= 256:
                    spans.append((live[i], new, int(rng.integers(len(new) + 1))))
            if spans:
                rows = [lm.forward([Span(ids[at], new, n) for ids, new, n in spans]) for at, lm in enumerate(lms)]
                assert_same(lms[0], rows[0], lms[1], rows[1])
        assert [lms[0].length(a) for a, _ in live] == [lms[1].length(b) for _, b in live]
        assert lms[0].num_free_sequences == lms[1].num_free_sequences == SLOTS - len(live)
    for ids in live:
        for lm, sequence in zip(lms, ids, strict=True):
            lm.free(sequence)


def test_the_final_hidden_state_can_be_the_key(pair: Pair) -> None:
    lm = in_llamacpp(pair.path, key_tap="final_hidden")
    reference = in_huggingface(pair.path, key_tap="final_hidden")
    assert lm.identity == reference.identity
    assert_same(lm, lm.encode([tokens(40)], [5]), reference, reference.encode([tokens(40)], [5]))
    lm.close()


def test_a_batch_may_be_longer_than_one_call_of_llama_decode(lm: LlamaCppLM) -> None:
    texts = [tokens(200, seed) for seed in range(SLOTS)]
    assert sum(map(len, texts)) > BATCH_TOKENS
    sequences = [lm.allocate() for _ in texts]
    rows = lm.forward([Span(s, text, rows=150) for s, text in zip(sequences, texts, strict=True)])
    assert_same(lm, rows, lm, lm.encode(texts, [50] * SLOTS))


def test_windows_are_as_many_as_one_likes(lm: LlamaCppLM) -> None:
    windows = [tokens(5 + seed % 30, seed) for seed in range(70)]
    rows = lm.encode(windows, [len(window) - 1 for window in windows])
    singles = [lm.encode([window], [len(window) - 1]) for window in windows]
    assert_same(lm, rows, lm, Rows(*(torch.cat(column) for column in zip(*singles, strict=True))))


def test_windows_leave_sequences_as_they_are(lm: LlamaCppLM) -> None:
    alone, beside = lm.allocate(), lm.allocate()
    lm.forward([Span(alone, tokens(20), rows=0), Span(beside, tokens(20), rows=0)])
    first = lm.forward([Span(alone, [7])])
    lm.encode([tokens(256, 9), tokens(3, 8)], [0, 0])
    second = lm.forward([Span(beside, [7])])
    assert_same(lm, second, lm, first)


def test_a_span_that_nobody_looks_at_gives_no_rows(lm: LlamaCppLM) -> None:
    sequence = lm.allocate()
    rows = lm.forward([Span(sequence, tokens(30), rows=0)])
    assert (rows.keys.shape, rows.hidden.shape) == ((0, 64), (0, VOCAB))
    assert lm.length(sequence) == 30


def test_no_windows_give_no_rows(lm: LlamaCppLM) -> None:
    assert lm.encode([], []).keys.shape == (0, 64)


def test_a_reused_number_remembers_nothing(lm: LlamaCppLM) -> None:
    sequence = lm.allocate()
    lm.forward([Span(sequence, tokens(40, 1))])
    lm.free(sequence)
    again = lm.allocate()
    assert (again, lm.length(again)) == (sequence, 0)
    assert_same(lm, lm.forward([Span(again, tokens(9), rows=9)]), lm, lm.encode([tokens(9)], [0]))


def test_a_copy_outlives_its_source_and_goes_its_own_way(lm: LlamaCppLM) -> None:
    source = lm.allocate()
    lm.forward([Span(source, tokens(30), rows=0)])
    fork = lm.copy(source)
    lm.forward([Span(source, tokens(5, 1), rows=0)])
    lm.free(source)
    rows = lm.forward([Span(fork, tokens(5, 2), rows=5)])
    assert_same(lm, rows, lm, lm.encode([tokens(30) + tokens(5, 2)], [30]))


def test_one_sequence_too_many_is_refused(lm: LlamaCppLM) -> None:
    first, *_ = (lm.allocate() for _ in range(SLOTS))
    with pytest.raises(Overloaded, match=f"all {SLOTS} sequences are in use"):
        lm.allocate()
    with pytest.raises(Overloaded):
        lm.copy(first)


def test_a_sequence_too_long_is_refused_before_anything_is_appended(lm: LlamaCppLM) -> None:
    short, long = lm.allocate(), lm.allocate()
    lm.forward([Span(long, tokens(250), rows=0)])
    with pytest.raises(PromptTooLong, match="at most 256 tokens, got 257"):
        lm.forward([Span(short, tokens(5)), Span(long, tokens(7))])
    assert (lm.length(short), lm.length(long)) == (0, 250)
    assert len(lm.forward([Span(long, tokens(6))]).keys) == 1
    with pytest.raises(PromptTooLong, match="at most 256 tokens, got 300"):
        lm.encode([tokens(300)], [0])


def test_a_pass_that_fails_leaves_every_sequence_as_it_was(lm: LlamaCppLM) -> None:
    one, other = lm.allocate(), lm.allocate()
    lm.forward([Span(one, tokens(10, 1), rows=0), Span(other, tokens(20, 2), rows=0)])
    # The first 512 tokens are in the cache when the batch after them is refused.
    with pytest.raises(EngineFailure, match=r"llama_decode returned -1"):
        lm.forward(
            [Span(one, tokens(240, 3)), Span(other, tokens(220, 4)), Span(lm.allocate(), [*tokens(80, 5), VOCAB])]
        )
    assert (lm.length(one), lm.length(other)) == (10, 20)
    rows = lm.forward([Span(other, tokens(5, 6), rows=5), Span(one, [3])])
    need = lm.encode([tokens(20, 2) + tokens(5, 6), [*tokens(10, 1), 3]], [20, 10])
    assert_same(lm, rows, lm, need)
    with pytest.raises(EngineFailure):
        lm.encode([[-5]], [0])
    assert_same(lm, lm.encode([tokens(9)], [0]), lm, lm.encode([tokens(9)], [0]))


def test_a_key_that_is_not_seen_is_an_error_and_not_a_wrong_key(
    lm: LlamaCppLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = lm.allocate()
    monkeypatch.setattr(LlamaContext, "_take", lambda self, tensor: None)
    with pytest.raises(EngineFailure, match="the key tap saw 0 of 1 rows"):
        lm.forward([Span(sequence, [5])])
    assert lm.length(sequence) == 0


@pytest.mark.parametrize("length", [-1, 11])
def test_a_rewind_stays_within_the_sequence(lm: LlamaCppLM, length: int) -> None:
    sequence = lm.allocate()
    lm.forward([Span(sequence, tokens(10))])
    with pytest.raises(InvalidParameter, match="`length` must be in 0 … 10"):
        lm.rewind(sequence, length)


def test_kept_beginnings_are_not_computed_again(path: Path) -> None:
    lm = in_llamacpp(path, prefix_cache_bytes=1 << 20)
    prompt = tokens(100)
    first = lm.allocate()
    assert lm.reuse_prefix(first, prompt) == 0
    lm.forward([Span(first, prompt, rows=0)])
    lm.keep_prefix(first, prompt)
    lm.free(first)
    again = lm.allocate()
    known = lm.reuse_prefix(again, [*prompt[:70], *tokens(30, 1)])
    assert known == lm.length(again) == 64
    rest = [*prompt[64:70], *tokens(30, 1)]
    rows = lm.forward([Span(again, rest, rows=len(rest))])
    assert_same(lm, rows, lm, lm.encode([prompt[:64] + rest], [64]))
    use = lm.prefix_cache_use
    assert (use.asked_tokens, use.reused_tokens) == (200, 64)
    assert 0 < use.used_bytes <= use.reserved_bytes <= 1 << 20
    lm.close()


def test_kept_beginnings_make_room_for_live_sequences(path: Path) -> None:
    """The cache is as large as its sequences and a window; a hundred prompts kept and dropped never fill it."""
    lm = in_llamacpp(path, prefix_cache_bytes=1 << 30)
    for seed in range(100):
        sequence = lm.allocate()
        prompt = tokens(250, seed)
        assert lm.reuse_prefix(sequence, prompt) == 0
        lm.forward([Span(sequence, prompt, rows=0)])
        lm.keep_prefix(sequence, prompt)
        lm.free(sequence)
    sequences = [lm.allocate() for _ in range(SLOTS)]
    rows = lm.forward([Span(s, tokens(256, s), rows=1) for s in sequences])
    assert_same(lm, rows, lm, lm.encode([tokens(256, s) for s in sequences], [255] * SLOTS))
    lm.close()


def test_without_room_for_beginnings_none_is_kept(lm: LlamaCppLM) -> None:
    sequence = lm.allocate()
    lm.forward([Span(sequence, tokens(100), rows=0)])
    lm.keep_prefix(sequence, tokens(100))
    assert lm.reuse_prefix(lm.allocate(), tokens(100)) == 0
    assert lm.prefix_cache_use == (0, 0, 0, 0)


def test_greedy_tokens_are_those_of_bare_llama_cpp(path: Path) -> None:
    """Against the library's own interface with its own defaults: same arithmetic, same tokens, same logits."""
    lm, prompt, count = in_llamacpp(path, exact=False), tokens(40), 60
    sequence = lm.allocate()
    have, logits = [], []
    new = prompt
    for _ in range(count):
        row = lm.logits(lm.forward([Span(sequence, new)]).hidden)[0]
        logits.append(row)
        new = [int(row.argmax())]
        have += new
    need, bare = _bare_greedy(path, prompt, count)
    assert have == need
    torch.testing.assert_close(torch.stack(logits), bare, atol=1e-5, rtol=1e-5)
    lm.close()


def _bare_greedy(path: Path, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    lib: Any = library()
    options = lib.llama_model_default_params()
    options.use_extra_bufts = False
    model = lib.llama_model_load_from_file(str(path).encode(), options)
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
    context = lib.llama_init_from_model(model, params)
    found, rows, new = [], [], prompt
    for _ in range(count):
        batch = (lib.llama_token * len(new))(*new)
        assert lib.llama_decode(context, lib.llama_batch_get_one(batch, len(new))) == 0
        row = torch.empty(VOCAB)
        ctypes.memmove(row.data_ptr(), lib.llama_get_logits_ith(context, -1), VOCAB * 4)
        rows.append(row)
        new = [int(row.argmax())]
        found += new
    lib.llama_free(context)
    lib.llama_model_free(model)
    return found, torch.stack(rows)


def test_memory_bounds_the_sequences(path: Path) -> None:
    one = in_llamacpp(path, exact=False, max_length=64)
    per_slot = one.kv_cache_bytes // (SLOTS + 1)
    one.close()
    fewer = in_llamacpp(path, exact=False, max_length=64, kv_cache_bytes=3 * per_slot + 1)
    assert (fewer.num_sequences, fewer.kv_cache_bytes) == (2, 3 * per_slot)
    fewer.close()
    with pytest.raises(InvalidParameter, match=f"`kv_cache_bytes` must be at least {2 * per_slot} for one sequence"):
        in_llamacpp(path, exact=False, max_length=64, kv_cache_bytes=2 * per_slot - 1)


def test_without_sequences_it_only_encodes(path: Path) -> None:
    lm = in_llamacpp(path, max_sequences=0)
    assert (lm.num_sequences, lm.num_free_sequences) == (0, 0)
    assert lm.encode([tokens(200), tokens(100)], [0, 0]).keys.shape == (300, 64)
    with pytest.raises(Overloaded):
        lm.allocate()
    lm.close()


@pytest.mark.parametrize("max_length", [1, 257])
def test_the_length_stays_within_the_models(path: Path, max_length: int) -> None:
    with pytest.raises(InvalidParameter, match=r"`max_model_len` must be in 2 … 256 \(the model's context\)"):
        in_llamacpp(path, max_length=max_length)


def test_a_tap_that_there_is_not_is_refused(path: Path) -> None:
    with pytest.raises(InvalidParameter, match="`key_tap` must be 'ffn_input' or 'final_hidden', got 'attention'"):
        in_llamacpp(path, key_tap="attention")


def test_an_architecture_whose_key_was_not_verified_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp_context, "ARCHITECTURES", frozenset({"qwen2"}))
    with pytest.raises(
        UnsupportedModel, match=r"architecture 'llama': where llama\.cpp holds .* is known for qwen2 only"
    ):
        in_llamacpp(path)


def test_a_tensor_that_is_not_the_key_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LlamaContext.__init__

    def tapped_elsewhere(self: LlamaContext, model: LlamaModel, **options: Any) -> None:
        real(self, model, **{**options, "key_tap": "final_hidden"})

    monkeypatch.setattr(LlamaContext, "__init__", tapped_elsewhere)
    with pytest.raises(UnsupportedModel, match=r"keys differ from transformers' by .* of their variance, at most 0\.2"):
        in_llamacpp(path)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("vocab_size", "llama.cpp has 511 token ids, transformers 512"),
        ("eos_token_id", "texts end with token 511 in llama.cpp and with 0 in transformers"),
    ],
)
def test_libraries_that_disagree_on_tokens_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, what: str, message: str
) -> None:
    real = LlamaModel.__init__

    def other(self: LlamaModel, path: Path) -> None:
        real(self, path)
        setattr(self, what, 511)

    monkeypatch.setattr(LlamaModel, "__init__", other)
    with pytest.raises(UnsupportedModel, match=message):
        in_llamacpp(path)


def test_logits_of_another_head_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LlamaContext.decode

    def headed_otherwise(self: LlamaContext, *batch: Any) -> None:
        real(self, *batch)
        logits = batch[-1]
        logits[:] = np.roll(logits, 1, axis=1)

    monkeypatch.setattr(LlamaContext, "decode", headed_otherwise)
    with pytest.raises(UnsupportedModel, match=r"logits differ from transformers' by .* at most 0\.2 is allowed"):
        in_llamacpp(path, max_length=5)  # shorter than what is known of it


def test_the_shortest_sequences_are_served(path: Path) -> None:
    lm = in_llamacpp(path, max_length=2)
    sequence = lm.allocate()
    assert lm.forward([Span(sequence, [5, 6], rows=2)]).keys.shape == (2, 64)
    with pytest.raises(PromptTooLong, match="at most 2 tokens, got 3"):
        lm.forward([Span(sequence, [7])])
    lm.close()
