"""An evaluation as files: one JSON document, and two tables as CSV; and the document read back.

The document holds subject ids and per-subject results, so it stays where the scans are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.console import RESEARCH_ONLY
from common.csv_cells import csv_text
from common.environment import installed_version
from common.evaluation_summary import SubjectResult, by_site, fairness, group, over_sites
from common.files import write_text_atomically

FORMAT = "fedbrats-evaluation/1"
INTERVALS = (
    "Intervals say what other patients of these same sites might have given, by a percentile "
    "bootstrap over patients (too narrow with fewer than about 20 of them); nothing about other "
    "hospitals, nor about another training."
)
DOCUMENT, SUBJECTS, SUMMARY = "evaluation.json", "subjects.csv", "summary.csv"
STATISTICS = ("n", "mean", "ci_low", "ci_high", "median", "q1", "q3")
PACKAGES = ("fedbrats", "torch", "monai", "scipy", "numpy")


class EvaluationError(RuntimeError):
    """An evaluation is not possible or cannot be read; the text says what to do."""


def evaluation_document(
    results: Sequence[SubjectResult],
    *,
    model: Mapping[str, str],
    of: str,
    segmentation: Mapping[str, Any],
    label_coding: str,
    confidence: float,
    remarks: Sequence[str] = (),
    findings: Sequence[Mapping[str, str]] = (),
    left_out: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """All there is to say about these results, in plain JSON types without NaN.

    Args:
        model: its "file" and "sha256".
        of: whose results they are: "held-out" or "training" subjects of a run, or a "folder".
        segmentation: how: "flips" and "postprocess", the steps after the network.
        label_coding: what the labels in the files were taken for: auto, or of `common.brats.CODINGS`.
        remarks: sentences that a reader of the numbers must know.
        findings: as `sites.finding.Finding.as_dict`.
        left_out: "site", "subject" and "why" of every subject without results.
    """
    return {
        "format": FORMAT,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: installed_version(name) for name in PACKAGES},
        "model": dict(model),
        "note": RESEARCH_ONLY,
        "of": of,
        "segmentation": dict(segmentation),
        "label_coding": label_coding,
        "confidence": confidence,
        "remarks": list(remarks),
        "subjects": [_plain(result) for result in results],
        "sites": {site: group(own, confidence) for site, own in by_site(results).items()},
        "pooled": group(results, confidence),
        "over_sites": over_sites(results, confidence),
        "fairness": fairness(results, confidence),
        "findings": [dict(finding) for finding in findings],
        "left_out": [dict(subject) for subject in left_out],
    }


def as_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, allow_nan=False)


def write_evaluation(document: Mapping[str, Any], out: Path) -> tuple[Path, ...]:
    """Write the three files into `out`, which is made; returns their paths, the document's first.

    Raises:
        OSError: `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    texts = {  # the document last: where it is new, all is
        SUBJECTS: subjects_csv(document),
        SUMMARY: summary_csv(document),
        DOCUMENT: as_json(document) + "\n",
    }
    for name, text in texts.items():
        write_text_atomically(out / name, text)
    return out / DOCUMENT, out / SUBJECTS, out / SUMMARY


def read_evaluation(path: Path) -> dict[str, Any]:
    """The document in a file that `write_evaluation` wrote.

    Raises:
        EvaluationError: it is missing, damaged or of another format.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise EvaluationError(f"{path}: cannot be read ({reason}); evaluate again.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise EvaluationError(f"{path}: holds no evaluation of this version; evaluate again.")
    return document


def results_in(document: Mapping[str, Any]) -> list[SubjectResult]:
    """The per-subject results that a document was made from."""
    return [
        SubjectResult(
            **{
                **subject,
                "scores": {
                    structure: {
                        metric: math.nan if value is None else value
                        for metric, value in scores.items()
                    }
                    for structure, scores in subject["scores"].items()
                },
            }
        )
        for subject in document["subjects"]
    ]


def subjects_csv(document: Mapping[str, Any]) -> str:
    """One line per subject, structure and metric; undefined values are empty."""
    about = ("site", "subject", "patient", "grade", "tumour_ml")
    lines = (
        [*(subject[key] for key in about), structure, metric, value]
        for subject in document["subjects"]
        for structure, scores in subject["scores"].items()
        for metric, value in scores.items()
    )
    return csv_text([*about, "structure", "metric", "value"], lines)


def summary_csv(document: Mapping[str, Any]) -> str:
    """One line per group (site, pooled, over_sites, grade, size), structure and metric."""
    lines = (
        [kind, name, structure, metric, *(of[key] for key in STATISTICS)]
        for kind, name, summary in _groups(document)
        for structure, metrics in structures(summary)
        for metric, of in metrics.items()
    )
    return csv_text(["group", "name", "structure", "metric", *STATISTICS], lines)


def structures(summary: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(structure, {metric: statistic}) of a group, without its counts."""
    return ((name, of) for name, of in summary.items() if isinstance(of, dict))


def _groups(document: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for site, summary in document["sites"].items():
        yield "site", site, summary
    yield "pooled", "", document["pooled"]
    yield "over_sites", "", document["over_sites"]
    for grade, summary in document["fairness"]["grades"].items():
        yield "grade", grade, summary
    for size, summary in (document["fairness"]["sizes"] or {}).items():
        if size != "limits_ml":
            yield "size", size, summary


def _plain(result: SubjectResult) -> dict[str, Any]:
    scores = {
        structure: {m: None if math.isnan(value) else value for m, value in own.items()}
        for structure, own in result.scores.items()
    }
    return {**vars(result), "scores": scores}
