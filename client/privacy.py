"""DP-SGD whose unit is the patient: everything of one person together changes one clipped gradient.

Each step draws every patient with the accounted probability (nobody drawn is a step too), takes
one patient's gradient after the other (the mean over all of the person's scans and crops), clips it
to the norm C, adds them up, and adds noise of standard deviation sigma C once (Abadi et al. 2016,
arXiv:1607.00133). Clipping, summing, noise and the optimiser are fp32
(`client.patient_optimizer`); the forward pass may be bf16. Sampling and noise come from the
operating system (`client.system_noise`), so two runs differ; crops and augmentation are seeded, for
each patient independently of the others.

What leaves is the weights. Loss and time depend on who was drawn; they stay at the site. How much
noise, and whether a round may happen, is `client.budget`'s affair.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from client.accounting import Steps
from client.forward import forward_of
from client.held_volumes import on_disk
from client.samples import augmented, sample
from client.system_noise import system_sample
from client.training import Outcome
from common.brats import N_CLASSES
from common.config import FederationConfig
from common.loss import dice_focal_loss
from common.progress import remark, track
from common.seeds import derive_seed
from sites.cache import CachedSubject

Gradient = list[torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class NotProtectable(ValueError):
    """This network or loss would leak past the noise; the text says how and what to change."""


def train_privately(
    network: nn.Module,
    patients: Mapping[str, Sequence[CachedSubject]],
    config: FederationConfig,
    noise: Steps,
    clip: float,
    *,
    site: str,
    round_: int,
    learning_rate: float,
    device: torch.device,
) -> Outcome:
    """Train `network` in place for `noise.steps` steps. `patients`: id -> all scans of that person.

    The outcome's loss is for this site's own eyes only.

    Raises:
        NotProtectable: the network or the loss cannot be trained privately.
    """
    require_protectable(network, config)
    names, scans = list(patients), list(patients.values())
    network.train()
    losses: list[float] = []
    drawn: Counter[str] = Counter()

    def gradient_of(patient: int) -> Gradient:
        # every patient has random numbers of their own: from a common stream, which anybody can
        # repeat, one patient more would change the crops of all that follow
        name = names[patient]
        drawn[name] += 1
        own = site, round_, name, drawn[name]
        torch.manual_seed(derive_seed(config.seed, "torch", *own))  # the VAE's latent noise
        gradient, loss = patient_gradient(
            network,
            scans[patient],
            config,
            np.random.default_rng(derive_seed(config.seed, "order", *own)),
            torch.Generator().manual_seed(derive_seed(config.seed, "augment", *own)),
            device,
        )
        losses.append(loss)
        remark(f"loss {loss:.3f}")
        return gradient

    begin = time.monotonic()
    take_steps(
        network.parameters(),
        gradient_of,
        len(scans),
        noise,
        clip,
        optimiser=config.privacy.optimiser,
        learning_rate=learning_rate,
        what=f"round {round_}, {site}: private training",
    )
    loss = sum(losses) / len(losses) if losses else math.nan
    return Outcome(loss, noise.steps, len(losses), time.monotonic() - begin)


def take_steps(
    parameters: Iterable[nn.Parameter],
    gradient_of: Callable[[int], Gradient],
    patients: int,
    noise: Steps,
    clip: float,
    *,
    optimiser: str,
    learning_rate: float,
    what: str,
) -> None:
    """`noise.steps` noisy steps; `gradient_of(i)` is patient i's gradient at the present weights."""
    # imported here for Opacus takes a second to load, and every hospital imports this module
    from client.patient_optimizer import PatientOptimizer

    trained = [p for p in parameters if p.requires_grad]
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimiser]
    optimizer = PatientOptimizer(
        kind(trained, lr=learning_rate),
        sigma=noise.noise_multiplier,
        clip=clip,
        expected_batch=noise.sampling_rate * patients,
    )
    optimizer.zero_grad(set_to_none=True)
    drawn = [system_sample(patients, noise.sampling_rate) for _ in range(noise.steps)]
    work = [(step, patient) for step, of in enumerate(drawn) for patient in (*of, None)]
    for _, patient in track(work, what, len(work), "patients"):
        if patient is None:
            optimizer.finish()
        else:
            optimizer.take(gradient_of(patient))


def patient_gradient(
    network: nn.Module,
    scans: Sequence[CachedSubject],
    config: FederationConfig,
    order: np.random.Generator,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[Gradient, float]:
    """The gradient, fp32, of the mean loss over `privacy.crops` crops of each scan; and that loss."""
    t = config.training
    parameters = [p for p in network.parameters() if p.requires_grad]
    forward = forward_of(config, device)
    # Not held in GPU memory: a private step that ran out of it could not be tried again.
    crops = [on_disk(scan) for scan in scans for _ in range(config.privacy.crops)]
    total: Gradient = []
    mean = 0.0
    for start in range(0, len(crops), t.batch_size):
        some = crops[start : start + t.batch_size]
        pairs = [sample(crop, config, order, device) for crop in some]
        images, labels = zip(*pairs, strict=True)
        batch, truth = augmented(torch.stack(images), torch.stack(labels), t, generator)
        share = len(batch) / len(crops)
        loss, auxiliary = forward(network, batch, truth)
        loss = share * (loss if auxiliary is None else loss + auxiliary)
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        total = list(map(torch.add, total, found)) if total else list(found)
        mean += float(loss.detach())
    return total, mean


def require_protectable(network: nn.Module, config: FederationConfig) -> None:
    """Refuse what noise on the gradients would not cover.

    Raises:
        NotProtectable: the network keeps statistics of its inputs, or the loss couples patients.
    """
    statistics = [name for name, _ in network.named_buffers()]
    if statistics:
        raise NotProtectable(
            f"network.norm {config.network.norm}: the network keeps statistics of the patients' "
            f"images ({statistics[0]} and {len(statistics) - 1} more), which would leave without "
            "noise. The federation needs network.norm: group or instance for differential privacy."
        )
    require_separable(
        lambda logits, labels: dice_focal_loss(logits, labels, **config.loss.model_dump())
    )


def require_separable(loss: Loss) -> None:
    """Refuse a loss in which one patient's gradient depends on another patient of the batch.

    Raises:
        NotProtectable: it does, as with Dice sums over the batch (MONAI's `batch=True`).
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, N_CLASSES, 4, 4, 4, generator=generator)
    labels = torch.randint(0, N_CLASSES, (2, 4, 4, 4), generator=generator)
    other = torch.stack((logits[0], -3 * logits[1])), torch.stack((labels[0], labels[1].flip(0)))

    def first(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = logits.clone().requires_grad_()
        return torch.autograd.grad(loss(logits, labels), logits)[0][0]

    if not torch.equal(first(logits, labels), first(*other)):
        raise NotProtectable(
            "the loss couples the patients of a batch (a Dice over the whole batch does): one "
            "patient's gradient then depends on the others, and clipping it bounds nothing."
        )
