"""The training loss: soft Dice plus lambda times the categorical (softmax) focal loss.

Both terms see softmax probabilities over the four classes of `common.brats`:

    dice  = mean over classes of 1 - (2 sum p g + s) / (sum p + sum g + s),  s = 1e-5
    focal = mean over classes and voxels of  alpha_c g_c (1 - p_c)^gamma (-log p_c)

with p the probabilities, g the one-hot truth, and sums over the voxels of one subject (Milletari et
al. 2016, arXiv:1606.04797; Lin et al. 2017, arXiv:1708.02002). The focal term is the categorical
one of the reference study's Keras segmentation-models-3D (gamma 2, alpha 0.25 for every class
alike, mean over the class axis too). It is not MONAI's `DiceFocalLoss(softmax=True)`, whose focal
term takes a sigmoid of each channel whatever `softmax` says, nor MONAI's scalar `alpha`, which
weighs the background by 1 - alpha.

Two things differ from Keras. The Dice sums are per subject, not over the batch, so that no
subject's gradient depends on another subject, which patient-level differential privacy needs. And
the classes are averaged: Keras code that passes `class_weights` of 0.25 each to its DiceLoss has
the mean of weighted scores, a quarter of this Dice term; `focal_weight=4` has that balance.

Forward and backward are written by hand, with library torch alone. Autograd through the formulas
above keeps some dozen tensors of the logits' size; this keeps the logits, which exist anyway, and a
few sums per subject and class, and computes the probabilities a second time for the gradient. With
U_c = sum p_c + sum g_c + s, I_c = 2 sum p_c g_c + s, w the weight of one class and subject in the
mean, q the probability of a voxel's true class t and k_t its factor in the focal mean:

    A_c = w I_c / U_c^2,  B_c = 2 w / U_c       d dice / d p_c = A_c - B_c g_c
    h   = k_t (gamma (1-q)^(gamma-1) q log q - (1-q)^gamma)         = q d focal / d q
    d loss / d logit_j = p_j (A_j - sum_c A_c p_c - r) + g_j r,  r = h - B_t q

On a CPU all of it goes through blocks of voxels that stay in the cache; a GPU gets the whole batch
at once, in some thirty kernels without atomics (so that runs are repeatable), without waiting for
the GPU, and in the logits' memory format. MONAI's classes are the reference of the tests and of
`benchmarks/loss_speed.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from common.brats import N_CLASSES

SMOOTH = 1e-5
BLOCK = 2**15
"""Voxels of one block on one CPU thread: some tensors of four floats for each fit its cache."""


@dataclass(frozen=True)
class _Terms:
    focal_weight: float
    gamma: float
    alpha: tuple[float, ...]  # one per class
    first: int  # of the classes in the Dice mean


def dice_focal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    focal_weight: float = 1.0,
    gamma: float = 2.0,
    alpha: float | Sequence[float] = 0.25,
    include_background: bool = True,
) -> torch.Tensor:
    """Dice + `focal_weight` * focal: a scalar fp32 tensor, the mean over the subjects of the batch.

    `logits` is (B, 4, D, H, W) of any float type (computed in fp32, also under autocast); `labels`
    is (B, D, H, W), integers 0..3. `alpha` is one factor for all classes or one per class.
    `include_background=False` leaves class 0 out of the Dice mean only: in the focal term it would
    mean a softmax without the background's logit. The gradient has no gradient of its own.

    Raises:
        ValueError: the shapes do not fit, or `alpha` is not one factor, or one per class.
    """
    if logits.shape[1] != N_CLASSES or labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"logits must be (B, {N_CLASSES}, D, H, W) and labels (B, D, H, W) of the same grid, "
            f"not {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    factors = [alpha] * N_CLASSES if isinstance(alpha, float | int) else list(alpha)
    if len(factors) != N_CLASSES or min(factors) < 0:
        raise ValueError(f"alpha must be one factor or {N_CLASSES}, none below 0, not {alpha}")
    terms = _Terms(
        float(focal_weight),
        float(gamma),
        tuple(map(float, factors)),
        0 if include_background else 1,
    )
    loss: torch.Tensor = _DiceFocal.apply(logits, labels, terms)
    return loss


class _DiceFocal(torch.autograd.Function):
    """The loss of logits (B, 4, ...) and labels (B, ...); see the module docstring."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, terms: _Terms
    ) -> torch.Tensor:
        scores, truth = logits.flatten(2), labels.flatten(1)
        batch, voxels = truth.shape
        # float64, lest the order of many additions be seen
        sums = scores.new_zeros((batch, N_CLASSES, 2), dtype=torch.float64)
        focal = scores.new_zeros(batch, dtype=torch.float64)
        for subjects, part in _blocks(truth):
            p, g, log_q = _seen(scores[subjects, :, part], truth[subjects, part])
            sums[subjects, :, 1] += p.sum(2).add_(g.sum(2))
            sums[subjects, :, 0] += p.mul_(g).sum(2)
            if terms.focal_weight:
                cost = (1 - log_q.exp()).pow_(terms.gamma).mul_(log_q)
                focal[subjects] -= _weighted(cost, g, terms.alpha).sum((1, 2))
        overlap, size = 2 * sums[..., 0] + SMOOTH, sums[..., 1] + SMOOTH
        loss = (1 - overlap / size)[:, terms.first :].mean()
        if terms.focal_weight:
            loss = loss + focal.mean() * (terms.focal_weight / (N_CLASSES * voxels))
        ctx.save_for_backward(logits, labels, overlap, size)
        ctx.terms = terms
        return loss.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, labels, overlap, size = ctx.saved_tensors
        terms: _Terms = ctx.terms
        scores, truth = logits.flatten(2), labels.flatten(1)
        gradient = torch.empty_like(scores)  # in their memory format
        batch, voxels = truth.shape
        w = upstream / (batch * (N_CLASSES - terms.first))
        k = upstream * (terms.focal_weight / (batch * N_CLASSES * voxels))
        away, towards = w * overlap / size**2, 2 * w / size  # A and B
        away[:, : terms.first], towards[:, : terms.first] = 0, 0
        a, b = away.float()[..., None], towards.float()[..., None]
        for subjects, part in _blocks(truth):
            p, g, log_q = _seen(scores[subjects, :, part], truth[subjects, part])
            q = log_q.exp()
            r = (b[subjects] * g).sum(1, keepdim=True).mul_(-q)
            if terms.focal_weight:
                h = (1 - q).pow_(terms.gamma).neg_()
                if terms.gamma:
                    h.addcmul_((1 - q).pow_(terms.gamma - 1).mul_(q), log_q, value=terms.gamma)
                r.addcmul_(_weighted(h, g, terms.alpha), k)
            mean = (a[subjects] * p).sum(1, keepdim=True)
            gradient[subjects, :, part] = p.mul_(a[subjects] - (mean + r)).addcmul_(g, r)
        return gradient.unflatten(2, logits.shape[2:]), None, None


