"""One site's local training: some epochs of Adam over its own subjects, starting from the global weights.

The optimiser starts anew each round, so a round depends on nothing but the global weights, the
site's data and the seed; on a CPU with a fixed number of threads two runs agree to the last bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from client.samples import augmented, sample
from common.config import FederationConfig
from common.loss import dice_focal_loss
from common.network import segment
from common.precision import autocast, autocast_dtype
from common.progress import remark, track
from common.seeds import derive_seed
from sites.cache import CachedSubject


@dataclass(frozen=True)
class Outcome:
    """`loss` is the mean over training samples; a sample is one subject's volume or patch."""

    loss: float
    steps: int
    samples: int
    seconds: float


class TrainingDiverged(RuntimeError):
    """The loss or the weights became infinite or not a number; the update must not be sent."""


def train(
    network: torch.nn.Module,
    subjects: Sequence[CachedSubject],
    config: FederationConfig,
    *,
    site: str,
    round_: int,
    learning_rate: float,
    device: torch.device,
) -> Outcome:
    """Train `network` in place.

    Raises:
        TrainingDiverged: the loss or the weights are not finite; the text says at which step.
    """
    t = config.training
    dtype = autocast_dtype(t.precision, device)
    torch.manual_seed(derive_seed(config.seed, "torch", site, round_))  # the VAE's latent noise
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "augment", site, round_))
    order = np.random.default_rng(derive_seed(config.seed, "order", site, round_))
    optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate)
    network.train()
    samples = _samples(len(subjects), config)
    steps = math.ceil(samples / t.batch_size) * t.epochs
    total, seen = torch.zeros((), device=device), 0
    begin = time.monotonic()
    batches = _batches(subjects, config, order)
    for step, (images, labels) in enumerate(
        track(batches, f"round {round_}, {site}: training", steps, "batches"), start=1
    ):
        images, labels = images.to(device), labels.to(device)
        images, labels = augmented(images, labels, t, generator)
        with autocast(device, dtype):
            logits, auxiliary = segment(
                network, images.contiguous(memory_format=torch.channels_last_3d)
            )
        loss = dice_focal_loss(logits, labels, **config.loss.model_dump())
        total += loss.detach() * len(images)
        optimiser.zero_grad(set_to_none=True)
        (loss if auxiliary is None else loss + auxiliary).backward()
        if t.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), t.gradient_clip)
        optimiser.step()
        so_far = float(total)
        if not math.isfinite(so_far):
            raise TrainingDiverged(_diverged("loss was", site, round_, step, steps))
        seen += len(images)
        remark(f"loss {so_far / seen:.3f}")
    if not all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters()):
        raise TrainingDiverged(_diverged("weights were", site, round_, steps, steps))
    count = samples * t.epochs
    return Outcome(float(total) / count, steps, count, time.monotonic() - begin)


def _diverged(what: str, site: str, round_: int, step: int, steps: int) -> str:
    return (
        f"{site}: the {what} not finite at step {step} of {steps} in round {round_}; "
        "lower training.learning_rate or set training.precision to fp32."
    )


def _samples(subjects: int, config: FederationConfig) -> int:
    """Training samples of one epoch."""
    patches = config.preprocess.mode == "patches"
    return subjects * (config.training.patches_per_subject if patches else 1)


def _batches(
    subjects: Sequence[CachedSubject], config: FederationConfig, order: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images (B, C, X, Y, Z) float32 and labels (B, X, Y, Z) uint8, every subject equally often."""
    size = config.training.batch_size
    count = _samples(len(subjects), config)
    for _ in range(config.training.epochs):
        sequence = order.permutation(count) % len(subjects)
        for start in range(0, count, size):
            pairs = [
                sample(subjects[index], config, order) for index in sequence[start : start + size]
            ]
            images, labels = zip(*pairs, strict=True)
            yield torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))
