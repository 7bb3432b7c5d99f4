"""The audit's bound: against the theorem written out term by term, closed forms and coins."""

from __future__ import annotations

import math

import numpy as np
import pytest

from simulation.one_run_bound import lower_bound, p_value, right_guesses


def by_hand(guesses: int, right: int, canaries: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 term by term."""
    p = math.exp(epsilon) / (1 + math.exp(epsilon))
    chance = [math.comb(guesses, k) * p**k * (1 - p) ** (guesses - k) for k in range(guesses + 1)]
    steepest = max((sum(chance[right - i : right]) / i for i in range(1, right + 1)), default=0)
    return min(1.0, sum(chance[right:]) + 2 * canaries * delta * steepest)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize(("guesses", "right"), [(1, 1), (40, 40), (40, 31), (40, 20), (40, 0)])
def test_the_p_value_is_the_theorems(guesses, right, delta):
    for epsilon in (0.0, 0.5, 2.0, 6.0):
        expected = by_hand(guesses, right, 100, epsilon, delta)
        assert p_value(guesses, right, 100, epsilon, delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("guesses", [5, 20, 100, 1000])
def test_who_is_always_right_proves_what_the_closed_form_says(guesses):
    p = 0.05 ** (1 / guesses)  # p^r = 0.05
    assert lower_bound(guesses, guesses, 2 * guesses, 0.0) == pytest.approx(
        math.log(p / (1 - p)), abs=1e-5
    )


def test_the_bound_is_where_the_p_value_is_5_percent():
    bound = lower_bound(100, 85, 400, 1e-4)
    assert p_value(100, 85, 400, bound, 1e-4) == pytest.approx(0.05, abs=1e-4)


def test_guesses_no_better_than_coins_prove_nothing():
    assert lower_bound(100, 50, 400, 0.0) == lower_bound(100, 0, 400, 0.0) == 0.0


def test_less_certain_guarantees_are_harder_to_refute():
    assert lower_bound(100, 95, 400, 1e-3) < lower_bound(100, 95, 400, 0.0)
    assert lower_bound(100, 95, 400, 0.0, confidence=0.99) < lower_bound(100, 95, 400, 0.0)


def test_the_bound_of_randomised_response_rarely_exceeds_its_epsilon():
    right = np.random.default_rng(0).binomial(200, math.e / (1 + math.e), size=400)  # epsilon 1
    bounds = [lower_bound(200, int(v), 200, 0.0) for v in right]
    assert np.mean(np.array(bounds) > 1) < 0.08  # 5 %, and 3 %, three deviations, of luck
    assert np.mean(bounds) > 0.5


def test_guesses_are_the_highest_and_the_lowest_scores():
    scores = np.array([5.0, -1.0, 3.0, 0.0, 4.0, 1.0])
    inside = np.array([True, False, True, True, False, False])
    assert right_guesses(scores, inside, 2) == 2  # 5 took part, -1 did not
    assert right_guesses(scores, inside, 4) == 2  # of 4 and 0 neither is as guessed
    assert right_guesses(scores, inside, 6) == 4
