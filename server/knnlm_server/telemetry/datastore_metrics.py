"""What the registry of datastores counts, for Prometheus."""

from __future__ import annotations

from knnlm_server.telemetry.families import Families

_LOAD_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class DatastoreMetrics:
    """Counters of loads and swaps; a datastore's name is a label once it has been loaded."""

    def __init__(self) -> None:
        make = Families()
        self.registry, self.families = make.registry, make.made
        self._swaps = make.counter(
            "knnlm_datastore_swaps", "Times that a loaded name was given another generation.", "datastore"
        )
        self._load_seconds = make.histogram(
            "knnlm_datastore_load_seconds",
            "From the beginning of a load to the generation that serves.",
            _LOAD_SECONDS,
            "datastore",
        )
        self._refused = make.counter(
            "knnlm_datastore_refused_loads",
            "Loads that failed, by error; no datastore where the name was never loaded.",
            "datastore",
            "code",
        )

    def count_load(self, name: str, seconds: float, *, swapped: bool) -> None:
        """A load that succeeded."""
        self._load_seconds.labels(name).observe(seconds)
        self._swaps.labels(name).inc(int(swapped))

    def count_refused(self, name: str, code: str) -> None:
        """A load that failed."""
        self._refused.labels(name, code).inc()
