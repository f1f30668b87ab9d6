"""Two versions of a small datastore, calibrated so that completions repeat what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from small_stores import recalibrate

from knnlm_builder.pipeline import build_with
from knnlm_builder.progress import SilentReporter
from knnlm_builder.settings import BuildSettings
from knnlm_core.lm.loading import LoadOptions, load_lm

PROMPT = "Über Ventile: das Modell ZX-80"
CONTINUED = " öffnet bei 3,2 bar 🙂 und schließt bei 2,9 bar."
_TAIL = " Mehr dazu steht im Handbuch, das dem Gerät beiliegt. Calibration keeps the end of a document for itself."
_SUBJECTS = ("The tenant", "A buyer", "The court", "An owner", "The landlord")


class Stores(NamedTuple):
    """What lies under ``root``: `manuals` in two versions, the second current."""

    model: Path
    root: Path
    old: str
    new: str


def publish_stores(model: Path, folder: Path) -> Stores:
    """Build both versions with the LM that lies in ``model``."""
    lm = load_lm(str(model), LoadOptions())

    def build(name: str, extra: str) -> str:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in _rows(extra)), encoding="utf-8")
        settings = BuildSettings(
            model=str(model),
            inputs=(path,),
            output=folder / "datastores",
            name="manuals",
            window=128,
            stride=64,
            held_out_max_tokens=64,
            force=True,
        )
        version = build_with(lm, settings, SilentReporter()).version
        recalibrate(folder / "datastores", "manuals", k=4, knn_temperature=1.0, lmbda=0.95, lambda_mode="fixed")
        return version

    versions = [build("old", "An older note."), build("new", "A newer note.")]
    lm.close()
    return Stores(model, folder / "datastores", *versions)


def _rows(extra: str) -> list[dict[str, str]]:
    valves = {
        "id": "valves/zx-80",
        "text": PROMPT + CONTINUED + _TAIL,
        "title": "Ventile & Dichtungen",
        "licence": "CC-BY-4.0",
        "uri": "https://example.org/zx-80",
    }
    others = [
        {"id": f"law-{i}", "text": f"{subject} shall keep a written note number {i}. {extra}", "title": f"Note {i}"}
        for i, subject in enumerate(_SUBJECTS)
    ]
    return [valves, *others]
