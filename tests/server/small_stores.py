"""Small corpora, the versions built from them, and what fixtures hand out."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from live_server import LiveServer

WHO = ("The tenant", "A buyer", "Der Käufer", "The court", "An owner", "The café’s landlord")
DOES = ("may refuse", "shall return", "must keep", "schuldet", "has lost", "can sell")
WHAT = ("the goods", "every key", "half of the rent (50 €)", "a written notice", "the index", "its value 🙂")


def write_corpus(path: Path, prefix: str, documents: int, sentences: int, seed: int) -> Path:
    """A JSON Lines file of documents ``<prefix>-<i>``, no two of which begin alike."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(documents):
            text = " ".join(f"{draw.choice(WHO)} {draw.choice(DOES)} {draw.choice(WHAT)}." for _ in range(sentences))
            row = {
                "id": f"{prefix}-{i}",
                "text": f"{i}. {prefix}: {text}",
                "uri": f"file:{prefix}/{i}",
                "title": f"№ {i}",
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


class Published(NamedTuple):
    """What lies under ``root``: `law` in two versions, the second current, and `news` in one."""

    model: Path
    root: Path
    law_old: str
    law_new: str
    news: str


# Starts a server with settings of its own; ``wait=False`` returns before it is ready.
Start = Callable[..., LiveServer]
