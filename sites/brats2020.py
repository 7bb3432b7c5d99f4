"""Where the BraTS subjects come from: facts about the public data sets, shipped with the product.

Covers the originating site of all 369 BraTS 2020 training subjects, the same subject's number in
BraTS 2021 / FeTS 2022, and FeTS 2022's two partitions (23 institutions; the five largest cut in
three by tumour size: 33). Does not decide how a cohort is split: that is `sites.institutions`.

Source: the official "BraTS21-17 mapping" released with BraTS 2021 (column "Site No"), joined with
BraTS 2019's name_mapping.csv, and FeTS 2022's partitioning_1.csv and partitioning_2.csv. Site
numbers are theirs. For the TCGA collections the site is the tissue source, a proxy for the scanner.
"""

from __future__ import annotations

import csv
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class IdRange:
    """Consecutive BraTS 2020 training numbers, `first` to `last` included, of one site."""

    site: int
    first: int
    last: int
    grade: str
    token: str
    """What stands for the institution in BraTS 2018/2019 ids; "" for IvyGAP, which has none."""


RANGES: tuple[IdRange, ...] = (
    IdRange(1, 1, 129, "HGG", "CBICA"),
    IdRange(2, 130, 135, "HGG", "2013"),
    IdRange(17, 136, 144, "HGG", "2013"),
    IdRange(3, 145, 149, "HGG", "2013"),
    IdRange(4, 150, 157, "HGG", "TMC"),
    IdRange(5, 158, 179, "HGG", "TCIA01"),
    IdRange(6, 180, 213, "HGG", "TCIA02"),
    IdRange(7, 214, 225, "HGG", "TCIA03"),
    IdRange(8, 226, 233, "HGG", "TCIA04"),
    IdRange(9, 234, 237, "HGG", "TCIA05"),
    IdRange(10, 238, 245, "HGG", "TCIA06"),
    IdRange(11, 246, 259, "HGG", "TCIA08"),
    IdRange(3, 260, 269, "LGG", "2013"),
    IdRange(4, 270, 270, "LGG", "TMC"),
    IdRange(12, 271, 281, "LGG", "TCIA09"),
    IdRange(13, 282, 316, "LGG", "TCIA10"),
    IdRange(14, 317, 322, "LGG", "TCIA12"),
    IdRange(15, 323, 335, "LGG", "TCIA13"),
    IdRange(16, 336, 369, "HGG", ""),
)
"""BraTS 2020 numbered its training subjects site by site, so the number alone tells the site."""

SITE_NAMES: dict[int, str] = {
    1: "University of Pennsylvania",
    2: "BraTS 2012/13 contributor A",  # these three never published their names
    3: "BraTS 2012/13 contributor B",
    4: "Tata Memorial Centre",
    5: "MD Anderson Cancer Center",
    6: "Henry Ford Hospital (GBM)",
    7: "UCSF",
    8: "Duke",
    9: "Emory University",
    10: "Case Western (GBM)",
    11: "Thomas Jefferson University (GBM)",
    12: "Thomas Jefferson University (LGG)",
    13: "Henry Ford Hospital (LGG)",
    14: "Case Western (LGG)",
    15: "Case Western - St Joe's (LGG)",
    16: "IvyGAP (Swedish, Seattle)",
    17: "BraTS 2012/13 contributor C",
}

HOSPITALS: dict[int, int] = {site: site for site in range(1, 18)} | {
    12: 11,  # Thomas Jefferson
    13: 6,  # Henry Ford
    14: 10,  # Case Western
    15: 10,
}
"""Site -> the lowest site number of the same hospital: TCGA gave its glioblastoma and its low-grade
collection separate codes, so 17 sites are 13 hospitals."""

TSS: dict[str, str] = {
    "TCIA01": "02",
    "TCIA02": "06",
    "TCIA03": "08",
    "TCIA04": "12",
    "TCIA05": "14",
    "TCIA06": "19",
    "TCIA08": "76",
    "TCIA09": "CS",
    "TCIA10": "DU",
    "TCIA12": "FG",
    "TCIA13": "HT",
}
"""Token of BraTS 2018/2019 ids -> TCGA tissue source site code (the `06` in TCGA-06-1802)."""

