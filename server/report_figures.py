"""The figures that a run's history alone can give: curves, times, bytes, who took part, spread.

Every function takes records of complete rounds and the sites in the order in which they are shown,
which decides how each looks in all figures. A value that a site did not tell leaves a gap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.figures import (
    BLACK,
    BLUE,
    FAINT,
    GREY,
    REGION_STYLES,
    SKY,
    VERMILLION,
    line_style,
    new_figure,
    shown_name,
    styled,
)
from common.metrics import REGIONS, SiteMetrics, mean_over_regions
from server.history import Contribution, RoundRecord

FEWEST_IN_A_BOX = 5  # quartiles of fewer values say nothing that the values do not
FEWEST_TANGLED = 10  # times of more sites than these are shown as a range
FEWEST_MARKED = 15  # with more rounds than these not every point gets a marker
MEGABYTE = 1e6
SPELLED = {"dice": "Dice", "iou": "IoU", "hd95": "HD95"}
DRAWN = ("dice", "iou")  # over the rounds, and of sites
Records = Sequence[RoundRecord]


@styled
def curves(records: Records, sites: Sequence[str], chosen: int | None) -> Figure:
    """Dice and IoU over the rounds, each the mean of WT, TC and ET; a line for each site.

    The legend names the sites in the order in which their lines end.
    """
    told = _best_first(records, sites)
    figure = new_figure(max(3.4, 0.6 + 0.19 * (len(told) + 1)))
    for place, metric in enumerate(DRAWN, start=1):
        axes = figure.add_subplot(1, 2, place)
        for site in told:
            values = [_mean_of_regions(r.metrics.get(site), metric) for r in records]
            _line(axes, records, values, sites.index(site), shown_name(site))
        means = [_mean([_mean_of_regions(m, metric) for m in r.metrics.values()]) for r in records]
        axes.plot(_numbers(records), means, color=BLACK, linewidth=3, label="mean over sites")
        _share_axes(axes, records, f"{SPELLED[metric]}, mean of WT, TC and ET")
        _mark_chosen(axes, records, chosen)
    if told:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


@styled
def curves_of_each_site(records: Records, sites: Sequence[str], metric: str) -> Figure:
    """A panel for each site with its three regions, over the range of all sites' means in grey."""
    told = [site for site in sites if any(site in r.metrics for r in records)]
    columns = 4
    rows = max(1, math.ceil(len(told) / columns))
    figure = new_figure(0.5 + 1.75 * rows)
    numbers = _numbers(records)
    everyone = [[_mean_of_regions(m, metric) for m in r.metrics.values()] for r in records]
    low = [min(values, default=math.nan) for values in everyone]
    high = [max(values, default=math.nan) for values in everyone]
    for place, site in enumerate(told):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.fill_between(numbers, low, high, color=FAINT, linewidth=0, label="all sites (mean)")
        for region, (colour, dashes, marker) in REGION_STYLES.items():
            values = [_value(r.metrics.get(site), f"{metric}/{region}") for r in records]
            axes.plot(
                numbers,
                values,
                color=colour,
                linestyle=dashes,
                marker=marker,
                markersize=3,
                markevery=_every(records),
                label=region,
            )
        _share_axes(axes, records, shown_name(site))
        axes.set_xlabel("")
        if place % columns:
            axes.tick_params(labelleft=False)
        else:
            axes.set_ylabel(SPELLED[metric])
    if told:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@styled
def losses(records: Records, sites: Sequence[str]) -> Figure:
    """The sites' mean loss in training, and on their held-out subjects with the pooled one."""
    figure = new_figure(max(3.2, 0.6 + 0.19 * (len(sites) + 1)))
    training, validation = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for index, site in enumerate(sites):
        losses = [_of(r, site, lambda c: c.train_loss) for r in records]
        _line(training, records, losses, index, shown_name(site))
        held_out = [_value(r.metrics.get(site), "loss") for r in records]
        _line(validation, records, held_out, index, shown_name(site))
    pooled = [math.nan if r.loss is None else r.loss for r in records]
    label = "pooled over subjects"
    validation.plot(_numbers(records), pooled, color=BLACK, linewidth=3, label=label)
    for axes, title in ((training, "Training"), (validation, "Held-out subjects")):
        _share_axes(axes, records, f"{title}: loss", top=None)
    figure.legend(*validation.get_legend_handles_labels(), loc="outside right upper")
    return figure


