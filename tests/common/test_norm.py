"""The norms against torch's own: values, gradients, parameters' names, and the layout they keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.norm import GroupNorm, InstanceNorm, _normalised

CHANNELS = 6
PAIRS = {
    "instance": (InstanceNorm(CHANNELS, affine=True), nn.InstanceNorm3d(CHANNELS, affine=True)),
    "group": (GroupNorm(3, CHANNELS), nn.GroupNorm(3, CHANNELS)),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


def images(batch: int, layout: torch.memory_format, dtype=torch.float32) -> torch.Tensor:
    """Not of mean 0, as after a convolution with a bias."""
    generator = torch.Generator().manual_seed(batch)
    made = 5 + torch.randn(batch, CHANNELS, 5, 4, 3, generator=generator)
    return made.to(dtype).contiguous(memory_format=layout)


def results(function, layer: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of input, weight and bias."""
    batch = batch.clone(memory_format=torch.preserve_format).requires_grad_()
    output = function(batch)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    inputs = (batch, layer.weight, layer.bias)
    return [output.detach(), *torch.autograd.grad((output.float() * upstream).sum(), inputs)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", PAIRS)
def test_values_and_gradients_are_torchs_own(kind, batch, layout):
    ours, reference = PAIRS[kind]
    with torch.no_grad():
        ours.weight.copy_(torch.linspace(-1, 2, CHANNELS))
        ours.bias.copy_(torch.linspace(3, 1, CHANNELS))
    reference.load_state_dict(ours.state_dict())
    exact = results(reference.double(), reference, images(batch, layout).double())
    groups = CHANNELS if kind == "instance" else 3

    def traced(x: torch.Tensor) -> torch.Tensor:
        return _normalised(x, groups, ours.weight, ours.bias, ours.eps)

    for way in (ours, traced):
        found = results(way, ours, images(batch, layout))
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-4)
        assert found[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("kind", PAIRS)
def test_half_precision_stays_half_and_is_computed_in_full(kind):
    ours, _ = PAIRS[kind]
    half = images(2, torch.channels_last_3d, torch.bfloat16)
    expected = ours(half.float())
    groups = CHANNELS if kind == "instance" else 3
    for found in (ours(half), _normalised(half, groups, ours.weight, ours.bias, ours.eps)):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=2**-8)


def test_a_subjects_numbers_do_not_depend_on_the_rest_of_the_batch():
    ours, _ = PAIRS["instance"]
    batch = images(3, torch.channels_last_3d)
    torch.testing.assert_close(ours(batch)[1:2], ours(batch[1:2]), rtol=0, atol=0)


def test_one_voxel_has_no_variance():
    ours, _ = PAIRS["instance"]
    with pytest.raises(ValueError, match="one voxel has no variance"):
        ours(torch.ones(1, CHANNELS, 1, 1, 1))


@pytest.mark.parametrize("threads", [1, 2])
def test_many_voxels_far_from_zero_keep_fp32s_digits(threads):
    """torch's channels-last kernel is wrong by 3 here: it adds up two million numbers in a row."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        norm = InstanceNorm(2, affine=True)
        generator = torch.Generator().manual_seed(0)
        batch = 100 + torch.randn(1, 2, 96, 96, 96, generator=generator)
        batch[:, 1, :40] = 0  # a background
        batch = batch.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
        upstream = torch.randn(batch.shape, generator=generator) + 1
        output = norm(batch)
        output.backward(upstream.contiguous(memory_format=torch.channels_last_3d))
    finally:
        torch.set_num_threads(before)
    x, dy = (t.detach().double().flatten(2) for t in (batch, upstream))
    variance, mean = torch.var_mean(x, dim=2, keepdim=True, correction=0)
    scale = torch.rsqrt(variance + norm.eps)
    normal = (x - mean) * scale
    count = x.shape[2]  # the sums over all voxels: as errors of a mean
    expected = normal, (dy * normal).sum((0, 2)) / count, dy.sum((0, 2)) / count
    found = output.detach().flatten(2), norm.weight.grad / count, norm.bias.grad / count
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    of_x = (dy - dy.mean(2, True) - normal * (dy * normal).mean(2, True)) * scale
    torch.testing.assert_close(batch.grad.flatten(2).double(), of_x, rtol=2e-5, atol=2e-5)