PATIENTS_2013: dict[int, frozenset[int]] = {
    2: frozenset({5, 10, 18, 19, 20, 21}),
    17: frozenset({2, 7, 12, 13, 14, 17, 23, 25, 26}),
    3: frozenset({0, 1, 3, 4, 6, 8, 9, 11, 15, 16, 22, 24, 27, 28, 29}),
}
"""Three sites share the token 2013: the patient number in Brats18_2013_<patient>_1 tells which."""

SUSPICIOUS: frozenset[str] = frozenset(
    f"BraTS20_Training_{number:03d}" for number in (353, 354, 355, 367)
)
"""Subjects that BraTS 2021 dropped (IvyGAP W36, W43, W39, W7): worth a look before training."""

_BRATS2020 = re.compile(r"BraTS20_Training_(\d{3,})")
_BRATS2021 = re.compile(r"(?:BraTS2021|FeTS2022)_(\d{5})")
_LINKS = Path(__file__).with_name("brats2021_links.csv")
_STARTS = [ids.first for ids in RANGES]


def number_of(subject_id: str) -> int | None:
    """7 for "BraTS20_Training_007"; None for an id that is not a BraTS 2020 training id.

    A number above 369 is a number too: only `range_of` says whether the real set has it.
    """
    match = _BRATS2020.fullmatch(subject_id)
    return int(match[1]) if match else None


def range_of(subject_id: str) -> IdRange | None:
    """The site, grade and token of a real BraTS 2020 training id (001 to 369), else None."""
    number = number_of(subject_id)
    if number is None or not 1 <= number <= RANGES[-1].last:
        return None
    return RANGES[bisect_right(_STARTS, number) - 1]


def brats2021_number(subject_id: str) -> int | None:
    """131 for "BraTS2021_00131" and for "FeTS2022_00131" (one numbering), else None."""
    match = _BRATS2021.fullmatch(subject_id)
    return int(match[1]) if match else None


def brats2021_id(subject_id: str) -> str | None:
    """The BraTS 2021 id of a BraTS 2020 training id; None for the four it dropped, and others."""
    ids = range_of(subject_id)
    number = None if ids is None else _links().brats2021.get(number_of(subject_id) or 0)
    return None if number is None else f"BraTS2021_{number:05d}"


def brats2020_id(subject_id: str) -> str | None:
    """The BraTS 2020 training id of a BraTS 2021 or FeTS 2022 id, None where it is newer."""
    number = brats2021_number(subject_id)
    older = None if number is None else _links().brats2020.get(number)
    return None if older is None else f"BraTS20_Training_{older:03d}"


def patient_id(subject_id: str) -> str:
    """One id for all the ids that a patient has in BraTS 2020, BraTS 2021 and FeTS 2022."""
    number = brats2021_number(brats2021_id(subject_id) or subject_id)
    return subject_id if number is None else f"BraTS2021_{number:05d}"


def fets_part(subject_id: str, *, parts: Literal[23, 33]) -> int | None:
    """The FeTS 2022 partition (from 1) of a BraTS 2020, BraTS 2021 or FeTS 2022 training id.

    Of the 23 parts, 1 to 17 are BraTS 2020's sites. None where FeTS has no such subject.
    """
    number = brats2021_number(brats2021_id(subject_id) or subject_id)
    links = _links()
    return None if number is None else (links.fets23 if parts == 23 else links.fets33).get(number)


@dataclass(frozen=True)
class _Links:
    brats2021: Mapping[int, int]  # BraTS 2020 number -> BraTS 2021 number
    brats2020: Mapping[int, int]  # and back
    fets23: Mapping[int, int]  # BraTS 2021 number -> part
    fets33: Mapping[int, int]


@cache
def _links() -> _Links:
    with _LINKS.open(encoding="ascii", newline="") as file:
        rows = list(csv.DictReader(file))
    links = {int(row["brats2020"]): int(row["brats2021"]) for row in rows if row["brats2020"]}
    return _Links(
        MappingProxyType(links),
        MappingProxyType({newer: older for older, newer in links.items()}),
        MappingProxyType({int(row["brats2021"]): int(row["fets23"]) for row in rows}),
        MappingProxyType({int(row["brats2021"]): int(row["fets33"]) for row in rows}),
    )
