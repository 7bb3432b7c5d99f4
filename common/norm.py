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

import torch
from torch import nn
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
    batch, channels, *size = images.shape
    grouped = images.float().view(batch, groups, channels // groups, *size)
    variance, mean = torch.var_mean(grouped, dim=(2, 3, 4, 5), keepdim=True, correction=0)
    grouped = (grouped - mean) * torch.rsqrt(variance + eps)
    per_channel = (1, channels, 1, 1, 1)
    scaled = grouped.view(images.shape) * weight.view(per_channel) + bias.view(per_channel)
    return scaled.to(images.dtype)
