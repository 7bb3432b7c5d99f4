"""Which subjects (scans, time points) are one patient: by their names, or by a file of the hospital.

The file is `patients.csv` in the data folder, with the columns Subject_ID and Patient_ID. Says
nothing about scans that look alike: recognising a patient under another name is for the
fingerprints of `sites.checks`. Ids that two years of BraTS gave one patient are two patients here.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from sites.finding import Finding
from sites.subject import Subject

PATIENTS = "patients.csv"
_COLUMNS = ("Subject_ID", "Patient_ID")

# BraTS-GLI-00005-001, BraTS-MEN-RT-0005-1: the last number is the time point
_TIME_POINT = re.compile(r"(?P<patient>brats(?:-[a-z]+)+-\d+)-\d+", re.IGNORECASE)


class PatientsError(ValueError):
    """patients.csv cannot be followed; the message says which line or subject, and what to do."""


def patients_of(subjects: Sequence[Subject], root: Path) -> dict[str, str]:
    """Subject id -> patient id.

    `root`/patients.csv decides for the subjects that it names; the patient of any other is what its
    name says, BraTS-GLI-00005 for BraTS-GLI-00005-001, and for names without time points the
    subject itself. A Patient_ID that is also another subject's patient makes them one patient.

    Raises:
        PatientsError: the file cannot be read, contradicts itself, or tears the time points of a
            patient apart by naming only some of them.
    """
    path = root / PATIENTS
    named = _read(path)
    patients = {}
    alike: dict[str, list[str]] = defaultdict(list)
    for subject in subjects:
        by_name = _patient_in(subject.id)
        patients[subject.id] = named.get(subject.id, by_name)
        alike[by_name].append(subject.id)
    for by_name, time_points in alike.items():
        moved = [i for i in time_points if patients[i] != by_name]
        forgotten = [i for i in time_points if i not in named]
        if moved and forgotten:
            raise PatientsError(
                f"{path}: gives subject {moved[0]} to patient {patients[moved[0]]} and does not "
                f"name {forgotten[0]}, which by its name is the same patient: add a line for "
                f"{forgotten[0]}."
            )
    return patients


def unknown_in_list(subjects: Sequence[Subject], root: Path, *, site: str) -> list[Finding]:
    """Warnings for lines of `root`/patients.csv that name no subject: one misspelt scan is otherwise
    taken for a patient by itself.

    Raises:
        PatientsError: the file cannot be read or contradicts itself.
    """
    unknown = set(_read(root / PATIENTS)) - {subject.id for subject in subjects}
    if not unknown:
        return []
    # what is there and cannot be used has a finding of its own
    here = [path.name for path in root.rglob("*")]
    findings = []
    for name in sorted(unknown):
        if any(_is_part_of(name, file) for file in here):
            continue
        what = f"names subject {name}, of which no file is there"
        remedy = (
            "Correct the Subject_ID so that it equals the subject's folder, or delete the line."
        )
        findings.append(Finding(site, "", PATIENTS, "warning", "patients-unknown", what, remedy))
    return findings


def _is_part_of(subject_id: str, file: str) -> bool:
    """Case_1 has Case_1, Case_1_t1.nii and Case_1.nii.gz; not Case_12, nor its time point Case_1-002."""
    if not file.startswith(subject_id):
        return False
    rest = file[len(subject_id) :]
    return not rest or (rest[0] in "._-" and not rest[1:2].isdigit())


def joined(patients: Mapping[str, str], twins: Mapping[str, str]) -> dict[str, str]:
    """`patients` (subject id -> patient id), with the patients of subjects that hold one scan made one."""
    found = dict(patients)
    for one, other in twins.items():
        before, after = found[one], found[other]
        found = {subject: after if p == before else p for subject, p in found.items()}
    return found


def patients_at_two_sites(
    sites: Mapping[str, Sequence[str]], patients: Mapping[str, str]
) -> list[Finding]:
    """Warnings for subjects (of site -> subject ids) whose patient an earlier site has already."""
    findings = []
    first: dict[str, tuple[str, str]] = {}
    for site, members in sites.items():
        for subject in members:
            other_site, other = first.setdefault(patients[subject], (site, subject))
            if other_site == site:
                continue
            what = f"is the same patient as subject {other} of site {other_site}"
            remedy = (
                "Give all of the patient's subjects to one site: a patient must not count twice, "
                "nor be trained on at one site and tested on at the other."
            )
            code = "patient-at-two-sites"
            findings.append(Finding(site, subject, "", "warning", code, what, remedy))
    return findings


def _patient_in(subject_id: str) -> str:
    match = _TIME_POINT.fullmatch(subject_id)
    return match["patient"] if match else subject_id


def _read(path: Path) -> dict[str, str]:
    """Subject id -> patient id as the file says; nothing where there is no file."""
    lines = _lines(path)
    if lines is None:
        return {}
    header = lines[0][1] if lines else []
    missing = [column for column in _COLUMNS if column not in header]
    if missing:
        raise PatientsError(
            f"{path}, line 1: no column {' and no column '.join(missing)}: the first line must be "
            f"{','.join(_COLUMNS)}, with commas (not semicolons or tabs)."
        )
    where = [header.index(column) for column in _COLUMNS]
    patients: dict[str, str] = {}
    said: dict[str, int] = {}
    for line, cells in lines[1:]:
        here = f"{path}, line {line}"
        if not any(cells):
            continue
        if any(cells[len(header) :]):
            # half of a Patient_ID with a comma in it would be another patient
            raise PatientsError(
                f"{here}: more cells than the {len(header)} columns: is there a comma too many?"
            )
        subject, patient = (cells[i] if i < len(cells) else "" for i in where)
        if not subject or not patient:
            lacking = "Patient_ID" if subject else "Subject_ID"
            raise PatientsError(f"{here}: {lacking} is empty: fill it or delete the line.")
        if not patient.isprintable():
            raise PatientsError(f"{here}: the Patient_ID holds a control character: type it anew.")
        if patients.setdefault(subject, patient) != patient:
            raise PatientsError(
                f"{here}: subject {subject} belongs to patient {patient}, but in line "
                f"{said[subject]} to {patients[subject]}: delete the wrong line."
            )
        said.setdefault(subject, line)
    return patients


def _lines(path: Path) -> list[tuple[int, list[str]]] | None:
    """Number and cells of every line; any line ends, a byte-order mark or none."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            return [(reader.line_num, [text.strip() for text in cells]) for cells in reader]
    except OSError as error:
        # a link that leads nowhere is a file that somebody meant to be there
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            return None
        reason = error.strerror or "the file is damaged"
        raise PatientsError(
            f"{path}: cannot be read ({reason}): make it readable, or remove it if every subject "
            "is a patient by itself."
        ) from error
    except UnicodeDecodeError as error:
        raise PatientsError(
            f"{path}: not a csv file in UTF-8: in a spreadsheet choose 'Save as', 'CSV UTF-8'."
        ) from error
    except csv.Error as error:
        raise PatientsError(
            f"{path}: not readable as csv ({error}): is a quotation mark left open?"
        ) from error
