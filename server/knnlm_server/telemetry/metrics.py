"""What the engine counts, for Prometheus: one registry per app, so that nothing is global."""

from __future__ import annotations

from knnlm_server.telemetry.families import REQUEST_SECONDS, TOKEN_SECONDS, Families
from knnlm_server.telemetry.pass_metrics import PassMetrics
from knnlm_server.telemetry.request_metrics import RequestMetrics

_RECALL = (0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1)


class EngineMetrics:
    """Counters and histograms that the engine's thread moves; times in seconds, lengths in tokens."""

    def __init__(self) -> None:
        make = Families()
        self.registry, self.families = make.registry, make.made
        self.of_requests = RequestMetrics(make)
        self.of_passes = PassMetrics(make)
        self.generation_tokens = make.counter("knnlm_generation_tokens", "Tokens generated.")
        self.first_token = make.histogram(
            "knnlm_time_to_first_token_seconds", "From submission to the first token.", REQUEST_SECONDS
        )
        self.between_tokens = make.batched(
            "knnlm_inter_token_latency_seconds", "Between two tokens of one choice.", TOKEN_SECONDS
        ).labels()
        self.retrievals = make.counter(
            "knnlm_retrievals",
            "Tokens with a datastore: whether it was searched for them, pointers were followed instead, or neither.",
            "decision",
        )
        # Looked up once: they move with every token.
        self._decisions = [self.retrievals.labels(decision) for decision in ("searched", "followed", "skipped")]
        self.drafted_tokens = make.counter(
            "knnlm_drafted_tokens", "Tokens that were verified as drafts read off a datastore."
        )
        self.accepted_tokens = make.counter("knnlm_accepted_tokens", "Tokens of drafts that were generated.")
        self.shadow_recall = make.histogram(
            "knnlm_shadow_recall",
            "Share of a searched token's exact nearest entries that were found, for the tokens searched again exactly.",
            _RECALL,
        )
        self.shadow_dropped = make.counter(
            "knnlm_shadow_dropped",
            "Tokens that were to be searched again exactly and were not: the queue was full, the datastore was about "
            "to be closed, or the search failed.",
            "reason",
        )

    def count_retrievals(self, searched: int, followed: int, skipped: int) -> None:
        """Tokens that have a datastore, by what was decided for them."""
        for counter, count in zip(self._decisions, (searched, followed, skipped), strict=True):
            if count:
                counter.inc(count)
