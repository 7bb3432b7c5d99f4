"""The report's figures draw the history's numbers, and leave a gap where there is none."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from common.figures import line_style
from common.metrics import SiteMetrics
from server.history import Contribution, RoundRecord
from server.report_figures import (
    FEWEST_TANGLED,
    boxes_over_sites,
    boxes_over_subjects,
    curves,
    curves_of_each_site,
    losses,
    participation,
    times_and_bytes,
)
from tests.server.test_tables import metrics

SITES = ("a", "b", "only-evaluates")


def dice(value: float) -> SiteMetrics:
    return metrics(2, dice_wt=value, dice_tc=value / 2, dice_et=value / 4, iou_wt=value / 3)


def a_round(number: int, absent: str = "", sites=("a", "b")) -> RoundRecord:
    contributions = tuple(
        Contribution(site, False, "off")
        if site == absent
        else Contribution(site, True, "", number / 10, 10.0 * number + place, 2.0, 3_000_000)
        for place, site in enumerate(sites)
    )
    measured = {"a": dice(number / 10), "b": dice(0.9), "only-evaluates": dice(0.2)}
    if absent:
        del measured[absent]
    return RoundRecord(number, 1e-3, 50.0, 0.4, "c", "s", contributions, measured)


@pytest.fixture
def records() -> list[RoundRecord]:
    """Three rounds; b is absent in the second."""
    return [a_round(1), a_round(2, "b"), a_round(3)]


def lines(axes) -> dict[str, list[float]]:
    return {line.get_label(): [float(y) for y in line.get_ydata()] for line in axes.get_lines()}


def test_curves_are_the_means_of_the_regions_with_gaps(records):
    figure = curves(records, SITES, chosen=3)
    left, right = figure.axes
    drawn = lines(left)
    for place, number in enumerate((1, 2, 3)):
        assert drawn["a"][place] == pytest.approx(number / 10 * (1 + 1 / 2 + 1 / 4) / 3)
    assert math.isnan(drawn["b"][1])
    assert drawn["b"][0] == pytest.approx(0.9 * 1.75 / 3)
    everybody = [
        np.mean([drawn[s][n] for s in SITES if not math.isnan(drawn[s][n])]) for n in range(3)
    ]
    assert drawn["mean over sites"] == pytest.approx(everybody)
    means = records[0].metrics["a"].means
    assert lines(right)["a"][0] == pytest.approx(
        sum(means[f"iou/{r}"] for r in ("WT", "TC", "ET")) / 3
    )
    [legend] = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named == ["b", "a", "only-evaluates", "mean over sites"], "as the lines end"


def test_a_site_looks_the_same_in_every_figure(records):
    for figure in (curves(records, SITES, None), losses(records, SITES)):
        [line] = [found for found in figure.axes[1].get_lines() if found.get_label() == "b"]
        style = line_style(SITES.index("b"))
        assert (line.get_color(), line.get_marker()) == (style.color, style.marker)


def test_each_sites_panel_has_its_regions(records):
    figure = curves_of_each_site(records, SITES, "dice")
    panels = {axes.get_title(loc="left"): lines(axes) for axes in figure.axes}
    assert list(panels) == list(SITES)
    assert panels["a"]["TC"] == pytest.approx([0.05, 0.1, 0.15])
    assert panels["only-evaluates"]["ET"] == pytest.approx([0.05] * 3)


def test_losses_and_times_are_the_sites_own(records):
    training, validation = (lines(axes) for axes in losses(records, SITES).axes)
    assert training["a"] == pytest.approx([0.1, 0.2, 0.3])
    assert math.isnan(training["b"][1])
    assert all(math.isnan(value) for value in training["only-evaluates"])
    assert validation["pooled over subjects"] == [0.4] * 3
    times, sizes = times_and_bytes(records, SITES).axes
    assert lines(times)["b"][0::2] == [11.0, 31.0]
    assert [bar.get_height() for bar in times.patches] == [50.0] * 3
    assert [bar.get_height() for bar in sizes.patches] == [6.0, 3.0, 6.0]


def test_times_of_many_sites_are_a_range():
    many = [f"s{n}" for n in range(FEWEST_TANGLED + 1)]
    records = [a_round(1, sites=many), a_round(2, sites=many)]
    times, _ = times_and_bytes(records, many).axes
    assert lines(times) == {"training, median of the sites": [15.0, 25.0]}
    corners = times.collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (10.0, 30.0)


def test_participation_tells_contributed_from_absent_from_evaluated(records):
    [axes] = participation(records, SITES).axes
    points = {
        found.get_label(): sorted(map(tuple, found.get_offsets().tolist()))
        for found in axes.collections
    }
    assert points == {
        "contributed": [(1, 0), (1, 1), (2, 0), (3, 0), (3, 1)],
        "absent": [(2, 1)],
        "only evaluated": [(1, 2), (2, 2), (3, 2)],
    }


def test_boxes_have_the_quartiles_of_five_and_only_the_median_of_fewer():
    values = {"a": {"WT": [0.1, 0.2, 0.4, 0.7, 0.8]}, "b": {"WT": [0.5, 0.9, math.nan]}, "c": {}}
    [axes] = boxes_over_subjects(values, "dice", ("WT",)).axes
    heights = [sorted(set(map(float, line.get_ydata()))) for line in axes.get_lines()]
    assert [0.2, 0.7] in heights, "the box"
    assert [0.4] in heights, "its median"
    assert [0.7] in heights, "the median of two"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert sum(len(points.get_offsets()) for points in axes.collections) == 7


def test_every_site_is_a_point_in_the_boxes_over_sites():
    found = {f"s{n}": dice(n / 10) for n in range(1, 7)}
    left, _ = boxes_over_sites(found).axes
    heights = sorted(round(y, 6) for _, y in left.collections[0].get_offsets())
    assert heights == [n / 10 for n in range(1, 7)]


def test_a_history_without_metrics_is_drawn_too(records):
    without = [replace(record, metrics={}, loss=None) for record in records]
    assert curves(without, SITES, None).axes
    assert not curves_of_each_site(without, SITES, "iou").axes
    assert losses(without, SITES).axes
