"""Weights survive the disk unchanged, and an update that cannot be averaged is refused by name."""

from __future__ import annotations

import hashlib
import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from common.weights import (
    BLOCK,
    DTYPES,
    BadWeights,
    byte_count,
    check_update,
    file_sha256,
    load_weights,
    norm,
    relative_change,
    safetensors_parts,
    save_weights,
    weights_of,
)


def network() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = torch.nn.Sequential(
            torch.nn.Conv3d(2, 4, 3), torch.nn.BatchNorm3d(4), torch.nn.ReLU()
        )
        layers(torch.randn(2, 2, 5, 5, 5))  # one batch: the counter is 1, the means are not 0
    return layers


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


def test_weights_of_takes_parameters_and_buffers_as_a_copy():
    layers = network()
    weights = weights_of(layers)
    assert weights["1.num_batches_tracked"].dtype == torch.int64
    assert weights["1.num_batches_tracked"].shape == ()
    before = weights["0.weight"].clone()
    with torch.no_grad():
        layers[0].weight.zero_()
    assert torch.equal(weights["0.weight"], before)
    assert not any(tensor.requires_grad for tensor in weights.values())


def test_round_trip_keeps_every_tensor(tmp_path):
    path = tmp_path / "model.safetensors"
    layers = network().to(memory_format=torch.channels_last_3d)
    weights = dict(sorted(weights_of(layers).items()))
    about = {"round": 3, "config": {"name": "brats"}}
    digest = save_weights(path, weights, about)
    loaded, said = load_weights(path)
    assert same(dict(sorted(loaded.items())), weights)
    assert said == about
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == file_sha256(path)
    fresh = network()
    fresh.load_state_dict(loaded)


def test_round_trip_of_unusual_layouts(tmp_path):
    """safetensors refuses what is not contiguous; values and shapes must come back all the same."""
    base = torch.arange(24.0).reshape(2, 3, 4)
    weights = {
        "expanded": torch.ones(1).expand(4),
        "part": base[:, 1],
        "transposed": base.permute(2, 0, 1),
        "scalar": torch.tensor(-7),
        "empty": torch.zeros(0, 3),
    }
    save_weights(tmp_path / "w", weights, {})
    loaded, _ = load_weights(tmp_path / "w")
    assert same(dict(sorted(loaded.items())), dict(sorted(weights.items())))


@pytest.mark.parametrize("about", [{}, {"encoding": "fp32"}])
def test_parts_are_the_bytes_that_safetensors_itself_writes(about):
    weights = {
        "long": torch.randn(1000),
        "channels_last": torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        "transposed": torch.randn(3, 5).T,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(-7),
        "ümlaut": torch.ones(1, requires_grad=True),
        **({} if about else {"complex": torch.ones(2, dtype=torch.complex64)}),
        **{str(dtype): torch.ones(3).to(dtype) for dtype in DTYPES},
    }
    plain = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    assert b"".join(safetensors_parts(weights, about)) == save(plain, about or None)


def test_the_same_weights_give_the_same_bytes(tmp_path):
    weights = weights_of(network())
    a = save_weights(tmp_path / "a", weights, {"x": 1, "y": 2})
    b = save_weights(tmp_path / "b", dict(reversed(weights.items())), {"y": 2, "x": 1})
    assert a == b


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, weights_of(network()), {})
    whole = path.read_bytes()
    for content in (b"", b"hello", b"\xff" * 1000, whole[:-5], whole[:20]):
        path.write_bytes(content)
        with pytest.raises(BadWeights, match=re.escape(str(path))):
            load_weights(path)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(BadWeights, match="not a readable safetensors file"):
            load_weights(missing)


@pytest.mark.parametrize("about", ["{bad", "[1]", "3"])
def test_a_file_with_damaged_metadata_is_refused(tmp_path, about):
    save_file({"a": torch.zeros(2)}, tmp_path / "w", metadata={"fedbrats": about})
    with pytest.raises(BadWeights):
        load_weights(tmp_path / "w")


def test_a_foreign_safetensors_file_says_nothing_about_itself(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "w")
    weights, about = load_weights(tmp_path / "w")
    assert torch.equal(weights["a"], torch.ones(2))
    assert about == {}


