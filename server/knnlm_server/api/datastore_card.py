"""What routes say about a loaded datastore."""

from __future__ import annotations

from typing import Any

from knnlm_core.datastore.calibration import Calibration
from knnlm_server.registry.table import DatastoreStatus


def render_card(status: DatastoreStatus) -> dict[str, Any]:
    """As ``DatastoreCard`` describes it."""
    datastore, manifest = status.datastore, status.datastore.manifest
    self_test = status.self_test
    return {
        "object": "datastore",
        "name": datastore.name,
        "version": datastore.version,
        "generation": status.generation,
        "revision": datastore.revision,
        "state": status.state,
        "entries": datastore.entries,
        "bytes": manifest.num_bytes,
        "unit": manifest.unit,
        "documents": datastore.counts.documents,
        "learned_documents": datastore.counts.learned,
        "deleted_documents": datastore.counts.deleted,
        "leases": status.leases,
        "aliases": list(status.aliases),
        "follows_current": status.served.follows_current,
        "previous": status.served.previous,
        "self_test": self_test._asdict() if self_test.queries else None,
        "key_drift": status.drift.ratio if status.drift is not None else None,
        "calibration": _render_calibration(datastore.calibration) if datastore.calibration is not None else None,
        "model_fingerprint": manifest.lm.model_fingerprint,
    }


def _render_calibration(calibration: Calibration) -> dict[str, Any]:
    """What requests use and how good it was; the protocol's long lists of digests stay in the file."""
    return {
        **calibration.settings(),
        "lambda_modes": ["fixed", *(mode for mode, rule in calibration.lambda_rules if rule is not None)],
        "report": calibration.report,
        "held_out_documents": calibration.protocol.get("held_out_documents"),
    }
