"""Rates and the end of training, against torch's own scheduler stepped live, and across a resume."""

from __future__ import annotations

import random

import pytest
import torch

from common.config import Rounds
from server.schedule import learning_rate, should_stop


def noisy_losses(seed: int, count: int = 60) -> list[float]:
    draw = random.Random(seed)
    return [1 / (1 + n / 8) + draw.uniform(-0.08, 0.08) + 0.3 for n in range(count)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("patience", "factor"), [(1, 0.5), (1, 0.1), (3, 0.1), (10, 0.7)])
def test_rates_are_those_of_torch_stepped_live(seed, patience, factor):
    rounds = Rounds(number=60, plateau_patience=patience, plateau_factor=factor)
    losses = noisy_losses(seed)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.Adam([parameter], lr=1e-3)
    live = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, mode="min", factor=factor, patience=patience, threshold=0.0
    )
    used = []
    for done, loss in enumerate(losses):
        used.append(optimiser.param_groups[0]["lr"])
        # a fresh call each round is what a server resumed before every round would decide
        assert learning_rate(1e-3, losses[:done], rounds) == used[-1]
        live.step(loss)
    assert min(used) < 1e-3


def test_the_rate_is_lowered_after_patience_rounds_were_forgiven():
    rounds = Rounds(plateau_patience=2, plateau_factor=0.5)
    losses = [1.0, 0.5, 0.6, 0.7, 0.8]
    assert learning_rate(1.0, losses[:4], rounds) == 1.0
    assert learning_rate(1.0, losses, rounds) == 0.5


def test_no_patience_no_change():
    rounds = Rounds(plateau_patience=None, stop_patience=None)
    worse = [float(n) for n in range(200)]
    assert learning_rate(0.01, worse, rounds) == 0.01
    assert not should_stop(worse, rounds)


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([], False),
        ([1.0], False),
        ([1.0, 1.1], False),
        ([1.0, 1.1, 1.2], True),
        ([1.0, 1.1, 0.9, 1.2], False),
        ([1.0, 1.1, 0.9, 1.2, 0.95], True),
        ([1.0, 1.0, 1.0], True),  # equal is not better
        ([3.0, 2.0, 1.0], False),
    ],
)
def test_training_stops_once_the_best_round_is_too_long_ago(losses, stops):
    assert should_stop(losses, Rounds(stop_patience=2)) is stops


@pytest.mark.parametrize("seed", range(4))
def test_stopping_is_the_usual_count_of_rounds_without_a_better_loss(seed):
    losses, rounds = noisy_losses(seed), Rounds(stop_patience=5)
    best, waited, stopped = float("inf"), 0, None
    for number, loss in enumerate(losses, start=1):
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited == 5 and stopped is None:
            stopped = number
    assert stopped is not None
    first = next(n for n in range(len(losses) + 1) if should_stop(losses[:n], rounds))
    assert first == stopped
