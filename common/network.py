"""The segmentation networks a federation can choose from, all MONAI's, behind one calling form.

Every network maps (B, modalities, D, H, W) to (B, 4, D, H, W) logits. `channels` is the width of
each resolution level, full resolution first, each level half as fine as the one above:

    unet            BasicUNet: the reference study's U-Net (conv-norm-ReLU twice, max-pool,
                    up-sampling, skip concatenation). Exactly five levels.
    residual_unet   UNet with two residual units per level; its first level already has half the
                    input's resolution (MONAI strides on entry). Kerfoot et al. 2018.
    attention_unet  AttentionUnet. Oktay et al. 2018, arXiv:1804.03999.
    unetplusplus    BasicUNetPlusPlus without deep supervision. Exactly five levels.
                    Zhou et al. 2018, arXiv:1807.10165.
    dynunet         DynUNet, nnU-Net's plain U-Net, without deep supervision. At least three levels.
    segresnet       SegResNet. Myronenko 2018, arXiv:1810.11654. Each level doubles the width.
    segresnet_vae   SegResNet with the same paper's auto-encoder as a regulariser.

Differences from stock MONAI, each so that every tensor that travels has a use: DynUNet's second
registration of the same layers, U-Net++'s unused heads, and AttentionUnet's fixed batch norm (its
norm can be chosen here) are gone; SegResNetVAE learns its standard deviations, as in the paper.
Activations are not in place, which costs no memory here and keeps per-sample gradients possible.

`unet` and `unetplusplus` upsample by 2x2x2 transposed convolution: it takes 4 to 9 % less CPU time
per bf16 step (64^3, batch 2) than a 1x1x1 convolution with trilinear interpolation, a third of
pixel shuffle's parameters, and its gradient on CUDA is reproducible, which interpolation's is not.

Not here: mixed precision (`common.precision`), the loss (`common.loss`), sliding windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from monai.networks.nets import (
    AttentionUnet,
    BasicUNet,
    BasicUNetPlusPlus,
    DynUNet,
    SegResNet,
    SegResNetVAE,
    UNet,
)
from monai.networks.nets.basic_unet import UpCat
from torch import nn

from common.brats import N_CLASSES
from common.norm import GroupNorm, InstanceNorm

NORMS = ("batch", "instance", "group")
DEFAULT_CHANNELS = (16, 32, 64, 128, 256)
VAE_WEIGHT = 0.1
"""Weight of the auto-encoder's losses (Myronenko 2018, equation 1)."""

_RELU = ("RELU", {"inplace": False})


def build_network(
    name: str,
    *,
    in_channels: int,
    channels: Sequence[int] = DEFAULT_CHANNELS,
    norm: str = "instance",
    patch_size: Sequence[int] = (128, 128, 128),
    seed: int | None = None,
) -> nn.Module:
    """A new network in fp32 on the CPU.

    `norm` is "batch", "instance" or "group", always with learned scale and shift; "group" uses up
    to eight groups of at least two channels. `patch_size` (D, H, W) is what the network will be
    trained on: `segresnet_vae` can train on nothing else, for the others it is only checked.
    The same `seed` gives the same weights and leaves the global random state alone; without one,
    that state is used. Raises ValueError where a network cannot have what is asked.
    """
    channels = tuple(channels)
    _check(name, channels, norm, tuple(patch_size))
    with nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
        if seed is not None:
            # Not torch.manual_seed, which reseeds CUDA too.
            torch.default_generator.manual_seed(seed)
        network = NETWORKS[name](in_channels, channels, tuple(patch_size))
    _set_norm(network, norm)
    for module in network.modules():
        if type(module) is UpCat:
            module.__class__ = _UpCat
    return network


def segment(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits (B, 4, D, H, W) and, from `segresnet_vae` in training mode, a term to add to the loss.

    `images` is (B, modalities, D, H, W), each side a multiple of `size_multiple`. The term is a
    scalar, already weighted by `VAE_WEIGHT`; it draws from the global random state. Raises
    ValueError if a `segresnet_vae` in training mode gets images not of its patch size.
    """
    if isinstance(network, SegResNetVAE) and network.training:
        size, expected = tuple(images.shape[2:]), tuple(network.input_image_size)
        if size != expected:  # MONAI would take the extra voxels for extra subjects
            raise ValueError(f"this segresnet_vae trains on patches of {expected}, not {size}")
    output = network(images)
    if isinstance(output, list):  # U-Net++: one entry per head
        return output[-1], None
    if isinstance(output, tuple):
        logits, auxiliary = output
        return logits, None if auxiliary is None else VAE_WEIGHT * auxiliary
    return output, None


def size_multiple(name: str, channels: Sequence[int]) -> int:
    """What each spatial side of an image must be a multiple of."""
    halvings = len(channels) - 1
    if name == "segresnet_vae":
        halvings += 1  # the auto-encoder halves once more
    return int(2**halvings)


def parameter_count(network: nn.Module) -> int:
    """The number of trainable values."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


class _UpCat(UpCat):
    """MONAI's, without its padding of odd sides: there are none here, and asked for none, torch copies
    the whole volume all the same. Nor does `torch.compile` stop at a type check any more."""

    def forward(self, x: torch.Tensor, x_e: torch.Tensor | None) -> torch.Tensor:
        assert x_e is not None
        output: torch.Tensor = self.convs(torch.cat([x_e, self.upsample(x)], dim=1))
        return output


Channels = tuple[int, ...]


def _basic_unet(in_channels: int, channels: Channels, patch_size: Channels) -> nn.Module:
    return BasicUNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=N_CLASSES,
        features=(*channels, channels[0]),  # the last: after the last up-sampling
        act=_RELU,
        norm="batch",
    )


