"""Instance and group normalisation that stay in the channels-last memory layout.

torch's own instance norm and, on GPUs, its group norm know the channels-first layout only: between
channels-last convolutions each one copies its input there and its output back, and on a GPU runs on
as many of its 132 processors as batch times channels. That is a third of a training step of the
reference U-Net on a CPU and more than half of one on a GPU (docs/speed.md). The numbers are the same
but for rounding, the parameters have the same names.

Two ways, one function: an instance norm is a batch norm of one subject, whose channels-last kernels
are fast on CPU and GPU; while `torch.compile` traces, the textbook formula, from which it makes one
kernel with what comes before and after (Ulyanov et al. 2016, arXiv:1607.08022; Wu & He 2018,
arXiv:1803.08494). Batch norm needs nothing of this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class InstanceNorm(nn.InstanceNorm3d):
    """`nn.InstanceNorm3d` with scale and shift, without running statistics; (B, C, D, H, W)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return _normalised(input, input.shape[1], self.weight, self.bias, self.eps)
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
