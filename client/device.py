"""Where a site computes: its GPU if there is one, else the CPU with a fixed number of threads."""

from __future__ import annotations

import torch

from common.config import Training
from common.machine import available_cores

GIGABYTE = 10**9


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def limit_gpu_memory(gigabytes: float | None) -> None:
    """What this process may take of its GPU's memory at most; None, or no GPU: no limit.

    torch counts its own tensors and cache; some hundred MB of the driver's come on top.
    """
    if gigabytes is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * GIGABYTE / total), 0)


def use_threads(training: Training) -> None:
    """Fix the number of CPU threads, on which the last bits of every sum depend; on a GPU, let
    cuDNN try its ways of each convolution and keep the fastest."""
    torch.set_num_threads(training.threads or available_cores())
    torch.backends.cudnn.benchmark = True
