"""Swapping versions under load: sixteen streams and a scoring client while the name is retargeted every half second.

Two versions of one name are built from different training pages (60,000 entries each), loaded once each so that both
are verified, and then swapped 500 times. Streams: greedy completions of 32 tokens after eight prompts of 128 tokens
from eval pages, calibrated settings, one after the other in each of 16 clients; scoring: one text of 512 tokens again
and again. What each version answers alone is computed before; every answer must be that of the one version that its
`system_fingerprint` names (a text that parts from it only where the two best tokens lie within 10⁻³ is counted apart).
Inter-token latency is what the clients see between two chunks: half of the time without swaps comes before all swaps,
the other half after them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from common import arguments, read_rows, shuffled_train_rows, write_result
from rich.progress import track
from served import MODEL, Served, served

from knnlm_client import Client
from knnlm_core.datastore import layout

NAME, PORT = "swapped", 8767
STREAMS, PROMPTS, PROMPT_TOKENS, NEW_TOKENS, SCORE_TOKENS = 16, 8, 128, 32, 512
ENTRIES, SWAPS, PERIOD_S, CALM_S = 60_000, 500, 0.5, 60
NEAR_TIE = 1e-3  # nats between the two best tokens
LIMIT = 1.25


@dataclass
class Seen:
    """What the clients saw in one phase."""

    gaps_s: list[float] = field(default_factory=list)  # between tokens of a stream
    answers: int = 0
    scores: int = 0
    versions: set[str] = field(default_factory=set)
    near_ties: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Expected:
    """What one version answers alone."""

    tokens: dict[int, list[str]]  # by prompt
    margins: dict[int, list[float]]  # between the two best tokens, nats
    mixed_nll: float


def main() -> None:
    """Run and write the result."""
    args = arguments(__doc__, data=True).parse_args()
    root = args.work / "swaps"
    versions = _build(args.model, args.data, args.work, root)
    calm, swapping, swap_s = Seen(), Seen(), list[float]()
    with (
        served(
            args.model, root, NAME, port=PORT, options=("--max-sequences", str(STREAMS), "--max-model-len", "1024")
        ) as server,
        Client(server.url, timeout=3600) as client,
    ):
        prompts, text = _inputs(client, args.data)
        expected = {}
        for version in versions:
            client.datastores.load(NAME, version)
            expected[version] = _alone(server.url, client, prompts, text)
        assert expected[versions[0]].tokens != expected[versions[1]].tokens, "the two versions cannot be told apart"
        with _clients(server.url, Seen(), prompts, text, expected):  # caches fill, files are touched
            _progress(10, "Warm up")
        before = _resources(server)
        with _clients(server.url, calm, prompts, text, expected):
            _progress(CALM_S, "Without swaps")
        with _clients(server.url, swapping, prompts, text, expected):
            for i in track(range(SWAPS), description="Swap"):
                started = time.perf_counter()
                client.datastores.load(NAME, versions[i % 2])
                swap_s.append(time.perf_counter() - started)
                time.sleep(max(0.0, PERIOD_S - swap_s[-1]))
        with _clients(server.url, calm, prompts, text, expected):
            _progress(CALM_S, "Without swaps")
        time.sleep(1)
        after = _resources(server)
    ratio = {p: _percentile(swapping.gaps_s, p) / _percentile(calm.gaps_s, p) for p in (50, 90, 99)}
    result = {
        "claim": f"no failed request, every answer that of exactly one version, p99 inter-token latency ≤ {LIMIT} × "
        "that without swaps, descriptors, threads and memory flat",
        "protocol": " ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        "swaps": len(swap_s),
        "swap_seconds": {"median": statistics.median(swap_s), "p99": _percentile(swap_s, 99), "max": max(swap_s)},
        "failed": {"without swaps": len(calm.failed), "with swaps": len(swapping.failed)},
        "wrong_answers": {"without swaps": len(calm.wrong), "with swaps": len(swapping.wrong)},
        "first_problems": (calm.failed + swapping.failed + calm.wrong + swapping.wrong)[:5],
        "answers": {"without swaps": calm.answers, "with swaps": swapping.answers},
        "scores": {"without swaps": calm.scores, "with swaps": swapping.scores},
        "answers_that_part_at_a_near_tie": calm.near_ties + swapping.near_ties,
        "versions_seen": len(swapping.versions),
        "inter_token_latency_with_over_without": {f"p{p}": value for p, value in ratio.items()},
        "inter_token_seconds": {
            name: {f"p{p}": _percentile(seen.gaps_s, p) for p in (50, 90, 99)}
            for name, seen in (("without swaps", calm), ("with swaps", swapping))
        },
        "server_before_and_after": {name: [before[name], after[name]] for name in before},
    }
    write_result("swaps", result, lambda axes: _draw(axes, calm, swapping))
    if swapping.failed or swapping.wrong or calm.failed or calm.wrong:
        raise SystemExit("answers were wrong or failed; see first_problems")


def _draw(axes: Any, calm: Seen, swapping: Seen) -> None:
    for name, seen in (("without swaps", calm), (f"a swap every {PERIOD_S:g} s", swapping)):
        gaps = sorted(seen.gaps_s)
        axes.plot([1000 * gap for gap in gaps], [1 - i / len(gaps) for i in range(len(gaps))], label=name)
    axes.set(
        xlabel="time between two tokens, ms", ylabel="share that took longer", yscale="log",
        title=f"{STREAMS} streams and a scoring client",
    )  # fmt: skip
    axes.legend()


def _build(model: str, data: Path, work: Path, root: Path) -> list[str]:
    """Two versions of one name from different pages, built with the command that users run."""
    work.mkdir(parents=True, exist_ok=True)
    rows = shuffled_train_rows(data)
    for half in (0, 1):
        corpus = work / f"swaps-{half}.jsonl"
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows[half::2]), encoding="utf-8")
        command = ["build", "--model", model, "--input", str(corpus), "--output", str(root), "--name", NAME]
        command += ["--max-tokens", str(ENTRIES), "--force"]
        subprocess.run([sys.executable, "-m", "knnlm_cli", *command], check=True)
    versions = layout.published_versions(root, NAME)
    assert len(versions) == 2, f"{root / NAME} has other versions: remove the folder"
    return versions


def _inputs(client: Client, data: Path) -> tuple[list[list[int]], list[int]]:
    pages = [client.tokenize(row["text"]).tokens for row in read_rows(data / "eval.jsonl.gz")]
    pages = [ids for ids in pages if len(ids) >= max(PROMPT_TOKENS, SCORE_TOKENS)]
    return [list(ids[:PROMPT_TOKENS]) for ids in pages[:PROMPTS]], list(pages[PROMPTS][:SCORE_TOKENS])


def _alone(url: str, client: Client, prompts: list[list[int]], text: list[int]) -> Expected:
    tokens, margins = {}, {}
    for i, prompt in enumerate(prompts):
        body = _body(prompt) | {"stream": False, "logprobs": 2}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=3600).raise_for_status().json()["choices"][0]
        tokens[i] = answer["logprobs"]["tokens"]
        best = [sorted(top.values(), reverse=True) for top in answer["logprobs"]["top_logprobs"]]
        margins[i] = [top[0] - top[1] if len(top) > 1 else 0.0 for top in best]
    nll = client.score([text], model=f"{MODEL}@{NAME}").total.mixed.nll
    assert nll is not None
    return Expected(tokens, margins, nll)


def _body(prompt: list[int]) -> dict[str, Any]:
    return {
        "model": f"{MODEL}@{NAME}", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True,
        "logprobs": 0, "stream": True,
    }  # fmt: skip


@contextmanager
def _clients(
    url: str, seen: Seen, prompts: list[list[int]], text: list[int], expected: dict[str, Expected]
) -> Iterator[None]:
    """All clients at work in the block; each finishes its request after it."""
    stop = threading.Event()
    lock = threading.Lock()

    def stream(number: int) -> None:
        with httpx.Client(timeout=3600) as http:
            turn = number
            while not stop.is_set():
                i = turn % len(prompts)
                turn += 1
                try:
                    _stream_once(http, url, i, prompts[i], seen, lock, expected)
                except Exception as error:
                    with lock:
                        seen.failed.append(f"stream {number}: {error!r}"[:300])

    def score() -> None:
        with Client(url, timeout=3600) as client:
            while not stop.is_set():
                try:
                    answer = client.score([text], model=f"{MODEL}@{NAME}")
                    nll = answer.total.mixed.nll
                    version = answer.system_fingerprint.rsplit(":", 2)[1]
                    assert nll is not None
                    with lock:
                        seen.scores += 1
                        if abs(nll - expected[version].mixed_nll) > 1e-4 * abs(nll):
                            seen.wrong.append(f"score {nll} of {version}, alone {expected[version].mixed_nll}")
                except Exception as error:
                    with lock:
                        seen.failed.append(f"score: {error!r}"[:300])

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(STREAMS)] + [threading.Thread(target=score)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _stream_once(
    http: httpx.Client, url: str, i: int, prompt: list[int], seen: Seen, lock: threading.Lock,
    expected: dict[str, Expected],
) -> None:  # fmt: skip
    tokens: list[str] = []
    gaps: list[float] = []
    fingerprints: set[str] = set()
    last = None
    with http.stream("POST", f"{url}/v1/completions", json=_body(prompt)) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            now = time.perf_counter()
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            fingerprints.add(chunk["system_fingerprint"])
            new = [token for choice in chunk["choices"] for token in (choice["logprobs"] or {}).get("tokens", ())]
            if new:
                if last is not None:
                    gaps.append(now - last)
                last = now
            tokens += new
    (fingerprint,) = fingerprints
    version = fingerprint.rsplit(":", 2)[1]
    need = expected[version]
    with lock:
        seen.answers += 1
        seen.versions.add(version)
        seen.gaps_s += gaps
        if tokens != need.tokens[i]:
            at = next((j for j, pair in enumerate(zip(tokens, need.tokens[i], strict=False)) if pair[0] != pair[1]), -1)
            if at >= 0 and need.margins[i][at] < NEAR_TIE:
                seen.near_ties += 1
            else:
                seen.wrong.append(f"prompt {i} of {version} parts at token {at}: {tokens}")


def _progress(seconds: float, description: str) -> None:
    for _ in track(range(int(seconds)), description=description):
        time.sleep(1)


def _resources(server: Served) -> dict[str, int]:
    folder = Path(f"/proc/{server.process.pid}")
    status = dict(row.split(":\t") for row in (folder / "status").read_text().splitlines() if ":\t" in row)
    return {
        "descriptors": len(os.listdir(folder / "fd")),
        "threads": int(status["Threads"]),
        "rss_bytes": 1024 * int(status["VmRSS"].split()[0]),
        "anonymous_bytes": 1024 * int(status["RssAnon"].split()[0]),
    }


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


if __name__ == "__main__":
    main()
