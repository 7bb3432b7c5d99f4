"""Batches prepared one ahead, and volumes held in (a stand-in for) GPU memory: the same numbers."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import client.held_volumes
from client.batches import _one_ahead, batches
from client.held_volumes import Volume, give_back, held
from sites.cache import CachedSubject

CPU = torch.device("cpu")


def test_the_next_is_made_by_a_thread_while_the_present_is_used_and_none_beyond():
    made: list[int] = []
    another = threading.Event()

    def numbers():
        for number in range(4):
            made.append(number)
            assert threading.current_thread() is not threading.main_thread()
            another.set()
            yield number, number

    seen = []
    for number, _ in _one_ahead(numbers()):
        seen.append(number)
        if number < 3:
            assert another.wait(5)
        while len(made) < min(number + 2, 4):
            pass
        assert len(made) <= number + 2
        another.clear()
    assert seen == [0, 1, 2, 3]


def test_a_failure_in_the_thread_is_the_loops_own():
    def failing():
        yield 1, 1
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(_one_ahead(failing()))


@pytest.mark.parametrize("size", ["[16,16,16]", "[32,32,32]"])
def test_volumes_held_as_tensors_give_the_same_batches_as_those_on_disk(
    make_subject, tiny_config, monkeypatch, size
):
    config = tiny_config(
        "preprocess.mode=patches", f"training.patch={size}", "training.patches_per_subject=5"
    )
    random = np.random.default_rng(0)
    shape = (24, 20, 40)
    subjects = [
        make_subject(
            f"S{i}", random.normal(size=(4, *shape)), np.uint8(random.random(shape) > 0.99)
        )
        for i in range(3)
    ]

    def all_batches():
        return list(batches(subjects, config, np.random.default_rng(1), CPU))

    from_disk = all_batches()

    def on_gpu(subject: CachedSubject, device: torch.device) -> Volume:
        image, labels = (torch.from_numpy(np.array(a)) for a in (subject.image(), subject.labels()))
        return Volume(image, labels, np.flatnonzero(labels.numpy()).astype(np.int32))

    monkeypatch.setattr("client.batches.held", on_gpu)
    for found, expected in zip(all_batches(), from_disk, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert found[0].dtype == torch.float32


ONE = 4 * 512 * 2 + 512  # bytes of a subject of 8^3
ROOM = int(2.5 * ONE / 0.4)


@pytest.mark.parametrize(("free", "allowed"), [(ROOM, 10**9), (10**9, ROOM)])
def test_only_what_fits_is_held_and_only_until_it_is_released(
    make_subject, monkeypatch, free, allowed
):
    """The meta device stands for the GPU: it takes any tensor and keeps no numbers."""
    shape = (8, 8, 8)
    subjects = [
        make_subject(f"S{i}", np.ones((4, *shape)), np.ones(shape, np.uint8)) for i in "abc"
    ]
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    monkeypatch.setattr(
        torch.cuda, "get_per_process_memory_fraction", lambda device: allowed / 10**9
    )
    monkeypatch.setattr(client.held_volumes, "_held", {})
    monkeypatch.setattr(client.held_volumes, "_room", {})
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: to(self, "meta"))
    volumes = [held(subject, gpu) for subject in subjects]
    assert [isinstance(v.image, torch.Tensor) for v in volumes] == [True, True, False]
    assert held(subjects[0], gpu) is volumes[0]
    assert give_back()
    assert not give_back()
    assert not any(isinstance(held(subject, gpu).image, torch.Tensor) for subject in subjects)
