"""Many subjects into one folder: what was done already is kept, what is changed is done again.

The folder holds for each subject ID.nii.gz and the maps asked for (`client.prediction.save`), and
predictions.json and predictions.csv of them all. The list is written after the files of each subject,
and names their sha256: a kill loses the subject in progress at most, and a file that was removed or
made by another model, with other options or from other scans is made anew. A file that a person has
changed since, or that another program wrote, is kept, and its subject is not segmented.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.familiarity import Reference, judge
from client.nifti_output import is_as_written
from client.prediction import (
    Model,
    Options,
    map_paths,
    save,
    segment,
    written_by,
)
from client.prediction_summary import Summary, as_csv, summary_of
from common.code_hash import code_hash
from common.console import DISK_FULL, RESEARCH_ONLY
from common.files import locked, write_text_atomically
from common.progress import track
from common.weights import file_sha256
from sites.finding import Finding
from sites.subject import SEGMENTATION, Subject, role_of

TOO_LARGE = Finding(
    site="",
    subject="",
    file="",
    severity="error",
    code="memory",
    what="needs more memory than there is",
    remedy="Check its voxel size; else use a machine with more memory.",
)


class Clash(ValueError):
    """A file to write is a scan, would be taken for one, or is not ours; or two subjects would write it."""


@dataclass(frozen=True)
class Job:
    """What is to be done with every subject. `model_sha256` is of the model's file."""

    model: Model
    model_sha256: str
    options: Options
    reference: Reference | None = None


def refuse_clashes(subjects: Sequence[Subject], outputs: Sequence[Path]) -> None:
    """Raises Clash: one of `outputs`, each subject's file of labels, would replace a scan or another.

    Capitals do not count, as on many disks they do not."""
    scans = {
        str(path.resolve()).casefold(): path
        for subject in subjects
        for path in (
            *subject.images.values(),
            *((subject.segmentation,) if subject.segmentation else ()),
            *(twin for twins in subject.duplicates.values() for twin in twins),
        )
    }
    owner: dict[str, str] = {}
    for subject, labels in zip(subjects, outputs, strict=True):
        for path in (labels, *map_paths(labels)):
            place = str(path.resolve()).casefold()
            if place in scans:
                raise Clash(f"{path} would replace a scan; choose another OUT.")
            if taken_for := role_of(path.name, path.absolute().parent.name):
                what = "true labels" if taken_for[1] == SEGMENTATION else f"a {taken_for[1]} scan"
                raise Clash(
                    f"{path} has the name of a patient's {what}, for which it would be taken; "
                    "choose another name."
                )
            if place in owner:
                raise Clash(
                    f"the subjects {owner[place]} and {subject.id} would both write {path}; "
                    "segment them into two folders."
                )
            owner[place] = subject.id


def not_to_replace(subject: Subject, outputs: Sequence[Path]) -> list[Finding]:
    """The files among `outputs` that are there and not as fedbrats wrote them."""
    return [
        Finding(
            site="",
            subject=subject.id,
            file=path.name,
            severity="error",
            code="not-replaced",
            what="was changed since it was written, or not written by this program; it is kept, and the "
            "subject was not segmented",
            remedy=f"Move {path} to another place, then type the same again.",
        )
        for path in outputs
        if path.exists() and not path.is_dir() and not is_as_written(path)
    ]


def segment_all(
    job: Job, subjects: Sequence[Subject], unusable: Sequence[Finding], out: Path
) -> list[Summary]:
    """Segment every subject into the folder `out`; returns what predictions.json says of each.

    Args:
        unusable: errors about subjects that `subjects` lacks, which are listed too.

    Raises:
        Clash: before anything is written.
        AlreadyInUse: another process writes there.
        OSError: a file cannot be written; what was done before it is kept.
    """
    refuse_clashes(subjects, [_labels_of(out, subject) for subject in subjects])
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".predictions.lock"):
        for left in _half_written(out):  # by a call that was killed
            left.unlink()
        entries = _read_list(out)
        for finding in unusable:
            _replace(entries, out, _failed(finding.subject, unusable))
        _write_list(entries, out)
        for subject in track(subjects, "segmenting", len(subjects), "subjects"):
            scans = _scans(subject)
            before = entries.get(subject.id)
            if (
                before is not None
                and before.get("made_by") == _identity(job, scans)
                and _intact(before, out)
            ):
                findings = before["findings"]
                codes = {finding["code"] for finding in findings}
                entries[subject.id] = before | {
                    "warnings": judge(before["features"], codes, job.reference)
                }
            elif kept := not_to_replace(subject, written_by(job.options, _labels_of(out, subject))):
                entries[subject.id] = _failed(subject.id, kept) | {
                    "earlier_files": _files_of(before),
                    "scans": {} if before is None else before.get("scans", {}),
                }
            else:
                _replace(entries, out, _done(job, subject, scans, before, out))
            _write_list(entries, out)
    wanted = {subject.id for subject in subjects} | {finding.subject for finding in unusable}
    return [entries[subject] for subject in sorted(wanted)]