MODEL = {
    "conv.weight": torch.zeros(2, 3),
    "norm.bias": torch.zeros(3),
    "norm.count": torch.tensor(4),
}


def changed(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return MODEL | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in MODEL.items() if name not in names}


@pytest.mark.parametrize(
    ("update", "said"),
    [
        (without("norm.bias"), r"lacks 1 tensors \(norm\.bias\) and adds no tensor"),
        (changed(more=torch.zeros(1)), r"lacks no tensor and adds 1 tensors \(more\)"),
        (
            without("norm.bias") | {"norm.bais": torch.zeros(3)},
            r"lacks .*norm\.bias.* adds .*norm\.bais",
        ),
        ({}, "lacks 3 tensors"),
        (changed(conv__weight=torch.zeros(3, 2)), r"conv\.weight .*\(3, 2\).*expected.*\(2, 3\)"),
        (changed(norm__bias=torch.zeros(1, 3)), r"norm\.bias"),
        (changed(norm__bias=torch.zeros(3).double()), r"norm\.bias is torch\.float64"),
        (changed(norm__count=torch.tensor(4.0)), r"norm\.count is torch\.float32"),
        (changed(norm__bias=torch.tensor([0, torch.nan, 0])), r"norm\.bias .*not finite"),
        (changed(conv__weight=torch.full((2, 3), torch.inf)), r"conv\.weight .*not finite"),
        (changed(conv__weight=torch.full((2, 3), -torch.inf)), r"conv\.weight .*not finite"),
    ],
)
def test_an_update_that_does_not_fit_is_refused(update, said):
    with pytest.raises(BadWeights, match=said):
        check_update(update, MODEL)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype, value):
    for size in (1, 5, 67, 1000):  # with and without what a vector register does not hold
        values = torch.linspace(-1, 1, size).to(dtype)
        check_update({"a": values}, {"a": values})
        for place in {0, 3, 64, size - 1} & set(range(size)):
            bad = values.clone()
            bad[place] = value
            with pytest.raises(BadWeights, match="not finite"):
                check_update({"a": bad}, {"a": values})


def test_an_update_that_fits_is_accepted_in_any_order():
    largest = torch.finfo(torch.float32).max
    update = dict(reversed(changed(norm__bias=torch.full((3,), largest)).items()))
    check_update(update, MODEL)


def test_byte_count_is_what_the_tensors_hold():
    assert byte_count(MODEL) == (6 + 3) * 4 + 8


def test_relative_change_is_the_norm_of_the_change_over_that_of_the_model():
    generator = torch.Generator().manual_seed(5)
    shapes = {"a": (3, 4), "b": (5,), "c": (), "long": (BLOCK + 7,), "none": (0, 2)}
    model = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    update = {name: t + torch.randn(t.shape, generator=generator) for name, t in model.items()}
    counters = {"n": torch.tensor(1)}, {"n": torch.tensor(10**9)}
    flat = [np.concatenate([w[name].numpy().ravel() for name in shapes]) for w in (model, update)]
    before, after = (values.astype(np.float64) for values in flat)
    expected = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert relative_change(update | counters[1], model | counters[0]) == pytest.approx(expected)
    assert relative_change(update, model, norm(model)) == relative_change(update, model)
    transposed = {"t": torch.randn((7, 5), generator=generator).T}
    assert norm(transposed) == pytest.approx(float(np.linalg.norm(transposed["t"].double())))
    assert relative_change(model, model) == 0
    assert relative_change({n: 3 * t for n, t in model.items()}, model) == pytest.approx(2)


def test_relative_change_where_a_norm_is_nothing_or_huge():
    zero, one = {"a": torch.zeros(3)}, {"a": torch.ones(3)}
    assert relative_change(zero, zero) == 0
    assert relative_change(one, zero) == math.inf
    assert relative_change({}, {}) == 0
    huge = {"a": torch.full((3,), torch.finfo(torch.float32).max)}
    assert relative_change(huge, one) == pytest.approx(3.4028235e38, rel=1e-6)
    assert relative_change(huge, {"a": -huge["a"]}) == pytest.approx(2)
    tiny = {"a": torch.full((3,), 1e-40)}
    assert relative_change({"a": 2 * tiny["a"]}, tiny) == pytest.approx(1)
