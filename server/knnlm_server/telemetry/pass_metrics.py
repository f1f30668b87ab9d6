"""What the engine's steps and scoring passes take and find, for Prometheus."""

from __future__ import annotations

from knnlm_core.mixture import Timings
from knnlm_server.telemetry.families import Families

_PASS_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_LAMBDA = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_STEP_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_DISTANCES = (0, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
_KINDS = ("completion", "score")  # whose passes are measured


class PassMetrics:
    """What the engine's steps and scoring passes took and found. On the engine's thread, with every token."""

    def __init__(self, make: Families) -> None:
        self._forward, self._gate, self._search, self._mix = (
            make.batched(f"knnlm_{name}_seconds", text, _PASS_SECONDS, "kind", _KINDS)
            for name, text in (
                ("forward", "Seconds that the language model took for one pass, its head included."),
                ("gate", "Seconds that gates took in one pass, for all its tokens that have a datastore."),
                ("search", "Seconds that searches took in one pass, for all its tokens together."),
                ("mix", "Seconds that weighing, fusing and interpolating took in one pass."),
            )
        )
        self._tokens = make.batched("knnlm_step_tokens", "Tokens of one step, drafts and prompts.", _STEP_TOKENS)
        self._sequences = make.batched("knnlm_step_sequences", "Sequences that one step advances.", _STEP_SEQUENCES)
        self._distances = make.batched(
            "knnlm_nearest_distance",
            "Squared L2 from a generated token's key to the nearest entry found, or pointer followed.",
            _DISTANCES,
        ).labels()
        self._lambdas = make.batched(
            "knnlm_lambda", "Weight λ of p_knn at generated tokens that were searched or followed for.", _LAMBDA
        ).labels()

    def count_step(self, tokens: int, sequences: int) -> None:
        """A step of generation."""
        self._tokens.labels().observe(tokens)
        self._sequences.labels().observe(sequences)

    def count_pass(self, kind: str, forward: float, timings: Timings | None) -> None:
        """Seconds of a step or a scoring pass; without timings, none of its tokens has a datastore."""
        self._forward.labels(kind).observe(forward)
        if timings is not None:
            self._gate.labels(kind).observe(timings.gate)
            if timings.search:
                self._search.labels(kind).observe(timings.search)
            self._mix.labels(kind).observe(timings.mix)

    def count_found(self, distances: list[float], lambdas: list[float]) -> None:
        """Of generated tokens."""
        self._distances.observe_all(distances)
        self._lambdas.observe_all(lambdas)
