"""What a run of `knnlm score` uses, and who chose it: the command line, the datastore's calibration, or nobody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from knnlm_cli.score_settings import ScoreSettings
from knnlm_core.errors import InvalidKnnParams, InvalidParameter
from knnlm_core.windows import settle_windows

COMMAND_LINE = "command line"
DEFAULT = "default"
GATE = ("gate", "gate_threshold")
RETRIEVAL = ("k", "temperature", "lambda", "lambda_mode", *GATE)
# Where k and τ are not the calibrated ones.
_PLAIN: Mapping[str, Any] = {"lambda_mode": "fixed", "gate": "always", "gate_threshold": None}


class Setting(NamedTuple):
    """A value in use, and who chose it."""

    value: int | float | str
    source: str


@dataclass(frozen=True, slots=True)
class Used:
    """What the scores were made with.

    Attributes:
        datastore, version: None for the LM alone.
        calibration: id of the calibration beside the version, if there is one.
        retrieval: k, temperature, lambda and how it is set, gate and its threshold; empty for the LM alone.
        windows: window and stride, in tokens.
    """

    model: str
    model_fingerprint: str
    datastore: str | None
    version: str | None
    calibration: str | None
    retrieval: Mapping[str, Setting]
    windows: Mapping[str, Setting]


def choose_windows(settings: ScoreSettings, max_length: int) -> dict[str, Setting]:
    """Window and stride for an LM with a context of ``max_length`` tokens; defaults as in building and serving.

    Raises: InvalidParameter: they are out of bounds.
    """
    given = {"window": settings.window, "stride": settings.stride}
    settled = settle_windows(**given, max_length=max_length)
    return {
        name: Setting(value, DEFAULT if given[name] is None else COMMAND_LINE)
        for name, value in settled._asdict().items()
    }


def choose_retrieval(settings: ScoreSettings, name: str, calibration: Mapping[str, Any] | None) -> dict[str, Setting]:
    """The command line's settings over those of the calibration of datastore ``name``.

    Args:     calibration: its settings, as `/v1/datastores` names them.
    Raises:   InvalidParameter: neither says anything of k, τ or λ.
    """
    given = settings.knn_given()
    if "gate_threshold" in given and "gate" not in given:
        raise InvalidKnnParams("`knn.gate_threshold` needs `knn.gate`, and none is given", param="knn.gate_threshold")
    found: dict[str, Setting] = {field: Setting(value, COMMAND_LINE) for field, value in given.items()}
    by_calibration = f"calibration {calibration['id']}" if calibration is not None else DEFAULT
    for field in ("k", "temperature", "lambda"):
        if field in given:
            continue
        if calibration is None:
            raise InvalidParameter(f"datastore {name!r} has no calibration, so --{field} must be given", param=field)
        found[field] = Setting(calibration[field], by_calibration)
    settled, source = _PLAIN, DEFAULT
    if calibration is not None and _is_calibrated(found, calibration):
        settled, source = calibration, by_calibration
    if "lambda_mode" not in given:
        found["lambda_mode"] = (
            Setting("fixed", DEFAULT) if "lambda" in given else Setting(settled["lambda_mode"], source)
        )
    if "gate" not in given:
        # Not all gates have a threshold.
        found |= {field: Setting(settled[field], source) for field in GATE if settled[field] is not None}
    return {field: found[field] for field in RETRIEVAL if field in found}


def _is_calibrated(found: Mapping[str, Setting], calibration: Mapping[str, Any]) -> bool:
    """Whether k and τ are those that the calibration's rules and gates were fitted for, as `keeps_to` has it."""
    return all(found[field].value == calibration[field] for field in ("k", "temperature"))