def _blocks(truth: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Which subjects and voxels of (B, N) to take at a time."""
    batch, voxels = truth.shape
    if truth.device.type != "cpu":
        yield slice(None), slice(None)
        return
    threads = torch.get_num_threads()
    # several threads wait for each other after every step: fewer steps, lest a busy machine stall them
    length = BLOCK if threads == 1 else 4 * BLOCK * threads
    for b in range(batch):
        for start in range(0, voxels, length):
            yield slice(b, b + 1), slice(start, start + length)


def _seen(
    scores: torch.Tensor, truth: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of scores (B, 4, N) and labels (B, N), in fp32: the probabilities p and the one-hot truth g,
    both (B, 4, N), and the logarithm (B, 1, N) of the true class' probability."""
    if scores.device.type == "cpu":  # converted and put in order in one go
        log_p = torch.empty(scores.shape).copy_(scores).log_softmax(1)
    elif scores.stride(1) == 1:  # channels_last; of another axis, log_softmax would copy it
        log_p = scores.transpose(1, 2).log_softmax(2, dtype=torch.float32).transpose(1, 2)
    else:
        log_p = scores.log_softmax(1, dtype=torch.float32)
    # gather refuses labels that are none
    log_q = log_p.gather(1, truth[:, None].to(torch.int64))
    classes = torch.arange(N_CLASSES, dtype=torch.float32, device=truth.device)
    # floats in, floats out: the comparison of bytes to booleans is several times slower on a CPU
    g = torch.eq(truth[:, None].float(), classes[:, None], out=torch.empty_like(log_p))
    return log_p.exp_(), g, log_q


def _weighted(cost: torch.Tensor, g: torch.Tensor, alpha: tuple[float, ...]) -> torch.Tensor:
    """A cost (B, 1, N) of the true class times that class' factor."""
    if len(set(alpha)) == 1:
        return cost * alpha[0]
    # no tensor of factors: to send one to a GPU waits for it
    return cost * sum(factor * g[:, c : c + 1] for c, factor in enumerate(alpha))
