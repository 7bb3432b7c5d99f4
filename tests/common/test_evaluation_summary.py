"""What per-subject results come to, against sums by hand."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest

from common.bootstrap import intervals_of_means
from common.evaluation_summary import by_site, fairness, group, over_sites
from tests.common.made_results import RESULTS, result

WT = {"a": [0.4, 0.6], "b": [0.9, 0.5, 0.7], "c": [0.8]}


def test_a_site_has_the_statistics_of_its_subjects():
    found = group(by_site(RESULTS)["b"], 0.95)
    dice = found["WT"]["dice"]
    assert (found["n"], found["patients"], dice["n"]) == (3, 3, 3)
    assert dice["mean"] == pytest.approx(statistics.fmean(WT["b"]))
    quartiles = statistics.quantiles(WT["b"], n=4, method="inclusive")
    assert [dice["q1"], dice["median"], dice["q3"]] == pytest.approx(quartiles)
    [interval] = intervals_of_means([WT["b"]], ["b1", "b2", "b3"], 0.95)
    assert (dice["ci_low"], dice["ci_high"]) == interval
    assert found["ET"]["dice"]["mean"] == pytest.approx(0.5)
    assert found["ED"].keys() == {
        *(["dice", "iou", "hd95", "sensitivity", "specificity", "precision"])
    }


def test_undefined_values_are_left_out_and_counted():
    found = group(by_site(RESULTS)["b"], 0.95)["ET"]["precision"]
    assert (found["mean"], found["n"]) == (0.5, 2)
    nothing = group([result("a", "a1", 0.5, precision=math.nan)], 0.95)["ET"]["precision"]
    assert nothing == dict.fromkeys(("mean", "median", "q1", "q3", "ci_low", "ci_high")) | {"n": 0}


def test_a_single_patient_has_a_mean_and_no_interval():
    dice = group(by_site(RESULTS)["c"], 0.95)["WT"]["dice"]
    assert (dice["mean"], dice["ci_low"], dice["ci_high"], dice["n"]) == (0.8, None, None, 1)
    time_points = [result("a", name, 0.5, patient="p") for name in ("a1", "a2")]
    assert group(time_points, 0.95)["WT"]["dice"]["ci_low"] is None
    assert group(time_points, 0.95)["patients"] == 1


def test_pooled_counts_subjects_alike_and_over_sites_sites():
    everybody = [value for values in WT.values() for value in values]
    means = [statistics.fmean(values) for values in WT.values()]
    pooled, alike = group(RESULTS, 0.95), over_sites(RESULTS, 0.95)
    assert (pooled["n"], alike["n"]) == (6, 3)
    assert pooled["WT"]["dice"]["mean"] == pytest.approx(statistics.fmean(everybody))
    dice = alike["WT"]["dice"]
    assert (dice["n"], dice["single_patient_sites"]) == (3, 1)
    assert dice["mean"] == pytest.approx(statistics.fmean(means))
    assert dice["median"] == pytest.approx(statistics.median(means))
    assert dice["ci_low"] < dice["mean"] < dice["ci_high"]
    # at a the only defined value is one subject's, at c too
    precision = alike["ET"]["precision"]
    assert (precision["n"], precision["single_patient_sites"]) == (3, 2)


def test_the_worst_site_and_the_spread_between_sites():
    sites = fairness(RESULTS, 0.95)["sites"]
    assert sites["WT"]["worst"] == {"site": "a", "dice": pytest.approx(0.5)}
    assert sites["WT"]["best"] == {"site": "c", "dice": pytest.approx(0.8)}
    assert sites["WT"]["spread"] == pytest.approx(0.3)
    assert sites["WT"]["std"] == pytest.approx(statistics.pstdev([0.5, 0.7, 0.8]))
    assert sites["regions"]["worst"] == {"site": "a", "dice": pytest.approx(0.4)}
    assert fairness(by_site(RESULTS)["b"], 0.95)["sites"] is None


def test_grades_are_apart_and_unknown_is_one_of_them():
    grades = fairness(RESULTS, 0.95)["grades"]
    assert {grade: of["n"] for grade, of in grades.items()} == {"HGG": 3, "LGG": 2, "unknown": 1}
    assert grades["LGG"]["WT"]["dice"]["mean"] == pytest.approx(0.65)
    assert list(fairness([replace(r, grade=None) for r in RESULTS], 0.95)["grades"]) == ["unknown"]


def test_sizes_are_the_tertiles_of_all_true_tumours():
    """5, 20, 30, 50, 80, 100 ml: two in each third."""
    sizes = fairness(RESULTS, 0.95)["sizes"]
    assert sizes["limits_ml"] == pytest.approx([20 + 2 / 3 * 10, 50 + 1 / 3 * 30])
    assert [sizes[size]["n"] for size in ("small", "medium", "large")] == [2, 2, 2]
    assert sizes["large"]["WT"]["dice"]["mean"] == pytest.approx(0.75)
    assert fairness(RESULTS[:2], 0.95)["sizes"] is None
    equal = fairness([replace(r, tumour_ml=7.0) for r in RESULTS], 0.95)["sizes"]
    assert equal.keys() == {"limits_ml", "small"}
