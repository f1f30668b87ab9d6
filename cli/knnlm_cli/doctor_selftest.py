"""`knnlm doctor`: the whole way once, with a random LM made on the spot: build, search, serve, compare with float64."""

from __future__ import annotations

import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from knnlm_builder.pipeline import build_with
from knnlm_builder.progress import SilentReporter
from knnlm_builder.settings import BuildSettings
from knnlm_cli.doctor_checks import Check, failed, ok
from knnlm_cli.doctor_reference import Floats, Mixing, Reference
from knnlm_cli.doctor_served import served
from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_core.lm.random_lm import save_random_lm
from knnlm_server.settings import ServerSettings

NAME = "self-test"
MIXING = Mixing(k=16, temperature=20.0, lmbda=0.5)
SCORED_TOKENS = 96
PROMPT_TOKENS = 24
NEW_TOKENS = 8
MAX_DISTANCE_ERROR = 1e-3  # of squared distances of about 50; float32 is off by some 1e-5
MAX_LOG_PROB_ERROR = 1e-3  # nats; float32 is off by some 1e-5, a wrong row, neighbour or weight by far more
_REPORT = "report it with `knnlm doctor --json`; until then do not trust this installation's numbers"
_WHO = ("the tenant", "a buyer", "the court", "an owner", "the index", "der Käufer")
_DOES = ("may refuse", "shall return", "must keep", "has lost", "schuldet", "can sell")
_WHAT = ("the goods", "every key", "half of the rent", "a written notice", "its value", "the café")


def self_test() -> Iterator[Check]:
    """Build, search and answer, one finding each; what cannot be done ends it."""
    with tempfile.TemporaryDirectory(prefix="knnlm-doctor-") as made, _own_places(Path(made)):
        folder = Path(made)
        began = time.monotonic()
        model = save_random_lm(folder / "model", _prose(0, 40))
        entries = _build(folder, model)
        took = time.monotonic() - began
        yield ok(
            "self-test build",
            f"a random LM made, a datastore of {entries} entries built, verified and published in {took:.1f} s",
            entries=entries,
            seconds=round(took, 3),
        )
        with Datastore.open(folder / "datastores", NAME, checksums=True) as datastore:
            reference = Reference(model, datastore)
            token_ids = _token_ids(model)
            yield _search(datastore, reference, token_ids)
            yield _answer(folder, model, reference, token_ids)


def _build(folder: Path, model: Path) -> int:
    corpus = folder / "corpus.jsonl"
    rows = ({"id": f"page-{number}", "text": _prose(number, 12)} for number in range(1, 9))
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = BuildSettings(
        model=str(model),
        inputs=(corpus,),
        output=folder / "datastores",
        name=NAME,
        window=128,
        stride=64,
        held_out_fraction=0.2,
        held_out_max_tokens=256,
        shard_entries=400,  # so that there are several
        dtype="float32",
        force=True,  # whether so little text helps is not the question
    )
    lm = load_lm(str(model), LoadOptions(dtype="float32"))
    try:
        return build_with(lm, settings, SilentReporter()).entries
    finally:
        lm.close()


def _token_ids(model: Path) -> list[int]:
    lm = load_lm(str(model), LoadOptions(dtype="float32"))
    try:
        return list(lm.tokenizer.encode(_prose(100, 30)))[:SCORED_TOKENS]
    finally:
        lm.close()


def _search(datastore: Datastore, reference: Reference, token_ids: list[int]) -> Check:
    queries = reference.queries(token_ids)
    found = datastore.search(torch.from_numpy(queries), MIXING.k).distances.double().numpy()
    error = float(np.abs(found - reference.nearest(queries, MIXING.k)).max())
    facts = {"queries": len(queries), "k": MIXING.k, "largest_difference": error}
    message = f"the {MIXING.k} nearest of {len(queries)} queries, largest difference of a distance {error:.1e}"
    if not error <= MAX_DISTANCE_ERROR:
        return failed("self-test search", f"FAISS does not find what brute force finds: {message}", _REPORT, **facts)
    return ok("self-test search", f"FAISS finds what brute force finds: {message}", **facts)


def _answer(folder: Path, model: Path, reference: Reference, token_ids: list[int]) -> Check:
    settings = ServerSettings(
        _env_prefix="KNNLM_SELF_TEST_",  # type: ignore[call-arg]  # settings of another server are not this one's
        model=str(model),
        datastores=folder / "datastores",
        served_model_name="random",
        dtype="float32",
        max_sequences=2,
        kv_cache_bytes=16 << 20,
        prefix_cache_bytes=1 << 20,
        drain_timeout_s=5,
    )
    began = time.monotonic()
    with served(settings) as client:
        scored = _scored(client, token_ids)
        generated, traced = _completed(client, token_ids[:PROMPT_TOKENS])
    took = time.monotonic() - began
    errors = np.concatenate(
        [
            _differences(reference, token_ids, scored),
            _differences(reference, token_ids[:PROMPT_TOKENS] + generated, traced),
        ]
    )
    error = float(errors.max())
    facts = {
        "scored": len(scored), "generated": len(generated), "compared": len(errors), "seconds": round(took, 3),
        "largest_difference": error,
    }  # fmt: skip
    message = (
        f"{len(scored)} tokens scored and {len(generated)} generated over HTTP in {took:.1f} s; of {len(errors)} "
        f"compared, the largest difference of a log-probability is {error:.1e} nats"
    )
    if not error <= MAX_LOG_PROB_ERROR:
        return failed("self-test answer", f"the server does not answer as float64 does: {message}", _REPORT, **facts)
    return ok("self-test answer", f"the server answers as float64 does: {message}", **facts)


def _differences(reference: Reference, token_ids: list[int], log_probs: Floats) -> Floats:
    """How far the last tokens' log-probabilities are from the reference's, where no tie decides them."""
    expected, certain = reference.log_probs(token_ids, MIXING)
    last = slice(len(expected) - len(log_probs), None)
    return np.abs(log_probs - expected[last])[certain[last]]


def _knn() -> dict[str, Any]:
    return {"k": MIXING.k, "temperature": MIXING.temperature, "lambda": MIXING.lmbda, "gate": "always"}


def _scored(client: httpx.Client, token_ids: list[int]) -> Floats:
    body = {"model": f"random@{NAME}", "input": [token_ids], "per_token": True, "knn": _knn()}
    answer = client.post("/v1/score", json=body).raise_for_status().json()
    return np.array([token["mixed"] for token in answer["results"][0]["per_token"]])


def _completed(client: httpx.Client, prompt: list[int]) -> tuple[list[int], Floats]:
    body = {
        "model": f"random@{NAME}", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True,
        "knn": {**_knn(), "trace": True},
    }  # fmt: skip
    answer = client.post("/v1/completions", json=body).raise_for_status().json()
    trace = answer["choices"][0]["knn"]
    return [token["token_id"] for token in trace], np.log([token["p"] for token in trace])


def _prose(seed: int, sentences: int) -> str:
    """Text in which phrases come again, so that neighbours mean something."""
    draw = random.Random(seed)
    parts = (" ".join(draw.choice(words) for words in (_WHO, _DOES, _WHAT)) for _ in range(sentences))
    return f"Page {seed}. " + "; ".join(parts) + ".\n"


@contextmanager
def _own_places(folder: Path) -> Iterator[None]:
    """Servers remember which versions they have verified, matplotlib its fonts; not in the user's own folders here."""
    own = {"XDG_CACHE_HOME": str(folder / "cache"), "MPLCONFIGDIR": str(folder / "matplotlib")}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # fonts that are looked for anew are no news
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
