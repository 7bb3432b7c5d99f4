"""Telling that memory ran out from every other error."""

from __future__ import annotations

import torch


def is_full_memory(error: BaseException) -> bool:
    """Did torch or numpy find too little memory? On a CPU, and for CUDA's libraries, torch says so by
    its text only."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    texts = ("DefaultCPUAllocator", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
