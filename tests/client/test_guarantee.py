"""What an (epsilon, delta) promises: the bounds against closed forms, and never worded too well."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest

from client.guarantee import found_at_most, in_words, of_aggregation, right_at_most
from common.config import FederationConfig, Rounds
from common.terms import Terms


def test_right_at_most_is_the_hypothesis_testing_bound():
    assert right_at_most(0.0, 0.0) == 0.5
    assert right_at_most(8.0, 0.0) == pytest.approx(math.exp(8) / (1 + math.exp(8)))
    assert right_at_most(0.0, 0.2) == pytest.approx(0.6)  # total variation delta
    assert right_at_most(1000.0, 0.5) == 1.0
    # the best test of a Gaussian mechanism of mu 1 is right in Phi(1/2); no (eps, delta) says less
    mu = 1.0
    for e in (0.1, 0.5, 1.0, 2.0, 4.0):
        normal = NormalDist()
        delta = normal.cdf(-e / mu + mu / 2) - math.exp(e) * normal.cdf(-e / mu - mu / 2)
        assert right_at_most(e, delta) >= normal.cdf(mu / 2) - 1e-12
        power = normal.cdf(normal.inv_cdf(0.01) + mu)
        assert found_at_most(e, delta) >= power - 1e-12


def test_found_at_most_is_within_what_is_possible():
    assert found_at_most(0.0, 0.0) == pytest.approx(0.01)
    assert found_at_most(1.0, 0.0) == pytest.approx(0.01 * math.e)
    # at 8 the false alarms bound nothing, the misses do
    assert found_at_most(8.0, 0.0) == pytest.approx(1 - 0.99 * math.exp(-8))
    assert found_at_most(1000.0, 0.0) == 1.0
    assert found_at_most(0.0, 1.0) == 1.0


def test_a_large_epsilon_is_called_weak():
    said = " ".join(in_words(8.0, 0.0))
    assert "99.97 %" in said
    assert "weak worst-case guarantee" in said
    assert "not a guarantee" in said
    assert "strong guarantee" in " ".join(in_words(0.5, 1e-5))
    assert "next to no guarantee" in " ".join(in_words(25.0, 1e-5))
    # never rounded to what would be better than the truth
    assert "in at most nearly 100 % of cases" in " ".join(in_words(25.0, 1e-5))


@pytest.mark.parametrize("private", [True, False])
def test_what_secure_aggregation_promises_and_what_holds_without_it(private):
    config = FederationConfig(secure_aggregation=True, rounds=Rounds(min_sites=5))
    roster = tuple(f"SHA256:{letter * 43}" for letter in "ABCDEFGHIJ")
    on = of_aggregation(Terms("f", "c", config, roster), private=private)
    assert "of at least 7 of the 10 sites" in on
    assert "no more than 3 of them collude" in on
    assert "as if it were off" in on
    for off in (None, Terms("f", "c", FederationConfig())):
        assert "is off: the coordinator sees this site's own update" in of_aggregation(
            off, private=private
        )
    assert ("Epsilon is this site's own" in on) == private
