"""What the installed FAISS is, for diagnosis; nothing is searched with it here."""

from __future__ import annotations

from importlib.metadata import distributions
from typing import NamedTuple

import faiss

DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs", "faiss")


class SearchEngine(NamedTuple):
    """The FAISS that is imported."""

    version: str
    options: str  # it was compiled with; the instruction set that was chosen for this processor is among them
    threads: int  # OpenMP threads of a search
    gpus: int  # that it can use; 0 for a build without CUDA


def search_engine() -> SearchEngine:
    """Ask the imported FAISS about itself."""
    gpus = getattr(faiss, "get_num_gpus", lambda: 0)()
    return SearchEngine(faiss.__version__, faiss.get_compile_options().strip(), faiss.omp_get_max_threads(), int(gpus))


def installed_engines() -> list[tuple[str, str]]:
    """Name and version of every FAISS distribution in this environment, sorted; there must be exactly one.

    They share the package `faiss`, so with two of them the files of one lie over those of the other.
    """
    found = {(each.metadata["Name"] or "").lower().replace("_", "-"): each.version for each in distributions()}
    return sorted((name, version) for name, version in found.items() if name in DISTRIBUTIONS)
