"""The splits against the published maps, and what a person reads when a file is wrong."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from sites import brats2020
from sites.institutions import Split, SplitError, roles, sizes, split_subjects, too_small
from sites.subject import Subject

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the published csv files are absent")
ROOT = Path("/data/MICCAI_BraTS2020_TrainingData")
IDS_2020 = [f"BraTS20_Training_{number:03d}" for number in range(1, 370)]
SIZES_17 = [129, 35, 34, 34, 22, 15, 14, 13, 12, 11, 9, 9, 8, 8, 6, 6, 4]
HEADER = (
    "Grade,BraTS_2017_subject_ID,BraTS_2018_subject_ID,TCGA_TCIA_subject_ID,"
    "BraTS_2019_subject_ID,BraTS_2020_subject_ID\n"
)


def subject(subject_id: str, folder: Path | None = None, grade: str | None = None) -> Subject:
    return Subject(subject_id, folder or ROOT / subject_id, {}, None, grade)


BRATS_2020 = [subject(subject_id) for subject_id in IDS_2020]


def descending(split: Split) -> list[int]:
    return sorted(sizes(split).values(), reverse=True)


def published(name: str, *columns: str) -> list[list[str]]:
    with (SHARED / name).open(newline="") as file:
        return [[row[column] for column in columns] for row in csv.DictReader(file)]


# ---- by institution ----


def test_brats_2020_becomes_17_sites_with_nobody_left_out():
    split = split_subjects(BRATS_2020, by="institution")
    assert descending(split) == SIZES_17
    assert list(split.sites) == [f"site-{number:02d}" for number in range(1, 18)]
    assert split.unmapped == ()
    assert sorted(i for members in split.sites.values() for i in members) == IDS_2020
    assert Counter(split.grades.values()) == {"HGG": 293, "LGG": 76}


@needs_shared
def test_the_17_sites_and_13_hospitals_are_the_published_ones():
    rows = published("brats2020_sites.csv", "BraTS_2020_subject_ID", "site", "hospital", "Grade")
    split = split_subjects(BRATS_2020, by="institution")
    merged = split_subjects(BRATS_2020, by="institution", merge_hospitals=True)
    for subject_id, site, hospital, grade in rows:
        assert subject_id in split.sites[f"site-{int(site):02d}"]
        assert subject_id in merged.sites[f"hospital-{int(hospital):02d}"]
        assert split.grades[subject_id] == grade
    assert len(merged.sites) == 13


def test_brats_2021_and_fets_subjects_join_the_same_sites_as_their_2020_selves():
    split = split_subjects(
        [subject("BraTS2021_00131"), subject("FeTS2022_00000"), subject("BraTS20_Training_005")],
        by="institution",
    )
    assert split.sites == {
        "site-01": ("BraTS2021_00131", "BraTS20_Training_005"),
        "site-18": ("FeTS2022_00000",),  # new in 2021, its grade was never published
    }
    assert split.grades["BraTS2021_00131"] == "HGG"
    assert split.grades["FeTS2022_00000"] == ""


@pytest.mark.parametrize(
    ("subject_id", "site"),
    [
        ("Brats18_CBICA_AAB_1", "site-01"),
        ("BraTS19_TCIA08_167_1", "site-11"),
        ("Brats18_2013_10_1", "site-02"),
        ("Brats18_2013_2_1", "site-17"),
        ("BraTS19_2013_27_1", "site-03"),
        ("BraTS19_TMC_09043_1", "site-04"),
        ("Brats18_UAB_3455_1", "site-UAB"),  # validation only: a site that BraTS never numbered
    ],
)
def test_ids_of_2018_and_2019_carry_their_institution(subject_id, site):
    assert split_subjects([subject(subject_id)], by="institution").sites == {site: (subject_id,)}


@needs_shared
def test_brats_2019_ids_give_the_same_sites_as_2020_numbers():
    pairs = published(
        "brats2020_sites.csv", "BraTS_2019_subject_ID", "BraTS_2020_subject_ID", "site"
    )
    older = [(old, site) for old, _, site in pairs if old != "NA"]
    assert len(older) == 335
    split = split_subjects([subject(old) for old, _ in older], by="institution")
    for subject_id, site in older:
        assert subject_id in split.sites[f"site-{int(site):02d}"]


def test_synthetic_subjects_beyond_369_are_placed_by_the_name_mapping(tmp_path):
    (tmp_path / "name_mapping.csv").write_text(
        HEADER
        + "HGG,Brats17_TCIA_S6001_1,Brats18_TCIA02_S6001_1,TCGA-06-S6001,BraTS19_TCIA02_S6001_1,"
        "BraTS20_Training_6001\n"
        "HGG,NA,NA,NA,NA,BraTS20_Training_16001\n"
        "HGG,Brats17_2013_S3001_1,Brats18_2013_S3001_1,NA,BraTS19_2013_S3001_1,"
        "BraTS20_Training_3001\n"
        "HGG,Brats17_2013_S17001_1,Brats18_2013_S17001_1,NA,BraTS19_2013_S17001_1,"
        "BraTS20_Training_17001\n"
    )
    ids = [f"BraTS20_Training_{n}" for n in ("007", "3001", "6001", "16001", "17001", "99999")]
    split = split_subjects([subject(i, tmp_path / i) for i in ids], by="institution")
    assert split.sites == {
        f"site-{site}": (f"BraTS20_Training_{number}",)
        for site, number in (
            ("01", "007"),
            ("03", "3001"),
            ("06", "6001"),
            ("16", "16001"),
            ("17", "17001"),
        )
    }
    assert split.unmapped == ("BraTS20_Training_99999",)


def test_a_cohort_of_unknown_ids_is_an_error_that_names_the_ways_out():
    with pytest.raises(SplitError, match=r"none of the 1 subjects.*Partition_ID"):
        split_subjects([subject("koeln_001")], by="institution")


# ---- by name_mapping.csv ----


@needs_shared
def test_the_name_mapping_gives_15_groups():
    file = SHARED / "name_mapping_2020_reconstructed.csv"
    split = split_subjects(BRATS_2020, by="name_mapping", file=file)
    assert descending(split) == [129, 35, 34, 34, 30, 22, 14, 13, 12, 11, 9, 8, 8, 6, 4]
    assert len(split.sites["2013"]) == 30
    assert split.sites["IvyGAP"] == tuple(IDS_2020[335:])
    for subject_id in IDS_2020:
        ids = brats2020.range_of(subject_id)
        assert ids is not None
        assert subject_id in split.sites[ids.token or "IvyGAP"]


def test_the_name_mapping_is_found_above_grade_folders_and_gives_the_grade(tmp_path):
    (tmp_path / "name_mapping.csv").write_text(
        "Grade,TCGA_TCIA_subject_ID,BraTS_2019_subject_ID\n"
        "LGG,NA,BraTS19_TCIA10_1_1\nHGG,TCGA-06-0001,\nHGG,TCGA-QQ-0002,NA\n"
    )
    members = [
        subject("BraTS19_TCIA10_1_1", tmp_path / "x" / "BraTS19_TCIA10_1_1"),
        subject("TCGA-06-0001", tmp_path / "TCGA-06-0001"),
        subject("TCGA-QQ-0002", tmp_path / "TCGA-QQ-0002"),
    ]
    expected = {
        "TCGA-QQ": ("TCGA-QQ-0002",),
        "TCIA02": ("TCGA-06-0001",),
        "TCIA10": ("BraTS19_TCIA10_1_1",),
    }
    for root in (tmp_path, None):
        split = split_subjects(members, by="name_mapping", root=root)
        assert split.sites == expected
        assert split.grades["BraTS19_TCIA10_1_1"] == "LGG"


def test_a_missing_name_mapping_and_two_that_disagree_are_named(tmp_path):
    row = "HGG,NA,NA,NA,BraTS19_CBICA_AAA_1,BraTS20_Training_001\n"
    inner = tmp_path / "inner"
    inner.mkdir()
    members = [subject("BraTS20_Training_001", inner / "BraTS20_Training_001")]
    with pytest.raises(SplitError, match=r"found no name_mapping\.csv"):
        split_subjects(members, by="name_mapping", root=tmp_path)
    (tmp_path / "name_mapping.csv").write_text(HEADER + row)
    (inner / "name_mapping.csv").write_text(HEADER + row)
    split_subjects(members, by="name_mapping", root=tmp_path)  # a mere copy is no matter
    (inner / "name_mapping.csv").write_text(HEADER + row.replace("CBICA", "TMC"))
    with pytest.raises(SplitError, match=r"name_mapping\.csv, line 2.*BraTS20_Training_001"):
        split_subjects(members, by="name_mapping", root=tmp_path)


def test_a_folder_of_a_grade_outranks_the_files():
    members = [subject("BraTS20_Training_001", grade="LGG"), subject("BraTS20_Training_002")]
    assert split_subjects(members, by="institution").grades == {
        "BraTS20_Training_001": "LGG",
        "BraTS20_Training_002": "HGG",
    }


# ---- by partition ----


@needs_shared
@pytest.mark.parametrize(("parts", "name"), [(23, "1"), (33, "2")])
def test_fets_partitions_work_on_all_three_data_sets_with_and_without_their_file(parts, name):
    file = SHARED / f"fets_partitioning_{name}.csv"
    rows = published(file.name, "Subject_ID", "Partition_ID")
    for prefix in ("FeTS2022", "BraTS2021"):
        members = [subject(subject_id.replace("FeTS2022", prefix)) for subject_id, _ in rows]
        by_file = split_subjects(members, by="csv", file=file)
        assert len(by_file.sites) == parts
        assert (by_file.unmapped, by_file.absent) == ((), 0)
        for subject_id, part in rows:
            expected = by_file.sites[f"part-{int(part):02d}"]
            assert subject_id.replace("FeTS2022", prefix) in expected
        assert split_subjects(members, by=f"fets-{parts}") == by_file
    by_file = split_subjects(BRATS_2020, by="csv", file=file)
    shipped = split_subjects(BRATS_2020, by=f"fets-{parts}")
    assert by_file.sites == shipped.sites
    assert by_file.unmapped == shipped.unmapped == tuple(sorted(brats2020.SUSPICIOUS))
    assert by_file.absent == 1251 - 365


def partition(folder: Path, text: str | bytes) -> Path:
    file = folder / "partition.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


MEMBERS = [subject(name) for name in ("anna", "bert", "carl")]


def test_a_partition_lists_who_is_unmapped_and_counts_who_is_absent(tmp_path):
    file = partition(tmp_path, "Partition_ID,Subject_ID\n2,anna\nKöln,bert\n2,dora\n")
    split = split_subjects(MEMBERS, by="csv", file=file)
    assert split.sites == {"Köln": ("bert",), "part-02": ("anna",)}
    assert (split.unmapped, split.absent) == (("carl",), 1)


def test_spreadsheets_ways_of_writing_a_csv_are_understood(tmp_path):
    plain = "Partition_ID,Subject_ID\n1,anna\n2,bert\n"
    expected = split_subjects(MEMBERS, by="csv", file=partition(tmp_path, plain))
    for text in (
        b"\xef\xbb\xbf" + plain.encode(),
        plain.replace("\n", "\r\n"),
        plain.replace("\n", "\r"),
        "Partition_ID, Subject_ID ,Comment\n1, anna,x\n\n 2 ,bert,\n,,\n",
        'Subject_ID,Partition_ID,\n"anna","01",\nbert,2,\n',
    ):
        assert split_subjects(MEMBERS, by="csv", file=partition(tmp_path, text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: no column Partition_ID and no column Subject_ID"),
        ("Partition_ID;Subject_ID\n1;anna\n", r"line 1: no column .*commas"),
        ("Partition_ID,Patient\n1,anna\n", r"line 1: no column Subject_ID"),
        ("Partition_ID,Subject_ID\n1,anna\n1,bert,carl\n", r"line 3: more cells than the 2"),
        ("Partition_ID,Subject_ID\n1,anna\n1\n", r"line 3: Subject_ID is empty"),
        ("Partition_ID,Subject_ID\n,anna\n", r"line 2: Partition_ID is empty"),
        ("Partition_ID,Subject_ID\n../x,anna\n", r"line 2: the Partition_ID cannot name a site"),
        ('Partition_ID,Subject_ID\n1,"anna\n1,bert\n', r"line \d: not readable .*quotation mark"),
        ("Partition_ID,Subject_ID\n1,anna\n1,anna\n", r"line 3: repeats anna of line 2"),
        (
            "Partition_ID,Subject_ID\n1,anna\n2,anna\n",
            r"line 3: subject anna is at part-02 but in line 2 at part-01",
        ),
        (
            "Partition_ID,Subject_ID\n1,BraTS20_Training_004\n2,FeTS2022_00131\n",
            r"line 3: subject FeTS2022_00131 \(also BraTS20_Training_004\) is at part-02",
        ),
        ("Partition_ID,Subject_ID\n1,dora\n", r"none of the 1 subjects in the file is among the 3"),
        (b"PK\x03\x04\xff\xfe\x00\x00", r"not a csv file in UTF-8"),
        ("Partition_ID,Subject_ID\n1,anna\n".encode("utf-16"), r"not a csv file in UTF-8"),
    ],
)
def test_a_bad_partition_says_where_and_what_to_do(tmp_path, text, message):
    with pytest.raises(SplitError, match=message):
        split_subjects(MEMBERS, by="csv", file=partition(tmp_path, text))


def test_a_partition_that_is_no_file_is_named(tmp_path):
    for file in (tmp_path / "nowhere.csv", tmp_path):
        with pytest.raises(SplitError, match=file.name):
            split_subjects(MEMBERS, by="csv", file=file)
    with pytest.raises(SplitError, match="needs its file"):
        split_subjects(MEMBERS, by="csv")


# ---- by folders, at random ----


def test_the_first_folder_below_the_root_is_the_site(tmp_path):
    members = [
        subject("a1", tmp_path / "north" / "a1"),
        subject("a2", tmp_path / "north" / "2020" / "a2"),
        subject("b1", tmp_path / "south" / "HGG" / "b1", "HGG"),
        subject("b2", tmp_path / "south"),  # files without a folder of their own
        subject("c1", tmp_path / "c1"),
        subject("d1", tmp_path / "HGG" / "d1", "HGG"),
    ]
    split = split_subjects(members, by="folders", root=tmp_path)
    assert split.sites == {"north": ("a1", "a2"), "south": ("b1", "b2")}
    assert split.unmapped == ("c1", "d1")
    with pytest.raises(SplitError, match="HGG and LGG are grades"):
        split_subjects(members[4:], by="folders", root=tmp_path)
    members.append(subject("e1", tmp_path / "pat\udcff" / "e1"))
    with pytest.raises(SplitError, match=r"the folder pat\? in .* rename it"):
        split_subjects(members, by="folders", root=tmp_path)


def test_the_same_id_at_two_sites_is_refused(tmp_path):
    members = [subject("a1", tmp_path / "north" / "a1"), subject("a1", tmp_path / "south" / "a1")]
    with pytest.raises(SplitError, match=r"a1 occurs twice.*north.*south"):
        split_subjects(members, by="folders", root=tmp_path)


@pytest.mark.parametrize("parts", [1, 4, 7])
def test_iid_parts_are_equal_in_size_and_in_grades(parts):
    split = split_subjects(BRATS_2020, by="iid", parts=parts, seed=5)
    assert sorted(i for members in split.sites.values() for i in members) == IDS_2020
    assert len(split.sites) == parts
    assert max(descending(split)) - min(descending(split)) <= 1
    low = [sum(split.grades[i] == "LGG" for i in members) for members in split.sites.values()]
    assert max(low) - min(low) <= 1


def test_iid_depends_on_the_seed_alone_and_mixes_the_institutions():
    split = split_subjects(BRATS_2020, by="iid", parts=4, seed=5)
    assert split == split_subjects(BRATS_2020[::-1], by="iid", parts=4, seed=5)
    assert split.sites != split_subjects(BRATS_2020, by="iid", parts=4, seed=6).sites
    of_site_one = Counter(
        part for part, members in split.sites.items() for i in members if i in IDS_2020[:129]
    )
    assert all(20 <= count <= 45 for count in of_site_one.values())  # about 32 each


@pytest.mark.parametrize("parts", [None, 0, 4])
def test_an_impossible_number_of_parts_is_refused(parts):
    with pytest.raises(SplitError, match="1 to 3 parts"):
        split_subjects(MEMBERS, by="iid", parts=parts)


# ---- what may be asked ----


def test_a_mistyped_split_offers_the_nearest():
    with pytest.raises(SplitError, match="did you mean 'institution'"):
        split_subjects(MEMBERS, by="institutions")
    with pytest.raises(SplitError, match="only in the split by institution"):
        split_subjects(BRATS_2020, by="fets-33", merge_hospitals=True)
    with pytest.raises(SplitError, match="no subjects"):
        split_subjects([], by="institution")


# ---- who trains ----

FEDERATION = split_subjects(BRATS_2020, by="institution")


def test_small_sites_and_held_out_sites_evaluate_and_the_others_train():
    assert too_small(FEDERATION, 8) == ("site-02", "site-09", "site-14")
    told = roles(FEDERATION, hold_out=["site-16"], min_subjects=8)
    evaluating = {site for site, role in told.items() if role == "evaluates"}
    assert evaluating == {"site-02", "site-09", "site-14", "site-16"}
    assert set(told) == set(FEDERATION.sites)
    assert set(roles(FEDERATION).values()) == {"trains"}


def test_a_mistyped_site_offers_the_nearest():
    with pytest.raises(SplitError, match=r"'site-6'.*did you mean 'site-06'"):
        roles(FEDERATION, hold_out=["site-6"])


def test_a_federation_without_training_sites_is_refused():
    with pytest.raises(SplitError, match="no site is left to train"):
        roles(FEDERATION, min_subjects=130)
