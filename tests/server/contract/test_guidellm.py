"""guidellm, unmodified and offline: a load test completes, and counts the tokens that it asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from learned import Learned
from live_server import LiveServer
from offline import run_offline

pytestmark = pytest.mark.slow

REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 3, 16, 8


@pytest.mark.parametrize(
    ("route", "model"), [("/v1/completions", "learned-lm"), ("/v1/chat/completions", "learned-lm@law")]
)
def test_a_load_test_completes_without_an_error(
    learned_server: LiveServer, learned: Learned, tmp_path: Path, route: str, model: str
) -> None:
    arguments = {
        "--backend": f"kind=openai_http,target={learned_server.url},model={model},request_format={route}",
        "--profile": "kind=synchronous",
        "--constraint": f"kind=max_requests,count={REQUESTS}",
        "--tokenizer": f"kind=huggingface_auto,model={learned.model}",
        "--data": f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
        "--output": f"kind=json,path={tmp_path / 'report.json'}",
    }
    options = [part for option in arguments.items() for part in option]
    run_offline(["-m", "guidellm", "run", *options, "--disable-console"], tmp_path)
    (benchmark,) = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["benchmarks"]
    made = benchmark["scheduler_metrics"]["requests_made"]
    assert made == {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}
    metrics = benchmark["metrics"]
    assert counts(metrics["output_token_count"]) == (REQUESTS, OUTPUT_TOKENS, OUTPUT_TOKENS)
    prompts = counts(metrics["prompt_token_count"])
    if route == "/v1/completions":
        assert prompts == (REQUESTS, PROMPT_TOKENS, PROMPT_TOKENS)
    else:  # what the chat template puts around a prompt counts too
        assert prompts[1] > PROMPT_TOKENS
    # It tells the first token from the later ones, which it can only do of a stream.
    assert metrics["time_to_first_token_ms"]["successful"]["count"] == REQUESTS
    assert metrics["inter_token_latency_ms"]["successful"]["min"] > 0


def counts(distribution: dict[str, Any]) -> tuple[int, float, float]:
    """How many, the least and the most."""
    successful = distribution["successful"]
    return successful["count"], successful["min"], successful["max"]
