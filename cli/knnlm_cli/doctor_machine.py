"""What the machine gives this process: cores and memory, within the limits of its container."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
MEMORY = Path("/proc/meminfo")
_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


class Cores(NamedTuple):
    """Cores there are, may be used, and are paid for."""

    online: int
    affinity: int  # that the scheduler may put this process on
    quota: float | None  # cores' worth of time that the cgroup allows; None for no limit

    @property
    def usable(self) -> int:
        """Threads that can run at once."""
        return min(self.affinity, max(1, math.ceil(self.quota))) if self.quota is not None else self.affinity


class Memory(NamedTuple):
    """Bytes; None where the system does not say."""

    total: int | None
    available: int | None
    limit: int | None  # of the cgroup


def cores(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> Cores:
    """The cores of this process."""
    online = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else online
    quotas = [quota for folder in _folders(cgroups, own, "cpu") if (quota := _quota(folder)) is not None]
    return Cores(online, affinity, min(quotas, default=None))


def memory(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP, told: Path = MEMORY) -> Memory:
    """The memory of this process."""
    fields = dict(line.split(":", 1) for line in _read(told).splitlines() if ":" in line)
    kib = {name: int(value.split()[0]) * 1024 for name, value in fields.items() if value.split()}
    limits = [
        int(text)
        for folder in _folders(cgroups, own, "memory")
        for text in (_read(folder / "memory.max"), _read(folder / "memory.limit_in_bytes"))
        if text.isdigit() and int(text) < _NO_LIMIT
    ]
    return Memory(kib.get("MemTotal"), kib.get("MemAvailable"), min(limits, default=None))


def _folders(cgroups: Path, own: Path, controller: str) -> Iterator[Path]:
    """Folders of the cgroups that this process is in, its own first: the limits of all of them hold."""
    for line in _read(own).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top = cgroups  # version 2: one tree for everything
        elif controller in controllers.split(","):
            top = cgroups / controllers if (cgroups / controllers).is_dir() else cgroups / controller
        else:
            continue
        # Inside a container the path may be that outside of it, where nothing is; the top folder is then its own.
        folder = top / path.lstrip("/")
        while folder != top and top in folder.parents:
            yield folder
            folder = folder.parent
        yield top


def _quota(folder: Path) -> float | None:
    numbers = _read(folder / "cpu.max").split()
    if not numbers:
        numbers = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers) or int(numbers[1]) == 0:
        return None  # "max", or −1
    return int(numbers[0]) / int(numbers[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
