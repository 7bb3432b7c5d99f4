"""An evaluation on a terminal: tables of Dice with intervals, distances and lesions, then fairness and
what the numbers do not say, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from common.console import RESEARCH_ONLY, many, plain
from common.metrics import REGIONS

Rows = list[tuple[str, Mapping[str, Any]]]


def evaluation_tables(document: Mapping[str, Any]) -> Group:
    """Everything to print of a document, for rich."""
    sites: Rows = list(document["sites"].items())
    totals: Rows = [
        ("all subjects", document["pooled"]),
        ("mean over sites", document["over_sites"]),
    ]
    if len(sites) == 1:  # both would be the site's row again
        totals = []
    n = document["pooled"]["n"]
    share = f"{document['confidence']:.0%}"
    return Group(
        f"Dice on {_subjects_of(document)}, mean and {share} interval",
        _table(sites, totals, [("Dice", "dice", 3, True)], n),
        "HD95 in mm and lesion-wise Dice (BraTS 2023: true lesions of 50 mm³ or less are not counted), means",
        _table(
            sites,
            totals,
            [("HD95", "hd95", 1, False), ("lesion Dice", "lesion_dice", 3, False)],
            n,
        ),
        *(Text(line) for line in lines(document)),
    )


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """Fairness, left-out subjects and remarks, in words."""
    yield from fairness_lines(document)
    for subject in document["left_out"]:
        site = f" of {plain(subject['site'])}" if subject["site"] else ""
        yield f"Left out: {plain(subject['subject'])}{site}: {plain(subject['why']).rstrip('.')}."
    yield from document["remarks"]
    yield RESEARCH_ONLY


def fairness_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """How Dice differs between sites, grades and sizes of tumours, in words."""
    fairness = document["fairness"]
    between = fairness["sites"]
    if between is None:
        yield "Only one site: no spread between sites."
    else:
        for name, found in between.items():
            what = "mean Dice of WT, TC, ET" if name == "regions" else f"Dice {name}"
            best, worst = found["best"], found["worst"]
            yield (
                f"Worst site by {what}: {plain(worst['site'])} {worst['dice']:.3f}; best "
                f"{plain(best['site'])} {best['dice']:.3f}; spread {found['spread']:.3f}, standard "
                f"deviation {found['std']:.3f} over {found['n']} sites."
            )
    for grade, of in fairness["grades"].items():
        yield f"Grade {grade}: {_dice_in_words(of)}."
    sizes = fairness["sizes"]
    if sizes is not None:
        low, high = sizes["limits_ml"]
        ranges = {
            "small": f"up to {low:.1f} ml",
            "medium": f"to {high:.1f} ml",
            "large": f"above {high:.1f} ml",
        }
        for size, text in ranges.items():
            if size in sizes:
                yield f"Tumours {text} ({size}): {_dice_in_words(sizes[size])}."


def _subjects_of(document: Mapping[str, Any]) -> str:
    return {
        "held-out": "each site's held-out subjects",
        "training": "each site's TRAINING subjects",
        "folder": "the subjects",
    }[document["of"]]


def _table(
    sites: Rows, totals: Rows, metrics: Sequence[tuple[str, str, int, bool]], n: int
) -> Table:
    """`metrics` holds heading, metric, digits, and whether its interval is shown."""
    table = Table("site")
    for heading, *_ in metrics:
        for region in REGIONS:
            table.add_column(f"{heading} {region}", justify="right")
    table.add_column("n", justify="right")
    for rows in (sites, totals):
        for name, of in rows:
            cells = [
                _cell(of.get(region, {}).get(metric), digits, with_interval)
                for _, metric, digits, with_interval in metrics
                for region in REGIONS
            ]
            count = n if rows is totals else of["n"]
            table.add_row(Text(plain(name)), *cells, str(count))
        table.add_section()
    return table


def _cell(statistic: Mapping[str, Any] | None, digits: int, with_interval: bool) -> Text:
    if statistic is None or statistic["mean"] is None:
        return Text("-")
    text = f"{statistic['mean']:.{digits}f}"
    if with_interval and statistic["ci_low"] is not None:
        text += f" ({statistic['ci_low']:.2f}–{statistic['ci_high']:.2f})"
    return Text(text)


def _dice_in_words(of: Mapping[str, Any]) -> str:
    dice = ", ".join(f"{region} {of[region]['dice']['mean']:.3f}" for region in REGIONS)
    return f"Dice {dice} ({many(of['n'], 'subject')})"
