"""A training step is that of MONAI's own networks and losses: the same loss and the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.losses import DiceLoss, FocalLoss
from monai.networks.nets import BasicUNet, DynUNet

from client.forward import forward_of
from common.config_file import load_config
from common.model import network_for

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {"spatial_dims": 3, "in_channels": 4, "out_channels": 4}


def unet() -> torch.nn.Module:
    return BasicUNet(
        **COMMON,
        features=(4, 8, 8, 16, 16, 4),
        act=("RELU", {"inplace": True}),
        norm=("instance", {"affine": True}),
    )


def dynunet() -> torch.nn.Module:
    return DynUNet(
        **COMMON,
        kernel_size=[3] * 3,
        strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
        filters=(4, 8, 16),
        norm_name=("instance", {"affine": True}),
    )


@pytest.mark.parametrize(
    ("name", "channels", "stock"),
    [("unet", [4, 8, 8, 16, 16], unet), ("dynunet", [4, 8, 16], dynunet)],
)
def test_loss_and_gradients_are_stock_monais(name, channels, stock):
    config = load_config(
        preset="quick",
        assign=[
            f"network.name={name}",
            f"network.channels={channels}",
            "network.norm=instance",
            "preprocess.shape=[32, 32, 32]",
            "training.precision=fp32",
        ],
    )
    ours, peer = network_for(config), stock()
    # DynUNet has each of its layers under two names, ours under one
    assert not peer.load_state_dict(ours.state_dict(), strict=False).unexpected_keys
    ours = ours.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 4, (2, 32, 32, 32), generator=generator, dtype=torch.uint8)
    images = torch.randn(2, 4, 32, 32, 32, generator=generator) + labels[:, None]

    loss, auxiliary = forward_of(config, CPU)(ours, images, labels)
    assert auxiliary is None
    loss.backward()
    logits, truth = peer(images), labels[:, None]
    dice = DiceLoss(softmax=True, to_onehot_y=True)
    focal = FocalLoss(gamma=2.0, weight=0.25, use_softmax=True, to_onehot_y=True)
    expected = dice(logits, truth) + focal(logits, truth)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    same = dict(peer.named_parameters(remove_duplicate=False))
    pairs = [(p.grad, same[name].grad) for name, p in ours.named_parameters()]
    found, due = (torch.cat([g.flatten() for g in side]) for side in zip(*pairs, strict=True))
    assert due.norm() > 0
    assert (found - due).norm() / due.norm() < 1e-3
