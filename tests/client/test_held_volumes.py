"""Where there is no room in the GPU's memory. (That what is held there is what lies on disk needs one.)"""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from client import held_volumes
from client.held_volumes import held

GPU = torch.device("cuda", 0)


@pytest.fixture
def full_gpu(monkeypatch):
    monkeypatch.setattr(held_volumes, "_room", {})
    monkeypatch.setattr(held_volumes, "_full", set())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2**34))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)


def test_without_room_volumes_are_read_from_disk_and_the_log_says_so_once(
    full_gpu, prepared, log, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("fedbrats"), "level", logging.INFO)
    for subject in prepared.ready[:2]:
        volume = held(subject, GPU)
        np.testing.assert_array_equal(volume.image, subject.image())
        np.testing.assert_array_equal(volume.labels, subject.labels())
    assert log == [
        (
            "not all prepared subjects fit into the GPU's memory beside the training: some are read "
            "from disk each time, which is a little slower."
        )
    ]
