"""`knnlm doctor`: the packages that are needed, the one FAISS, and the extras."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import NamedTuple

from packaging.requirements import Requirement

from knnlm_cli.doctor_checks import Check, failed, ok, warning

OFFICIAL_FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")


class Extra(NamedTuple):
    """A part that is installed by choice."""

    name: str
    modules: tuple[str, ...]
    gives: str
    install: str


EXTRAS = (
    Extra("gguf", ("gguf", "accelerate"), "models in GGUF files", "pip install 'knnlm[gguf]'"),
    Extra(
        "llamacpp",
        ("llama_cpp",),
        "llama.cpp runs GGUF files, faster where few sequences are decoded on a CPU",
        "pip install 'knnlm[llamacpp]', which compiles it",
    ),
    Extra("plot", ("matplotlib",), "curves of calibrations, knnlm score --plot", "pip install 'knnlm[plot]'"),
    Extra("client", ("knnlm_client",), "the Python client, knnlm demo", "pip install ./clients/python"),
    Extra(
        "playground",
        ("gradio", "knnlm_client"),
        "the page in the browser",
        "pip install 'knnlm[playground]' ./clients/python",
    ),
    Extra(
        "otel",
        ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
        "spans of requests, sent to a collector",
        "pip install 'knnlm[otel]'",
    ),
)


def check_packages() -> Check:
    """Whether what knnlm needs is installed, in a version that it knows."""
    try:
        lines = requires("knnlm") or []
    except PackageNotFoundError:
        return warning("packages", "knnlm itself is not installed", "pip install . where its pyproject.toml is")
    needed = [each for line in lines if (each := Requirement(line)).marker is None or each.marker.evaluate()]
    wrong = [told for each in needed if (told := _wrong(each))]
    versions = {each.name: found for each in needed if (found := _version(each.name))}
    facts = {"knnlm": version("knnlm"), "versions": versions}
    if wrong:
        remedy = "pip install " + " ".join(f"'{each.name}{each.specifier}'" for each in needed if _wrong(each))
        return failed("packages", "; ".join(wrong), remedy, **facts)
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "fastapi") if name in versions)
    return ok("packages", f"knnlm {version('knnlm')} and all {len(needed)} that it needs, among them {shown}", **facts)


def check_torch() -> Check:
    """Which build of torch is installed."""
    import torch

    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    facts = {"version": torch.__version__, "cuda": torch.version.cuda}
    return ok("torch", f"{torch.__version__}, built {build}", **facts)


def check_faiss() -> Check:
    """Whether exactly one FAISS distribution is installed, and which."""
    from knnlm_core.datastore.engine_info import installed_engines, search_engine

    installed = installed_engines()
    names = " and ".join(f"{name} {number}" for name, number in installed)
    facts = {"distributions": dict(installed)}
    if len(installed) > 1:
        remedy = f"{_uninstall([name for name, _ in installed])}, then pip install 'knnlm[cpu]' or 'knnlm[gpu]'"
        return failed("faiss", f"{names} are both installed and overwrite each other's files", remedy, **facts)
    engine = search_engine()
    facts |= engine._asdict()
    message = f"{names or f'FAISS {engine.version} of no distribution'}, {engine.options}"
    if engine.gpus:
        message += f", {engine.gpus} GPUs"
    if installed and installed[0][0] not in OFFICIAL_FAISS:
        remedy = f"{_uninstall([installed[0][0]])}, then pip install 'knnlm[cpu]' or 'knnlm[gpu]'"
        return warning("faiss", f"{message}: not a build of FAISS's own maintainers", remedy, **facts)
    return ok("faiss", message, **facts)


def check_extras() -> list[Check]:
    """What is installed by choice; what is missing is no fault."""
    return [_extra(extra) for extra in EXTRAS]


def _extra(extra: Extra) -> Check:
    missing = [module for module in extra.modules if not _is_there(module)]
    name, facts = f"extra {extra.name}", {"installed": not missing, "missing": missing}
    if missing:
        return ok(name, f"not installed; it gives: {extra.gives}; {extra.install}", **facts)
    return ok(name, f"installed; it gives: {extra.gives}", **facts)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def _wrong(requirement: Requirement) -> str | None:
    found = _version(requirement.name)
    if found is None:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} is {found}, knnlm needs {requirement.specifier}"
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _uninstall(names: Sequence[str]) -> str:
    return f"pip uninstall --yes {' '.join(names)}"