@styled
def times_and_bytes(records: Records, sites: Sequence[str]) -> Figure:
    """How long each round took and what it received, with each site's training time, or their range."""
    figure = new_figure(3.2)
    times, sizes = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    numbers = _numbers(records)
    times.bar(numbers, [r.seconds for r in records], color=FAINT, edgecolor=GREY, linewidth=0.6,
              label="whole round")  # fmt: skip
    seconds = [[_of(r, site, lambda c: c.seconds) for r in records] for site in sites]
    if len(sites) <= FEWEST_TANGLED:
        for index, (site, values) in enumerate(zip(sites, seconds, strict=True)):
            _line(times, records, values, index, shown_name(site))
    else:
        by_round = [[s for s in of if not math.isnan(s)] for of in zip(*seconds, strict=True)]
        fastest, slowest = ([f(of, default=math.nan) for of in by_round] for f in (min, max))
        median = [float(np.median(of)) if of else math.nan for of in by_round]
        times.fill_between(numbers, fastest, slowest, color=SKY, alpha=0.6, linewidth=0,
                           label="training, fastest to slowest site")  # fmt: skip
        times.plot(numbers, median, color=BLACK, linewidth=2, label="training, median of the sites")
    received = [sum(c.bytes or 0 for c in r.contributions) / MEGABYTE for r in records]
    sizes.bar(numbers, received, color=SKY, edgecolor=GREY, linewidth=0.6)
    _share_axes(times, records, "Seconds: the whole round, and training", top=None)
    _share_axes(sizes, records, "Megabytes of updates received in the round", top=None)
    for axes in (times, sizes):
        axes.set_ylim(bottom=0)
    figure.legend(*times.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


@styled
def participation(records: Records, sites: Sequence[str]) -> Figure:
    """What each site did in each round: trained, was absent, or was evaluated only."""
    figure = new_figure(0.95 + 0.24 * len(sites))
    axes = figure.add_subplot()
    size = max(12.0, min(70.0, 1500 / max(len(records), 1)))
    looks: dict[str, dict[str, Any]] = {
        "contributed": {"marker": "s", "facecolor": BLUE, "edgecolor": BLUE},
        "absent": {"marker": "x", "color": VERMILLION, "linewidth": 1.8},
        "only evaluated": {"marker": "o", "facecolor": "none", "edgecolor": GREY, "linewidth": 1.2},
    }
    for what, look in looks.items():
        points = [
            (r.round, row)
            for r in records
            for row, site in enumerate(sites)
            if _what_it_did(r, site) == what
        ]
        if points:
            across, down = zip(*points, strict=True)
            axes.scatter(across, down, s=size, label=what, **look)
    axes.set_yticks(range(len(sites)), [shown_name(site) for site in sites])
    axes.set_ylim(len(sites) - 0.5, -0.5)
    axes.set_xlim(0.4, (records[-1].round if records else 1) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20, min_n_ticks=1))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("round")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


@styled
def boxes_over_sites(metrics: Mapping[str, SiteMetrics]) -> Figure:
    """How far the sites' means lie apart: a box for each region, and each site as a point in it."""
    figure = new_figure(3.2)
    for place, metric in enumerate(DRAWN, start=1):
        axes = figure.add_subplot(1, 2, place)
        for column, region in enumerate(REGIONS):
            values = [_value(m, f"{metric}/{region}") for m in metrics.values()]
            box_and_points(axes, column, values, REGION_STYLES[region][0], REGION_STYLES[region][2])
        axes.set_xticks(range(len(REGIONS)), REGIONS)
        axes.set_ylim(-0.02, 1.02)
        axes.set_title(f"{SPELLED[metric]}: each point is a site's mean")
    return figure


