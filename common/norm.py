"""Instance and group normalisation that stay in the channels-last memory layout.

torch's own instance norm and, on GPUs, its group norm know the channels-first layout only: between
channels-last convolutions each one copies its input there and its output back, and on a GPU runs on
as many of its 132 processors as batch times channels. That is a third of a training step of the
reference U-Net on a CPU and more than half of one on a GPU (docs/speed.md). The parameters have the
same names, and the numbers are the same but for fp32's rounding.

An instance norm is a batch norm of one subject, whose channels-last kernels torch has. On a GPU they
are used as they are. On a CPU they add up a channel's voxels one after the other in fp32, which at 128^3
costs four digits (a channel of mean 100 and deviation 1 came out wrong by 3): there, means, variances and
gradients are those kernels' sums over a few thousand voxels each, added up in float64. While
`torch.compile` traces, it is the textbook formula, from which it makes one kernel with what comes
before and after (Ulyanov et al. 2016, arXiv:1607.08022; Wu & He 2018, arXiv:1803.08494). Batch norm is
torch's own.

A trap for whoever compares: torch 2.13's own instance norm returns wrong gradients on a CPU for one
subject and a channels-last upstream gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

ROWS = 4096
"""Voxels of one sum on a CPU: rounding errors grow with their number, calls become fewer."""

BLOCK = 16_384  # voxels of a gradient at a time, which stay in the cache


class InstanceNorm(nn.InstanceNorm3d):
    """`nn.InstanceNorm3d` with scale and shift, without running statistics; (B, C, D, H, W)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return _normalised(input, input.shape[1], self.weight, self.bias, self.eps)
        if input.device.type == "cpu":
            if not input.is_contiguous(memory_format=torch.channels_last_3d):
                return super().forward(input)
            result: torch.Tensor = _ChannelsLast.apply(input, self.weight, self.bias, self.eps)
            return result
        parts = [
            functional.batch_norm(
                subject, None, None, self.weight, self.bias, training=True, eps=self.eps
            )
            for subject in input.split(1)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` of (B, C, D, H, W)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return _normalised(input, self.num_groups, self.weight, self.bias, self.eps)
        return super().forward(input)


class _ChannelsLast(torch.autograd.Function):
    """Instance norm of (B, C, D, H, W) in channels-last on a CPU; the gradient as in `_Normalised`."""

    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        if images[0, 0].numel() == 1:
            raise ValueError(f"one voxel has no variance: {tuple(images.shape)}")
        output = torch.empty_like(images)
        means, variances = (images.new_empty(images.shape[:2], dtype=torch.float64) for _ in "mv")
        unused = torch.empty(0)
        for b, subject in enumerate(images.split(1)):
            means[b], variances[b] = _moments(subject)
            torch.ops.aten.native_batch_norm.out(
                subject, weight, bias, means[b].float(), variances[b].float(), False, 0.0, eps,
                out=output[b : b + 1], save_mean=unused, save_invstd=unused,
            )  # fmt: skip
        ctx.save_for_backward(images, weight, means, variances)
        ctx.eps = eps
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, weight, means, variances = ctx.saved_tensors
        upstream = upstream.contiguous(memory_format=torch.channels_last_3d)
        of_images = torch.empty_like(images)
        count = images[0, 0].numel()
        of_weight, of_bias = (torch.zeros(weight.shape, dtype=torch.float64) for _ in "wb")
        for b, (x, dy) in enumerate(zip(images.split(1), upstream.split(1), strict=True)):
            mean, variance = means[b].float(), variances[b].float()
            sums = [
                torch.ops.aten.native_batch_norm_backward(
                    part_dy, part_x, weight, mean, variance, None, None, False, ctx.eps,
                    [False, True, True],
                )[1:]
                for part_x, part_dy in zip(_parts(x), _parts(dy), strict=True)
            ]  # fmt: skip
            dy_x, dy_1 = (torch.stack(kind).double().sum(0) for kind in zip(*sums, strict=True))
            scale = torch.rsqrt(variances[b] + ctx.eps)
            dy_x += (mean - means[b]) * scale * dy_1  # the mean's own rounding, times all voxels
            of_weight += dy_x
            of_bias += dy_1
            # dx = to_dy dy + to_x x + rest, from the formula in `_Normalised`
            to_dy = weight * scale
            to_x = -to_dy * scale * dy_x / count
            rest = -to_dy * dy_1 / count - to_x * means[b]
            factors = [factor.float() for factor in (to_dy, to_x, rest)]
            _combine(of_images[b], dy[0], x[0], *factors)
        return of_images, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None


def _moments(subject: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and (biased) variance of each channel of (1, C, D, H, W), float64."""
    parts = _parts(subject)
    # running statistics in fp32, which a momentum of 0 leaves alone, have bf16 summed up in fp32
    unused = torch.zeros(2, subject.shape[1])
    found = [torch.batch_norm_update_stats(part, unused[0], unused[1], 0.0) for part in parts]
    means, variances = (torch.stack(kind).double() for kind in zip(*found, strict=True))
    share = torch.tensor([float(part[0, 0].numel()) for part in parts], dtype=torch.float64)
    share = (share / share.sum())[:, None]
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean) ** 2)).sum(0)


def _parts(subject: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(1, C, D, H, W) as pieces (1, C, rows, W) of about ROWS voxels."""
    rows = subject.flatten(2, 3)
    return rows.split(max(1, ROWS // rows.shape[3]), dim=2)


def _combine(
    out: torch.Tensor,
    dy: torch.Tensor,
    x: torch.Tensor,
    to_dy: torch.Tensor,
    to_x: torch.Tensor,
    rest: torch.Tensor,
) -> None:
    """out = to_dy dy + to_x x + rest by channel, computed in fp32; (C, D, H, W) channels-last."""
    volumes = (volume.flatten(1).T.split(BLOCK) for volume in (out, dy, x))
    for part, part_dy, part_x in zip(*volumes, strict=True):
        sums = torch.addcmul(rest, part_x.float(), to_x)
        part.copy_(sums.addcmul_(part_dy.float(), to_dy))


def _normalised(
    images: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Each of `groups` runs of channels of each subject with mean 0 and variance 1, computed in
    fp32, times `weight` plus `bias` (C); of the images' type."""
    result: torch.Tensor = _Normalised.apply(images, weight, bias, groups, eps)
    return result


class _Normalised(torch.autograd.Function):
    """With x' = (x - mean) / deviation over the N values of a group, y = w x' + b and dy given:

        d w_c = sum dy x',  d b_c = sum dy,  d x = (w dy - mean(w dy) - x' mean(w dy x')) / deviation

    with both sums over the same pass. Autograd through the forward formula takes three.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        groups: int,
        eps: float,
    ) -> torch.Tensor:
        grouped = _grouped(images.float(), groups)
        variance, mean = torch.var_mean(grouped, dim=(2, 3, 4, 5), keepdim=True, correction=0)
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(images, weight, mean, scale)
        ctx.groups = groups
        normal = ((grouped - mean) * scale).view(images.shape)
        return (normal * weight.view(_PER_CHANNEL) + bias.view(_PER_CHANNEL)).to(images.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, weight, mean, scale = ctx.saved_tensors
        groups: int = ctx.groups
        grouped = (_grouped(images.float(), groups) - mean) * scale
        dy = upstream.float()
        of_bias = dy.sum((2, 3, 4))  # (B, C)
        of_weight = (dy * grouped.view(images.shape)).sum((2, 3, 4))
        count = grouped[0, 0].numel()

        def group_mean(sums: torch.Tensor) -> torch.Tensor:
            return _grouped((sums * weight)[..., None, None, None], groups).sum(2, True) / count

        towards = _grouped(dy * weight.view(_PER_CHANNEL), groups)
        towards = (towards - group_mean(of_bias) - grouped * group_mean(of_weight)) * scale
        of_images = towards.view(images.shape).to(images.dtype)
        return of_images, of_weight.sum(0), of_bias.sum(0), None, None


_PER_CHANNEL = (1, -1, 1, 1, 1)


def _grouped(images: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, C, D, H, W) as (B, groups, C / groups, D, H, W)."""
    return images.unflatten(1, (groups, images.shape[1] // groups))
