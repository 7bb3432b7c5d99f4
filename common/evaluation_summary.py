"""What the per-subject results of an evaluation come to: means with intervals, per site, pooled and
over sites, and how fair they are.

Numbers only: measuring is for `client.subject_results`, files for `common.evaluation_document`. A value
that is undefined for a subject (see `common.metrics`) is NaN and left out of every statistic, which
says how many values it is over. What an interval covers: `common.bootstrap`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from common.bootstrap import Interval, intervals_of_means, intervals_of_means_over_sites
from common.metrics import REGIONS

METRICS = ("dice", "iou", "hd95", "sensitivity", "specificity", "precision")
LESION_METRICS = ("lesion_dice", "lesion_hd95")  # of the regions WT, TC and ET only
GRADES = ("HGG", "LGG", "unknown")
SIZES = ("small", "medium", "large")
RANKS = ("best", "median", "worst", "the only one")


@dataclass(frozen=True)
class SubjectResult:
    """One subject's scores: structure -> metric -> value, distances in mm, undefined ones NaN.

    `grade` is "HGG", "LGG" or None where it is not known; `tumour_ml` is the true whole tumour.
    """

    site: str
    subject: str
    patient: str
    grade: str | None
    tumour_ml: float
    scores: dict[str, dict[str, float]]

    @property
    def dice(self) -> dict[str, float]:
        return {region: self.scores[region]["dice"] for region in REGIONS}

    @property
    def regions_dice(self) -> float:
        """The headline figure: the mean Dice of WT, TC and ET."""
        return math.fsum(self.dice.values()) / len(REGIONS)


@dataclass(frozen=True)
class Statistic:
    """Of the `n` defined values; NaN if there is none. Without limits there is no interval, as with
    fewer than two patients."""

    mean: float
    median: float
    q1: float
    q3: float
    ci_low: float | None
    ci_high: float | None
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN."""
        return {key: _or_none(value) for key, value in asdict(self).items()}


Group = dict[str, Any]
"""{"n", structure: {metric: {"mean", "median", "q1", "q3", "ci_low", "ci_high", "n"}}}. Of subjects, "n"
counts them and "patients" is beside it; over sites, "n" counts sites, in each metric too, beside
"single_patient_sites"."""


def statistic(values: Sequence[float], interval: Interval | None) -> Statistic:
    """Mean, median and quartiles (linear between values) of the defined values."""
    defined = [value for value in values if not math.isnan(value)]
    if not defined:
        return Statistic(math.nan, math.nan, math.nan, math.nan, None, None, 0)
    q1, median, q3 = (float(q) for q in np.quantile(defined, (0.25, 0.5, 0.75)))
    low, high = interval or (None, None)
    mean = math.fsum(defined) / len(defined)  # as `common.metrics.summarise`
    return Statistic(mean, median, q1, q3, low, high, len(defined))


def group(results: Sequence[SubjectResult], confidence: float) -> Group:
    """The statistics of some subjects, each alike."""
    patients = [result.patient for result in results]
    keys = _keys(results)
    columns = _columns(results, keys)
    intervals = intervals_of_means(columns, patients, confidence)
    found: Group = {"n": len(results), "patients": len(set(patients))}
    for (structure, metric), values, interval in zip(keys, columns, intervals, strict=True):
        found.setdefault(structure, {})[metric] = statistic(values, interval).as_dict()
    return found


def by_site(results: Sequence[SubjectResult]) -> dict[str, list[SubjectResult]]:
    """Site -> its results, sites by name."""
    return {
        site: [result for result in results if result.site == site]
        for site in sorted({result.site for result in results})
    }


def ranked(results: Sequence[SubjectResult]) -> list[SubjectResult]:
    """By the mean Dice of WT, TC and ET, worst first; the order of `results` has no influence."""
    return sorted(results, key=lambda r: (r.regions_dice, r.site, r.subject))


