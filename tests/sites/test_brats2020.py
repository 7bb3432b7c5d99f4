"""The shipped map of BraTS subjects against the published mapping, where that is at hand."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from pathlib import Path

import pytest

from sites import brats2020

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the published csv files are absent")
IDS = [f"BraTS20_Training_{number:03d}" for number in range(1, 370)]


def digest(pairs: list[tuple[str, object]]) -> str:
    text = "".join(f"{subject_id} {value}\n" for subject_id, value in pairs)
    return hashlib.sha256(text.encode()).hexdigest()


def site_of(subject_id: str) -> int:
    ids = brats2020.range_of(subject_id)
    assert ids is not None
    return ids.site


def test_the_ranges_cover_369_subjects_with_the_known_sizes():
    covered = [n for ids in brats2020.RANGES for n in range(ids.first, ids.last + 1)]
    assert covered == list(range(1, 370))
    sizes = sorted(Counter(map(site_of, IDS)).values(), reverse=True)
    assert sizes == [129, 35, 34, 34, 22, 15, 14, 13, 12, 11, 9, 9, 8, 8, 6, 6, 4]
    merged = Counter(brats2020.HOSPITALS[site_of(i)] for i in IDS)
    assert sorted(merged.values(), reverse=True) == [129, 69, 34, 27, 25, 22, 15, 12, 9, 9, 8, 6, 4]
    grades = Counter(ids.grade for i in IDS if (ids := brats2020.range_of(i)))
    assert grades == {"HGG": 293, "LGG": 76}
    assert set(brats2020.SITE_NAMES) == set(map(site_of, IDS)) == set(brats2020.HOSPITALS)


# The digests are of the published files, so a slip of the keyboard in the table is caught anywhere.
def test_the_map_has_the_published_checksums():
    assert digest([(i, site_of(i)) for i in IDS]) == (
        "1a9488c7f2b22e42cd1525dd1b9879d638d99c5da83a98a224177646497a9b67"
    )
    assert (
        digest([(i, brats2020.brats2021_id(i) or "NA") for i in IDS])
        == "a2b1c10fc354b0faac5819efa00f7be240fc420100ad94220c250bb048bef7d7"
    )
    numbers = [f"FeTS2022_{n:05d}" for n in range(1667)]
    for parts, expected in (
        (23, "a4f9539a5c0516aaa7f2236561523f5e922717db7d8c71fda61c341c884b17fc"),
        (33, "44ee1e90147f1f731a2be8e6bf105a1d9df7bc55be2e80882848d78d990922a7"),
    ):
        placed = [(i, part) for i in numbers if (part := brats2020.fets_part(i, parts=parts))]
        assert len(placed) == 1251
        assert digest(placed) == expected


@needs_shared
def test_the_map_is_the_published_one():
    with (SHARED / "brats2020_sites.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 369
    for row in rows:
        subject_id = row["BraTS_2020_subject_ID"]
        ids = brats2020.range_of(subject_id)
        assert ids is not None
        assert (ids.site, ids.grade) == (int(row["site"]), row["Grade"])
        assert brats2020.HOSPITALS[ids.site] == int(row["hospital"])
        assert (brats2020.brats2021_id(subject_id) or "NA") == row["BraTS2021"]
        if row["BraTS_2019_subject_ID"] == "NA":
            assert ids.token == ""
            continue
        _, token, patient, *_ = row["BraTS_2019_subject_ID"].split("_")
        assert token == ids.token
        if token == "2013":
            assert int(patient) in brats2020.PATIENTS_2013[ids.site]


@needs_shared
def test_the_tissue_source_sites_are_those_of_the_name_mapping():
    with (SHARED / "name_mapping_2020_reconstructed.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            ids = brats2020.range_of(row["BraTS_2020_subject_ID"])
            if ids is not None and row["TCGA_TCIA_subject_ID"] != "NA":
                assert brats2020.TSS[ids.token] == row["TCGA_TCIA_subject_ID"].split("-")[1]


@needs_shared
@pytest.mark.parametrize(("parts", "name"), [(23, "1"), (33, "2")])
def test_the_shipped_partitions_are_fets_own(parts, name):
    with (SHARED / f"fets_partitioning_{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1251
    for row in rows:
        assert brats2020.fets_part(row["Subject_ID"], parts=parts) == int(row["Partition_ID"])


def test_a_subject_has_the_same_part_under_each_of_its_names():
    assert brats2020.brats2021_id("BraTS20_Training_004") == "BraTS2021_00131"
    for subject_id in ("BraTS20_Training_004", "BraTS2021_00131", "FeTS2022_00131"):
        assert brats2020.fets_part(subject_id, parts=23) == 1
    for subject_id in IDS:
        if subject_id not in brats2020.SUSPICIOUS:  # these four never reached FeTS
            assert brats2020.fets_part(subject_id, parts=23) == site_of(subject_id)


@pytest.mark.parametrize(
    "subject_id",
    ["BraTS20_Training_000", "BraTS20_Training_370", "BraTS20_Validation_007", "BraTS2021_00131x"],
)
def test_an_id_outside_the_published_sets_has_no_site(subject_id):
    assert brats2020.range_of(subject_id) is None
    assert brats2020.brats2021_id(subject_id) is None
    assert brats2020.fets_part(subject_id, parts=33) is None


def test_exactly_the_subjects_brats_2021_dropped_are_suspicious():
    dropped = {i for i in IDS if brats2020.brats2021_id(i) is None}
    assert dropped == brats2020.SUSPICIOUS
    assert {brats2020.number_of(i) for i in dropped} == {353, 354, 355, 367}


def test_the_link_to_brats_2021_leads_back():
    for subject_id in set(IDS) - brats2020.SUSPICIOUS:
        newer = brats2020.brats2021_id(subject_id)
        assert newer is not None
        assert brats2020.brats2020_id(newer) == subject_id
    assert brats2020.brats2020_id("BraTS2021_00000") is None  # new in 2021
