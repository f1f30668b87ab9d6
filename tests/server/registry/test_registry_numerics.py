"""A version is served only by an LM whose numerics its calibration was measured with."""

from __future__ import annotations

import pytest
from registry_stores import Open, Stores

from knnlm_core.datastore.calibration import NUMERICS, Calibration, calibration_id, write_calibration
from knnlm_core.datastore.publish import set_current
from knnlm_core.errors import DatastoreMismatch


def measured_with(stores: Stores, numerics: str | None) -> None:
    """Give the current version of `law` a calibration that says what it was measured with."""
    version = stores.law[-1]
    protocol = {"seed": 1} if numerics is None else {"seed": 1, NUMERICS: numerics}
    made = Calibration(
        id=calibration_id(version, protocol), datastore_version=version, k=8, knn_temperature=1.0, lmbda=0.25,
        protocol=protocol, report={}, helps=True,
    )  # fmt: skip
    write_calibration(stores.root, "law", made)
    set_current(stores.root, "law", version, made.id)


@pytest.mark.parametrize(("measured", "running"), [("float32", "int8"), ("int8", "float32"), (None, "int8")])
def test_a_version_calibrated_with_other_numerics_is_refused_until_it_is_calibrated_anew(
    stores: Stores, open_registry: Open, measured: str | None, running: str
) -> None:
    measured_with(stores, measured)
    registry = open_registry(numerics=running)
    with pytest.raises(DatastoreMismatch, match=f"numerics is '{measured or 'dense'}'.*knnlm calibrate ROOT/law"):
        registry.load("law")
    assert registry.names() == []
    measured_with(stores, running)
    registry.load("law")
    assert registry.names() == ["law"]


@pytest.mark.parametrize(("measured", "running"), [("bfloat16", "float32"), (None, "float32"), ("float32", None)])
def test_close_or_unknown_numerics_are_served(
    stores: Stores, open_registry: Open, measured: str | None, running: str | None
) -> None:
    measured_with(stores, measured)
    registry = open_registry(numerics=running)
    registry.load("law")
    assert registry.names() == ["law"]
