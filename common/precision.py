"""Mixed precision: when bf16 autocast is used, and a guard for where bf16 is silently wrong.

The guard. On CPUs with bf16 instructions, torch 2.13 (oneDNN 3.12) returns uninitialised numbers
(garbage, infinities or NaN) as the bf16 weight gradient of a padded 3-D convolution whenever, along
some axis, no kernel position lies wholly inside the image. No error is raised, the output and the
input gradient are right, and the loss still falls for a while. A 3x3x3 convolution is hit when its
first spatial size is 2: the bottom of a five-level U-Net at 32 voxels a side. `protect_conv3d`
makes such convolutions, and only those, compute in fp32. GPUs are not affected.

Not here: loss scaling (bf16 needs none), fp16, and casting the loss, which `common.loss` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import nn

_PROBE_TOLERANCE = 0.05
"""Relative error: bf16 gradients of the same rounded input differ by 0.004, wrong ones by 1."""


def autocast_dtype(precision: str, device: torch.device | str) -> torch.dtype | None:
    """The autocast type for `precision` ("auto", "bf16" or "fp32") on `device`; None means fp32.

    "auto" is bf16 where the device computes in it natively: CUDA from compute capability 8.0
    (Ampere) on, CPUs with avx512_bf16 or AMX (elsewhere bf16 is emulated and slower than fp32).
    Raises ValueError if "bf16" is asked for and not supported, or `precision` is unknown.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f'precision must be "auto", "bf16" or "fp32", not "{precision}"')
    if precision == "fp32":
        return None
    kind = torch.device(device).type
    if kind == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        supported = _cpu_has_bf16()
    else:
        supported = False
    if supported:
        return torch.bfloat16
    if precision == "bf16":
        raise ValueError(
            f'precision "bf16" is not supported by this {kind} device '
            "(it needs an NVIDIA GPU from Ampere on, or a CPU with avx512_bf16 or AMX); "
            'use "auto" or "fp32"'
        )
    return None


def autocast(device: torch.device | str, dtype: torch.dtype | None) -> torch.autocast:
    """A context in which networks compute in `dtype`; None (fp32) switches autocast off."""
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None)


def protect_conv3d(network: nn.Module) -> None:
    """Make every Conv3d and ConvTranspose3d of `network` keep out of the faulty bf16 cases.

    Decided at each call from the real shape, and only under CPU bf16 autocast; everywhere else the
    layers do exactly what they did. Parameters, state-dict names, hooks, pickling and deepcopy are
    untouched; calling it twice is harmless. The output keeps autocast's type.
    """
    for module in network.modules():
        # Only the class is exchanged, so the module keeps its identity, parameters and name.
        if type(module) is nn.Conv3d:
            module.__class__ = _GuardedConv3d
        elif type(module) is nn.ConvTranspose3d:
            module.__class__ = _GuardedConvTranspose3d


def bf16_weight_gradient_faults(sizes: Iterable[int] = range(1, 9)) -> tuple[int, ...]:
    """The first spatial sizes D at which this CPU's bf16 weight gradient of a 3x3x3 conv is wrong.

    Compares with fp32 on (2, 32, D, 4, 4) -> 16 channels, padding 1, in both memory formats, twice
    each because the wrong values are uninitialised memory; NaN counts as wrong. It takes tens of
    milliseconds, and does not touch the global random state. Empty where bf16 is not native.
    """
    return _probe(tuple(sizes))


@cache
def _probe(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not _cpu_has_bf16():
        return ()
    return tuple(size for size in sizes if not _gradient_is_right(size))


def _gradient_is_right(size: int) -> bool:
    generator = torch.Generator().manual_seed(size)
    # Rounded to bf16 first, so that fp32 and bf16 start from the same numbers.
    image = torch.randn(2, 32, size, 4, 4, generator=generator).bfloat16()
    kernel = torch.randn(16, 32, 3, 3, 3, generator=generator).bfloat16()
    upstream = torch.randn(2, 16, size, 4, 4, generator=generator).bfloat16().float()
    formats = (torch.contiguous_format, torch.channels_last_3d)

    def weight_gradient(dtype: torch.dtype, memory_format: torch.memory_format) -> torch.Tensor:
        def laid_out(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(dtype=dtype, memory_format=memory_format)

        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            weight = laid_out(kernel).detach().requires_grad_()
            output = nn.functional.conv3d(laid_out(image), weight, padding=1)
            # Not autograd.grad, whose first call imports sympy: 0.35 s.
            (output.float() * upstream).sum().backward()
        assert weight.grad is not None
        return weight.grad.float()

    exact = weight_gradient(torch.float32, torch.contiguous_format)
    return all(
        # `not >` would let a NaN pass.
        bool(
            (weight_gradient(torch.bfloat16, layout) - exact).norm()
            < _PROBE_TOLERANCE * exact.norm()
        )
        for layout in formats
        for _ in range(2)
    )


def _in_cpu_autocast(input: torch.Tensor) -> bool:
    return input.device.type == "cpu" and torch.is_autocast_enabled("cpu")


@cache
def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _clipped_everywhere(size: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether no kernel position along an axis of `size` voxels avoids the padding."""
    first_inside = -(-padding // stride) * stride - padding
    return first_inside + (kernel - 1) * dilation > size - 1


def _is_faulty(module: nn.Conv3d | nn.ConvTranspose3d, padded: Sequence[int]) -> bool:
    """Whether `module` is now in bf16 and would get a wrong weight gradient. `padded` is the
    spatial shape its padding belongs to: a convolution's input, a transposed one's output."""
    if torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    padding = module.padding
    if isinstance(padding, str):  # "same" or "valid"
        reach = [(k - 1) * d // 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        padding = tuple(reach) if padding == "same" else (0, 0, 0)
    axes = zip(padded, module.kernel_size, module.stride, padding, module.dilation, strict=True)
    if any(_clipped_everywhere(*axis) for axis in axes):
        return True
    # No other fault is known, but another CPU may have one. The known ones are not probed again:
    # they read memory that was never written.
    return padded[0] in bf16_weight_gradient_faults(range(3, 9))


class _GuardedConv3d(nn.Conv3d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not _in_cpu_autocast(input) or not _is_faulty(self, input.shape[-3:]):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float()).bfloat16()


class _GuardedConvTranspose3d(nn.ConvTranspose3d):
    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        if not _in_cpu_autocast(input) or not _is_faulty(self, self._output_shape(input)):
            return super().forward(input, output_size)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float(), output_size).bfloat16()

    def _output_shape(self, input: torch.Tensor) -> list[int]:
        padding = [p for p in self.padding if not isinstance(p, str)]
        axes = zip(
            input.shape[-3:],
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.output_padding,
            strict=True,
        )
        return [(n - 1) * s - 2 * p + d * (k - 1) + extra + 1 for n, k, s, p, d, extra in axes]
