"""`knnlm doctor`: threads of torch and FAISS against the cores there are, and the GPU."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

from knnlm_cli.doctor_checks import Check, failed, ok, warning
from knnlm_cli.doctor_environment import gib
from knnlm_cli.doctor_machine import cores

DRIVER = Path("/proc/driver/nvidia/version")


def check_threads() -> Check:
    """Whether torch and FAISS start more threads than can run."""
    import torch

    from knnlm_core.datastore.engine_info import search_engine

    usable, given = cores().usable, os.environ.get("OMP_NUM_THREADS")
    threads = {"torch": torch.get_num_threads(), "faiss": search_engine().threads}
    facts = {**threads, "OMP_NUM_THREADS": given, "usable_cores": usable}
    setting = "OMP_NUM_THREADS is not set" if given is None else f"OMP_NUM_THREADS={given}"
    message = f"torch {threads['torch']}, FAISS {threads['faiss']} on {usable} usable cores; {setting}"
    if given is not None and re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", given.strip()) is None:
        return warning(
            "threads", message, f"OMP_NUM_THREADS must be a number: export OMP_NUM_THREADS={usable}", **facts
        )
    if max(threads.values()) > usable:
        remedy = (
            f"threads that wait for each other cost tenfold: export OMP_NUM_THREADS={usable}, or --threads {usable}"
        )
        return warning("threads", message, remedy, **facts)
    return ok("threads", message, **facts)


def check_gpu(driver: Path = DRIVER) -> Check:
    """Which GPU torch can use; where there is one that it cannot use, why."""
    import torch

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    installed = _driver(driver)
    facts: dict[str, Any] = {"driver": installed, "torch_cuda": torch.version.cuda, "devices": []}
    if available:
        return _usable(facts)
    if installed is None:
        return ok("gpu", "none; the language model runs on the CPU", **facts)
    if torch.version.cuda is None:
        remedy = "to use it, install a torch with CUDA in place of this one, and 'knnlm[gpu]'"
        return warning("gpu", f"driver {installed} is here, but torch is a build for CPUs", remedy, **facts)
    why = "".join(str(each.message).strip().partition("\n")[0] for each in told[:1]) or "it finds no device"
    remedy = "update the driver or install a torch for an older CUDA; in a container, hand it the GPU (--gpus all)"
    return warning("gpu", f"torch for CUDA {torch.version.cuda} cannot use driver {installed}: {why}", remedy, **facts)


def _usable(facts: dict[str, Any]) -> Check:
    import torch

    devices: list[dict[str, Any]] = []
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        devices.append({"name": found.name, "bytes": found.total_memory, "capability": f"{found.major}.{found.minor}"})
    facts["devices"] = devices
    shown = ", ".join(f"{each['name']} ({gib(each['bytes'])}, {each['capability']})" for each in devices)
    message = f"{shown}; driver {facts['driver'] or 'unknown'}, torch for CUDA {torch.version.cuda}"
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        remedy = "install a torch that was built for this GPU, or serve with --device cpu"
        return failed("gpu", f"{message}: it computes nothing: {reason}", remedy, **facts)
    return ok("gpu", message, **facts)


def _driver(path: Path) -> str | None:
    """Version of NVIDIA's kernel driver; None without one."""
    try:
        told = path.read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", told)
    return match[1] if match else "of unknown version"
