from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from common.precision import (
    autocast,
    autocast_dtype,
    bf16_weight_gradient_faults,
    protect_conv3d,
)

CPU_BF16 = autocast_dtype("auto", "cpu") is not None
needs_bf16 = pytest.mark.skipif(not CPU_BF16, reason="this CPU has no bf16 instructions")


def weight_gradient(layer: nn.Module, image: torch.Tensor, dtype: torch.dtype | None):
    layer.zero_grad()
    image = image.clone(memory_format=torch.preserve_format).requires_grad_()
    with autocast("cpu", dtype):
        output = layer(image)
    # Values that bf16 holds exactly, so that only the layer's own arithmetic differs.
    upstream = torch.arange(output.numel()).remainder(7).sub(3).reshape(output.shape)
    (output.float() * upstream).sum().backward()
    return layer.weight.grad.clone(), image.grad, output.detach()


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.float() - exact).norm() / exact.norm()).item()


def bf16_layer(kind: type[nn.Module], kernel: int, stride: int) -> nn.Module:
    torch.manual_seed(0)
    padding = 1 if kernel == 3 else 0
    if kind is nn.ConvTranspose3d:
        layer = kind(32, 16, kernel, stride, padding, output_padding=padding * (stride - 1))
    else:
        layer = kind(32, 16, kernel, stride, padding)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.bfloat16())
    return layer


@needs_bf16
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ("kind", "kernel", "stride"),
    [
        (nn.Conv3d, 3, 1),
        (nn.Conv3d, 3, 2),
        (nn.Conv3d, 1, 1),
        (nn.ConvTranspose3d, 2, 2),
        (nn.ConvTranspose3d, 3, 2),
        (nn.ConvTranspose3d, 3, 1),
    ],
)
def test_protected_bf16_gradients_match_fp32_at_every_small_size(kind, kernel, stride, layout):
    layer = bf16_layer(kind, kernel, stride)
    protect_conv3d(layer)
    for depth in range(1, 9):
        for side in (1, 2, depth, 5):
            for batch in (1, 2):
                image = torch.randn(batch, 32, depth, side, side).bfloat16().float()
                image = image.to(memory_format=layout)
                exact = weight_gradient(layer, image, None)
                found = weight_gradient(layer, image, torch.bfloat16)
                for name, wrong, right in zip(
                    ("weight", "image", "output"), found, exact, strict=True
                ):
                    error = relative_error(wrong, right)
                    assert error < 0.02, f"{name} at {(batch, depth, side)}: {error}"


@needs_bf16
def test_unprotected_gradients_are_wrong_exactly_where_the_probe_says():
    """Shows that the guard is needed here; on a CPU without the fault the probe is empty too."""
    faults = bf16_weight_gradient_faults()
    assert set(faults) <= {2}, "a fault that was not known: protect_conv3d needs to cover it"
    layer = bf16_layer(nn.Conv3d, 3, 1)
    for depth in range(1, 6):
        image = torch.randn(2, 32, depth, 4, 4).bfloat16().float()
        exact = weight_gradient(layer, image, None)[0]
        found = weight_gradient(layer, image, torch.bfloat16)[0]
        assert (relative_error(found, exact) < 0.02) == (depth not in faults)


@needs_bf16
def test_only_the_faulty_sizes_leave_bf16_and_the_type_stays():
    """The guard must not slow down the sizes that are right, nor change types downstream."""
    torch.manual_seed(0)
    layer = nn.Conv3d(8, 8, 3, padding=1)
    protected = copy.deepcopy(layer)
    protect_conv3d(protected)
    for depth, same in ((2, False), (3, True), (8, True)):
        image = torch.randn(2, 8, depth, 4, 4)
        with autocast("cpu", torch.bfloat16):
            plain, guarded = layer(image), protected(image)
        assert guarded.dtype == plain.dtype == torch.bfloat16
        # Computed in fp32 from unrounded input, it cannot agree with bf16 everywhere.
        assert torch.equal(plain, guarded) == same
    assert torch.equal(layer(image), protected(image))  # without autocast nothing changes


def test_protection_is_invisible_to_checkpoints_and_copies():
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.ConvTranspose3d(2, 1, 2, 2))
    names = list(network.state_dict())
    protect_conv3d(network)
    protect_conv3d(network)
    image = torch.randn(1, 1, 2, 4, 4)
    with autocast("cpu", torch.bfloat16 if CPU_BF16 else None):
        expected = network(image)
        for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert list(twin.state_dict()) == names
            assert torch.equal(twin(image), expected)
            assert twin[0].weight is not network[0].weight


def test_probe_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    bf16_weight_gradient_faults((3, 7))
    assert torch.equal(torch.get_rng_state(), before)


def test_precision_names():
    assert autocast_dtype("fp32", "cpu") is None
    assert autocast_dtype("auto", "meta") is None
    with pytest.raises(ValueError, match="not supported"):
        autocast_dtype("bf16", "meta")
    with pytest.raises(ValueError, match="fp16"):
        autocast_dtype("fp16", "cpu")
    with autocast("cpu", None):
        assert not torch.is_autocast_enabled("cpu")


def test_cpu_bf16_follows_the_processor():
    """Against what the kernel says of the processor; emulated bf16 would be slower than fp32."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = file.read().split()
    except OSError:
        pytest.skip("no /proc/cpuinfo here")
    native = "avx512_bf16" in flags or "amx_bf16" in flags
    assert native == CPU_BF16
    if not native:
        with pytest.raises(ValueError, match="avx512_bf16"):
            autocast_dtype("bf16", "cpu")
