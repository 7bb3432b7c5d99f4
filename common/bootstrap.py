"""Bootstrap confidence intervals of means over patients, by scipy's percentile bootstrap.

What is drawn anew is patients, each with all of its scans: scans of one patient are not independent,
and an interval that took them for so would be too narrow. Each site's patients are drawn within the
site, so an interval says what other patients of these same sites might have given, nothing about
other sites. Values that are undefined (NaN) are left out. The seed is fixed: the same values give
the same interval.

Many quantities of the same scans are given at once, as columns: one row of values for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

RESAMPLES = 2000
SEED = 0
FEWEST_PATIENTS = 2  # from a single one nothing can be said about others
MOST_NUMBERS = 10**7  # of resampled values in memory at once
Interval = tuple[float, float]
Columns = Sequence[Sequence[float]]  # one row per quantity, one value in it per scan


def intervals_of_means(
    columns: Columns, patients: Sequence[str], confidence: float
) -> list[Interval | None]:
    """Of each row of `columns` the interval of its mean; `patients` says whose each scan is.

    None where fewer than two patients have a defined value.
    """
    sums, counts = _by_patient(columns, patients)
    found: list[Interval | None] = [None] * len(columns)
    for rows, drawn in _defined_alike(counts):
        if drawn.size >= FEWEST_PATIENTS:
            site = sums[np.ix_(rows, drawn)], counts[np.ix_(rows, drawn)]
            for row, interval in zip(rows, _intervals([site], 0.0, 1, confidence), strict=True):
                found[row] = interval
    return found


def intervals_of_means_over_sites(
    sites: Sequence[tuple[Columns, Sequence[str]]], confidence: float
) -> list[tuple[Interval | None, int]]:
    """The same of the unweighted mean of the sites' means, each site given as above.

    Sites without a defined value are left out. A site with a single patient cannot be drawn anew: its
    mean stays as it is, which makes the interval too narrow.

    Returns:
        Of each row the interval, None where every site has a single patient; and the number of such
        sites.
    """
    tables = [_by_patient(*site) for site in sites]
    found: list[tuple[Interval | None, int]] = [(None, 0)] * (len(sites[0][0]) if sites else 0)
    if not sites:
        return found
    ends = np.cumsum([counts.shape[1] for _, counts in tables])[:-1]
    for rows, drawn in _defined_alike(np.concatenate([counts for _, counts in tables], axis=1)):
        of_sites = np.split(drawn, np.searchsorted(drawn, ends))
        starts = (0, *ends)
        several, fixed, single = [], np.zeros(len(rows)), 0
        for (sums, counts), patients, start in zip(tables, of_sites, starts, strict=True):
            own = np.ix_(rows, patients - start)
            if patients.size >= FEWEST_PATIENTS:
                several.append((sums[own], counts[own]))
            elif patients.size:
                fixed += (sums[own] / counts[own])[:, 0]
                single += 1
        intervals: list[Interval | None] = [None] * len(rows)
        if several:
            intervals = [*_intervals(several, fixed, len(several) + single, confidence)]
        for row, interval in zip(rows, intervals, strict=True):
            found[row] = interval, single
    return found


def _by_patient(columns: Columns, patients: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(rows, patients): of each patient the sum of its defined values, and their number."""
    values = np.array(columns, np.float64)
    names = {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
    whose = np.zeros((len(patients), len(names)))
    whose[range(len(patients)), [names[patient] for patient in patients]] = 1
    defined = ~np.isnan(values)
    return np.where(defined, values, 0.0) @ whose, defined.astype(np.float64) @ whose


def _defined_alike(counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows that are defined for the same patients, with the numbers of these: they can be drawn at once."""
    alike: dict[bytes, list[int]] = {}
    for row, of in enumerate(counts > 0):
        alike.setdefault(of.tobytes(), []).append(row)
    return ((np.array(rows), np.flatnonzero(counts[rows[0]])) for rows in alike.values())


def _intervals(
    sites: Sequence[tuple[np.ndarray, np.ndarray]],
    fixed: np.ndarray | float,
    n: int,
    confidence: float,
) -> Iterator[Interval]:
    """Of every row: the sites' means, drawn anew, and `fixed`, together over `n`."""
    from scipy.stats import bootstrap

    def mean(*drawn: np.ndarray, axis: int) -> np.ndarray:
        total = sum(
            sums[:, at].sum(axis=axis) / counts[:, at].sum(axis=axis)
            for (sums, counts), at in zip(sites, drawn, strict=True)
        )
        return (total + np.reshape(fixed, (-1, *[1] * (np.ndim(drawn[0]) - 1)))) / n

    numbers = sum(sums.size for sums, _ in sites)
    interval = bootstrap(
        [np.arange(sums.shape[1]) for sums, _ in sites],
        mean,
        n_resamples=RESAMPLES,
        batch=max(1, min(RESAMPLES, MOST_NUMBERS // numbers)),
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(SEED),
    ).confidence_interval
    return (
        (float(low), float(high)) for low, high in zip(interval.low, interval.high, strict=True)
    )
