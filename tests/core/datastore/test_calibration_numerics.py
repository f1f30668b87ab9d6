"""A calibration holds for the numerics that it was measured with."""

from __future__ import annotations

import pytest

from knnlm_core.datastore.calibration import NUMERICS, Calibration, calibration_id, numerics_class
from knnlm_core.errors import DatastoreMismatch


def calibration(numerics: str | None) -> Calibration:
    protocol = {"seed": 0} if numerics is None else {"seed": 0, NUMERICS: numerics}
    version = "0" * 16
    return Calibration(
        id=calibration_id(version, protocol), datastore_version=version, k=8, knn_temperature=1.0, lmbda=0.25,
        protocol=protocol, report={}, helps=True,
    )  # fmt: skip


@pytest.mark.parametrize("measured", ["float32", "bfloat16", "float16", "gguf", None])
@pytest.mark.parametrize("running", ["float32", "bfloat16", "gguf"])
def test_numerics_that_differ_by_rounding_share_calibrations(measured: str | None, running: str) -> None:
    calibration(measured).require_numerics("law", running)
    assert numerics_class(running) == "dense"


@pytest.mark.parametrize(
    ("measured", "running", "flag"),
    [("float32", "int8", "int8"), ("gguf", "int8", "int8"), ("int8", "float32", "full")],
)
def test_int8_has_calibrations_of_its_own_and_the_error_says_how_to_make_one(
    measured: str, running: str, flag: str
) -> None:
    with pytest.raises(DatastoreMismatch, match=f"numerics is '{measured}', the running model needs '{running}'; run "
                       f"`knnlm calibrate ROOT/law --model MODEL --weights {flag}`") as caught:  # fmt: skip
        calibration(measured).require_numerics("law", running)
    assert caught.value.param == NUMERICS
    calibration("int8").require_numerics("law", "int8")


def test_a_calibration_that_does_not_say_is_of_dense_weights() -> None:
    assert calibration(None).numerics is None
    calibration(None).require_numerics("law", "bfloat16")
    with pytest.raises(DatastoreMismatch, match="numerics is 'dense', the running model needs 'int8'"):
        calibration(None).require_numerics("law", "int8")


def test_numerics_are_part_of_what_a_calibration_is_named_by() -> None:
    assert calibration("int8").id != calibration("float32").id
