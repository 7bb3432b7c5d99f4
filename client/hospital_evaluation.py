"""A trained model on a hospital's own labelled subjects: one folder in BraTS layout, no federation needed.

Nothing leaves the machine. Subjects that cannot be used are named and left out.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from client.prediction import Model, Options, load_model
from client.subject_results import (
    PLAIN,
    Segmenter,
    segmentation_of,
    segmentation_remarks,
    segmenter_of,
    subject_result,
)
from common.console import ending_in_order
from common.evaluation_document import INTERVALS, EvaluationError, evaluation_document
from common.evaluation_summary import SubjectResult
from common.progress import track
from common.weights import file_sha256
from sites.cache import prepare_subject
from sites.checks import same_patient_twice
from sites.finding import Finding
from sites.institutions import grades_of
from sites.patients import joined, patients_of, unknown_in_list
from sites.preprocess import recipe_of
from sites.subject import discover

TRAINED_ON = "If the model was trained on any of these subjects, or chosen by them, the figures are too good."


class NoUsableSubject(EvaluationError):
    """`findings` say which file and why."""

    def __init__(self, text: str, findings: tuple[Finding, ...]) -> None:
        super().__init__(text)
        self.findings = findings


def evaluate_folder(
    model: Path,
    data: Path,
    *,
    site: str,
    cache: Path | None = None,
    confidence: float = 0.95,
    label_coding: str = "auto",
    options: Options = PLAIN,
    segmenter: Callable[[Model, Options], Segmenter] = segmenter_of,
) -> dict[str, Any]:
    """Check, prepare, segment and measure every subject below `data`, one after the other.

    Args:
        site: the name to report.
        cache: keeps the prepared subjects there; without it none outlives its own measurement.
        label_coding: what the labels in `data` mean: auto, or of `common.brats.CODINGS`. That of the
            model's federation does not count, as these files are of another hospital.
        options: flips and post-processing; the maps are not kept.

    Returns:
        The document of `common.evaluation_document`; nothing else is written.

    Raises:
        NoUsableSubject: there is no subject that can be used.
        BadWeights: the model cannot be read.
        CacheError, OSError: the cache cannot be written.
        SplitError, PatientsError: name mappings or patients.csv in `data` cannot be followed.
    """
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)  # prepared scans are scans
    loaded = load_model(model)
    digest = file_sha256(model)
    recipe = replace(recipe_of(loaded.config), label_coding=label_coding)
    discovery = discover(data, modalities=recipe.modalities, site=site)
    subjects = discovery.subjects
    findings = list(discovery.findings)
    grades = grades_of(subjects, data) if subjects else {}
    patients = patients_of(subjects, data)
    findings += unknown_in_list(subjects, data, site=site) if subjects else []
    segment = segmenter(loaded, options)
    results: list[SubjectResult] = []
    digests: list[tuple[str, str, str]] = []
    with (
        ending_in_order(),
        nullcontext(cache) if cache else TemporaryDirectory(prefix="fedbrats-") as place,
    ):
        for subject in track(subjects, "evaluating", len(subjects), "subjects"):
            entry, found = prepare_subject(subject, recipe, Path(place), site=site)
            findings += found
            if entry is None:
                continue
            digests.append((site, entry.id, entry.digest))
            labels = segment(entry)
            grade = grades.get(entry.id)
            results.append(subject_result(site, entry, labels, patient=entry.id, grade=grade))
            if cache is None:
                shutil.rmtree(entry.folder)
    findings += same_patient_twice(digests)
    errors = [f for f in reversed(findings) if f.severity == "error" and f.subject]
    why = {f.subject: f.what for f in errors}
    usable = [result for result in results if result.subject not in why]
    if not usable:
        raise NoUsableSubject(f"{data}: no subject can be used.", tuple(findings))
    first: dict[str, str] = {}
    twins = {i: first.setdefault(of, i) for _, i, of in digests}
    patients = joined(patients, {one: other for one, other in twins.items() if one != other})
    return evaluation_document(
        [replace(result, patient=patients[result.subject]) for result in usable],
        model={"file": str(model), "sha256": digest},
        of="folder",
        segmentation=segmentation_of(options),
        label_coding=label_coding,
        confidence=confidence,
        remarks=[
            TRAINED_ON,
            *_coding_remarks(label_coding, loaded.config.label_coding),
            *segmentation_remarks(options),
            INTERVALS,
        ],
        findings=[finding.as_dict() for finding in findings],
        left_out=[
            {"site": site, "subject": subject, "why": what} for subject, what in sorted(why.items())
        ],
    )


def _coding_remarks(used: str, of_the_model: str) -> list[str]:
    """What the labels in the files were taken for; a wrong coding is not seen in the figures."""
    how = f"by the coding {used}"
    if used == "auto":
        how = "by each file's own labels: 4 is ET as in brats, or 3 is ET as in brats2023"
    said = [f"Labels were read {how} (--label-coding)."]
    if of_the_model not in ("auto", used):
        said.append(
            f"The model's federation read its labels by {of_the_model}: if these are coded so too, "
            f"evaluate again with --label-coding {of_the_model}."
        )
    return said
