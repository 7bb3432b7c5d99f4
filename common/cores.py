"""How many of the machine's cores are this process's to use."""

from __future__ import annotations

import os


def available_cores() -> int:
    """A container or scheduler can have limited them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
