"""One site's local training: some epochs of Adam over its own subjects, starting from the global weights.

The optimiser starts anew each round, so a round depends on nothing but the global weights, the
site's data and the seed; on a CPU with a fixed number of threads two runs agree to the last bit.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from client.batches import batches, samples_of_an_epoch
from client.forward import forward_of
from client.samples import augmented
from client.thrift import Thrift, recomputing, within_memory
from common.config import FederationConfig
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
        GpuTooSmall: a step does not fit into the GPU's memory.
    """

    def attempt(thrift: Thrift) -> Outcome:
        return _train(
            network,
            subjects,
            config,
            site=site,
            round_=round_,
            learning_rate=learning_rate,
            device=device,
            thrift=thrift,
        )

    if device.type != "cuda":
        return attempt(Thrift.NONE)
    return within_memory(attempt, network, what=config.fingerprint(), site=site)


def _train(
    network: torch.nn.Module,
    subjects: Sequence[CachedSubject],
    config: FederationConfig,
    *,
    site: str,
    round_: int,
    learning_rate: float,
    device: torch.device,
    thrift: Thrift,
) -> Outcome:
    t = config.training
    torch.manual_seed(derive_seed(config.seed, "torch", site, round_))  # the VAE's latent noise
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "augment", site, round_))
    order = np.random.default_rng(derive_seed(config.seed, "order", site, round_))
    optimiser = torch.optim.Adam(
        network.parameters(), lr=learning_rate, fused=True if device.type == "cuda" else None
    )
    network.train()
    samples = samples_of_an_epoch(len(subjects), config)
    steps = math.ceil(samples / t.batch_size) * t.epochs
    usual = steps * config.rounds.number if thrift is Thrift.NONE else 0
    forward = forward_of(config, device, usual)
    total, seen = torch.zeros((), device=device), 0
    losses: deque[_Pending] = deque()
    lag = 1 if device.type == "cuda" else 0  # waiting for this step's loss would leave the GPU idle
    begin = time.monotonic()

    def check(pending: _Pending) -> None:
        so_far = pending.read()
        if not math.isfinite(so_far):
            raise TrainingDiverged(_diverged("loss was", site, round_, pending.step, steps))
        remark(f"loss {so_far / pending.seen:.3f}")

    made = batches(subjects, config, order, device)
    what = f"round {round_}, {site}: training"
    for step, (images, labels) in enumerate(track(made, what, steps, "batches"), start=1):
        images, labels = augmented(images, labels, t, generator)
        optimiser.zero_grad(set_to_none=True)
        for part, truth in _parts(images, labels, thrift):
            share = len(part) / len(images)
            with recomputing(network, thrift):
                loss, auxiliary = forward(network, part, truth)
            total += loss.detach() * len(part)
            whole = loss if auxiliary is None else loss + auxiliary
            (whole if share == 1 else whole * share).backward()
        if t.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), t.gradient_clip)
        optimiser.step()
        seen += len(images)
        losses.append(_Pending.of(total, step, seen))
        if len(losses) > lag:
            check(losses.popleft())
    while losses:
        check(losses.popleft())
    if not all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters()):
        raise TrainingDiverged(_diverged("weights were", site, round_, steps, steps))
    count = samples * t.epochs
    return Outcome(float(total) / count, steps, count, time.monotonic() - begin)


def _parts(
    images: torch.Tensor, labels: torch.Tensor, thrift: Thrift
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batch, or its subjects one by one."""
    size = len(images) if thrift is Thrift.NONE else 1
    return zip(images.split(size), labels.split(size), strict=True)


@dataclass(frozen=True)
class _Pending:
    """The sum of losses until a step, on its way from the device."""

    value: torch.Tensor
    landed: torch.cuda.Event | None
    step: int
    seen: int

    @classmethod
    def of(cls, total: torch.Tensor, step: int, seen: int) -> _Pending:
        if total.device.type != "cuda":
            return cls(total.clone(), None, step, seen)
        value = torch.empty((), pin_memory=True).copy_(total, non_blocking=True)
        landed = torch.cuda.Event()
        landed.record()
        return cls(value, landed, step, seen)

    def read(self) -> float:
        if self.landed is not None:
            self.landed.synchronize()
        return float(self.value)


def _diverged(what: str, site: str, round_: int, step: int, steps: int) -> str:
    return (
        f"{site}: the {what} not finite at step {step} of {steps} in round {round_}; "
        "lower training.learning_rate or set training.precision to fp32."
    )
