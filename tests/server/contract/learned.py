"""A tiny LM trained for a moment: it predicts, so that answers, greedy texts and perplexities mean something."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from tiny import tiny_model, tiny_tokenizer

STEPS, BATCH, LENGTH, LEARNING_RATE = 80, 8, 64, 3e-3


class Learned(NamedTuple):
    """What lies on disk: the folder of the LM, which takes chats too, and a root with one datastore, `law`."""

    model: Path
    root: Path


def learn(folder: Path, texts: Iterable[str]) -> Path:
    """Train the tiny Llama for about a second and save it as a model folder."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    stream, draw = torch.tensor(ids), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.requires_grad_(True).train().parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        starts = torch.randint(len(stream) - LENGTH, (BATCH,), generator=draw)
        batch = torch.stack([stream[start : start + LENGTH] for start in starts])
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
