"""What a training step sees of a subject: its whole volume or a patch, and random changes of it."""

from __future__ import annotations

import numpy as np
import torch

from common.config import FederationConfig, Training
from sites.augment import augment
from sites.cache import CachedSubject

TUMOUR_CENTRED = 0.5  # share of patches that hold tumour for certain; nnU-Net has a third


def sample(
    subject: CachedSubject, config: FederationConfig, order: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Image (C, X, Y, Z) float32 and labels (X, Y, Z) uint8: the whole working grid, or a patch."""
    image, labels = subject.image(), subject.labels()
    if config.preprocess.mode == "patches":
        return _patch(image, labels, config.training.patch, order)
    return np.asarray(image, np.float32), np.asarray(labels)


def _patch(
    image: np.ndarray,
    labels: np.ndarray,
    size: tuple[int, int, int],
    order: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """A random patch, by even chance around a random tumour voxel; padded with zeros if too small."""
    shape = labels.shape
    # both draws are always made, so that what follows does not depend on the labels
    about_tumour, where = order.random() < TUMOUR_CENTRED, order.random(4)
    starts = [int(u * (max(n - p, 0) + 1)) for u, n, p in zip(where[:3], shape, size, strict=True)]
    if about_tumour:
        tumour = np.flatnonzero(labels)
        if tumour.size:
            voxel = np.unravel_index(tumour[int(where[3] * tumour.size)], shape)
            starts = [
                int(np.clip(v - p // 2, 0, max(n - p, 0)))
                for v, n, p in zip(voxel, shape, size, strict=True)
            ]
    x, y, z = (slice(s, s + p) for s, p in zip(starts, size, strict=True))
    inside = labels[x, y, z]
    fits = tuple(slice(0, n) for n in inside.shape)
    patch = np.zeros((image.shape[0], *size), np.float32)
    patch[(slice(None), *fits)] = image[:, x, y, z]
    patch_labels = np.zeros(size, np.uint8)
    patch_labels[fits] = inside
    return patch, patch_labels


def augmented(
    images: torch.Tensor, labels: torch.Tensor, training: Training, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A changed copy of images (B, C, X, Y, Z) and labels (B, X, Y, Z), on their device."""
    return augment(images, labels, generator=generator, **training.augment.model_dump())
