"""Small texts in few words, in an order that no two of them share: for an LM to learn, to store, and to ask about."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = [
    *("ferryman", "beekeeper", "guardian", "registrar", "finder", "Seeamt", "swarm", "wreck", "cargo", "deposit"),
    *("seal", "défaut", "印", "lantern", "harbour", "pilot", "informs", "answers", "seizes", "inspects", "verwahrt"),
    *("publishes", "forfeits", "salvages", "insures", "anchors", "upon", "without", "under", "against", "every"),
    *("lost", "hidden", "drifting", "§", "¶", "forthwith", "Quittung", "mooring", "bailiff"),
]


def statute(seed: int, sentences: int = 10) -> str:
    """A text of its own for each seed."""
    draw = random.Random(seed)
    return f"§ {seed}: " + " ".join(" ".join(draw.choices(WORDS, k=6)) + "." for _ in range(sentences))


def write_statutes(path: Path, seeds: range) -> Path:
    """A JSON Lines file of some statutes."""
    rows = ({"id": f"law-{seed}", "text": statute(seed)} for seed in seeds)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
