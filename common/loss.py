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
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from monai.losses import DiceLoss, FocalLoss
from monai.networks import one_hot

from common.brats import N_CLASSES


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
    mean a softmax without the background's logit. Raises ValueError if the shapes do not fit.
    """
    if logits.shape[1] != N_CLASSES or labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"logits must be (B, {N_CLASSES}, D, H, W) and labels (B, D, H, W) of the same grid, "
            f"not {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    per_class = (float(alpha),) if isinstance(alpha, float | int) else tuple(map(float, alpha))
    scores = logits.float()  # enough: autocast lowers nothing of what follows
    truth = one_hot(labels.unsqueeze(1), N_CLASSES)
    loss: torch.Tensor = _dice(include_background)(scores, truth)
    if focal_weight:
        loss = loss + focal_weight * _focal(float(gamma), per_class)(scores, truth)
    return loss


@cache
def _dice(include_background: bool) -> DiceLoss:
    return DiceLoss(include_background=include_background, softmax=True, batch=False)


@cache
def _focal(gamma: float, alpha: tuple[float, ...]) -> FocalLoss:
    # `weight`, not MONAI's `alpha`: see the module docstring.
    weight = alpha[0] if len(alpha) == 1 else list(alpha)
    return FocalLoss(gamma=gamma, weight=weight, use_softmax=True)
