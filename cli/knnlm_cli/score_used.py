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
RETRIEVAL = ("k", "temperature", "lambda", "lambda_mode", "gate", "gate_threshold")


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

    Args:     calibration: id, k, temperature, lambda, lambda_mode and gate, as `/v1/datastores` names them.
    Raises:   InvalidParameter: neither says anything of k, τ or λ.
    """
    given = settings.knn_given()
    if "gate_threshold" in given and "gate" not in given:
        raise InvalidKnnParams("`knn.gate_threshold` needs `knn.gate`, and none is given", param="knn.gate_threshold")
    found: dict[str, Setting] = {}
    for field in RETRIEVAL:
        if field in given:
            found[field] = Setting(given[field], COMMAND_LINE)
        elif field == "gate_threshold":  # not all gates have one
            continue
        elif field == "lambda_mode" and ("lambda" in given or not _is_calibrated(found, calibration)):
            found[field] = Setting("fixed", DEFAULT)
        elif calibration is not None:
            found[field] = Setting(calibration[field], f"calibration {calibration['id']}")
        elif field == "gate":
            found[field] = Setting("always", DEFAULT)
        else:
            raise InvalidParameter(f"datastore {name!r} has no calibration, so --{field} must be given", param=field)
    return found


def _is_calibrated(found: Mapping[str, Setting], calibration: Mapping[str, Any] | None) -> bool:
    """Whether k and τ are those that the calibration's rules for λ were fitted for."""
    return calibration is not None and all(found[field].value == calibration[field] for field in ("k", "temperature"))
