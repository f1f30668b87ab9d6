"""An engine without HTTP around it, and requests that remember what they were told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from knnlm_core.errors import KnnlmError
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.retrieval import Retrieval
from knnlm_server.engine.detokenizer import IncrementalDetokenizer
from knnlm_server.engine.engine import Engine, EngineConfig
from knnlm_server.engine.events import Event, Failed, TokenEvent
from knnlm_server.engine.request import Choice, CompletionRequest
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.engine.stopping import StopMatcher
from tiny import tiny_model, tiny_tokenizer


@contextmanager
def running_engine(
    family: str, slots: int = 8, step_tokens: int = 64, max_queued: int = 256
) -> Iterator[tuple[Engine, HuggingFaceLM]]:
    """An engine of its own over a tiny LM, its bookkeeping checked after every step."""
    tokenizer = Tokenizer(tiny_tokenizer())
    lm = HuggingFaceLM(tiny_model(family), tokenizer, name=family, max_sequences=slots)
    config = EngineConfig(step_tokens=step_tokens, max_queued=max_queued, check_integrity=True)
    engine = Engine(lm, tokenizer.eos_token_ids, config)
    engine.start()
    try:
        yield engine, lm
    finally:
        engine.stop(drain_timeout_s=0)
        lm.close()


class Run:
    """One request's events, collected until its end."""

    def __init__(
        self, lm: HuggingFaceLM, prompt_ids: list[int], params: SamplingParams, retrieval: Retrieval | None = None
    ) -> None:
        self.events: list[Event] = []
        self.ends = 0
        self._done = threading.Event()
        self.request = CompletionRequest(
            request_id="test",
            prompt_ids=prompt_ids,
            params=params,
            retrieval=retrieval,
            choices=[
                Choice(i, IncrementalDetokenizer(lm.tokenizer.decode, prompt_ids), StopMatcher(params.stop))
                for i in range(params.n)
            ],
            seed=params.seed or 0,
            emit=self.events.append,
            on_end=self._end,
        )

    def _end(self) -> None:
        self.ends += 1
        self._done.set()

    def wait_end(self) -> Run:
        assert self._done.wait(60), "no end within a minute"
        return self

    def wait(self) -> Run:
        """Until the end, which must be a good one."""
        self.wait_end()
        if self.error is not None:
            raise self.error
        return self

    @property
    def error(self) -> KnnlmError | None:
        """What the request failed with."""
        return next((event.error for event in self.events if isinstance(event, Failed)), None)

    def log_probs(self, choice: int = 0) -> list[float]:
        return [e.log_prob for e in self.events if isinstance(e, TokenEvent) and e.choice == choice]

    def tokens(self, choice: int = 0) -> list[int]:
        return [e.token_id for e in self.events if isinstance(e, TokenEvent) and e.choice == choice]

    def text(self, choice: int = 0) -> str:
        return "".join(e.text for e in self.events if isinstance(e, TokenEvent) and e.choice == choice)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    return [torch.randint(1, 400, (n,), generator=generator).tolist() for n in lengths]
