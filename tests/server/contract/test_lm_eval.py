"""lm-evaluation-harness, unmodified and offline: the server gives what the harness computes itself from the folder."""

from __future__ import annotations

import json
import math
import random
import re
from typing import NamedTuple

import numpy as np
import pytest
from exact_reference import ExactReference, Knn
from harness import Evaluation, Harness, rolling_windows_of, write_task
from learned import Learned
from live_server import LiveServer
from statutes import WORDS, statute
from transformers import AutoTokenizer

from knnlm_core.datastore.reader import Datastore

pytestmark = pytest.mark.slow

MAX_LENGTH = 64  # several windows per text
TEXTS = [statute(seed) for seed in range(900, 904)]
STOPS = [".", "印", " §", "zz", "swarm", "\n", " un", "lost", "ow", "Q"]

ROLLING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
CHOOSE = """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATE = f"""\
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{question}}}}"
generation_kwargs: {{until: {json.dumps(STOPS)}, max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


class Evaluations(NamedTuple):
    """The same tasks through four models of the harness."""

    folder: Evaluation  # its own `hf`, on the folder that is served
    served: Evaluation  # `local-completions` on the server
    remote: Evaluation  # … which tokenises too
    mixed: Evaluation  # `local-completions` on the LM with a datastore, several requests at a time
    log: str


@pytest.fixture(scope="module")
def evaluations(learned: Learned, running_server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Evaluations:
    folder = tmp_path_factory.mktemp("harness")
    harness = Harness(folder / "tasks", folder / "runs")
    draw = random.Random(0)
    questions = [
        {"question": statute(seed, 1), "choices": draw.sample(WORDS, 4), "answer": draw.randrange(4)}
        for seed in range(800, 820)
    ]
    write_task(harness.tasks, "rolling", [{"text": text} for text in TEXTS], ROLLING)
    write_task(harness.tasks, "choose", questions, CHOOSE)
    write_task(harness.tasks, "generate", [{"question": statute(seed, 1)[:24]} for seed in range(700, 712)], GENERATE)
    api = {"base_url": f"{running_server.url}/v1/completions", "max_length": MAX_LENGTH}
    local = api | {"tokenizer": learned.model, "tokenizer_backend": "huggingface", "tokenized_requests": True}
    # `hf` counts its max_length differently: the windows are the same when it is 2 less.
    hf = {"pretrained": learned.model, "dtype": "float32", "max_length": MAX_LENGTH - 2}
    remote = api | {"model": "learned-lm", "tokenizer_backend": "remote", "tokenized_requests": True}
    log = harness.run(
        [
            harness.arguments("folder", "hf", hf),
            harness.arguments("served", "local-completions", local | {"model": "learned-lm"}),
            harness.arguments("remote", "local-completions", remote),
            harness.arguments("mixed", "local-completions", local | {"model": "learned-lm@law", "num_concurrent": 4}),
        ]
    )
    return Evaluations(*map(harness.read, ("folder", "served", "remote", "mixed")), log)


def log_likelihoods(evaluation: Evaluation) -> list[float]:
    """One per text, in nats."""
    return [float(answer[0]) for answer in evaluation.answers["rolling"]]


def chosen(evaluation: Evaluation) -> list[int]:
    """The likeliest choice of each question."""
    return [int(np.argmax([float(score) for score, _ in row])) for row in evaluation.answers["choose"]]


def test_no_run_met_a_failed_request(evaluations: Evaluations) -> None:
    assert "API request failed" not in evaluations.log
    assert "retrying" not in evaluations.log


@pytest.mark.parametrize("which", ["served", "remote"])
def test_rolling_perplexity_is_that_of_the_harness_own_backend(evaluations: Evaluations, which: str) -> None:
    served: Evaluation = getattr(evaluations, which)
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        need = evaluations.folder.metrics["rolling"][metric]
        assert served.metrics["rolling"][metric] == pytest.approx(need, rel=1e-5), metric
    assert log_likelihoods(served) == pytest.approx(log_likelihoods(evaluations.folder), rel=1e-6)


@pytest.mark.parametrize("which", ["served", "remote"])
def test_every_multiple_choice_answer_is_that_of_the_harness_own_backend(evaluations: Evaluations, which: str) -> None:
    served: Evaluation = getattr(evaluations, which)
    assert chosen(served) == chosen(evaluations.folder)
    assert len(set(chosen(served))) == 4, "choose other questions: these have one answer"
    for need, row in zip(evaluations.folder.answers["choose"], served.answers["choose"], strict=True):
        assert [float(score) for score, _ in row] == pytest.approx([float(score) for score, _ in need], abs=1e-4)
        assert [greedy for _, greedy in row] == [greedy for _, greedy in need]
    for metric in ("acc", "acc_norm"):
        assert served.metrics["choose"][metric] == evaluations.folder.metrics["choose"][metric]


@pytest.mark.parametrize("which", ["served", "remote"])
def test_greedy_text_up_to_a_stop_is_that_of_the_harness_own_backend(evaluations: Evaluations, which: str) -> None:
    served: Evaluation = getattr(evaluations, which)
    texts = [answer[0] for answer in served.answers["generate"]]
    assert texts == [answer[0] for answer in evaluations.folder.answers["generate"]]
    assert not any(stop in text for text in texts for stop in STOPS)
    assert len({len(text) for text in texts}) > 3, "choose other stops: these end no text"


def test_rolling_perplexity_with_a_datastore_is_a_float64_recomputation_over_the_same_windows(
    evaluations: Evaluations, learned: Learned, learned_server: LiveServer
) -> None:
    calibration = learned_server.http.get("/v1/datastores/law").json()["calibration"]
    knn = Knn(calibration["k"], calibration["temperature"], calibration["lambda"])
    assert 0.05 < knn.lmbda < 0.95, "the datastore must matter, and the LM too"
    reference, tokenizer = ExactReference(learned.model), AutoTokenizer.from_pretrained(learned.model)
    with Datastore.open(learned.root, "law") as law:
        base, mixed = zip(
            *(recompute(reference, law, knn, tokenizer(text).input_ids, tokenizer.eos_token_id) for text in TEXTS),
            strict=True,
        )
    assert log_likelihoods(evaluations.mixed) == pytest.approx(mixed, rel=1e-5)
    assert log_likelihoods(evaluations.served) == pytest.approx(base, rel=1e-6)
    words = sum(len(re.split(r"\s+", text)) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    metrics = evaluations.mixed.metrics["rolling"]
    assert metrics["word_perplexity"] == pytest.approx(math.exp(-sum(mixed) / words), rel=1e-3)
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(-sum(mixed) / size), rel=1e-4)
    assert metrics["byte_perplexity"] < 0.99 * evaluations.served.metrics["rolling"]["byte_perplexity"]


def recompute(
    reference: ExactReference, law: Datastore, knn: Knn, token_ids: list[int], prefix_id: int
) -> tuple[float, float]:
    """Log-likelihood of a text by the LM alone and mixed with the datastore."""
    base, mixed = 0.0, 0.0
    for window in rolling_windows_of(token_ids, prefix_id, MAX_LENGTH):
        seen = reference.run(window.token_ids[:-1])
        for row in range(len(window.token_ids) - 1 - window.num_scored, len(window.token_ids) - 1):
            target = window.token_ids[row + 1]
            p_lm = np.exp(seen.log_probs[row])
            p_knn, _ = reference.knn_probs(law, seen.keys[row], knn, len(p_lm))
            base += math.log(p_lm[target])
            mixed += math.log(knn.lmbda * p_knn[target] + (1 - knn.lmbda) * p_lm[target])
    return base, mixed


def test_the_store_changes_answers_through_the_harness_too(evaluations: Evaluations) -> None:
    assert evaluations.mixed.answers["generate"] != evaluations.served.answers["generate"]
    assert evaluations.mixed.answers["choose"] != evaluations.served.answers["choose"]


def test_windows_score_each_token_once_after_the_prefix() -> None:
    for length in (1, 2, 61, 62, 63, 124, 125, 200):
        windows = list(rolling_windows_of(range(1, length + 1), 0, MAX_LENGTH))
        assert [i for w in windows for i in w.token_ids[len(w.token_ids) - w.num_scored :]] == list(
            range(1, length + 1)
        )
        assert all(len(w.token_ids) == MAX_LENGTH - 1 for w in windows[1:])
