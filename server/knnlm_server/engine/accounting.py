"""What a step took, said to metrics and to the requests that took part in it."""

from __future__ import annotations

from knnlm_server.engine.request import CompletionRequest
from knnlm_server.engine.scheduler import Batch
from knnlm_server.engine.step import Step
from knnlm_server.telemetry.pass_metrics import PassMetrics


def requests_of(batch: Batch) -> list[CompletionRequest]:
    """The requests of a batch, each once."""
    both = [*(chunk.request for chunk in batch.chunks), *(decode.request for decode in batch.decodes)]
    return list(dict.fromkeys(both))


def count_step(metrics: PassMetrics, batch: Batch, step: Step) -> None:
    """Before anybody is told that a request of the batch is over."""
    chunks, decodes = batch.chunks, batch.decodes
    seconds, mixing = step.forward_seconds, step.mixing
    reading = {chunk.request for chunk in chunks}
    for request in requests_of(batch):
        spent = request.timeline.prefill if request in reading else request.timeline.decode
        spent.add(seconds, mixing.timings if request.retrieval is not None else None)
    read = sum(chunk.stop - chunk.start for chunk in chunks)
    metrics.count_step(len(decodes) + sum(len(decode.draft) for decode in decodes) + read, len(decodes) + len(chunks))
    metrics.count_pass(CompletionRequest.kind, seconds, mixing.timings)
    if mixing.distances:
        metrics.count_found(mixing.distances, mixing.lambdas)
