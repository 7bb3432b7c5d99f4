"""Where a site computes: its GPU if there is one, else the CPU with a fixed number of threads."""

from __future__ import annotations

import os

import torch

from common.config import Training


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_threads(training: Training) -> None:
    """Fix the number of CPU threads, on which the last bits of every sum depend."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(training.threads or available or 1)
