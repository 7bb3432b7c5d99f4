"""Bootstrap confidence intervals of means over patients, by scipy's percentile bootstrap.

What is drawn anew is patients, each with all of its scans: scans of one patient are not independent,
and an interval that took them for so would be too narrow. Each site's patients are drawn within the
site, so an interval says what other patients of these same sites might have given, nothing about
other sites. Values that are undefined (NaN) are left out. The seed is fixed: the same values give
the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
SEED = 0
FEWEST_PATIENTS = 2  # from a single one nothing can be said about others
Interval = tuple[float, float]


def interval_of_mean(
    values: Sequence[float], patients: Sequence[str], confidence: float
) -> Interval | None:
    """The interval of the mean over `values`, of which `patients` says whose each is.

    None with fewer than two patients of a defined value.
    """
    sums, counts = _by_patient(values, patients)
    if sums.size < FEWEST_PATIENTS:
        return None
    from scipy.stats import bootstrap

    def mean(of_sums: np.ndarray, of_counts: np.ndarray, axis: int) -> np.ndarray:
        return of_sums.sum(axis=axis) / of_counts.sum(axis=axis)

    return _limits(bootstrap((sums, counts), mean, paired=True, **_settings(sums.size, confidence)))


def interval_of_mean_over_sites(
    sites: Sequence[tuple[Sequence[float], Sequence[str]]], confidence: float
) -> tuple[Interval | None, int]:
    """The interval of the unweighted mean of the sites' means, each site given as for `interval_of_mean`.

    Sites without a defined value are left out. A site with a single patient cannot be drawn anew: its
    mean stays as it is, which makes the interval too narrow.

    Returns:
        The interval, None where every site has a single patient; and the number of such sites.
    """
    samples = [_by_patient(*site) for site in sites]
    samples = [(sums, counts) for sums, counts in samples if sums.size]
    fixed = [float(s[0] / c[0]) for s, c in samples if s.size < FEWEST_PATIENTS]
    drawn = [(s, c) for s, c in samples if s.size >= FEWEST_PATIENTS]
    if not drawn:
        return None, len(fixed)
    from scipy.stats import bootstrap

    def mean(*indices: np.ndarray, axis: int) -> np.ndarray:
        means = [
            sums[at].sum(axis=axis) / counts[at].sum(axis=axis)
            for (sums, counts), at in zip(drawn, indices, strict=True)
        ]
        return (sum(means) + math.fsum(fixed)) / len(samples)

    indices = [np.arange(sums.size) for sums, _ in drawn]
    settings = _settings(sum(s.size for s, _ in drawn), confidence)
    return _limits(bootstrap(indices, mean, **settings)), len(fixed)


def _by_patient(values: Sequence[float], patients: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of each patient the sum of its defined values, and their number."""
    of: dict[str, list[float]] = {}
    for value, patient in zip(values, patients, strict=True):
        if not math.isnan(value):
            of.setdefault(patient, []).append(value)
    sums = np.array([math.fsum(own) for own in of.values()], np.float64)
    return sums, np.array([len(own) for own in of.values()], np.int64)


def _settings(patients: int, confidence: float) -> dict[str, object]:
    return {
        "n_resamples": RESAMPLES,
        "batch": max(1, min(RESAMPLES, 10**7 // patients)),  # bounds the memory
        "vectorized": True,
        "confidence_level": confidence,
        "method": "percentile",
        "random_state": np.random.default_rng(SEED),
    }


def _limits(result: object) -> Interval:
    interval = result.confidence_interval  # type: ignore[attr-defined]
    return float(interval.low), float(interval.high)
