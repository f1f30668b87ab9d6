"""What becomes of the engine's requests, for Prometheus."""

from __future__ import annotations

from knnlm_server.telemetry.families import REQUEST_SECONDS, TOKEN_SECONDS, Families
from knnlm_server.telemetry.timeline import Timeline

_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768)


class RequestMetrics:
    """What becomes of the engine's requests."""

    def __init__(self, make: Families) -> None:
        self.rejected = make.counter(
            "knnlm_rejected_requests", "Requests that the engine did not take, by the error's code.", "reason"
        )
        for code in ("overloaded", "shutting_down"):
            self.rejected.labels(code)  # there from the beginning: a first refusal is an increase
        self._ended = make.counter(
            "knnlm_requests", "Engine requests that have ended, by kind and outcome.", "kind", "outcome"
        )
        self._prompt_tokens = make.counter("knnlm_prompt_tokens", "Prompt tokens of requests that have ended.")
        self._seconds = make.histogram("knnlm_request_seconds", "From submission to the end.", REQUEST_SECONDS, "kind")
        self._queue = make.histogram(
            "knnlm_request_queue_seconds", "From submission to the first pass.", REQUEST_SECONDS, "kind"
        )
        self._prefill = make.histogram(
            "knnlm_request_prefill_seconds", "From the first pass to the first token of a completion.", REQUEST_SECONDS
        )
        self._decode = make.histogram(
            "knnlm_request_decode_seconds", "From the first token of a completion to its end.", REQUEST_SECONDS
        )
        self._per_token = make.histogram(
            "knnlm_time_per_output_token_seconds",
            "Mean time between the tokens of a completion's longest choice.",
            TOKEN_SECONDS,
        )
        self._prompt_lengths = make.histogram(
            "knnlm_request_prompt_tokens", "Tokens of the prompt of a completion that has finished.", _TOKENS
        )
        self._completion_lengths = make.histogram(
            "knnlm_request_generation_tokens", "Tokens of all choices of a completion that has finished.", _TOKENS
        )

    def count_start(self, kind: str, timeline: Timeline) -> None:
        """A request's first pass is about to begin."""
        self._queue.labels(kind).observe(timeline.begin())

    def count_end(self, kind: str, timeline: Timeline, outcome: str) -> None:
        """A request has ended, however it did."""
        self._seconds.labels(kind).observe(timeline.end())
        self._ended.labels(kind, outcome).inc()

    def count_read(self, tokens: int) -> None:
        """Prompt tokens, those that the prefix cache spared included."""
        self._prompt_tokens.inc(tokens)

    def count_completion(self, timeline: Timeline, prompt_tokens: int, generated: list[int]) -> None:
        """A completion has finished.

        Args:   generated: tokens of each choice.
        """
        self._prompt_lengths.observe(prompt_tokens)
        self._completion_lengths.observe(sum(generated))
        begun, first, ended = timeline.begun_s, timeline.first_token_s, timeline.ended_s
        if begun is None or first is None or ended is None:  # nothing was to be generated
            return
        self._prefill.observe(first - begun)
        self._decode.observe(ended - first)
        if (most := max(generated)) > 1:
            self._per_token.observe((ended - first) / (most - 1))
