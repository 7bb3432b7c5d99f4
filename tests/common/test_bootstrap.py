"""Intervals of means: scipy's own for plain data, loops for patients with several scans."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from common.bootstrap import (
    RESAMPLES,
    SEED,
    intervals_of_means,
    intervals_of_means_over_sites,
)

VALUES = list(np.random.default_rng(4).beta(5, 2, 14))
NAMES = [f"p{n}" for n in range(14)]


def interval_of_mean(values, patients, confidence):
    return intervals_of_means([values], patients, confidence)[0]


def interval_of_mean_over_sites(sites, confidence):
    return intervals_of_means_over_sites(
        [([values], names) for values, names in sites], confidence
    )[0]


def clusters() -> tuple[list[float], list[str]]:
    """Six patients with 1 to 6 scans each, alike within a patient."""
    random = np.random.default_rng(8)
    values, patients = [], []
    for n in range(6):
        level = random.random()
        values += list(level + 0.02 * random.random(n + 1))
        patients += [f"p{n}"] * (n + 1)
    return values, patients


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_of_plain_data_is_scipys(confidence):
    expected = bootstrap(
        (VALUES,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(SEED),
    ).confidence_interval
    assert interval_of_mean(VALUES, NAMES, confidence) == pytest.approx(tuple(expected))


def test_patients_are_drawn_with_all_their_scans():
    values, patients = clusters()
    names = sorted(set(patients))
    own = {p: [v for v, of in zip(values, patients, strict=True) if of == p] for p in names}
    random = np.random.default_rng(99)
    means = []
    for _ in range(8000):
        drawn: list[float] = []
        for name in random.choice(names, len(names)):
            drawn += own[name]
        means.append(sum(drawn) / len(drawn))
    low, high = interval_of_mean(values, patients, 0.9)
    assert (low, high) == pytest.approx(np.percentile(means, [5, 95]), abs=0.02)
    narrow = interval_of_mean(values, [f"scan-{n}" for n in range(len(values))], 0.9)
    assert high - low > 1.5 * (narrow[1] - narrow[0])


def test_the_mean_over_sites_draws_within_each_site():
    random = np.random.default_rng(3)
    sites = [(list(random.random(n)), [f"{s}-{n}" for n in range(n)]) for s, n in enumerate((3, 8))]
    sites.append(([0.5, 0.7, 0.9], ["x", "x", "y"]))
    groups = [
        [[v for v, of in zip(values, names, strict=True) if of == p] for p in sorted(set(names))]
        for values, names in sites
    ]
    means = []
    for _ in range(8000):
        of_sites = []
        for patients in groups:
            drawn = [
                v for n in random.integers(0, len(patients), len(patients)) for v in patients[n]
            ]
            of_sites.append(sum(drawn) / len(drawn))
        means.append(sum(of_sites) / 3)
    found, single = interval_of_mean_over_sites(sites, 0.9)
    assert found == pytest.approx(np.percentile(means, [5, 95]), abs=0.012)
    assert single == 0


def test_undefined_values_are_as_if_they_were_not_there():
    values, patients = [*VALUES, math.nan, math.nan], [*NAMES, "p0", "nobody"]
    assert interval_of_mean(values, patients, 0.95) == interval_of_mean(VALUES, NAMES, 0.95)
    sites = [(VALUES, NAMES), ([math.nan], ["z"])]
    assert interval_of_mean_over_sites(sites, 0.95) == interval_of_mean_over_sites(sites[:1], 0.95)


def test_a_single_patient_gives_no_interval():
    assert interval_of_mean([0.5, 0.6, 0.7], ["a", "a", "a"], 0.95) is None
    assert interval_of_mean([0.5, math.nan], ["a", "b"], 0.95) is None
    assert interval_of_mean([], [], 0.95) is None
    assert interval_of_mean_over_sites([([0.5], ["a"]), ([0.7], ["b"])], 0.95) == (None, 2)
    assert intervals_of_means_over_sites([], 0.95) == []


def test_a_site_with_a_single_patient_stays_as_it_is():
    (low, high), single = interval_of_mean_over_sites([(VALUES, NAMES), ([0.2], ["a"])], 0.95)
    alone = interval_of_mean(VALUES, NAMES, 0.95)
    assert (low, high) == pytest.approx([(limit + 0.2) / 2 for limit in alone], abs=1e-9)
    assert single == 1


def test_equal_values_give_an_interval_without_width_and_the_same_again():
    assert interval_of_mean([1.0, 1.0, 1.0], ["a", "b", "c"], 0.95) == (1.0, 1.0)
    assert interval_of_mean(VALUES, NAMES, 0.95) == interval_of_mean(VALUES, NAMES, 0.95)


def test_columns_given_at_once_have_the_intervals_that_each_has_alone():
    random = np.random.default_rng(5)
    table = random.random((6, 12))
    table[2, :3] = table[4, 5] = math.nan
    table[5, 1:] = math.nan
    patients = [f"p{n // 2}" for n in range(12)]
    alone = [interval_of_mean(row, patients, 0.9) for row in table]
    for found, expected in zip(intervals_of_means(table, patients, 0.9), alone, strict=True):
        assert found == (expected and pytest.approx(expected))
    assert alone[5] is None
    sites = [(table[:, :5], patients[:5]), (table[:, 5:6], ["x"]), (table[:, 6:], patients[6:])]
    alone = [interval_of_mean_over_sites([(t[r], n) for t, n in sites], 0.9) for r in range(6)]
    assert [single for _, single in alone] == [1, 1, 1, 1, 0, 1]
    together = intervals_of_means_over_sites(sites, 0.9)
    for (found, n), (expected, single) in zip(together, alone, strict=True):
        assert found == pytest.approx(expected)
        assert n == single
