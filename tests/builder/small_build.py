"""Real builds in a second: a tiny LM, a few pages of text, the pipeline as it is."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers.processors import TemplateProcessing

from knnlm_builder.pipeline import BuildResult, build_with
from knnlm_builder.progress import Advance
from knnlm_builder.settings import BuildSettings, read_settings
from knnlm_builder.stages.plan import Plan, make_plan
from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.signals import LMSignals, lm_signals
from tiny import tiny_model, tiny_tokenizer

_SUBJECTS = (
    "the key",
    "the value",
    "a datastore",
    "the server",
    "an entry",
    "der Speicher",
    "the café",
    "your thought",
)
_VERBS = ("holds", "looks for", "predicts", "retrieves", "forgets", "enthält", "came before", "is next to")
_ENDS = (
    "every token.",
    "the next token.",
    "nothing at all!",
    "keys like its own thought.",
    "你好，世界 🙂.",
    "a token, twice;",
)


def prose(seed: int, sentences: int = 10) -> str:
    """Text in which phrases come again, so that a datastore of some helps with the rest."""
    draw = random.Random(seed)
    parts = [" ".join(draw.choice(words) for words in (_SUBJECTS, _VERBS, _ENDS)) for _ in range(sentences)]
    return f"Page {seed}. " + " ".join(parts) + "\n"


def write_jsonl(path: Path, texts: Sequence[str], prefix: str = "doc") -> Path:
    rows = [{"id": f"{prefix}-{i}", "text": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@cache
def tiny_lm(bos: bool = False, seed: int = 0, family: str = "llama", tap: str | None = None) -> HuggingFaceLM:
    raw = tiny_tokenizer()
    if bos:
        raw.add_special_tokens({"bos_token": "<|start|>"})
        raw.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", raw.bos_token_id)]
        )
    return HuggingFaceLM(tiny_model(family, seed), Tokenizer(raw), name="tiny", key_tap=tap)


def digits_lm() -> HuggingFaceLM:
    """An LM that knows all there is to know of random digits: each comes with probability 1/10 after anything.

    Dimension 0 of every hidden state is large and constant, and the head reads it alone; the others, which are most of
    the key, depend on the context as ever.
    """
    model: Any = tiny_model("llama")
    tokenizer = Tokenizer(tiny_tokenizer())
    model.model.embed_tokens.weight[:, 0] = 50.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight.zero_()
    model.lm_head.weight.zero_()
    model.lm_head.weight[:, 0] = -3.0
    model.lm_head.weight[tokenizer.encode("0123456789"), 0] = 0.0
    return HuggingFaceLM(model, tokenizer, name="digits")


def random_digits(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice("0123456789") for _ in range(count))


def flat_signals(count: int) -> LMSignals:
    """Of an LM that knows nothing."""
    return lm_signals(torch.zeros(count, 4).log_softmax(dim=1))


class Stage(NamedTuple):
    total: int | None
    done: int


class Recorder:
    """Keeps what a build reported."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, Stage]] = []
        self.said: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count

        yield advance
        self.stages.append((name, Stage(total, done)))

    def say(self, message: str) -> None:
        self.said.append(message)


def given(folder: Path, *inputs: Path, **changes: object) -> BuildSettings:
    """Settings under which a few pages are enough."""
    defaults: dict[str, object] = {
        "model": "not loaded",
        "inputs": inputs,
        "output": folder,
        "name": "law",
        "window": 48,
        "stride": 20,
        "held_out_fraction": 0.2,
    }
    return read_settings(BuildSettings, **{**defaults, **changes})


def build(settings: BuildSettings, lm: HuggingFaceLM | None = None, reporter: Recorder | None = None) -> BuildResult:
    return build_with(lm or tiny_lm(), settings, reporter or Recorder())


def plan_of(settings: BuildSettings, folder: Path, lm: HuggingFaceLM | None = None) -> Plan:
    """The plan that a build with these settings makes."""
    lm = lm or tiny_lm()
    folder.mkdir(parents=True, exist_ok=True)
    return make_plan(settings, settings.windowing(lm.max_length), lm.tokenizer, folder, Recorder())


def opened(settings: BuildSettings, version: str | None = None) -> Datastore:
    return Datastore.open(settings.output, settings.name, version, checksums=True)


def all_keys(store: Datastore) -> torch.Tensor:
    return store.keys(torch.arange(store.entries))


def all_values(store: Datastore) -> torch.Tensor:
    return store.values(torch.arange(store.entries))
