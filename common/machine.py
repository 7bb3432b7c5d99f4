"""How much of the machine is this process's to use: its cores and its memory.

A container's limits count where they bind a process to cores, and where cgroup v2 limits its memory; a
share of time (docker's `--cpus`) is not seen.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes that can be had without swapping, as Linux estimates it; None where there is no estimate."""
    found: list[int] = []
    with contextlib.suppress(OSError, LookupError, ValueError):
        [line] = [x for x in MEMINFO.read_text().splitlines() if x.startswith("MemAvailable:")]
        found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        found.append(int(CGROUP.read_text()))
    return min(found, default=None)
