"""What `fed-sim evaluate` has kept of a run, as parts of its report: the section and the held-out grades.

The numbers are the document's own (`common.evaluation_document`); nothing is computed anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from common.evaluation_summary import GRADES
from common.evaluation_table import fairness_lines
from common.metrics import REGIONS
from server.report import Section, Table

TITLE = "Evaluation"
METRICS = (("dice", "Dice", 3), ("hd95", "HD95", 1), ("lesion_dice", "lesion-wise Dice", 3))
NOT_EVALUATED = (
    "Intervals, lesion-wise scores and fairness are not there: fed-sim evaluate RUN adds them, once the "
    "run is complete."
)
DAMAGED = "What fed-sim evaluate has kept cannot be read; evaluate again."


def evaluation_section(document: Mapping[str, Any] | None) -> Section:
    """Means over sites and over subjects with intervals, and fairness; a sentence where there is none."""
    if document is None:
        return Section("evaluation", TITLE, [NOT_EVALUATED])
    try:
        rows = [
            [
                f"{name} {region}",
                *_cells(document["over_sites"][region][metric], digits),
                *_cells(document["pooled"][region][metric], digits),
            ]
            for metric, name, digits in METRICS
            for region in REGIONS
        ]
        caption = (
            f"Means with {document['confidence']:.0%} intervals; HD95 in mm; lesion-wise as in BraTS 2023. "
            "Over sites each site counts alike, over subjects each subject."
        )
        return Section(
            "evaluation",
            TITLE,
            list(fairness_lines(document)),
            [Table(_HEADINGS, rows, caption)],
            remarks=list(map(str, document["remarks"])),
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        return Section("evaluation", TITLE, [DAMAGED])


def held_out_grades(document: Mapping[str, Any] | None) -> dict[str, dict[str, int]]:
    """Site -> grade -> held-out subjects, grades in their usual order; nothing where no grade is known."""
    try:
        pairs = [
            (str(subject["site"]), subject["grade"] or "unknown")
            for subject in (document or {"subjects": []})["subjects"]
        ]
    except (LookupError, TypeError):
        return {}
    if all(grade == "unknown" for _, grade in pairs):
        return {}
    counts = Counter(pairs)
    return {
        site: {grade: counts[site, grade] for grade in GRADES if counts[site, grade]}
        for site in sorted({site for site, _ in pairs})
    }


_HEADINGS = ("", "over sites", "interval", "sites", "over subjects", "interval", "subjects")


def _cells(of: Mapping[str, Any], digits: int) -> list[str]:
    if of["mean"] is None:
        return ["-", "-", "0"]
    interval = "-"
    if of["ci_low"] is not None:
        interval = f"{of['ci_low']:.{digits}f}–{of['ci_high']:.{digits}f}"
    return [f"{of['mean']:.{digits}f}", interval, str(of["n"])]
