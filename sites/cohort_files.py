"""The two csv files that say where subjects come from: BraTS's name_mapping.csv and a partition.

Covers finding and reading them, and refusing with file, line and remedy what cannot be understood.
Does not decide which subject goes where: that is `sites.institutions`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sites import brats2020
from sites.subject import Subject

if TYPE_CHECKING:
    from _csv import Reader as CsvReader

NAME_MAPPING = "name_mapping.csv"
IVYGAP = "IvyGAP"


class SplitError(ValueError):
    """The split cannot be made; the message says which file, line or subject, and what to do."""


@dataclass(frozen=True)
class Origin:
    """What an id of BraTS 2018/2019 or TCGA says about where the patient was scanned."""

    token: str  # CBICA, 2013, TMC, TCIA01, ...; TCGA-XX for an unknown tissue source; IVYGAP
    patient: str = ""


_TOKEN_OF_TSS = {code: token for token, code in brats2020.TSS.items()}
_OLD_ID = re.compile(r"brats1[789]_([^_]+)_(.+)_\d+", re.IGNORECASE)


def origin_of(subject_id: str) -> Origin | None:
    """From BraTS19_TCIA08_167_1 or TCGA-76-6657; None where the id names no institution."""
    if match := _OLD_ID.fullmatch(subject_id):
        # BraTS 2017 wrote plain TCIA for all of the eleven TCGA sites.
        return None if match[1] == "TCIA" else Origin(match[1], match[2])
    if match := re.fullmatch(r"TCGA-([^-]+)-.+", subject_id):
        return Origin(_TOKEN_OF_TSS.get(match[1], f"TCGA-{match[1]}"))
    return None


@dataclass(frozen=True)
class NameRow:
    """What name_mapping.csv says about one subject."""

    grade: str  # "HGG", "LGG" or ""
    origin: Origin | None


def _read_csv(path: Path, *columns: str) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells of every row; any line ends, a byte-order mark or none."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _rows(csv.reader(file, strict=True), path, columns)
    except OSError as error:
        reason = error.strerror or "it cannot be read"
        raise SplitError(f"{path}: {reason}: give the path of a csv file") from error
    except UnicodeDecodeError as error:
        raise SplitError(
            f"{path}: not a csv file in UTF-8: in a spreadsheet choose 'Save as', 'CSV UTF-8'"
        ) from error


def _rows(
    reader: CsvReader, path: Path, columns: Sequence[str]
) -> list[tuple[int, dict[str, str]]]:
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        missing = [column for column in columns if column not in header]
        if missing:
            raise SplitError(
                f"{path}, line 1: no column {' and no column '.join(missing)}: the first line must "
                "name the columns, separated by commas (not semicolons or tabs)"
            )
        for cells in reader:
            texts = [text.strip() for text in cells]
            if any(texts[len(header) :]):
                raise SplitError(
                    f"{path}, line {reader.line_num}: more cells than the {len(header)} columns: "
                    "is there a comma too many?"
                )
            if any(texts):
                texts += [""] * (len(header) - len(texts))
                rows.append((reader.line_num, dict(zip(header, texts, strict=False))))
    except csv.Error as error:
        raise SplitError(
            f"{path}, line {reader.line_num}: not readable as csv ({error}): is a quotation mark "
            "left open?"
        ) from error
    return rows


def read_partition(path: Path) -> dict[str, str]:
    """Patient (see `brats2020.patient_id`) -> site name: `part-07` for a Partition_ID of 7, any
    other Partition_ID as it stands.

    Raises SplitError for a file that is no such csv, and for a subject in two lines.
    """
    placed: dict[str, tuple[str, str, int]] = {}
    for line, row in _read_csv(path, "Partition_ID", "Subject_ID"):
        subject_id, part = row["Subject_ID"], row["Partition_ID"]
        if not subject_id or not part:
            lacking = "Partition_ID" if subject_id else "Subject_ID"
            raise SplitError(f"{path}, line {line}: {lacking} is empty: fill it or delete the line")
        site = f"part-{int(part):02d}" if part.isdecimal() else part
        if not re.fullmatch(r"\w[^\\/:*?\"<>|\x00-\x1f]{0,63}", site):
            raise SplitError(
                f"{path}, line {line}: the Partition_ID cannot name a site, whose name is a file's "
                'too: use a number, or up to 64 characters without \\ / : * ? " < > |'
            )
        patient = brats2020.patient_id(subject_id)
        if patient in placed:
            other, other_id, first = placed[patient]
            same = f"{subject_id}" + (f" (also {other_id})" if other_id != subject_id else "")
            if other == site:
                raise SplitError(f"{path}, line {line}: repeats {same} of line {first}: delete one")
            raise SplitError(
                f"{path}, line {line}: subject {same} is at {site} but in line {first} at {other}: "
                "a subject belongs to one site, delete the wrong line"
            )
        placed[patient] = site, subject_id, line
    return {patient: site for patient, (site, _, _) in placed.items()}


_ORIGIN_COLUMNS = ("BraTS_2019_subject_ID", "BraTS_2018_subject_ID", "TCGA_TCIA_subject_ID")


def read_name_mappings(paths: Iterable[Path]) -> dict[str, NameRow]:
    """Every id that a row gives its subject (2017, 2018, TCGA, 2019, 2020) -> that row.

    Raises SplitError for a file that is no such csv, and for a subject of two differing rows.
    """
    rows: dict[str, NameRow] = {}
    seen: dict[str, str] = {}
    for path in paths:
        for line, cells in _read_csv(path, "BraTS_2019_subject_ID"):
            given = {
                column: text
                for column, text in cells.items()
                if column.endswith("subject_ID") and text not in ("", "NA", "nan")
            }
            texts = [given[column] for column in _ORIGIN_COLUMNS if column in given]
            origin = next((known for text in texts if (known := origin_of(text))), None)
            if not texts and "BraTS_2020_subject_ID" in given:
                origin = Origin(IVYGAP)  # the one collection without ids of earlier years
            grade = cells.get("Grade", "").upper()
            row = NameRow(grade if grade in ("HGG", "LGG") else "", origin)
            here = f"{path}, line {line}"
            for subject_id in given.values():
                if rows.get(subject_id, row) != row:
                    raise SplitError(
                        f"{here}: subject {subject_id} has another grade or institution than in "
                        f"{seen[subject_id]}: correct or delete one of the two lines"
                    )
                rows[subject_id], seen[subject_id] = row, here
    return rows


def name_mappings_near(subjects: Sequence[Subject], root: Path | None) -> list[Path]:
    """Every name_mapping.csv beside the subjects or above them as far as `root`.

    Without a root the search ends two folders above a subject's: BraTS 2018 and 2019 have HGG and
    LGG between.
    """
    folders: set[Path] = set() if root is None else {root}
    for folder in {subject.folder for subject in subjects}:
        above = [folder, *folder.parents]
        folders.update(above[: above.index(root)] if root in above else above[:3])
    return sorted(path for folder in folders if (path := folder / NAME_MAPPING).is_file())