def _residual_unet(in_channels: int, channels: Channels, patch_size: Channels) -> nn.Module:
    return UNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=N_CLASSES,
        channels=channels,
        strides=(2,) * (len(channels) - 1),
        num_res_units=2,
        norm="batch",
    )


def _attention_unet(in_channels: int, channels: Channels, patch_size: Channels) -> nn.Module:
    return AttentionUnet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=N_CLASSES,
        channels=channels,
        strides=(2,) * (len(channels) - 1),
    )


def _unetplusplus(in_channels: int, channels: Channels, patch_size: Channels) -> nn.Module:
    network = BasicUNetPlusPlus(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=N_CLASSES,
        features=(*channels, channels[0]),
        act=_RELU,
        norm="batch",
    )
    for head in ("final_conv_0_1", "final_conv_0_2", "final_conv_0_3"):
        setattr(network, head, nn.Identity())  # used by deep supervision only
    return network


def _dynunet(in_channels: int, channels: Channels, patch_size: Channels) -> nn.Module:
    halvings = len(channels) - 1
    network = DynUNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=N_CLASSES,
        kernel_size=[3] * len(channels),
        strides=[1] + [2] * halvings,
        upsample_kernel_size=[2] * halvings,
        filters=list(channels),
        norm_name="batch",
        act_name=("leakyrelu", {"inplace": False, "negative_slope": 0.01}),
    )
    # `skip_layers` holds the same modules again, and is what forward() uses. Two names for one
    # tensor would double what travels, and safetensors refuses to write it.
    for duplicate in ("input_block", "downsamples", "bottleneck", "upsamples"):
        delattr(network, duplicate)
    return network


def _segresnet(
    in_channels: int, channels: Channels, patch_size: Channels, *, vae: bool = False
) -> nn.Module:
    settings = {
        "spatial_dims": 3,
        "init_filters": channels[0],
        "in_channels": in_channels,
        "out_channels": N_CLASSES,
        "act": _RELU,
        "norm": "batch",
        # Four levels are the paper's; for a fifth, MONAI's SegResNetDS has four blocks too.
        "blocks_down": (1, 2, 2, *(4,) * len(channels))[: len(channels)],
        "blocks_up": (1,) * (len(channels) - 1),
    }
    if vae:
        network = SegResNetVAE(input_image_size=patch_size, vae_estimate_std=True, **settings)
        network.vae_down.append(nn.Flatten())  # MONAI's view() fails on channels_last_3d
        return network
    return SegResNet(**settings)


NETWORKS: dict[str, Callable[[int, Channels, Channels], nn.Module]] = {
    "unet": _basic_unet,
    "residual_unet": _residual_unet,
    "attention_unet": _attention_unet,
    "unetplusplus": _unetplusplus,
    "dynunet": _dynunet,
    "segresnet": _segresnet,
    "segresnet_vae": partial(_segresnet, vae=True),
}
"""Name -> constructor(in_channels, channels, patch_size)."""


def _check(name: str, channels: Channels, norm: str, patch_size: Channels) -> None:
    if name not in NETWORKS:
        raise ValueError(f'there is no network "{name}"; choose one of {", ".join(NETWORKS)}')
    if norm not in NORMS:
        raise ValueError(f'there is no norm "{norm}"; choose one of {", ".join(NORMS)}')
    if any(width < 2 for width in channels):
        raise ValueError(f"each level needs at least two channels, not {channels}")
    levels = len(channels)
    if name in ("unet", "unetplusplus") and levels != 5:
        raise ValueError(f"{name} has exactly five levels, so five channels, not {channels}")
    if levels < (3 if name == "dynunet" else 2):
        raise ValueError(f"{name} needs more levels than {channels} gives it")
    if name in ("segresnet", "segresnet_vae") and any(
        width != channels[0] * 2**level for level, width in enumerate(channels)
    ):
        raise ValueError(f"{name} doubles its width at each level, which {channels} does not")

    multiple = size_multiple(name, channels)
    if len(patch_size) != 3 or any(size < 1 or size % multiple for size in patch_size):
        raise ValueError(
            f"{name} with {levels} levels needs a patch size of three multiples of {multiple}, "
            f"not {patch_size}"
        )
    # batch norm too: the last batch of an epoch may hold a single subject
    if norm in ("instance", "batch") and max(patch_size) == multiple:
        raise ValueError(
            f"{norm} norm needs more than one voxel at the lowest level of {name}, which a "
            f"patch of {patch_size} does not leave; use a larger patch, fewer levels or group norm"
        )


def _set_norm(network: nn.Module, norm: str) -> None:
    """Put the chosen norm in place of every norm layer.

    Done after construction because MONAI takes one number of groups for all layers, whatever their
    width, and AttentionUnet takes no norm at all."""
    for parent in network.modules():
        for child_name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm3d | nn.InstanceNorm3d):
                setattr(parent, child_name, _norm_layer(norm, child.num_features))


def _norm_layer(norm: str, width: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm3d(width)
    if norm == "instance":
        return InstanceNorm(width, affine=True)
    groups = max(n for n in range(1, 9) if width % n == 0 and (width // n >= 2 or n == 1))
    return GroupNorm(groups, width)
