"""What a site's policy lets training take of a GPU, without a GPU: what torch is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from client.device import limit_gpu_memory
from common.full_memory import is_full_memory


@pytest.fixture
def limits(monkeypatch) -> list[tuple[float, int]]:
    """A GPU of 40 GB that only notes the limits it is given."""
    told: list[tuple[float, int]] = []
    card = SimpleNamespace(total_memory=40 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda fraction, device: told.append((fraction, device)),
    )
    return told


def test_a_limit_is_a_share_of_the_gpus_memory(limits):
    limit_gpu_memory(10)
    limit_gpu_memory(100)
    assert limits == [(0.25, 0), (1.0, 0)]


def test_without_a_limit_or_a_gpu_nothing_is_set(limits, monkeypatch):
    limit_gpu_memory(None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    limit_gpu_memory(10)
    assert limits == []


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("ALLOC_FAILED"), False),
    ],
)
def test_too_little_memory_is_told_from_other_errors(error, full):
    assert is_full_memory(error) is full