@styled
def boxes_over_subjects(
    values: Mapping[str, Mapping[str, Sequence[float]]], metric: str, structures: Sequence[str]
) -> Figure:
    """Site -> structure -> a value for each subject; a panel for each structure, a box for each site."""
    figure = new_figure(1.6 * len(structures) + 0.4)
    shared: Axes | None = None
    for place, structure in enumerate(structures, start=1):
        axes = figure.add_subplot(len(structures), 1, place, sharex=shared)
        shared = shared or axes
        for column, site in enumerate(values):
            style = line_style(column)
            found = values[site].get(structure, ())
            box_and_points(axes, column, found, style.color, style.marker)
        axes.set_ylabel(f"{SPELLED.get(metric, metric)} {structure}")
        axes.set_ylim(-0.04, 1.04)
        axes.grid(axis="x", visible=False)
        axes.tick_params(labelbottom=place == len(structures))
    if shared is not None:
        shared.set_xlim(-0.6, len(values) - 0.4)
        labels = [shown_name(site) for site in values]
        crowded = len(labels) > 8 or max(map(len, labels), default=0) > 12
        axes.set_xticks(range(len(labels)), labels, rotation=40 if crowded else 0,
                        ha="right" if crowded else "center")  # fmt: skip
    return figure


def box_and_points(
    axes: Axes, column: float, values: Sequence[float], colour: str, marker: str
) -> None:
    """Every value as a point; median and quartiles as a box where there are enough of them."""
    found = [value for value in values if not math.isnan(value)]
    if not found:
        return
    if len(found) >= FEWEST_IN_A_BOX:
        line = {"color": GREY, "linewidth": 1.1}
        axes.boxplot(
            [found],
            positions=[column],
            widths=0.5,
            showfliers=False,  # they are among the points
            boxprops=line,
            whiskerprops=line,
            capprops=line,
            medianprops={"color": BLACK, "linewidth": 2},
            manage_ticks=False,
        )
    else:
        median = float(np.median(found))
        axes.plot([column - 0.25, column + 0.25], [median, median], color=BLACK, linewidth=2)
    # side by side in an order that depends on nothing but the values
    across = np.linspace(-0.16, 0.16, len(found)) if len(found) > 1 else np.zeros(1)
    axes.scatter(column + across, found, s=30, marker=marker, color=colour, alpha=0.85, zorder=3,
                 linewidth=0.4, edgecolor="white")  # fmt: skip


def _line(axes: Axes, records: Records, values: Sequence[float], index: int, label: str) -> None:
    style = line_style(index)
    axes.plot(_numbers(records), values, label=label, markevery=_every(records), **style._asdict())


def _share_axes(axes: Axes, records: Records, title: str, *, top: float | None = 1.0) -> None:
    axes.set_title(title)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    if top is not None:
        axes.set_ylim(0, top)
    last = records[-1].round if records else 1
    axes.set_xlim(0.5, last + 0.5)


def _mark_chosen(axes: Axes, records: Records, chosen: int | None) -> None:
    if chosen is None:
        return
    late = chosen > records[-1].round / 2
    axes.axvline(chosen, color=GREY, linestyle=(0, (2, 2)), linewidth=1, zorder=1)
    axes.annotate(
        "chosen",
        (chosen, 0.01),
        xycoords=("data", "axes fraction"),
        xytext=(-3 if late else 3, 2),
        ha="right" if late else "left",
        textcoords="offset points",
        color=GREY,
        fontsize=8,
    )


def _best_first(records: Records, sites: Sequence[str]) -> list[str]:
    """The sites that ever told metrics, by the mean Dice that each told last."""
    last = {site: _mean_of_regions(m, "dice") for r in records for site, m in r.metrics.items()}
    told = [site for site in sites if site in last]
    return sorted(
        told, key=lambda site: -1.0 if math.isnan(last[site]) else last[site], reverse=True
    )


def _numbers(records: Records) -> list[int]:
    return [record.round for record in records]


def _every(records: Records) -> int:
    return 1 + len(records) // FEWEST_MARKED


def _what_it_did(record: RoundRecord, site: str) -> str:
    for contribution in record.contributions:
        if contribution.site == site:
            return "contributed" if contribution.trained else "absent"
    return "only evaluated" if site in record.metrics or site in record.released else "nothing"


def _of(record: RoundRecord, site: str, what: Callable[[Contribution], float | None]) -> float:
    found = next((what(c) for c in record.contributions if c.site == site), None)
    return math.nan if found is None else found


def _value(metrics: SiteMetrics | None, key: str) -> float:
    return metrics.means.get(key, math.nan) if metrics else math.nan


def _mean_of_regions(metrics: SiteMetrics | None, metric: str) -> float:
    return mean_over_regions(metrics, metric) if metrics else math.nan


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
