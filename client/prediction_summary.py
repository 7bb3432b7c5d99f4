"""A prediction in numbers and words: one JSON object and one line of a CSV table per subject."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from client.location import describe
from client.postprocessing import PostProcessing
from client.postprocessing import in_words as steps_in_words
from client.prediction import Prediction
from common.brats import BACKGROUND, STRUCTURES
from common.csv_cells import csv_cell

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
    parts = [", ".join(f"{name} {volumes[name]:.1f} ml" for name in STRUCTURES)]
    if summary["location"] is not None:
        parts.append(str(summary["location"]["text"]))
    if summary["tumour_entropy"] is not None:
        parts.append(f"mean entropy in the tumour {summary['tumour_entropy']:.2f}")
    return "; ".join(parts)


def as_csv(summaries: Sequence[Summary]) -> str:
    """One line per subject; one that could not be segmented has its errors in place of volumes."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = ("tumour_entropy", "flip_agreement")
    table.writerow(
        [
            "subject",
            *(f"{n}_ml" for n in STRUCTURES),
            *columns,
            "location",
            "warnings",
            "errors",
            "model",
            "options",
        ]
    )
    for summary in summaries:
        volumes = summary.get("millilitres") or {}
        location = summary.get("location") or {}
        errors = [
            f"{f['file']}: {f['what']}" if f["file"] else f["what"]
            for f in summary["findings"]
            if f["severity"] == "error"
        ]
        table.writerow(
            [
                csv_cell(summary["subject"]),
                *(f"{volumes[n]:.4f}" if n in volumes else "" for n in STRUCTURES),
                *("" if summary.get(c) is None else f"{summary[c]:.4f}" for c in columns),
                csv_cell(str(location.get("text", ""))),
                csv_cell("; ".join(summary.get("warnings", []))),
                csv_cell("; ".join(errors)),
                csv_cell(str(summary.get("model", {}).get("sha256", ""))[:12]),
                csv_cell(options_in_words(summary["options"]) if "options" in summary else ""),
            ]
        )
    return text.getvalue()


def options_in_words(options: Mapping[str, Any]) -> str:
    """How a subject's labels were made; `options` is `client.prediction.Options` as a dictionary."""
    steps = steps_in_words(PostProcessing(**options["postprocess"])) or "no post-processing"
    return f"flips, {steps}" if options["flips"] else steps
