"""Small corpora, the versions built from them, and what fixtures hand out."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from live_server import LiveServer

from knnlm_builder.pipeline import build_with
from knnlm_builder.progress import SilentReporter
from knnlm_builder.settings import BuildSettings
from knnlm_core.datastore.calibration import calibration_id, read_calibration, write_calibration
from knnlm_core.datastore.gate_file import describe
from knnlm_core.datastore.layout import read_current
from knnlm_core.datastore.publish import set_current
from knnlm_core.datastore.reader import Datastore
from knnlm_core.knn.gates import GATE_FEATURES
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_core.trees import Trees

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


def publish(model: Path, folder: Path) -> Published:
    """Build the datastores with the LM that lies in ``model``."""
    lm = load_lm(str(model), LoadOptions())

    def build(name: str, prefix: str, seed: int) -> str:
        settings = BuildSettings(
            model=str(model),
            inputs=(write_corpus(folder / f"{prefix}.jsonl", prefix, documents=6, sentences=7, seed=seed),),
            output=folder / "datastores",
            name=name,
            window=128,
            stride=64,
            held_out_max_tokens=128,
            shard_entries=300,
            force=True,
        )
        return build_with(lm, settings, SilentReporter()).version

    versions = [build("law", "old", 1), build("law", "new", 2), build("news", "news", 3)]
    lm.close()
    return Published(model, folder / "datastores", *versions)


def recalibrate(root: Path, name: str, *, trees: Trees | None = None, **changes: object) -> None:
    """Give the current version of a name a calibration that differs from the one it has.

    Args:
        trees: of a learned gate.
        changes: fields of the calibration.
    """
    current = read_current(root, name)
    assert current.calibration is not None
    old = read_calibration(root, name, current.calibration)
    protocol = {**old.protocol, "by": "the test"}
    with Datastore.open(root, name) as datastore:
        fingerprint = datastore.manifest.lm.model_fingerprint
    described = describe(trees, GATE_FEATURES, fingerprint) if trees is not None else None
    new = old.model_copy(
        update={
            "id": calibration_id(current.version, protocol), "protocol": protocol, "gate_trees": described, **changes
        }
    )  # fmt: skip
    write_calibration(root, name, new, trees)
    set_current(root, name, current.version, new.id)


# Starts a server with settings of its own; ``wait=False`` returns before it is ready.
Start = Callable[..., LiveServer]
