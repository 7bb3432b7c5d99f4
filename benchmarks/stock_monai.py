"""The peer of the training benchmarks: MONAI's networks and losses as its BraTS tutorial uses them.

The networks have instance norm with scale and shift, as ours have by default; BasicUNet's own default.
The focal term is the softmax one, because `DiceFocalLoss(softmax=True)` takes a sigmoid there, which
is another function than ours and costs more (`common.loss`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.losses import DiceLoss, FocalLoss
from monai.networks.nets import BasicUNet, DynUNet


def stock_network(name: str, channels: tuple[int, ...]) -> torch.nn.Module:
    """BasicUNet for "unet", DynUNet for "dynunet"; four modalities to four classes."""
    common: dict[str, Any] = {"spatial_dims": 3, "in_channels": 4, "out_channels": 4}
    if name == "unet":
        return BasicUNet(
            **common,
            features=(*channels, channels[0]),
            act=("RELU", {"inplace": True}),
            norm=("instance", {"affine": True}),
        )
    strides = [1] + [2] * (len(channels) - 1)
    return DynUNet(
        **common,
        kernel_size=[3] * len(channels),
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=channels,
        norm_name=("instance", {"affine": True}),
    )


def stock_loss() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(logits (B, 4, D, H, W), labels (B, D, H, W)) -> the loss that ours is, by MONAI's classes."""
    dice = DiceLoss(softmax=True, to_onehot_y=True)
    focal = FocalLoss(gamma=2.0, weight=0.25, use_softmax=True, to_onehot_y=True)

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # Dice sums over a head are beyond fp16
        scores, truth = logits.float(), labels[:, None]
        total: torch.Tensor = dice(scores, truth) + focal(scores, truth)
        return total

    return loss
