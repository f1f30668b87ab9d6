"""Time and memory of scoring over HTTP with a datastore, against the base LM alone and against a plain script.

Text: the eval pages, then training pages that are not in the store, until 100,000 tokens. Store: 300,000 entries, as in
strided_protocol. Windows of 1024 tokens, stride 512. Groups of some 25,000 tokens go to one running server in every
mode, in an order that rotates from group to group, so that a drifting machine hits all modes alike; ratios are of
summed times. The plain script scores the first pages of the first group in this process, the server being idle, and
then the server scores the same pages. Memory: the server's peak resident set (reset before each) while one text of the
length given is scored at k = 1024.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import torch
from common import arguments, read_rows, shuffled_train_rows, write_result
from plain_script import PlainScript, flat_index
from rich.progress import track
from served import MODEL, Served, served
from strided_protocol import NAME, build

from knnlm_client import Client
from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.loading import load_lm

PORT, TOKENS, GROUP_TOKENS, PLAIN_TOKENS = 8766, 100_000, 25_000, 3_000
WINDOW, STRIDE, MANY = 1024, 512, 1024
MEMORY_TOKENS = (16_000, 48_000)


def main() -> None:
    """Run and write the result."""
    args = arguments(__doc__, data=True).parse_args()
    root = args.work / "datastores"
    build(args.model, args.data, args.work, root)
    with Datastore.open(root, NAME) as store:
        texts = _texts(args.model, args.data, set(store.document_ids()))
        groups = list(_groups(texts))
        with served(args.model, root, NAME, port=PORT) as server, Client(server.url, timeout=3600) as client:
            calibration = client.datastores.get(NAME).calibration
            assert calibration is not None
            modes: dict[str, dict[str, Any]] = {
                "base": {"model": MODEL},
                "calibrated": {"model": f"{MODEL}@{NAME}"},
                "every token, k = 1024": {"model": f"{MODEL}@{NAME}", "knn": {"k": MANY, "gate": "always"}},
            }
            if calibration["k"] == MANY:  # the same request twice
                del modes["every token, k = 1024"]
            seconds = _time_modes(client, groups, modes)
            plain = _time_plain(args.model, store, client, groups[0])
            memory = _peaks(server, client, texts)
    total = {mode: sum(times) for mode, times in seconds.items()}
    ratios = {mode: value / total["base"] for mode, value in total.items()}
    per_group = {m: [a / b for a, b in zip(times, seconds["base"], strict=True)] for m, times in seconds.items()}
    result = {
        "claim": "calibrated ≤ 1.3 ×, k = 1024 at every token ≤ 1.9 × the time of the base LM; ≥ 5 × faster than a "
        "plain script; peak memory independent of the length of the text",
        "protocol": (__doc__ or "").split("\n\n", 1)[1].strip().replace("\n", " "),
        "tokens": sum(len(ids) - 1 for group in groups for ids in group),
        "calibrated_settings": {name: calibration[name] for name in ("k", "temperature", "lambda")},
        "time_over_base": ratios,
        "time_over_base_per_group": per_group,
        "base_tokens_per_second": sum(len(ids) for group in groups for ids in group) / total["base"],
        "plain_script": plain,
        "server_peak_bytes_by_text_tokens": memory,
    }
    bars = {
        **{m: r for m, r in ratios.items() if m != "base"},
        **{f"plain script, {n}": p["time_over_base"] for n, p in plain.items()},
    }
    write_result(
        "scoring",
        result,
        lambda axes: (
            axes.barh(list(bars), list(bars.values())),
            axes.axvline(1.0, color="tab:gray"),
            axes.bar_label(axes.containers[0], fmt="%.2f ×", padding=3),
            axes.set(xlabel="time relative to scoring with the base LM alone", title="Scoring against 300,000 entries"),
            axes.margins(x=0.15),
        ),
    )


def _texts(model: str, data: Path, stored: set[str]) -> list[list[int]]:
    """Token ids of the pages to score."""
    tokenizer = load_lm(model).tokenizer
    rows = read_rows(data / "eval.jsonl.gz") + [r for r in shuffled_train_rows(data)[::-1] if r["id"] not in stored]
    texts: list[list[int]] = []
    left = TOKENS
    for row in rows:
        ids = tokenizer.encode(row["text"])[: left + 1]
        if left and len(ids) > 1:
            texts.append(ids)
            left -= len(ids) - 1
    return texts


def _groups(texts: list[list[int]]) -> Iterator[list[list[int]]]:
    group: list[list[int]] = []
    for ids in texts:
        group.append(ids)
        if sum(map(len, group)) >= GROUP_TOKENS:
            yield group
            group = []
    if group:
        yield group


def _score(client: Client, texts: list[list[int]], mode: dict[str, Any]) -> tuple[float, float]:
    """Seconds, and the summed nats of the mixture."""
    started = time.perf_counter()
    answer = client.score(texts, window=WINDOW, stride=STRIDE, **mode)
    nll = answer.total.mixed.nll
    assert nll is not None
    return time.perf_counter() - started, nll


def _time_modes(
    client: Client, groups: list[list[list[int]]], modes: dict[str, dict[str, Any]]
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for mode in modes.values():
        _score(client, [groups[0][0][:600]], mode)  # pages of files and memory are touched once
    names = list(modes)
    for i, group in enumerate(track(groups, description="Score in every mode")):
        for j in range(len(names)):
            mode = names[(i + j) % len(names)]
            seconds[mode].append(_score(client, group, modes[mode])[0])
    return seconds


def _time_plain(model: str, store: Datastore, client: Client, group: list[list[int]]) -> dict[str, dict[str, float]]:
    """The plain script over two kinds of index, against the server on the same pages."""
    pages: list[list[int]] = []
    for ids in group:
        pages.append(ids[: PLAIN_TOKENS - sum(map(len, pages))])
        if sum(map(len, pages)) >= PLAIN_TOKENS:
            break
    calibration = store.calibration
    assert calibration is not None
    settings = {"knn_temperature": calibration.knn_temperature, "lmbda": calibration.lmbda}
    values = store.values(torch.arange(store.entries)).numpy()
    keys = store.keys(torch.arange(store.entries)).numpy()
    result = {}
    for name, index in (("exact index", flat_index(keys)), ("the store's own index", _own_index(store))):
        script = PlainScript(model, index, values, k=MANY)
        script.score(pages[0][:40], window=WINDOW, stride=STRIDE, **settings)
        started = time.perf_counter()
        nll = sum(
            script.score(ids, window=WINDOW, stride=STRIDE, **settings)[0]
            for ids in track(pages, description=f"Plain script, {name}")
        )
        plain_s = time.perf_counter() - started
        base_s, _ = _score(client, pages, {"model": MODEL})
        knn = {"k": MANY, "temperature": calibration.knn_temperature, "lambda": calibration.lmbda, "gate": "always"}
        ours_s, ours_nll = _score(client, pages, {"model": f"{MODEL}@{NAME}", "knn": knn})
        result[name] = {
            "time_over_ours": plain_s / ours_s,
            "time_over_base": plain_s / base_s,
            "nats_per_token_apart": abs(nll - ours_nll) / sum(len(ids) - 1 for ids in pages),
        }
    return result


def _own_index(store: Datastore) -> Any:
    spec = store.manifest.index
    assert len(store.manifest.shards) == 1, "the baseline reads one shard"
    index = faiss.read_index(str(store.folder / store.manifest.shards[0].name / "index.faiss"))
    if spec.is_trained:
        index.nprobe = spec.nprobe
    return index


def _peaks(server: Served, client: Client, texts: list[list[int]]) -> dict[int, int]:
    """The server's peak resident set in bytes, by tokens of the one text that it scored."""
    ids = [token_id for text in texts for token_id in text]
    peaks = {}
    for length in track(MEMORY_TOKENS, description="Peak memory"):
        folder = Path(f"/proc/{server.process.pid}")
        (folder / "clear_refs").write_text("5")  # resets VmHWM
        _score(client, [ids[:length]], {"model": f"{MODEL}@{NAME}", "knn": {"k": MANY, "gate": "always"}})
        (line,) = (row for row in (folder / "status").read_text().splitlines() if row.startswith("VmHWM"))
        peaks[length] = 1024 * int(line.split()[1])
    return peaks


if __name__ == "__main__":
    main()
