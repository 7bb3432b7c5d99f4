"""Many subjects into one folder: what was done already is kept, what is changed is done again.

The folder holds for each subject ID.nii.gz and the maps asked for (`client.prediction.save`), and
predictions.json and predictions.csv of them all. The list is written after the files of each subject,
and names their sha256: a kill loses the subject in progress at most, and a file that was changed,
removed or made by another model, with other options or from other scans is made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.familiarity import Reference, judge
from client.prediction import RESEARCH_ONLY, Model, Options, map_paths, save, segment
from client.prediction_summary import Summary, as_csv, summary_of
from common.code_hash import code_hash
from common.files import locked, write_text_atomically
from common.progress import track
from common.weights import file_sha256
from sites.finding import Finding
from sites.subject import Subject

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
    """A file to write is a scan, or two subjects would write it; the text says which."""


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
            if place in owner:
                raise Clash(
                    f"the subjects {owner[place]} and {subject.id} would both write {path}; "
                    "segment them into two folders."
                )
            owner[place] = subject.id


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
        for left in out.glob(".*.nii.gz.*.tmp"):  # half a file, by a call that was killed
            left.unlink()
        entries = _read_list(out)
        for finding in unusable:
            _replace(entries, out, _failed(finding.subject, unusable))
        for subject in track(subjects, "segmenting", len(subjects), "subjects"):
            identity = _identity(job, subject)
            before = entries.get(subject.id)
            if before is not None and before.get("made_by") == identity and _intact(before, out):
                findings = before["findings"]
                codes = {finding["code"] for finding in findings}
                entries[subject.id] = before | {
                    "warnings": judge(before["features"], codes, job.reference)
                }
            else:
                _replace(entries, out, _done(job, subject, identity, out))
            _write_list(entries, out)
        _write_list(entries, out)
    wanted = {subject.id for subject in subjects} | {finding.subject for finding in unusable}
    return [entries[subject] for subject in sorted(wanted)]


def model_words(job: Job) -> Summary:
    return {"sha256": job.model_sha256, "federation": job.model.config.name}


def _done(job: Job, subject: Subject, identity: str, out: Path) -> Summary:
    try:
        prediction, findings = segment(job.model, subject, job.options, job.reference)
    except MemoryError:
        return _failed(subject.id, [too_large(subject)])
    if prediction is None:
        return _failed(subject.id, findings)
    files = save(prediction, _labels_of(out, subject))
    return summary_of(prediction) | {
        "model": model_words(job),
        "options": asdict(job.options),
        "files": {path.name: file_sha256(path) for path in files},
        "made_by": identity,
    }


def too_large(subject: Subject) -> Finding:
    return Finding(**(TOO_LARGE.as_dict() | {"subject": subject.id}))  # type: ignore[arg-type]


def _failed(subject: str, findings: Sequence[Finding]) -> Summary:
    own = [finding.as_dict() for finding in findings if finding.subject == subject]
    return {"subject": subject, "millilitres": None, "warnings": [], "findings": own, "files": {}}


def _labels_of(out: Path, subject: Subject) -> Path:
    return out / f"{subject.id}.nii.gz"


def _identity(job: Job, subject: Subject) -> str:
    """A hash of all that decides a subject's files: code, model, options and scans."""
    scans = {role: file_sha256(path) for role, path in _readable(subject).items()}
    document = {
        "code": code_hash(),
        "model": job.model_sha256,
        "options": asdict(job.options),
        "scans": scans,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _readable(subject: Subject) -> dict[str, Path]:
    """A scan that cannot be opened is for the subject's checks to report."""
    found = {}
    for modality, path in subject.images.items():
        try:
            path.open("rb").close()
        except OSError:
            continue
        found[modality] = path
    return found


def _intact(entry: Summary, out: Path) -> bool:
    try:
        return bool(entry["files"]) and all(
            file_sha256(out / name) == digest for name, digest in entry["files"].items()
        )
    except OSError:
        return False


def _replace(entries: dict[str, Summary], out: Path, entry: Summary) -> None:
    """Files of an earlier call that belong to the subject no longer go: they would mislead."""
    before = entries.get(entry["subject"], {"files": {}})
    for name in set(before["files"]) - set(entry["files"]):
        if _intact({"files": {name: before["files"][name]}}, out):
            (out / name).unlink()
    entries[entry["subject"]] = entry


def _read_list(out: Path) -> dict[str, Summary]:
    """Earlier entries by subject; a list that is damaged or of an older version counts as none."""
    try:
        document: Any = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
        entries = {entry["subject"]: entry for entry in document["subjects"]}
        for entry in entries.values():
            names = dict(entry["files"])
            if any(Path(name).name != name for name in names) or "findings" not in entry:
                return {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return entries


def _write_list(entries: dict[str, Summary], out: Path) -> None:
    ordered = [entries[subject] for subject in sorted(entries)]
    document = {"note": RESEARCH_ONLY, "subjects": ordered}
    write_text_atomically(out / "predictions.json", json.dumps(document, indent=1) + "\n")
    write_text_atomically(out / "predictions.csv", as_csv(ordered))
