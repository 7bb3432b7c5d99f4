"""A prediction in numbers and words: one JSON object and one line of a CSV table per subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from client.familiarity import millilitres
from client.location import describe
from client.postprocessing import PostProcessing
from client.postprocessing import in_words as steps_in_words
from client.prediction import Prediction
from common.brats import BACKGROUND, STRUCTURES
from common.csv_cells import csv_text

Summary = dict[str, Any]


def summary_of(prediction: Prediction) -> Summary:
    """JSON types only. `location` is None without a tumour."""
    return {
        "subject": prediction.subject,
        "millilitres": prediction.volumes_ml,
        "millilitres_before_postprocessing": prediction.found_ml,
        "tumour_entropy": prediction.tumour_entropy,
        "flip_agreement": prediction.flip_agreement,
        "location": location_of(prediction),
        "warnings": list(prediction.warnings),
        "findings": [finding.as_dict() for finding in prediction.findings],
        "features": prediction.features,
    }


def location_of(prediction: Prediction) -> Summary | None:
    """Side and lobes of the whole tumour, and both in words."""
    tumour = prediction.labels != BACKGROUND
    location = describe(tumour, prediction.brain, prediction.spacing)
    return None if location is None else asdict(location) | {"text": location.text}


def in_words(summary: Summary) -> str:
    """One line: volumes, location, how sure the model is."""
    volumes = summary["millilitres"]
    parts = [", ".join(f"{name} {millilitres(volumes[name])} ml" for name in STRUCTURES)]
    if summary["location"] is not None:
        parts.append(str(summary["location"]["text"]))
    if summary["tumour_entropy"] is not None:
        parts.append(f"mean entropy in the tumour {summary['tumour_entropy']:.2f}")
    return "; ".join(parts)


def as_csv(summaries: Sequence[Summary]) -> str:
    """One line per subject; one that could not be segmented has its errors in place of volumes."""
    doubts = ("tumour_entropy", "flip_agreement")
    volumes = [f"{structure}_ml" for structure in STRUCTURES]
    last = ("location", "warnings", "errors", "model", "options")
    return csv_text(["subject", *volumes, *doubts, *last], map(_row, summaries))


def _row(summary: Summary) -> list[str]:
    volumes = summary.get("millilitres") or {}
    doubts = (summary.get("tumour_entropy"), summary.get("flip_agreement"))
    location = summary.get("location") or {}
    errors = [
        f"{f['file']}: {f['what']}" if f["file"] else f["what"]
        for f in summary["findings"]
        if f["severity"] == "error"
    ]
    return [
        summary["subject"],
        *(f"{volumes[name]:.4f}" if name in volumes else "" for name in STRUCTURES),
        *("" if value is None else f"{value:.4f}" for value in doubts),
        str(location.get("text", "")),
        "; ".join(summary.get("warnings", [])),
        "; ".join(errors),
        str(summary.get("model", {}).get("sha256", ""))[:12],
        options_in_words(summary["options"]) if "options" in summary else "",
    ]


def options_in_words(options: Mapping[str, Any]) -> str:
    """How a subject's labels were made; `options` is `client.prediction.Options` as a dictionary."""
    steps = steps_in_words(PostProcessing(**options["postprocess"])) or "no post-processing"
    return f"flips, {steps}" if options["flips"] else steps
