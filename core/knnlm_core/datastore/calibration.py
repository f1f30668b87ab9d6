"""Calibrations: the retrieval settings that held-out text chose for one version, kept beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from knnlm_core.datastore import layout
from knnlm_core.datastore.manifest import Digest16, Positive, read_json, validate, version_of
from knnlm_core.datastore.sealed import check_seal, sealed_text
from knnlm_core.durable import sync_folder, write_text
from knnlm_core.errors import BuildConflict, DatastoreCorrupt

MAX_CALIBRATION_BYTES = 4 * 1024 * 1024


class Calibration(BaseModel):
    """Defaults for requests that name a datastore and nothing else.

    Attributes:
        datastore_version: the version that it was made for; it says nothing about any other.
        knn_temperature: τ, in units of squared distance.
        lmbda: λ, the weight of p_knn; ``lambda`` in JSON.
        protocol: what was measured on, and how.
        report: what came out: tokens, documents, base and mixed figures, gain and its interval.
        helps: whether the mixture beat the base LM.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_by_name=True, validate_by_alias=True
    )

    id: Digest16
    datastore_version: Digest16
    k: Positive
    knn_temperature: Annotated[float, Field(gt=0)]
    lmbda: Annotated[float, Field(alias="lambda", ge=0, le=1)]
    gate: Literal["always"] = "always"
    protocol: dict[str, JsonValue]
    report: dict[str, JsonValue]
    helps: Annotated[bool, Field(strict=True)]

    def settings(self) -> dict[str, JsonValue]:
        """What requests use, by the names of the HTTP API."""
        return {
            "id": self.id,
            "k": self.k,
            "temperature": self.knn_temperature,
            "lambda": self.lmbda,
            "gate": self.gate,
            "helps": self.helps,
        }


def calibration_id(datastore_version: str, protocol: Mapping[str, JsonValue]) -> str:
    """Name a calibration by its inputs, as `version_of` names a version."""
    return version_of({"datastore_version": datastore_version, "protocol": dict(protocol)})


def read_calibration(root: Path, name: str, calibration: str) -> Calibration:
    """Read one calibration of a name.

    Raises:
        DatastoreNotFound: no such calibration.
        DatastoreCorrupt: not a calibration, or one of another id.
    """
    path = layout.calibration_folder(root, name, calibration) / layout.CALIBRATION
    found = validate(Calibration, check_seal(read_json(path, MAX_CALIBRATION_BYTES), path), path)
    if found.id != calibration:
        raise DatastoreCorrupt(f"{path}: id is {found.id!r}, its folder needs {calibration!r}")
    return found


def find_calibration(root: Path, name: str, version: str) -> str | None:
    """The id of a version's newest calibration, for a version that CURRENT does not name; None if it has none."""
    found = [
        ((layout.calibration_folder(root, name, calibration) / layout.CALIBRATION).stat().st_mtime_ns, calibration)
        for calibration in layout.calibration_ids(root, name)
        if read_calibration(root, name, calibration).datastore_version == version
    ]
    return max(found)[1] if found else None


def write_calibration(root: Path, name: str, calibration: Calibration) -> Path:
    """Write a calibration into its folder and return the folder; other files may be put beside it.

    Raises: BuildConflict: the id is taken by a calibration with other content.
    """
    folder = layout.calibration_folder(root, name, calibration.id)
    path = folder / layout.CALIBRATION
    if path.exists():
        if read_calibration(root, name, calibration.id) != calibration:
            raise BuildConflict(f"{path} exists with other content; a calibration is never modified")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, sealed_text(calibration.model_dump(mode="json", by_alias=True)))
    for parent in (folder.parent, folder.parent.parent):
        sync_folder(parent)
    return folder
