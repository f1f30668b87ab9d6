"""What the engine counts, for Prometheus: one registry per app, so that nothing is global."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_RECALL = (0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1)
_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5)


class EngineMetrics:
    """Counters and histograms that the engine's thread moves; times in seconds, lengths in tokens."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "knnlm_requests",
            "Engine requests that have ended, by kind and outcome.",
            ["kind", "outcome"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "knnlm_prompt_tokens", "Prompt tokens of requests that have ended.", registry=self.registry
        )
        self.generation_tokens = Counter("knnlm_generation_tokens", "Tokens generated.", registry=self.registry)
        self.retrievals = Counter(
            "knnlm_retrievals",
            "Tokens with a datastore: whether it was searched for them, pointers were followed instead, or neither.",
            ["decision"],
            registry=self.registry,
        )
        # Looked up once: they move with every token.
        self._decisions = [self.retrievals.labels(decision) for decision in ("searched", "followed", "skipped")]
        self.drafted_tokens = Counter(
            "knnlm_drafted_tokens", "Tokens that were verified as drafts read off a datastore.", registry=self.registry
        )
        self.accepted_tokens = Counter(
            "knnlm_accepted_tokens", "Tokens of drafts that were generated.", registry=self.registry
        )
        self.first_token = Histogram(
            "knnlm_time_to_first_token_seconds",
            "From submission to the first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.between_tokens = Histogram(
            "knnlm_inter_token_latency_seconds",
            "Between two tokens of one choice.",
            buckets=_TOKEN_SECONDS,
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "knnlm_request_seconds", "From submission to the end.", ["kind"], buckets=_SECONDS, registry=self.registry
        )

        self.shadow_recall = Histogram(
            "knnlm_shadow_recall",
            "Share of a searched token's exact nearest entries that were found, for the tokens searched again exactly.",
            buckets=_RECALL,
            registry=self.registry,
        )
        self.shadow_dropped = Counter(
            "knnlm_shadow_dropped",
            "Tokens that were to be searched again exactly and were not: the queue was full, the datastore was about "
            "to be closed, or the search failed.",
            ["reason"],
            registry=self.registry,
        )

    def count_retrievals(self, searched: int, followed: int, skipped: int) -> None:
        """Tokens that have a datastore, by what was decided for them."""
        for counter, count in zip(self._decisions, (searched, followed, skipped), strict=True):
            counter.inc(count)
