"""The same weights and datastore in both runtimes: perplexity, and greedy answers against bare llama.cpp.

Perplexity: `/v1/score` of the first 10,000 tokens of the eval pages, window 1024, stride 512, by a server that runs the
model given with transformers in float32 and by one that runs the GGUF file in llama.cpp, with the store's calibrated
settings; base, and mixed. Answers: 50 held-out prompts of 64 tokens, 64 tokens each, greedy, by our server with λ = 0
at every token and by llama.cpp alone, one stream. Where two part, the gap between the two likeliest tokens there is
shown: sums in another order decide where it is below 0.001. How fast each runtime is: `serving.py --gguf`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import arguments, read_rows, write_result
from rich.progress import track
from served import MODEL, served
from serving import peer
from speculation import PROMPT_TOKENS, SKIPPED

from knnlm_client import Client
from knnlm_core.lm.loading import load_lm
from knnlm_core.lm.tokenizer import Tokenizer

TOKENS, PROMPTS, SCORED, PORT = 64, 50, 10_000, 8790
NEAR_TIE = 1e-3
SAME_PERPLEXITY = 0.01


def main() -> None:
    """Run and write the result."""
    parser = arguments(__doc__, data=True)
    parser.add_argument("--store", required=True, help="ROOT/NAME of a datastore built with the same model")
    parser.add_argument("--gguf", required=True, help="the same weights for llama.cpp")
    args = parser.parse_args()
    store = Path(args.store)
    lm = load_lm(args.model)
    tokenizer = lm.tokenizer
    lm.close()
    del lm
    pages = [tokenizer.encode(row["text"]) for row in read_rows(args.data / "eval.jsonl.gz")]
    long = [page for page in pages if len(page) >= SKIPPED + PROMPT_TOKENS + TOKENS]
    prompts = [page[at : at + PROMPT_TOKENS] for at in (SKIPPED, 0) for page in long][:PROMPTS]
    scores, drift = {}, {}
    for at, (path, runtime) in enumerate(((args.model, "huggingface"), (args.gguf, "llamacpp"))):
        options = ("--runtime", runtime, "--max-model-len", "1024", "--draft-tokens", "0")
        with (
            served(path, store.parent, store.name, port=PORT + at, options=options) as server,
            Client(server.url, timeout=3600) as client,
        ):
            scores[runtime] = perplexities(client, store.name, pages)
            drift[runtime] = client.datastores.get(store.name).key_drift
            if runtime == "llamacpp":
                answers = greedy(client, store.name, tokenizer, prompts, args.gguf)
    ratio = {
        what: scores["llamacpp"][what] / scores["huggingface"][what] for what in ("base perplexity", "mixed perplexity")
    }
    result = {
        "claim": f"mixed perplexity within {SAME_PERPLEXITY:.0%} of the Hugging Face runtime's; greedy answers at "
        "λ = 0 are those of bare llama.cpp",
        "protocol": (__doc__ or "").split("\n\n", 1)[1].strip(),
        "gguf": Path(args.gguf).name,
        "perplexity": scores,
        "llamacpp over huggingface": ratio,
        "key_drift": drift,
        "greedy": answers,
    }
    write_result("runtimes", result, lambda axes: draw(axes, result))


def perplexities(client: Client, name: str, pages: Sequence[list[int]]) -> dict[str, float]:
    """Of the first tokens of the pages."""
    texts, left = [], SCORED
    for page in pages:
        if left > 1:
            texts.append(page[:left])
            left -= len(texts[-1])
    total = client.score(texts, model=f"{MODEL}@{name}", window=1024, stride=512).total
    assert total.base.perplexity is not None
    assert total.mixed.perplexity is not None
    return {
        "tokens": total.tokens,
        "searched": total.searched / total.tokens,
        "base perplexity": total.base.perplexity,
        "mixed perplexity": total.mixed.perplexity,
    }


def greedy(client: Client, name: str, tokenizer: Tokenizer, prompts: Sequence[list[int]], gguf: str) -> dict[str, Any]:
    """Our answers with a datastore of weight zero beside llama.cpp's own."""
    same, partings = 0, []
    with peer("llama.cpp", "--model", gguf, "--streams", "1") as bare:
        for number, prompt in enumerate(track(prompts, description="Greedy answers")):
            alone = bare.ask([prompt])["tokens"][0]
            served_answer = client.completions(
                prompt, model=f"{MODEL}@{name}", max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=2,
                knn={"lambda": 0.0, "gate": "always"},
            ).choices[0]  # fmt: skip
            if served_answer.text == tokenizer.decode(alone):
                same += 1
                continue
            assert served_answer.logprobs is not None
            names = [tokenizer.decode([token]) for token in alone]
            pairs = zip(served_answer.logprobs.tokens, names, strict=True)
            at = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
            top = sorted((served_answer.logprobs.top_logprobs or [])[at].values(), reverse=True)
            partings.append({"prompt": number, "at": at, "gap": top[0] - top[1]})
    near = sum(parting["gap"] < NEAR_TIE for parting in partings)
    return {"prompts": len(prompts), "same": same, "near ties": near, "partings": partings}


def draw(axes: Any, result: dict[str, Any]) -> None:
    """Perplexities side by side."""
    scores = result["perplexity"]
    for at, runtime in enumerate(scores):
        heights = [scores[runtime][what] for what in ("base perplexity", "mixed perplexity")]
        bars = axes.bar([0 + 0.4 * at, 1 + 0.4 * at], heights, 0.4, label=runtime)
        axes.bar_label(bars, fmt="%.3f", fontsize=8)
    axes.set_xticks([0.2, 1.2], ["base", "mixed"])
    axes.set(ylabel="perplexity", title=f"{result['gguf']} and the same weights in float32")
    axes.legend()


if __name__ == "__main__":
    main()
