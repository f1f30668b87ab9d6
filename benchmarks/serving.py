"""Tokens per second, time to the first token and between tokens, memory: our server and its peers, side by side.

Every system is a process of its own and all are loaded from the beginning; rounds go from one to the next in an order
that moves on each time, so that a drifting machine hits all of them alike. A round is N streams that begin together,
64 tokens after prompts of 64, greedy. Ours are asked over HTTP, streaming; peers in their process, a whole batch at
once, with no server around them. Figures are medians over the rounds; ratios are of medians. Prompts:

    held out    eval pages, none of which is in the store        1, 4 and 16 streams
    stored      pages that the store holds                       1 stream
    other       WikiText-2 test                                  1 stream

The bound of a step is the bytes of the weights over the bandwidth at which this machine sums a large tensor, measured
in the same run: no step that reads all weights can be faster.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
from common import arguments, read_bandwidth, write_result
from rich.progress import track
from served import MODEL, served
from speculation import prompts

from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.loading import load_lm

TOKENS, ROUNDS = 64, 5
STREAMS = (1, 4, 16)
PORT = 8770
SEARCHED = "held out"

Times = list[list[float]]
Generate = Callable[[list[list[int]]], Times]
Answers = dict[str, Any]


class System(NamedTuple):
    """Something that generates."""

    generate: Generate
    process: subprocess.Popen[Any]


class Peer(NamedTuple):
    """A process of `peers.py`."""

    ask: Callable[[list[list[int]]], Answers]
    process: subprocess.Popen[Any]

    def system(self) -> System:
        """Its times alone."""
        return System(lambda batch: self.ask(batch)["times"], self.process)


def ours(url: str, body: dict[str, Any]) -> Generate:
    """Streams over HTTP, one thread and connection each."""

    def one(prompt: list[int], times: list[float], gate: threading.Barrier) -> None:
        asked = {**body, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        asked |= {"logprobs": 0}
        with httpx.Client(timeout=600) as client:
            gate.wait()
            begun = time.perf_counter()
            with client.stream("POST", f"{url}/v1/completions", json=asked) as response:
                response.raise_for_status()
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        choices = json.loads(line[6:])["choices"]
                        now = time.perf_counter() - begun
                        times += [now] * sum(len(choice["logprobs"]["tokens"]) for choice in choices)

    def generate(batch: list[list[int]]) -> Times:
        times: Times = [[] for _ in batch]
        gate = threading.Barrier(len(batch))
        threads = [
            threading.Thread(target=one, args=(prompt, of_one, gate))
            for prompt, of_one in zip(batch, times, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return times

    return generate


@contextmanager
def peer(*command: str) -> Iterator[Peer]:
    """One that is ready."""
    script = str(Path(__file__).parent / "peers.py")
    process = subprocess.Popen(
        [sys.executable, script, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    if stdout.readline().strip() != "ready":
        raise SystemExit(f"peer {command[0]} does not start")

    def ask(batch: list[list[int]]) -> Answers:
        stdin.write(json.dumps({"prompts": batch, "tokens": TOKENS}) + "\n")
        answers: Answers = json.loads(stdout.readline())
        return answers

    try:
        yield Peer(ask, process)
    finally:
        stdin.close()
        process.wait()


def main() -> None:
    """Run and write the result."""
    parser = arguments(__doc__, data=True)
    parser.add_argument("--store", required=True, help="ROOT/NAME of a datastore built with the same model")
    parser.add_argument("--gguf", nargs="*", default=[], help="the same weights for llama.cpp, bare and as our runtime")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    store = Path(args.store)
    lm = load_lm(args.model)
    with Datastore.open(store.parent, store.name) as opened:
        kinds = prompts(lm, opened, args.data, 4 * max(STREAMS))
        entries, calibration = opened.entries, opened.calibration
    assert calibration is not None
    weights = sum(p.numel() * p.element_size() for p in lm._model.parameters())  # type: ignore[attr-defined]
    lm.close()
    del lm
    with ExitStack() as stack:
        systems = start(stack, args.model, store, args.work, args.gguf)
        table = measure(systems, kinds, args.rounds)
        memory = {name: psutil.Process(system.process.pid).memory_info().rss for name, system in systems.items()}
        bandwidth = read_bandwidth()
    result = {
        "claim": "with a store as fast as the base LM, and faster than the peers' loops",
        "protocol": (__doc__ or "").split("\n\n", 1)[1].strip(),
        "entries": entries,
        "calibrated": calibration.settings(),
        "rounds": args.rounds,
        "bound": {"weight bytes": weights, "bytes per second": bandwidth, "tokens per second": bandwidth / weights},
        "memory bytes": memory,
        "table": table,
    }
    write_result("serving", result, lambda axes: draw(axes, result))


def start(stack: ExitStack, model: str, store: Path, work: Path, gguf: Sequence[str]) -> dict[str, System]:
    """All systems, loaded and ready."""
    systems: dict[str, System] = {}
    modes: dict[str, tuple[int, dict[str, Any]]] = {
        "base LM": (0, {"model": MODEL}),
        "kNN always": (0, {"model": f"{MODEL}@{store.name}", "knn": {"gate": "always"}}),
        "kNN gated": (0, {"model": f"{MODEL}@{store.name}", "knn": {"gate": "learned"}}),
        "kNN gated, drafts": (8, {"model": f"{MODEL}@{store.name}", "knn": {"gate": "learned"}}),
    }
    port = PORT
    for path in (model, *gguf):
        for drafts in (0, 8):
            limits = ("--max-sequences", str(max(STREAMS)), "--max-model-len", "1024")
            runtime = ("--runtime", "llamacpp" if path in gguf else "huggingface")
            options = (*limits, *runtime, "--draft-tokens", str(drafts))
            server = stack.enter_context(served(path, store.parent, store.name, port=port, options=options))
            port += 1
            for name, (of_mode, body) in modes.items():
                if of_mode == drafts:
                    label = f"{name} ({Path(path).stem})" if path in gguf else name
                    systems[label] = System(ours(server.url, body), server.process)
    common = ("--model", model, "--store", str(store), "--work", str(work))
    systems["transformers"] = stack.enter_context(peer("transformers", *common)).system()
    systems["transformers + kNN"] = stack.enter_context(peer("transformers-knn", *common)).system()
    for path in gguf:
        streams = ("--streams", str(max(STREAMS)))
        bare = stack.enter_context(peer("llama.cpp", "--model", path, *streams))
        systems[f"llama.cpp ({Path(path).stem})"] = bare.system()
    return systems


def measure(systems: dict[str, System], kinds: dict[str, list[list[int]]], rounds: int) -> dict[str, Any]:
    """All systems on all kinds of prompts."""
    cases = [(SEARCHED, streams) for streams in STREAMS] + [(kind, 1) for kind in ("stored", "other")]
    table: dict[str, Any] = {}
    for system in systems.values():
        system.generate(kinds[SEARCHED][-1:])  # warm
    for kind, streams in cases:
        seen: defaultdict[str, list[Times]] = defaultdict(list)
        for number in track(range(rounds), description=f"{kind}, {streams} streams"):
            texts = kinds[kind]
            batch = [texts[(number * streams + i) % len(texts)] for i in range(streams)]
            names = list(systems)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                seen[name].append(systems[name].generate(batch))
        table[f"{kind}, {streams} streams"] = {name: summary(runs) for name, runs in seen.items()}
    for case in table.values():
        base = case["base LM"]["tokens per second"]
        for row in case.values():
            row["over base LM"] = row["tokens per second"] / base
    return table


def summary(runs: Sequence[Times]) -> dict[str, float]:
    """Of the rounds of one system: medians, and the 99th percentile of what lies between two tokens."""
    rates = [sum(map(len, times)) / max(of_one[-1] for of_one in times) for times in runs]
    gaps = np.concatenate([np.diff(of_one) for times in runs for of_one in times])
    return {
        "tokens per second": statistics.median(rates),
        "seconds to the first token": statistics.median(of_one[0] for times in runs for of_one in times),
        "seconds between tokens, median": float(np.median(gaps)),
        "seconds between tokens, 99 %": float(np.quantile(gaps, 0.99)),
    }


def draw(axes: Any, result: dict[str, Any]) -> None:
    """Tokens per second by streams, with the bound of one stream."""
    by_streams = {n: result["table"][f"{SEARCHED}, {n} streams"] for n in STREAMS}
    names = list(by_streams[1])
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [by_streams[n][name]["tokens per second"] for n in STREAMS]
        axes.bar([at + i * width for at in range(len(STREAMS))], heights, width, label=name)
    axes.axhline(
        result["bound"]["tokens per second"], color="0.3", linestyle="--", linewidth=1, label="bound, 1 stream"
    )
    axes.set_xticks([at + 0.4 for at in range(len(STREAMS))], [f"{n} streams" for n in STREAMS])
    axes.set(ylabel="tokens/s", yscale="log", title="Held-out prompts")
    axes.legend(fontsize=6, ncols=2)


if __name__ == "__main__":
    main()
