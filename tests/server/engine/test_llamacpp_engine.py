"""The engine over llama.cpp: what it generates and scores is what it does over the Hugging Face adapter."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engine_runs import Run, prompts

from knnlm_core.errors import EngineFailure, KnnlmError
from knnlm_core.lm.protocol import TextLM
from knnlm_server.engine.engine import Engine, EngineConfig
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.engine.scoring import ScoreRequest, TokenScores
from llamacpp_models import in_huggingface, in_llamacpp, tiny_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("engine"))


@contextmanager
def engine_over(lm: TextLM) -> Iterator[Engine]:
    engine = Engine(lm, lm.tokenizer.eos_token_ids, EngineConfig(step_tokens=48, check_integrity=True))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(drain_timeout_s=0)
        lm.close()


def generated(lm: TextLM, n: int) -> list[list[int]]:
    """Sixteen prompts at once on four sequences, so that they come and go beside each other."""
    params = SamplingParams(max_tokens=24, temperature=0.0 if n == 1 else 1.0, n=n, seed=7)
    with engine_over(lm) as engine:
        runs = [Run(lm, prompt, params) for prompt in prompts(16)]  # type: ignore[arg-type]
        for run in runs:
            engine.submit(run.request)
        for run in runs:
            run.wait()
        assert lm.num_free_sequences == lm.num_sequences
        return [run.tokens(choice) for run in runs for choice in range(n)]


@pytest.mark.parametrize("n", [1, 3])
def test_what_is_generated_is_the_same_in_both_runtimes(path: Path, n: int) -> None:
    have = generated(in_llamacpp(path, prefix_cache_bytes=1 << 20), n)
    need = generated(in_huggingface(path), n)
    # A draw, or two tokens, may be closer than rounding: then one choice goes another way.
    differing = sum(one != other for one, other in zip(have, need, strict=True))
    assert differing <= (1 if n == 1 else 3), f"{differing} of {len(need)} choices differ"
    assert len({tuple(tokens) for tokens in have}) > 10


def scored(lm: TextLM) -> list[list[float]]:
    scores: dict[int, TokenScores] = {}
    ended = threading.Event()
    errors: list[KnnlmError | None] = []

    def end(error: KnnlmError | None) -> None:
        errors.append(error)
        ended.set()

    texts = [text for text in prompts(12) if len(text) > 1]
    with engine_over(lm) as engine:
        engine.submit(ScoreRequest("score", texts, None, 32, 16, scores.__setitem__, end))
        assert ended.wait(60)
    assert errors == [None]
    return [scores[i].base.tolist() for i in range(len(texts))]


def test_scores_are_the_same_in_both_runtimes(path: Path) -> None:
    for have, need in zip(scored(in_llamacpp(path)), scored(in_huggingface(path)), strict=True):
        assert have == pytest.approx(need, abs=1e-3)


def test_a_pass_that_fails_fails_its_requests_and_no_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = in_llamacpp(path)
    with engine_over(lm) as engine:
        bad = Run(lm, [5, 100_000], SamplingParams(max_tokens=4))  # type: ignore[arg-type]
        engine.submit(bad.request)
        assert isinstance(bad.wait_end().error, EngineFailure)
        good = Run(lm, [5, 6], SamplingParams(max_tokens=4, temperature=0.0))  # type: ignore[arg-type]
        engine.submit(good.request)
        assert len(good.wait().tokens()) > 0
        assert lm.num_free_sequences == lm.num_sequences