def shown_subjects(results: Sequence[SubjectResult]) -> dict[str, SubjectResult]:
    """The best, the median (the lower one of two) and the worst; fewer where there are fewer.

    The keys are of RANKS.
    """
    order = ranked(results)
    last = len(order) - 1
    places = {"best": last, "median": last // 2, "worst": 0}
    if len(order) == 2:
        del places["median"]
    elif len(order) < 2:
        places = {"the only one": 0} if order else {}
    return {rank: order[place] for rank, place in places.items()}


def over_sites(results: Sequence[SubjectResult], confidence: float) -> Group:
    """The statistics of the sites' means, each site alike; here `n` counts sites.

    `single_patient_sites` is how many of these have one patient, so that the interval, which keeps
    their means as they are, is too narrow.
    """
    sites = list(by_site(results).values())
    keys = _keys(results)
    columns = [_columns(site, keys) for site in sites]
    patients = [[result.patient for result in site] for site in sites]
    intervals = intervals_of_means_over_sites(list(zip(columns, patients, strict=True)), confidence)
    found: Group = {"n": len(sites)}
    for row, (structure, metric) in enumerate(keys):
        means = [statistic(own[row], None).mean for own in columns]
        interval, single = intervals[row]
        of = {**statistic(means, interval).as_dict(), "single_patient_sites": single}
        found.setdefault(structure, {})[metric] = of
    return found


def fairness(results: Sequence[SubjectResult], confidence: float) -> dict[str, Any]:
    """How Dice differs between sites, grades and sizes of tumours.

    Returns:
        "sites": for "regions" (the mean of WT, TC, ET) and each region, of the sites' mean Dice the
        best and worst {"site", "dice"}, "spread" (best - worst) and "std" (over these sites, the
        population's); None where there is one site only.
        "grades": HGG, LGG and unknown -> group, without empty ones.
        "sizes": small, medium, large -> group, and "limits_ml" between them, the tertiles of the
        true whole tumours; None with fewer than three subjects.
    """
    sites = by_site(results)
    dice: dict[str, Callable[[SubjectResult], float]] = {
        "regions": lambda result: result.regions_dice,
        **{region: _dice_of(region) for region in REGIONS},
    }
    grades = {
        grade: [result for result in results if (result.grade or "unknown") == grade]
        for grade in GRADES
    }
    return {
        "sites": {
            name: _between(
                {site: math.fsum(map(of, own)) / len(own) for site, own in sites.items()}
            )
            for name, of in dice.items()
        }
        if len(sites) > 1
        else None,
        "grades": {grade: group(own, confidence) for grade, own in grades.items() if own},
        "sizes": _by_size(results, confidence),
    }


def _between(dice: Mapping[str, float]) -> dict[str, Any]:
    """`dice` is site -> mean Dice; of equal sites the first by name is named."""
    best, worst = max(dice, key=lambda site: dice[site]), min(dice, key=lambda site: dice[site])
    return {
        "best": {"site": best, "dice": dice[best]},
        "worst": {"site": worst, "dice": dice[worst]},
        "spread": dice[best] - dice[worst],
        "std": float(np.std(list(dice.values()))),
        "n": len(dice),
    }


def _by_size(results: Sequence[SubjectResult], confidence: float) -> dict[str, Any] | None:
    if len(results) < len(SIZES):
        return None
    volumes = [result.tumour_ml for result in results]
    low, high = (float(limit) for limit in np.quantile(volumes, (1 / 3, 2 / 3)))
    members: dict[str, list[SubjectResult]] = {size: [] for size in SIZES}
    for result, volume in zip(results, volumes, strict=True):
        members[SIZES[(volume > low) + (volume > high)]].append(result)
    groups = {size: group(own, confidence) for size, own in members.items() if own}
    return {"limits_ml": [low, high], **groups}


def _keys(results: Sequence[SubjectResult]) -> list[tuple[str, str]]:
    """Every (structure, metric) that a result has."""
    every = (
        (structure, metric)
        for result in results
        for structure, scores in result.scores.items()
        for metric in scores
    )
    return list(dict.fromkeys(every))


def _columns(
    results: Sequence[SubjectResult], keys: Sequence[tuple[str, str]]
) -> list[list[float]]:
    return [
        [result.scores.get(structure, {}).get(metric, math.nan) for result in results]
        for structure, metric in keys
    ]


def _dice_of(region: str) -> Callable[[SubjectResult], float]:
    return lambda result: result.scores[region]["dice"]


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
