"""Weights of several datastores by how well each one predicts the end of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from knnlm_core.errors import KnnlmError
from knnlm_core.lm.protocol import CausalLM
from knnlm_core.mixture import source_log_probs
from knnlm_core.retrieval import NEIGHBORS_AT_ONCE, Retrieval
from knnlm_server.engine.window_work import Searches
from knnlm_server.telemetry.timeline import Timeline

MAX_TARGETS = 256  # last tokens of the prompt that are predicted
MAX_CONTEXT = 512  # tokens that the LM reads of a prompt, so that a pass is no longer than a step of generation
EPSILON = 0.05  # keeps a token that a store has never seen from deciding alone


@dataclass(slots=True, eq=False)
class PromptWeightsRequest:
    """Prompts whose ends are predicted by each datastore alone; always searched, whatever the gate would decide.

    One prompt a pass, so that no weight depends on what else the engine has to do.

    Attributes:
        prompts: token ids, at least one each.
        retrieval: from at least two datastores.
        weights: where those of each prompt are put, in their order.
        on_end: called exactly once when the request leaves the engine: with None, or with why it failed.
    """

    request_id: str
    prompts: Sequence[Sequence[int]]
    retrieval: Retrieval
    weights: list[list[float]]
    on_end: Callable[[KnnlmError | None], None]
    timeline: Timeline = field(default_factory=Timeline)
    kind: ClassVar[str] = "weights"  # as metrics call it

    @property
    def is_done(self) -> bool:
        """Whether every prompt has its weights."""
        return len(self.weights) == len(self.prompts)

    def run(self, lm: CausalLM, token_budget: int) -> Searches:
        """Weigh by the next prompt. Raises KnnlmError: a datastore could not be searched."""
        prompt = self.prompts[len(self.weights)][-MAX_CONTEXT:]
        self.weights.append(prompt_weights(lm, prompt, self.retrieval))
        return Searches(min(len(prompt) - 1, MAX_TARGETS), followed=0, skipped=0)


def prompt_weights(lm: CausalLM, prompt: Sequence[int], retrieval: Retrieval) -> list[float]:
    """Weights that sum to one.

    w_i ∝ exp(mean over the targets of log((1 − ε) p_knn,i + ε / V))      a mixture of each store with a uniform guess

    A prompt of one token predicts nothing: its weights are equal.

    Raises: KnnlmError: a datastore could not be searched.
    """
    count = min(len(prompt) - 1, MAX_TARGETS)
    if not count:
        return [1 / len(retrieval.sources)] * len(retrieval.sources)
    # The row at position t predicts token t + 1.
    keys = lm.encode([prompt[:-1]], [len(prompt) - 1 - count]).keys
    targets = torch.as_tensor(prompt[-count:], device=keys.device)
    step = max(1, NEIGHBORS_AT_ONCE // retrieval.k)
    cuts = [slice(start, start + step) for start in range(0, count, step)]
    p_knn = torch.cat([source_log_probs(keys[cut], targets[cut], retrieval) for cut in cuts]).double().exp()  # (·, S)
    means = torch.log((1 - EPSILON) * p_knn + EPSILON / lm.identity.vocab_size).mean(dim=0)
    weights: list[float] = torch.softmax(means, dim=0).tolist()
    return weights
