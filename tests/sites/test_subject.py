"""Finding subjects by name; the files are empty, as none is opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.brats import MODALITIES
from common.console import printable
from sites.subject import discover

OLD = ("_t1", "_t1ce", "_t2", "_flair", "_seg")
NEW = ("-t1n", "-t1c", "-t2w", "-t2f", "-seg")


def put(folder: Path, subject_id: str, endings=OLD, extension=".nii.gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for ending in endings:
        (folder / f"{subject_id}{ending}{extension}").touch()
    return folder


@pytest.mark.parametrize(
    ("place", "endings", "grade"),
    [
        ("HGG/Brats17_CBICA_AAB_1", OLD, "HGG"),
        ("LGG/Brats18_2013_0_1", OLD, "LGG"),
        ("data/hgg/BraTS19_TCIA08_113_1", OLD, "HGG"),
        ("MICCAI_BraTS2020_TrainingData/BraTS20_Training_001", OLD, None),
        ("a/b/c/BraTS2021_00000", OLD, None),
        ("FeTS2022_01341", OLD, None),
        ("BraTS-GLI-00000-000", NEW, None),
        ("BraTS-MET-00110-000", NEW, None),
        ("ward 3/patient_07", OLD, None),
    ],
)
@pytest.mark.parametrize("extension", [".nii", ".nii.gz"])
def test_namings_of_every_year(tmp_path, place, endings, grade, extension):
    folder = put(tmp_path / place, Path(place).name, endings, extension)
    found = discover(tmp_path)
    assert found.findings == ()
    (subject,) = found.subjects
    assert (subject.id, subject.folder, subject.grade) == (folder.name, folder, grade)
    expected = dict(zip(MODALITIES, endings, strict=False))
    assert {m: p.name for m, p in subject.images.items()} == {
        m: f"{folder.name}{ending}{extension}" for m, ending in expected.items()
    }
    assert list(subject.images) == list(MODALITIES)
    assert subject.segmentation == folder / f"{folder.name}{endings[-1]}{extension}"


def test_subjects_come_sorted_and_only_with_the_modalities_asked_for(tmp_path):
    for number in (3, 1, 2):
        put(tmp_path / f"BraTS20_Training_00{number}", f"BraTS20_Training_00{number}")
    found = discover(tmp_path, modalities=("t1ce", "flair"))
    assert [s.id[-1] for s in found.subjects] == ["1", "2", "3"]
    assert all(list(s.images) == ["t1ce", "flair"] for s in found.subjects)


def test_a_subjects_own_folder_is_a_site_of_one(tmp_path):
    folder = put(tmp_path / "LGG" / "BraTS20_Training_300", "BraTS20_Training_300")
    (subject,) = discover(folder).subjects
    assert (subject.id, subject.grade) == ("BraTS20_Training_300", "LGG")


def test_kaggles_misnomer_counts_only_where_it_is(tmp_path):
    for number in (354, 355):
        folder = put(tmp_path / f"BraTS20_Training_{number}", f"BraTS20_Training_{number}", OLD[:4])
        (folder / "W39_1998.09.19_Segm.nii").touch()
    other, kaggle = discover(tmp_path).subjects
    assert other.segmentation is None
    assert kaggle.segmentation == kaggle.folder / "W39_1998.09.19_Segm.nii"


@pytest.mark.parametrize("odd", ["a\nb", "pat\udcff", "a\x1b[2J"])
def test_a_name_that_cannot_be_written_down_is_said_and_the_others_go_on(tmp_path, odd):
    put(tmp_path / odd, odd)
    put(tmp_path / "BraTS20_Training_001", "BraTS20_Training_001")
    found = discover(tmp_path, site="north")
    assert [s.id for s in found.subjects] == ["BraTS20_Training_001"]
    (finding,) = found.findings
    assert (finding.site, finding.severity) == ("north", "error")
    assert (finding.code, finding.subject) == ("unwritable-name", printable(odd).replace("\n", "?"))
    assert "5 files" in finding.what
    assert all(text.isprintable() and text.encode() for text in finding.as_dict().values())


@pytest.mark.parametrize("name", ["x_t1.nii.gz\n", "x_t1\n.nii.gz", "x_t1\udcff.nii.gz"])
def test_a_modality_with_a_broken_name_is_not_dropped_without_a_word(tmp_path, name):
    folder = put(tmp_path / "x", "x", OLD[1:])
    (folder / name).touch()
    found = discover(tmp_path)
    assert found.subjects == ()
    (finding,) = found.findings
    assert (finding.code, finding.subject) == ("unwritable-name", "x")


def test_a_folder_whose_name_cannot_be_written_may_hold_a_subject(tmp_path):
    put(tmp_path / "\udcff", "x")
    (subject,) = discover(tmp_path).subjects
    assert subject.id == "x"
    put(tmp_path / "y", "x")
    (finding,) = discover(tmp_path).findings
    assert "y and ?" in finding.what


def test_junk_is_ignored(tmp_path):
    folder = put(tmp_path / "BraTS20_Training_001", "BraTS20_Training_001")
    for name in ("._BraTS20_Training_001_t1.nii.gz", ".DS_Store", "notes.csv", "x_t1.nii.gz.part"):
        (folder / name).touch()
    put(tmp_path / "__MACOSX" / folder.name, folder.name)
    put(tmp_path / ".ipynb_checkpoints" / folder.name, folder.name)
    found = discover(tmp_path)
    assert (len(found.subjects), found.findings) == (1, ())
    assert found.subjects[0].duplicates == {}


def test_many_subjects_may_lie_flat_in_a_folder_that_is_no_subject(tmp_path):
    for number in (1, 2):
        put(tmp_path / "HGG", f"BraTS20_Training_00{number}")
    found = discover(tmp_path)
    assert [s.id for s in found.subjects] == ["BraTS20_Training_001", "BraTS20_Training_002"]
    assert [s.grade for s in found.subjects] == ["HGG", "HGG"]
    assert found.findings == ()


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("BraTS20_Training_001", "BraTS20_Training_002"),
        ("BraTS20_Training_001", "BraTS19_CBICA_AAB_1"),
        ("BraTS2021_00001", "anything"),
        ("patient_07", "patient_08"),
    ],
)
@pytest.mark.parametrize("odd", [("_t1",), OLD])
def test_files_of_another_subject_spoil_a_folder(tmp_path, folder, file, odd):
    put(tmp_path / folder, folder, [e for e in OLD if e not in odd])
    put(tmp_path / folder, file, odd)
    put(tmp_path / "BraTS20_Training_009", "BraTS20_Training_009")
    found = discover(tmp_path, site="north")
    assert [s.id for s in found.subjects] == ["BraTS20_Training_009"]
    (finding,) = found.findings
    assert (finding.site, finding.subject, finding.severity) == ("north", folder, "error")
    assert finding.code == "id-mismatch"
    assert finding.file.startswith(file)
    assert f"{len(odd)} file" in finding.what


def test_letter_case_of_an_id_is_no_contradiction(tmp_path):
    put(tmp_path / "BraTS20_Training_001", "brats20_training_001", ["_T1", "_FLAIR"], ".NII.GZ")
    found = discover(tmp_path)
    assert found.findings == ()
    assert [(s.id, list(s.images)) for s in found.subjects] == [
        ("BraTS20_Training_001", ["t1", "flair"])
    ]


def test_one_id_in_two_folders_is_refused_and_both_are_named(tmp_path):
    for grade in ("HGG", "LGG"):
        put(tmp_path / grade / "Brats18_2013_0_1", "Brats18_2013_0_1")
    found = discover(tmp_path)
    assert found.subjects == ()
    (finding,) = found.findings
    assert (finding.severity, finding.subject) == ("error", "Brats18_2013_0_1")
    assert os.path.join("HGG", "Brats18_2013_0_1") in finding.what
    assert os.path.join("LGG", "Brats18_2013_0_1") in finding.what


def test_two_files_for_one_modality_are_both_kept_for_the_check(tmp_path):
    folder = put(tmp_path / "BraTS20_Training_001", "BraTS20_Training_001")
    put(folder, folder.name, ["_t1", "_seg"], ".nii")
    (subject,) = discover(tmp_path).subjects
    assert subject.images["t1"].name.endswith(".nii.gz")
    assert subject.duplicates == {
        "t1": (folder / f"{folder.name}_t1.nii",),
        "seg": (folder / f"{folder.name}_seg.nii",),
    }


def test_links_are_followed_once_and_loops_end(tmp_path):
    store = put(tmp_path / "store" / "BraTS20_Training_001", "BraTS20_Training_001")
    site = tmp_path / "site"
    site.mkdir()
    (site / "BraTS20_Training_001").symlink_to(store)
    (site / "again").symlink_to(store)
    (site / "loop").symlink_to(site)
    (site / "up").symlink_to(tmp_path)
    (site / "nowhere").symlink_to(tmp_path / "gone")
    found = discover(site)
    assert ([s.id for s in found.subjects], found.findings) == (["BraTS20_Training_001"], ())
    assert found.subjects[0].folder == site / "BraTS20_Training_001"


@pytest.mark.parametrize("kind", ["empty", "missing", "file", "no BraTS name"])
def test_nothing_found_is_an_error(tmp_path, kind):
    root = tmp_path / "site"
    if kind == "file":
        root.touch()
    elif kind != "missing":
        root.mkdir()
    if kind == "no BraTS name":
        (root / "scan.nii.gz").touch()
    found = discover(root, site="north")
    assert found.subjects == ()
    (finding,) = found.findings
    assert (finding.site, finding.severity, finding.code) == ("north", "error", "empty-site")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    put(tmp_path / "BraTS20_Training_001", "BraTS20_Training_001")
    locked = put(tmp_path / "BraTS20_Training_002", "BraTS20_Training_002")
    locked.chmod(0)
    try:
        (finding,) = discover(tmp_path).findings
    finally:
        locked.chmod(0o700)
    assert (finding.code, finding.file) == ("unreadable-folder", "BraTS20_Training_002")


def test_names_alone_need_no_scientific_library():
    """`fed-client --help` and the site map import this module."""
    import subprocess
    import sys

    code = "import sys, sites.subject; assert not {'numpy', 'nibabel', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