def model_words(job: Job) -> Summary:
    return {"sha256": job.model_sha256, "federation": job.model.config.name}


def _done(
    job: Job,
    subject: Subject,
    scans: dict[str, list[str]],
    before: Summary | None,
    out: Path,
) -> Summary:
    try:
        prediction, findings = segment(job.model, subject, job.options, job.reference)
    except MemoryError:
        return _failed(subject.id, [too_large(subject)])
    if prediction is None:
        return _failed(subject.id, findings)
    labels = _labels_of(out, subject)
    try:
        files = save(prediction, labels)
    except OSError as error:
        if error.errno in DISK_FULL:  # the others would not fit either
            raise
        return _failed(subject.id, [_not_written(subject, error, labels)])
    summary = summary_of(prediction)
    if before is not None and _files_of(before) and before.get("scans", scans) != scans:
        summary["findings"].append(_other_scans(subject, labels).as_dict())
    return summary | {
        "model": model_words(job),
        "options": asdict(job.options),
        "files": {path.name: file_sha256(path) for path in files},
        "scans": scans,
        "made_by": _identity(job, scans),
    }


def _not_written(subject: Subject, error: OSError, labels: Path) -> Finding:
    return Finding(
        site="",
        subject=subject.id,
        file=Path(error.filename or labels).name,
        severity="error",
        code="not-written",
        what=f"cannot be written ({error.strerror})",
        remedy="See to what is in its place and to the rights there, then type the same again.",
    )


def _other_scans(subject: Subject, labels: Path) -> Finding:
    return Finding(
        site="",
        subject=subject.id,
        file=labels.name,
        severity="warning",
        code="other-scans",
        what="was made anew, for an earlier call had made it from other scans under this id",
        remedy="If these are two patients, give each folder of patients an OUT of its own.",
    )


def too_large(subject: Subject) -> Finding:
    return Finding(**(TOO_LARGE.as_dict() | {"subject": subject.id}))  # type: ignore[arg-type]


def _failed(subject: str, findings: Sequence[Finding]) -> Summary:
    own = [finding.as_dict() for finding in findings if finding.subject == subject]
    return {"subject": subject, "millilitres": None, "warnings": [], "findings": own, "files": {}}


def _labels_of(out: Path, subject: Subject) -> Path:
    return out / f"{subject.id}.nii.gz"


def _identity(job: Job, scans: dict[str, list[str]]) -> str:
    """A hash of all that decides a subject's files: code, model, options and scans."""
    document = {
        "code": code_hash(),
        "model": job.model_sha256,
        "options": asdict(job.options),
        "scans": scans,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _scans(subject: Subject) -> dict[str, list[str]]:
    """The sha256 of each modality's file and of its duplicates, with which the checks compare it.

    A scan that cannot be opened is for the subject's checks to report."""
    found: dict[str, list[str]] = {}
    for modality, image in subject.images.items():
        for path in (image, *subject.duplicates.get(modality, ())):
            with contextlib.suppress(OSError):
                found.setdefault(modality, []).append(file_sha256(path))
    return found


def _files_of(entry: Summary | None) -> dict[str, str]:
    return {} if entry is None else entry["files"] or entry.get("earlier_files", {})


def _half_written(out: Path) -> list[Path]:
    patterns = (".*.nii.gz.*.tmp", ".predictions.json.*.tmp", ".predictions.csv.*.tmp")
    return [path for pattern in patterns for path in out.glob(pattern)]


def _intact(entry: Summary, out: Path) -> bool:
    try:
        return bool(entry["files"]) and all(
            file_sha256(out / name) == digest for name, digest in entry["files"].items()
        )
    except OSError:
        return False


def _replace(entries: dict[str, Summary], out: Path, entry: Summary) -> None:
    """Files of an earlier call that belong to the subject no longer go: they would mislead."""
    before = _files_of(entries.get(entry["subject"]))
    for name in set(before) - set(entry["files"]):
        if _intact({"files": {name: before[name]}}, out):
            (out / name).unlink()
    entries[entry["subject"]] = entry


def _read_list(out: Path) -> dict[str, Summary]:
    """Earlier entries by subject; a list that is damaged or of an older version counts as none."""
    try:
        document: Any = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
        entries = {entry["subject"]: entry for entry in document["subjects"]}
        for entry in entries.values():
            names = dict(_files_of(entry))
            if any(Path(name).name != name for name in names) or "findings" not in entry:
                return {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return entries


def _write_list(entries: dict[str, Summary], out: Path) -> None:
    ordered = [entries[subject] for subject in sorted(entries)]
    document = {"note": RESEARCH_ONLY, "subjects": ordered}
    write_text_atomically(
        out / "predictions.json", json.dumps(document, indent=1, allow_nan=False) + "\n"
    )
    write_text_atomically(out / "predictions.csv", as_csv(ordered))
