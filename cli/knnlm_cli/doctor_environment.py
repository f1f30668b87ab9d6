"""`knnlm doctor`: Python, system, cores, memory, settings in variables, space on the disk."""

from __future__ import annotations

import difflib
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from knnlm_cli.doctor_checks import Check, failed, ok, warning
from knnlm_cli.doctor_machine import cores, memory

MIN_PYTHON = (3, 11)
LOW_MEMORY_BYTES = 1 << 30
LOW_DISK_BYTES = 1 << 30


def check_python() -> Check:
    """Version and place of the interpreter."""
    version = platform.python_version()
    message = f"{platform.python_implementation()} {version}, {sys.executable}"
    facts = {"version": version, "executable": sys.executable}
    if sys.version_info < MIN_PYTHON:
        needed = ".".join(map(str, MIN_PYTHON))
        return failed("python", message, f"knnlm needs Python {needed} or later", **facts)
    return ok("python", message, **facts)


def check_system() -> Check:
    """The operating system."""
    message = f"{platform.system()} {platform.release()}, {platform.machine()}"
    facts = {"system": platform.system(), "release": platform.release(), "machine": platform.machine()}
    if os.name != "posix":
        return failed("system", message, "locks and signals are POSIX's: use Linux, macOS or WSL", **facts)
    return ok("system", message, **facts)


def check_cores() -> Check:
    """How many threads can run at once."""
    found = cores()
    limits = []
    if found.affinity < found.online:
        limits.append(f"{found.affinity} of {found.online} by affinity")
    if found.quota is not None:
        limits.append(f"{found.quota:g} by the container's quota")
    message = f"{found.usable} usable" + (f": {', '.join(limits)}" if limits else "")
    return ok("cores", message, **found._asdict(), usable=found.usable)


def check_memory() -> Check:
    """Memory that is free, and what bounds it."""
    found = memory()
    if found.available is None or found.total is None:
        return ok("memory", "the system does not say", **found._asdict())
    message = f"{gib(found.available)} of {gib(found.total)} available"
    if found.limit is not None:
        message += f"; the container's limit is {gib(found.limit)}"
    if min(found.available, found.limit or found.available) < LOW_MEMORY_BYTES:
        remedy = "end other programs, or serve a small model with less --kv-cache-bytes and --prefix-cache-bytes"
        return warning("memory", message, remedy, **found._asdict())
    return ok("memory", message, **found._asdict())


def check_variables() -> Check:
    """KNNLM_* variables: `knnlm serve` refuses unknown ones, and values out of bounds."""
    from knnlm_core.errors import InvalidParameter
    from knnlm_server.settings import ENV_PREFIX, ServerSettings, read_settings

    known = {ENV_PREFIX + name.upper() for name in ServerSettings.model_fields}
    given = sorted(name for name in os.environ if name.startswith(ENV_PREFIX))
    unknown = [name for name in given if name not in known]
    facts = {"given": given, "unknown": unknown}
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(known), n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        remedy = f"unset {' '.join(unknown)}{guess} (`knnlm serve --help` lists the settings)"
        return failed("variables", f"unknown: {', '.join(unknown)}; knnlm serve does not start", remedy, **facts)
    try:
        read_settings(**({} if f"{ENV_PREFIX}MODEL" in given else {"model": "none"}))
    except InvalidParameter as error:
        return failed("variables", error.message, "correct or unset it; knnlm serve does not start", **facts)
    return ok("variables", f"set: {', '.join(given)}" if given else "no KNNLM_* variable is set", **facts)


def check_disk(folder: Path | None, needed_bytes: int = 0) -> Check:
    """Space where datastores are kept, and whether they can be changed there.

    Args:   folder: the datastores'; None for the working directory.
            needed_bytes: what a new version of the largest datastore would take.
    """
    place = (folder or Path.cwd()).absolute()
    place = next(each for each in (place, *place.parents) if each.is_dir())  # builds make what is missing
    usage = shutil.disk_usage(place)
    writable, temporary = os.access(place, os.W_OK), Path(tempfile.gettempdir())
    facts = {
        "folder": str(place), "free_bytes": usage.free, "total_bytes": usage.total, "writable": writable,
        "temporary_folder": str(temporary), "temporary_free_bytes": shutil.disk_usage(temporary).free,
    }  # fmt: skip
    message = f"{gib(usage.free)} free in {place}"
    if usage.free < max(LOW_DISK_BYTES, needed_bytes):
        why = f"; another version of the largest datastore needs {gib(needed_bytes)}" if needed_bytes else ""
        return warning("disk", message + why, "make room: `knnlm datastore prune ROOT/NAME --keep 2`", **facts)
    if not writable:
        remedy = f"builds, deletions and additions need to write there: give this user {place}, or mount it writable"
        return warning("disk", f"{message}, which this user cannot write", remedy, **facts)
    return ok("disk", message, **facts)


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 29 else f"{count / (1 << 20):.1f} MiB"
