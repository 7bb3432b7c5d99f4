"""Epsilon against Google's accountant, the note's table of noise, and closed forms."""

from __future__ import annotations

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant
from scipy.optimize import brentq
from scipy.stats import norm

from client.accounting import (
    LEAST_NOISE,
    MOST_NOISE,
    NotAffordable,
    Steps,
    accountant_name,
    epsilon,
    noise_multiplier,
)


def google(history: list[Steps], delta: float) -> float:
    """dp-accounting's privacy loss distributions: another library and another method."""
    accountant = pld_privacy_accountant.PLDAccountant(value_discretization_interval=1e-3)
    for part in history:
        event = dp_event.PoissonSampledDpEvent(
            part.sampling_rate, dp_event.GaussianDpEvent(part.noise_multiplier)
        )
        accountant.compose(event, part.steps)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(
    ("history", "delta"),
    [
        ([Steps(10, 1.0, 100)], 1e-5),
        ([Steps(1.8, 1.0, 20)], 1 / 80),
        ([Steps(4.0, 2 / 34, 300)], 1 / 340),
        ([Steps(1.5, 0.5, 40)], 1 / 80),
        ([Steps(2.5, 1.0, 12), Steps(3.0, 0.25, 60), Steps(6.0, 1.0, 3)], 1 / 200),
    ],
)
def test_epsilon_agrees_with_googles_accountant_and_is_not_below_it(history, delta):
    ours, theirs = epsilon(history, delta), google(history, delta)
    assert theirs - 1e-3 < ours < theirs + 0.01


def test_one_full_step_is_the_gaussian_mechanism():
    """Balle and Wang 2018, theorem 8: the exact epsilon of N(0, sigma^2) with sensitivity 1."""

    def delta_of(eps: float, sigma: float) -> float:
        a, b = 0.5 / sigma, eps * sigma
        return float(norm.cdf(a - b) - math.exp(eps) * norm.cdf(-a - b))

    exact = brentq(lambda eps: delta_of(eps, 2.0) - 1e-3, 0, 10)
    assert epsilon([Steps(2.0, 1.0, 1)], 1e-3) == pytest.approx(exact, abs=0.003)


def test_twenty_rounds_are_one_composition_and_not_a_sum():
    rounds = [Steps(3.0, 1.0, 2)] * 20
    assert epsilon(rounds, 0.01) == epsilon([Steps(3.0, 1.0, 40)], 0.01)
    assert epsilon(rounds, 0.01) < 20 * epsilon([Steps(3.0, 1.0, 2)], 0.01)
    more = [*rounds, Steps(5.0, 1.0, 1)]
    assert epsilon(more, 0.01) > epsilon(rounds, 0.01)
    assert epsilon(more, 0.01) == epsilon(more[::-1], 0.01), "whatever the order"
    assert epsilon([], 0.01) == epsilon([Steps(1.0, 0.0, 5), Steps(1.0, 1.0, 0)], 0.01) == 0


@pytest.mark.parametrize(
    ("patients", "batch", "steps", "target", "sigma"),
    [  # notes/dp.md, with delta 1/(10 N)
        (8, 8, 20, 3, 3.60),
        (8, 8, 20, 8, 1.80),
        (8, 8, 20, 20, 0.98),
        (20, 20, 20, 3, 4.00),
        (34, 34, 20, 8, 2.00),
        (60, 60, 20, 20, 1.08),
        (120, 120, 100, 8, 4.86),
        (34, 8, 250, 3, 3.60),
    ],
)
def test_noise_is_that_of_the_table(patients, batch, steps, target, sigma):
    found = noise_multiplier(
        target, 1 / (10 * patients), sampling_rate=batch / patients, steps=steps
    )
    # 1 %, and what the table's three digits leave open
    assert found == pytest.approx(sigma, rel=0.01, abs=0.005)
    spent = epsilon([Steps(found, batch / patients, steps)], 1 / (10 * patients))
    assert target * 0.99 < spent <= target


def test_what_was_spent_before_leaves_less():
    before = [Steps(4.0, 1.0, 20)]
    fresh = noise_multiplier(8, 0.01, sampling_rate=1.0, steps=20)
    after = noise_multiplier(8, 0.01, sampling_rate=1.0, steps=20, before=before)
    assert after > fresh
    assert 7.9 < epsilon([*before, Steps(after, 1.0, 20)], 0.01) <= 8


def test_a_spent_budget_is_said():
    before = [Steps(4.0, 1.0, 20)]
    spent = epsilon(before, 0.01)
    with pytest.raises(NotAffordable, match=f"spent so far: epsilon {spent:.3f} of"):
        noise_multiplier(spent, 0.01, sampling_rate=1.0, steps=1, before=before)
    with pytest.raises(NotAffordable):
        noise_multiplier(spent / 2, 0.01, sampling_rate=1.0, steps=1, before=before)
    sigma = noise_multiplier(1.5 * spent, 0.01, sampling_rate=1.0, steps=1, before=before)
    assert sigma < MOST_NOISE


def test_almost_no_noise_is_still_a_bound():
    """Where PRV would take minutes: RDP's epsilon, larger and quick."""
    assert epsilon([Steps(0.05, 1.0, 100)], 0.01) > 1000
    assert noise_multiplier(1e4, 0.01, sampling_rate=1.0, steps=1) == LEAST_NOISE


def test_rarity_does_not_buy_away_the_noise():
    """Within (1, delta) almost none would do, and whoever is drawn would stand out of it."""
    assert noise_multiplier(1.0, 1 / 300, sampling_rate=0.1 / 30, steps=1) >= LEAST_NOISE


@pytest.mark.parametrize("delta", [1e-300, 1e-20, 1e-14, 0.999])
def test_a_delta_that_prv_cannot_resolve_has_a_bound_all_the_same(delta):
    found = epsilon([Steps(2.0, 1.0, 20)], delta)
    mu = math.sqrt(20) / 2.0  # one Gaussian mechanism (Balle and Wang 2018, theorem 8)
    exact = norm.cdf(mu / 2 - found / mu) - math.exp(found) * norm.cdf(-mu / 2 - found / mu)
    assert 0 <= exact <= delta
    assert found < 2 * math.sqrt(2 * math.log(1 / delta)) * mu + mu**2


def test_epsilon_is_never_negative():
    assert epsilon([Steps(9.0, 1.0, 1)], 0.9) == 0


def test_the_report_names_the_accountant():
    assert accountant_name() == (
        "PRV (Opacus 1.6.0), upper bound, error 0.001; RDP's looser one above epsilon 100 and for "
        "deltas that PRV cannot resolve"
    )
