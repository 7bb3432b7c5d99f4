"""Encoding for exact sums, against whole numbers of Python and naive means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from common.fixed_point import (
    COUNTER_BOUND,
    MOST_COUNTED,
    SMALLEST_BOUND,
    bound,
    decode_sum,
    encode_vector,
    scale,
    vector_length,
)
from common.weights import BadWeights
from tests.secure_sites import model, plain_mean, updates

SITES = 2, 3, 10, 23, 64, 200


def test_a_vector_is_what_its_definition_says() -> None:
    base = {"b": torch.tensor([0.5, -0.25]), "a": torch.tensor([[1.0], [2.0]])}
    update = {"b": torch.tensor([0.75, -0.5]), "a": torch.tensor([[1.0], [1.0]])}
    got = encode_vector(update, base, subjects=7, sites=3)
    room = ((2**31 - 1) / 3 - 1) / 1024
    s = {n: 2.0 ** math.floor(math.log2(room / bound)) for n, bound in (("a", 4.0), ("b", 1.0))}
    changes = ("a", 0.0), ("a", -1.0), ("b", 0.25), ("b", -0.25)  # a before b
    assert got.vector.tolist() == [int(7 * s[n] * c) % 2**32 for n, c in changes] + [7]
    assert got.cut == 0


@pytest.mark.parametrize("sites", SITES)
def test_the_largest_values_of_all_sites_add_up_to_less_than_the_modulus(sites: int) -> None:
    for tensor in model().values():
        one = round(MOST_COUNTED * bound(tensor) * scale(tensor, sites))
        assert sites * (one + 1) < 2**31
        assert 2 * sites * (one + 1) > 2**29, "and no more than two bits are given away"


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_the_largest_changes_decode_exactly(sites: int, sign: int) -> None:
    base = model()
    largest = {
        n: w + sign * bound(w) if w.is_floating_point() else w + sign * int(COUNTER_BOUND)
        for n, w in base.items()
    }
    total = np.zeros(vector_length(base), np.uint32)
    for _ in range(sites):
        encoded = encode_vector(largest, base, MOST_COUNTED, sites)
        total += encoded.vector
    mean, weight = decode_sum(total, base, sites)
    assert weight == sites * MOST_COUNTED
    for name in base:
        assert torch.allclose(mean[name].double(), largest[name].double(), rtol=1e-6), name
        assert mean[name].dtype == base[name].dtype


def test_the_error_of_a_mean_is_within_its_bound() -> None:
    base = model()
    parts = updates(base, (4, 31, 129))
    total = sum(encode_vector(w, base, n, 3).vector.astype(np.int64) for n, w in parts) % 2**32
    mean, weight = decode_sum(np.asarray(total, np.uint32), base, 3)
    assert weight == 164
    for name, expected in plain_mean(parts, base).items():
        if base[name].is_floating_point():
            allowed = 3 / (2 * scale(base[name], 3) * 164) + 2.0**-24 * float(expected.abs().max())
            assert float((mean[name].double() - expected).abs().max()) <= allowed
        else:
            assert float(mean[name]) == pytest.approx(float(expected), abs=0.5)


def test_changes_beyond_the_bound_are_cut_off_and_counted() -> None:
    base = {"a": torch.zeros(3)}
    update = {"a": torch.tensor([9.0, -7.0, 0.5])}
    encoded = encode_vector(update, base, 2, 3)
    assert encoded.cut == 2
    mean, _ = decode_sum(encoded.vector, base, 3)
    assert mean["a"].tolist() == pytest.approx([SMALLEST_BOUND, -SMALLEST_BOUND, 0.5])


def test_more_subjects_than_are_counted_weigh_as_the_most() -> None:
    base = {"a": torch.zeros(1)}
    assert encode_vector({"a": torch.ones(1)}, base, 5000, 3).vector[-1] == MOST_COUNTED


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    base = {"fine": torch.zeros(2), "spoilt": torch.zeros(2)}
    with pytest.raises(BadWeights, match="spoilt"):
        encode_vector({"fine": torch.ones(2), "spoilt": torch.tensor([0, bad])}, base, 3, 3)


def test_nobody_and_nowhere_are_refused() -> None:
    base = {"a": torch.zeros(1)}
    for subjects, sites in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="cannot be encoded"):
            encode_vector(base, base, subjects, sites)


def test_what_cannot_be_such_a_sum_is_refused() -> None:
    base = {"a": torch.zeros(4)}
    good = encode_vector({"a": torch.ones(4)}, base, 3, 3).vector
    for weight in (0, 3 * MOST_COUNTED + 1, 2**32 - 1):
        spoilt = good.copy()
        spoilt[-1] = weight
        with pytest.raises(BadWeights, match="impossible"):
            decode_sum(spoilt, base, 3)
    with pytest.raises(BadWeights, match="length"):
        decode_sum(good[:-1], base, 3)
    with pytest.raises(BadWeights, match="length"):
        decode_sum(good.astype(np.int32), base, 3)
