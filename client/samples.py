"""What a training step sees of a subject: its whole volume or a patch, and random changes of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from client.held_volumes import Volume
from common.config import FederationConfig, Training
from sites.augment import augment

TUMOUR_CENTRED = 0.5  # share of patches that hold tumour for certain; nnU-Net has a third


def sample(
    volume: Volume,
    config: FederationConfig,
    order: np.random.Generator,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (C, X, Y, Z) float32 and labels (X, Y, Z) uint8 on `device`: the whole working grid, or
    a patch, by even chance around a random tumour voxel and padded with zeros if the grid is smaller."""
    if config.preprocess.mode != "patches":
        return _cut(volume, (slice(None),) * 3, volume.shape, device)
    size = config.training.patch
    starts = _starts(volume, size, order)
    return _cut(
        volume, tuple(slice(s, s + p) for s, p in zip(starts, size, strict=True)), size, device
    )


def _starts(volume: Volume, size: Sequence[int], order: np.random.Generator) -> list[int]:
    """The lowest corner of a random patch."""
    shape = volume.shape
    # both draws are always made, so that what follows does not depend on the labels
    about_tumour, where = order.random() < TUMOUR_CENTRED, order.random(4)
    if about_tumour:
        tumour = volume.tumour()
        if tumour.size:
            voxel = np.unravel_index(tumour[int(where[3] * tumour.size)], shape)
            return [
                int(np.clip(v - p // 2, 0, max(n - p, 0)))
                for v, n, p in zip(voxel, shape, size, strict=True)
            ]
    return [int(u * (max(n - p, 0) + 1)) for u, n, p in zip(where[:3], shape, size, strict=True)]


def _cut(
    volume: Volume, box: tuple[slice, ...], size: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    image = _on(device, volume.image[(slice(None), *box)]).float()
    labels = _on(device, volume.labels[box])
    short = [p - n for p, n in zip(reversed(size), reversed(labels.shape), strict=True)]
    if any(short):
        padding = [part for missing in short for part in (0, missing)]
        image, labels = F.pad(image, padding), F.pad(labels, padding)
    return image, labels


def _on(device: torch.device, part: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(part, torch.Tensor):
        return part
    copied = torch.from_numpy(np.array(part))  # off the disk; contiguous, in memory of our own
    if device.type == "cuda":
        # page-locked, so that the copy runs while the GPU computes
        return copied.pin_memory().to(device, non_blocking=True)
    return copied.to(device)


def augmented(
    images: torch.Tensor, labels: torch.Tensor, training: Training, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A changed copy of images (B, C, X, Y, Z) and labels (B, X, Y, Z), on their device."""
    return augment(images, labels, generator=generator, **training.augment.model_dump())
