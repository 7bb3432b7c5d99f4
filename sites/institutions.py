"""Which subject belongs to which institution: a cohort in one folder becomes a federation's sites.

Covers the split by the published BraTS and FeTS maps, by name_mapping.csv, by a partition file, by
folders, and at random for comparison; and which sites train and which are only evaluated on. Does
not read scans, and does not choose the subjects a site holds out: that is `sites.holdout`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from common.console import plain
from sites import brats2020
from sites.cohort_files import (
    IVYGAP,
    NAME_MAPPING,
    NameRow,
    Origin,
    SplitError,
    name_mappings_near,
    origin_of,
    read_name_mappings,
    read_partition,
)
from sites.subject import Subject, writable

METHODS = ("institution", "name_mapping", "csv", "folders", "iid", "fets-23", "fets-33")


@dataclass(frozen=True)
class Split:
    sites: dict[str, tuple[str, ...]]
    """Site name -> its subject ids, sorted; sites in the order of their names, none empty."""
    unmapped: tuple[str, ...]
    """Subjects of the data without a site, sorted: to be shown, never dropped in silence."""
    grades: dict[str, str]
    """Every subject -> "HGG", "LGG", or "" where neither folder, name mapping nor map tells."""
    absent: int = 0
    """How many subjects the partition file names that the data does not have."""


def split_subjects(
    subjects: Sequence[Subject],
    *,
    by: str,
    root: Path | None = None,
    file: Path | None = None,
    merge_hospitals: bool = False,
    parts: int | None = None,
    seed: int = 0,
) -> Split:
    """Divide the subjects by one of `METHODS`.

    - `institution`: the originating site, `site-01` to `site-23` as numbered by BraTS 2021 and FeTS
      (`sites.brats2020`), from a BraTS 2020, 2021 or FeTS 2022 id, from the token inside a BraTS
      2018/2019 id, else from the name_mapping.csv beside the subjects; a token without a published
      number names its site itself. `merge_hospitals` joins the sites of one hospital under the
      lowest number: `hospital-01`, ...; BraTS 2020's 17 sites become 13.
    - `name_mapping`: the institution token in name_mapping.csv (`file`, or found from the subjects
      up to `root`), `IvyGAP` where every column is NA; BraTS 2020 makes 15 groups.
    - `csv`: `file` with columns Partition_ID and Subject_ID, as FeTS writes it. A subject is found
      under its BraTS 2020, BraTS 2021 or FeTS 2022 id alike.
    - `fets-23`, `fets-33`: FeTS 2022's own partitions, without their files.
    - `folders`: the first folder below `root`.
    - `iid`: `parts` parts of equal size (to within one) and equal grade mix, by a hash keyed with
      `seed`. Here, unlike elsewhere, a subject may move when others are added.

    Raises SplitError when the method lacks what it needs, a file cannot be understood or says two
    things about one subject, an id occurs twice, or not one subject gets a site.
    """
    if by not in METHODS:
        raise SplitError(
            f"no split is called '{by}'{_nearest(by, METHODS)}: choose {_names(METHODS)}"
        )
    if merge_hospitals and by != "institution":
        raise SplitError(f"hospitals can be merged only in the split by institution, not by {by}")
    _refuse_repeated(subjects)
    mapping = read_name_mappings(
        [file] if by == "name_mapping" and file else name_mappings_near(subjects, root)
    )
    grades = {subject.id: _grade(subject, mapping) for subject in subjects}
    absent = 0
    site_of: dict[str, str | None]
    if by == "institution":
        site_of = {
            subject_id: _institution(subject_id, mapping, grade, merge_hospitals)
            for subject_id, grade in grades.items()
        }
    elif by == "name_mapping":
        if not mapping:
            where = f"beside the subjects or in {root}" if root else "beside the subjects"
            raise SplitError(f"found no {NAME_MAPPING} {where}: put it there, or name the file")
        site_of = {i: _token_in(mapping, i) for i in grades}
    elif by == "csv":
        if file is None:
            raise SplitError("a split by csv needs its file, with Partition_ID and Subject_ID")
        placed = read_partition(file)
        site_of = {i: placed.get(brats2020.patient_id(i)) for i in grades}
        absent = len(placed.keys() - set(map(brats2020.patient_id, grades)))
    elif by == "folders":
        if root is None:
            raise SplitError("a split by folders needs the folder that holds the sites' folders")
        site_of = {subject.id: _first_folder(subject, root) for subject in subjects}
    elif by == "iid":
        site_of = dict(_iid(grades, parts, seed))
    else:
        fets: Literal[23, 33] = 23 if by == "fets-23" else 33
        site_of = {i: _numbered("part", brats2020.fets_part(i, parts=fets)) for i in grades}
    return _gather(site_of, grades, absent, by)


def grades_of(subjects: Sequence[Subject], root: Path) -> dict[str, str]:
    """Subject id -> "HGG", "LGG" or "", as `split_subjects` finds it: for a site with its own folder.

    Raises SplitError when two name mappings beside the subjects contradict each other.
    """
    mapping = read_name_mappings(name_mappings_near(subjects, root))
    return {subject.id: _grade(subject, mapping) for subject in subjects}


def grade_in_id(subject_id: str) -> str:
    """ "HGG" or "LGG" of a subject of BraTS 2020, under its id of any year; "" for any other."""
    ids = brats2020.range_of(brats2020.brats2020_id(subject_id) or subject_id)
    return ids.grade if ids else ""


def sizes(split: Split) -> dict[str, int]:
    """Site -> number of subjects."""
    return {site: len(subject_ids) for site, subject_ids in split.sites.items()}


def too_small(split: Split, minimum: int) -> tuple[str, ...]:
    """The sites with fewer than `minimum` subjects."""
    return tuple(site for site, size in sizes(split).items() if size < minimum)


def roles(
    split: Split, *, hold_out: Sequence[str] = (), min_subjects: int = 1
) -> dict[str, Literal["trains", "evaluates"]]:
    """What each site does: a site evaluates the finished model as a new hospital would, and never
    trains it, when `hold_out` names it or it has fewer than `min_subjects` subjects.

    Raises SplitError for a site that does not exist, and when no site is left to train.
    """
    for site in hold_out:
        if site not in split.sites:
            raise SplitError(
                f"cannot hold out '{site}', there is no such site{_nearest(site, split.sites)}: "
                f"the sites are {_names(split.sites)}"
            )
    small = too_small(split, min_subjects)
    out = {*hold_out, *small}
    if out >= set(split.sites):
        raise SplitError(
            f"no site is left to train: {len(set(hold_out))} held out, {len(small)} with fewer "
            f"than {min_subjects} subjects: hold out fewer or lower the minimum"
        )
    return {site: "evaluates" if site in out else "trains" for site in split.sites}


# ---- from a subject to its site ----


def _institution(
    subject_id: str, mapping: Mapping[str, NameRow], grade: str, merge_hospitals: bool
) -> str | None:
    ids = brats2020.range_of(subject_id)
    site = ids.site if ids else brats2020.fets_part(subject_id, parts=23)
    if site is None:
        row = mapping.get(subject_id)
        origin = origin_of(subject_id) or (row.origin if row else None)
        if origin is None:
            return None
        if origin.token not in _SITES_OF_TOKEN:  # an institution without a published number
            return f"site-{origin.token}"
        site = _site_of(origin, grade)
    if merge_hospitals and site is not None:
        return _numbered("hospital", brats2020.HOSPITALS.get(site, site))
    return _numbered("site", site)


_SITES_OF_TOKEN = {
    token: frozenset(ids.site for ids in brats2020.RANGES if ids.token == token)
    for token in {ids.token for ids in brats2020.RANGES if ids.token}
} | {IVYGAP: frozenset({16})}


def _site_of(origin: Origin, grade: str) -> int | None:
    candidates = _SITES_OF_TOKEN[origin.token]
    if len(candidates) == 1:
        return next(iter(candidates))
    # The token 2013: the patient tells; else the grade may, since one site alone had LGG.
    patient = origin.patient
    if patient.isdecimal():
        known = (s for s, patients in brats2020.PATIENTS_2013.items() if int(patient) in patients)
        return next(known, None)
    if patient[:1] == "S" and patient[1:].isdecimal() and int(patient[1:]) >= 1000:
        # A synthetic patient beyond BraTS 2020: 1000 * site + count (sites.phantom_cohort).
        site = int(patient[1:]) // 1000
        return site if site in candidates else None
    fitting = {r.site for r in brats2020.RANGES if r.site in candidates and r.grade == grade}
    return fitting.pop() if len(fitting) == 1 else None


def _token_in(mapping: Mapping[str, NameRow], subject_id: str) -> str | None:
    row = mapping.get(subject_id) or mapping.get(brats2020.brats2020_id(subject_id) or "")
    return row.origin.token if row and row.origin else None


def _grade(subject: Subject, mapping: Mapping[str, NameRow]) -> str:
    older = brats2020.brats2020_id(subject.id) or subject.id
    row = mapping.get(subject.id) or mapping.get(older)
    return subject.grade or (row.grade if row else "") or grade_in_id(subject.id)


def _first_folder(subject: Subject, root: Path) -> str | None:
    """None for a subject whose own folder lies in `root`, and below a grade, which is no site."""
    try:
        levels = subject.folder.absolute().relative_to(root.absolute()).parts
    except ValueError:
        return None
    own = levels == (subject.id,)
    if own or not levels or levels[0].upper() in ("HGG", "LGG"):
        return None
    if writable(levels[0]) != levels[0]:
        raise SplitError(
            f"the folder {plain(levels[0])} in {root} cannot name a site, whose name is "
            "a file's and stands in tables too: rename it"
        )
    return levels[0]


def _iid(grades: Mapping[str, str], parts: int | None, seed: int) -> Iterable[tuple[str, str]]:
    if parts is None or not 1 <= parts <= len(grades):
        raise SplitError(f"an iid split of {len(grades)} subjects needs 1 to {len(grades)} parts")

    # Dealt like cards, grade after grade without a new start: sizes differ by one at most.
    def order(subject_id: str) -> tuple[str, bytes]:
        key = f"{seed}\0{subject_id}".encode()
        return grades[subject_id], blake2b(key, digest_size=8, person=b"iid").digest()

    for turn, subject_id in enumerate(sorted(grades, key=order)):
        yield subject_id, f"part-{turn % parts + 1:02d}"


def _gather(
    site_of: Mapping[str, str | None], grades: dict[str, str], absent: int, by: str
) -> Split:
    members: dict[str, list[str]] = {}
    for subject_id, site in site_of.items():
        if site is not None:
            members.setdefault(site, []).append(subject_id)
    if not members:
        raise SplitError(_NONE_FITS[by].format(n=len(grades), absent=absent))
    return Split(
        sites={site: tuple(sorted(members[site])) for site in sorted(members)},
        unmapped=tuple(sorted(i for i, site in site_of.items() if site is None)),
        grades=dict(sorted(grades.items())),
        absent=absent,
    )


_NOT_BRATS = (
    "none of the {n} subjects is known by its id: this split is for BraTS and FeTS data; for "
    "others write a csv with Partition_ID and Subject_ID, or give each site its own folder"
)
_NONE_FITS = {
    "institution": _NOT_BRATS,
    "fets-23": _NOT_BRATS,
    "fets-33": _NOT_BRATS,
    "name_mapping": f"{NAME_MAPPING} names none of the {{n}} subjects: is it of another year?",
    "csv": "none of the {absent} subjects in the file is among the {n} of the data: a Subject_ID "
    "must be the name of the subject's folder",
    "folders": "none of the {n} subjects lies in a site's folder: expected SITE/SUBJECT below the "
    "data folder (HGG and LGG are grades, not sites)",
}


def _refuse_repeated(subjects: Sequence[Subject]) -> None:
    if not subjects:
        raise SplitError("there are no subjects to split: does the data folder hold any?")
    folders: dict[str, Path] = {}
    for subject in subjects:
        if subject.id in folders:
            raise SplitError(
                f"subject {subject.id} occurs twice, in {folders[subject.id].parent} and in "
                f"{subject.folder.parent}: keep one, or rename if they are different patients"
            )
        folders[subject.id] = subject.folder


# ---- words ----


def _numbered(kind: str, number: int | None) -> str | None:
    return None if number is None else f"{kind}-{number:02d}"


def _names(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _nearest(name: str, names: Iterable[str]) -> str:
    plain = {re.sub(r"\b0+(?=\d)", "", known): known for known in names}  # site-6 for site-06
    close = difflib.get_close_matches(name, plain, n=1, cutoff=0.4)
    return f" (did you mean '{plain[close[0]]}'?)" if close else ""
