from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from safetensors.torch import save
from torch import nn

from common.network import NETWORKS, NORMS, build_network, parameter_count, segment, size_multiple
from common.norm import GroupNorm, InstanceNorm
from common.precision import autocast, autocast_dtype, protect_conv3d

CHANNELS = (4, 8, 16, 32, 64)
CPU_BF16 = autocast_dtype("auto", "cpu")


def small(name: str, **options) -> nn.Module:
    """Five levels; four for the auto-encoder, which halves once more."""
    channels = CHANNELS[:4] if name == "segresnet_vae" else CHANNELS
    settings = {"in_channels": 2, "channels": channels, "patch_size": (32, 32, 32), "seed": 0}
    return build_network(name, **(settings | options))


def images(*size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 2, *size, generator=torch.Generator().manual_seed(1))


def train_step(network: nn.Module, batch: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    network.train()
    with autocast("cpu", dtype):
        logits, auxiliary = segment(network, batch)
    loss = logits.float().log_softmax(1)[:, 1].mean().neg()
    (loss if auxiliary is None else loss + auxiliary).backward()
    return logits


def assert_every_parameter_learns(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, f"{name} has no part in the loss"
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_trains_with_every_norm(name, norm):
    network = small(name, norm=norm)
    logits = train_step(network, images(32, 32, 32), None)
    assert logits.shape == (2, 4, 32, 32, 32)
    assert_every_parameter_learns(network)


@pytest.mark.skipif(CPU_BF16 is None, reason="this CPU has no bf16 instructions")
@pytest.mark.parametrize("norm", ["instance", "group"])
@pytest.mark.parametrize("name", NETWORKS)
def test_trains_in_bf16_channels_last(name, norm):
    """At 32 voxels a side, where five levels end on the size whose bf16 gradient is wrong."""
    network = small(name, norm=norm).to(memory_format=torch.channels_last_3d)
    protect_conv3d(network)
    batch = images(32, 32, 32).to(memory_format=torch.channels_last_3d)
    train_step(network, batch, CPU_BF16)
    assert_every_parameter_learns(network)


@pytest.mark.skipif(CPU_BF16 is None, reason="this CPU has no bf16 instructions")
@pytest.mark.parametrize("name", ["residual_unet", "dynunet"])
def test_bf16_gradients_resemble_fp32_down_to_the_lowest_level(name):
    """Without protect_conv3d the lowest level is off by 1 or infinite on a CPU with the fault."""
    exact, found = small(name), small(name)
    protect_conv3d(found)
    train_step(exact, images(32, 32, 32), None)
    train_step(found, images(32, 32, 32), CPU_BF16)
    for (key, right), other in zip(exact.named_parameters(), found.parameters(), strict=True):
        if right.ndim == 5:  # convolutions
            assert (other.grad - right.grad).norm() < 0.6 * right.grad.norm(), key


@pytest.mark.parametrize("name", NETWORKS)
def test_segments_any_size_that_is_a_multiple(name):
    network = small(name).eval()
    multiple = size_multiple(name, CHANNELS[:4] if name == "segresnet_vae" else CHANNELS)
    assert multiple == 16
    with torch.no_grad():
        for size in ((48, 16, 32), (16, 32, 16)):
            logits, auxiliary = segment(network, images(*size, batch=1))
            assert logits.shape == (1, 4, *size)
            assert auxiliary is None  # not in evaluation mode


@pytest.mark.parametrize("name", NETWORKS)
def test_seed_decides_the_weights_and_leaves_the_random_state_alone(name):
    torch.manual_seed(5)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    first = small(name, seed=3)
    assert torch.equal(torch.rand(3), expected_next)
    again, other = small(name, seed=3).state_dict(), small(name, seed=4).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in first.state_dict().items())
    assert any(not torch.equal(value, other[key]) for key, value in first.state_dict().items())


def test_without_a_seed_the_random_state_is_used():
    torch.manual_seed(1)
    first, second = (small("residual_unet", seed=None).state_dict() for _ in range(2))
    assert any(not torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_norm_asked_for_is_the_only_one_and_learns(name, norm):
    kinds = {"batch": nn.BatchNorm3d, "instance": InstanceNorm, "group": GroupNorm}
    layers = [m for m in small(name, norm=norm).modules() if isinstance(m, tuple(kinds.values()))]
    assert layers
    for layer in layers:
        assert type(layer) is kinds[norm]
        assert layer.weight.requires_grad
        assert layer.bias.requires_grad
        if norm == "group" and layer.num_channels > 1:
            assert layer.num_channels % layer.num_groups == 0
            assert layer.num_channels // layer.num_groups >= 2, "one channel a group: instance norm"


@pytest.mark.parametrize("name", NETWORKS)
def test_state_can_be_sent_and_averaged(name):
    """Each tensor once (safetensors refuses shared ones); floats, and batch norm's counters."""
    state = small(name, norm="batch").state_dict()
    save(state)
    integers = [key for key, value in state.items() if not value.is_floating_point()]
    assert integers
    assert all(key.endswith("num_batches_tracked") for key in integers)
    assert all(state[key].dtype == torch.int64 for key in integers)
    assert not any("num_batches" in key for key in small(name, norm="group").state_dict())


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_are_the_widths_of_the_levels(name):
    """Watch the widths and resolutions that come by in a forward pass."""
    channels = CHANNELS[:4] if name == "segresnet_vae" else CHANNELS
    network = small(name).eval()
    seen: dict[int, set[int]] = {}
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(
                lambda _m, _i, out: seen.setdefault(out.shape[-1], set()).add(out.shape[1])
            )
    with torch.no_grad():
        segment(network, images(32, 32, 32, batch=1))
    first = 16 if name == "residual_unet" else 32  # it strides on entry, and its bottom does not
    sides = [first // 2**level for level in range(len(channels))]
    if name == "residual_unet":
        sides[-1] = sides[-2]
    for side, width in zip(sides, channels, strict=True):
        assert width in seen[side], (side, seen)


def test_reference_unet_has_the_parameters_of_its_layers():
    """By hand: two 3x3x3 convolutions with norms per level, 2x2x2 up-convolutions, a 1x1x1 head."""
    channels = (16, 32, 64, 128, 256)

    def two_convs(wide_in: int, wide_out: int) -> int:
        norms = 2 * 2 * wide_out
        return 27 * (wide_in + wide_out) * wide_out + 2 * wide_out + norms

    total = two_convs(4, 16) + sum(two_convs(a, b) for a, b in pairwise(channels))
    for level in (3, 2, 1, 0):
        below, here = channels[level + 1], channels[level]
        upsampled = below // 2 if level else below
        total += 8 * below * upsampled + upsampled + two_convs(here + upsampled, here)
    total += 16 * 4 + 4
    assert parameter_count(build_network("unet", in_channels=4)) == total


def test_autoencoder_term_is_finite_and_only_in_training():
    network = small("segresnet_vae").train()
    batch = images(32, 32, 32)
    torch.manual_seed(0)
    auxiliary = segment(network, batch)[1]
    assert auxiliary is not None
    assert auxiliary.shape == ()
    # 0.1 x (KL + squared error of reconstructing unit-variance noise): near 0.1, not near 1.
    assert 0.05 < auxiliary.item() < 0.5
    with pytest.raises(ValueError, match=r"\(32, 32, 32\), not \(64, 32, 32\)"):
        segment(network, images(64, 32, 32))


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("vnet", {}, "choose one of unet"),
        ("unet", {"norm": "layer"}, "choose one of batch"),
        ("unet", {"channels": (8, 16, 32)}, "five"),
        ("unetplusplus", {"channels": (8, 16, 32, 64)}, "five"),
        ("segresnet", {"channels": (8, 16, 24)}, "doubles"),
        ("dynunet", {"channels": (8, 16)}, "levels"),
        ("residual_unet", {"channels": (8,)}, "levels"),
        ("residual_unet", {"channels": (8, 0)}, "two channels"),
        ("segresnet_vae", {"channels": CHANNELS, "patch_size": (48, 32, 32)}, "multiples of 32"),
        ("unet", {"patch_size": (40, 32, 32)}, "multiples of 16"),
        ("unet", {"patch_size": (16, 16, 16)}, "larger patch"),
    ],
)
def test_what_cannot_be_built_is_explained(name, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        small(name, **options)
