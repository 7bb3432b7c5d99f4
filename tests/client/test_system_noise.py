"""Noise that is Gaussian, of the right size, independent, and not to be had from any seed."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from scipy.stats import binom, kstest

from client.system_noise import BLOCK, add_system_gaussian, system_sample


def drawn(*shape: int, deviation: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    values = torch.zeros(shape, dtype=dtype)
    add_system_gaussian(values, deviation)
    return values


def test_it_is_gaussian_with_the_deviation_asked_for():
    values = drawn(400_000, deviation=2.5).numpy()
    assert values.std() == pytest.approx(2.5, rel=0.006)  # 5 standard errors
    assert abs(values.mean()) < 5 * 2.5 / 400_000**0.5
    assert kstest(values[::4] / 2.5, "norm").pvalue > 1e-6
    assert np.abs(values / 2.5).max() > 4, "with tails"


def test_neighbours_are_independent():
    values = drawn(3 * BLOCK + 17)
    for distance in (1, 2, 3, BLOCK):
        product = values[distance:] * values[:-distance]
        assert abs(float(product.mean())) < 6 / len(values) ** 0.5, distance
    squares = values**2 - 1
    assert abs(float((squares[1:] * squares[:-1]).mean())) < 12 / len(values) ** 0.5


def test_no_seed_gives_the_same_twice():
    def seeded() -> tuple[torch.Tensor, list[int]]:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        return drawn(1000), system_sample(1000, 0.5)

    (first, who), (second, others) = seeded(), seeded()
    assert not torch.equal(first, second)
    assert not np.isin(first.numpy(), second.numpy()).any()
    assert who != others


def test_it_is_drawn_from_the_operating_system(monkeypatch):
    keys = []
    real = os.urandom
    monkeypatch.setattr("client.system_noise.os.urandom", lambda n: keys.append(n) or real(n))
    drawn(10)
    drawn(10)
    assert keys == [32, 32], "a fresh 256-bit key each time"


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3,), (5, 1), (0,), (BLOCK + 1,)])
def test_any_shape_gets_noise(shape):
    many = torch.stack([drawn(*shape) for _ in range(200 if np.prod(shape) < 9 else 1)])
    assert bool((many != 0).all())
    if 0 < np.prod(shape) < 9:
        assert float(many.std()) == pytest.approx(1, rel=0.35)


def test_it_is_added_in_any_layout_and_not_where_values_share_memory():
    values = torch.full((2, 3, 4, 5, 6), 100.0).to(memory_format=torch.channels_last_3d)
    add_system_gaussian(values, 1.0)
    assert float(values.mean()) == pytest.approx(100, abs=0.3)
    assert float(values.std()) == pytest.approx(1, rel=0.2)
    for shared in (torch.zeros(1).expand(9), torch.zeros(9)[::2], torch.zeros(4, 4)[:, :2]):
        with pytest.raises(ValueError, match="without gaps"):
            add_system_gaussian(shared, 1.0)
    part = torch.zeros(10)
    add_system_gaussian(part[4:], 1.0)
    assert bool((part[:4] == 0).all())
    assert bool((part[4:] != 0).all())


def test_no_noise_is_no_noise():
    assert bool((drawn(1000, deviation=0.0) == 0).all())


def test_a_poisson_sample_is_binomial_in_number_and_fair_to_everybody():
    runs = [system_sample(20, 0.3) for _ in range(4000)]
    sizes = np.array([len(run) for run in runs])
    low, high = binom.ppf([1e-7, 1 - 1e-7], 4000 * 20, 0.3)
    assert low < sizes.sum() < high
    assert sizes.var() == pytest.approx(20 * 0.3 * 0.7, rel=0.15), "not a fixed number"
    counts = np.bincount([who for run in runs for who in run], minlength=20)
    low, high = binom.ppf([1e-8, 1 - 1e-8], 4000, 0.3)
    assert ((low < counts) & (counts < high)).all()
    assert system_sample(5, 1.0) == [0, 1, 2, 3, 4]
    assert system_sample(5, 0.0) == system_sample(0, 0.5) == []
