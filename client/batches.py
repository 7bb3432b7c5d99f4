"""The batches of one round at one site: every subject equally often, in seeded order.

On a GPU the next batch is prepared by a thread while the GPU trains on the present one; on a CPU,
whose cores are all training, in turn. The order of the draws is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from client.held_volumes import held
from client.samples import sample
from common.config import FederationConfig
from sites.cache import CachedSubject

Batch = tuple[torch.Tensor, torch.Tensor]


def samples_of_an_epoch(subjects: int, config: FederationConfig) -> int:
    patches = config.preprocess.mode == "patches"
    return subjects * (config.training.patches_per_subject if patches else 1)


def batches(
    subjects: Sequence[CachedSubject],
    config: FederationConfig,
    order: np.random.Generator,
    device: torch.device,
) -> Iterator[Batch]:
    """Images (B, C, X, Y, Z) float32 and labels (B, X, Y, Z) uint8 on `device`."""
    made = _made(subjects, config, order, device)
    return _one_ahead(made) if device.type == "cuda" else made


def _made(
    subjects: Sequence[CachedSubject],
    config: FederationConfig,
    order: np.random.Generator,
    device: torch.device,
) -> Iterator[Batch]:
    size = config.training.batch_size
    count = samples_of_an_epoch(len(subjects), config)
    for _ in range(config.training.epochs):
        sequence = order.permutation(count) % len(subjects)
        for start in range(0, count, size):
            chosen = sequence[start : start + size]
            volumes = [held(subjects[index], device) for index in chosen]
            pairs = [sample(volume, config, order, device) for volume in volumes]
            images, labels = zip(*pairs, strict=True)
            yield torch.stack(images), torch.stack(labels)


def _one_ahead(made: Iterator[Batch]) -> Iterator[Batch]:
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        coming = thread.submit(next, made, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, made, None)
            yield batch
