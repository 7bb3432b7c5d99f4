"""A subject's prepared voxels where the training reads them: in GPU memory if there is room, else on disk.

A round then takes 4 to 7 % less time than with volumes read one batch ahead, and 0.6 of the host's CPU
time (H200, docs/speed.md). A subject is about 30 MB (fp16), so a site's subjects mostly fit beside the
network. Once held they stay until the process ends or `give_back` is called. A CPU reads the
memory-mapped files: the system's page cache holds them already.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sites.cache import CachedSubject

LOG = logging.getLogger("fedbrats")
SHARE = 0.4  # of the GPU memory that is free at the first subject; the rest is for training

Array = np.ndarray | torch.Tensor


@dataclass(frozen=True)
class Volume:
    """image: float16 (C, X, Y, Z); labels: uint8 (X, Y, Z); both memory-mapped or on the GPU."""

    image: Array
    labels: Array
    indices: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.labels.shape)

    def tumour(self) -> np.ndarray:
        """Flat indices of all labelled voxels."""
        return np.flatnonzero(self.labels) if self.indices is None else self.indices


_held: dict[Path, Volume] = {}
_room: dict[torch.device, int] = {}
_full: set[torch.device] = set()  # those of which the log says it
_one_at_a_time = threading.Lock()


def on_disk(subject: CachedSubject) -> Volume:
    return Volume(subject.image(), subject.labels())


def held(subject: CachedSubject, device: torch.device) -> Volume:
    """`subject`'s voxels, as near to `device` as they fit."""
    if device.type != "cuda":
        return on_disk(subject)
    image, labels = subject.image(), subject.labels()
    with _one_at_a_time:
        if (volume := _held.get(subject.folder)) is not None:
            return volume
        if device not in _room:
            free, total = torch.cuda.mem_get_info(device)
            # the site's own limit on this process (`client.device.limit_gpu_memory`)
            allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
            _room[device] = int(SHARE * min(free, allowed))
        size = image.nbytes + labels.nbytes
        if size > _room[device]:
            if device not in _full:
                _full.add(device)
                LOG.info(
                    "not all prepared subjects fit into the GPU's memory beside the training: some are read "
                    "from disk each time, which is a little slower."
                )
            return Volume(image, labels)
        _room[device] -= size
        volume = Volume(
            torch.from_numpy(np.array(image)).to(device),
            torch.from_numpy(np.array(labels)).to(device),
            np.flatnonzero(labels).astype(np.int32),
        )
        _held[subject.folder] = volume
        return volume


def give_back() -> bool:
    """Give the GPU's memory up for good: from now on volumes are read from disk. Whether there was any."""
    with _one_at_a_time:
        some = bool(_held)
        _held.clear()
        for device in _room:
            _room[device] = 0
            _full.add(device)  # whoever asks says so
        return some
