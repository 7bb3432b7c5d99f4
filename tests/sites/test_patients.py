"""Which subjects are one patient: what names say, what the hospital's file says, and what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from sites.patients import (
    PatientsError,
    joined,
    patients_at_two_sites,
    patients_of,
    unknown_in_list,
)
from sites.subject import Subject

FIRST, SECOND, OTHER = "BraTS-GLI-00005-000", "BraTS-GLI-00005-001", "BraTS-GLI-00006-000"


def patients(root: Path, *ids: str) -> dict[str, str]:
    return patients_of([Subject(i, root / i, {}, None) for i in ids], root)


def listed(root: Path, *rows: str, header: str = "Subject_ID,Patient_ID") -> Path:
    path = root / "patients.csv"
    path.write_text("\n".join((header, *rows, "")), encoding="utf-8")
    return path


def complaint(root: Path, *ids: str) -> str:
    with pytest.raises(PatientsError) as caught:
        patients(root, *(ids or (FIRST,)))
    assert str(root / "patients.csv") in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize(
    ("subject", "patient"),
    [
        ("BraTS-GLI-00005-000", "BraTS-GLI-00005"),
        ("BraTS-GLI-02063-103", "BraTS-GLI-02063"),
        ("BraTS-MEN-00004-000", "BraTS-MEN-00004"),
        ("BraTS-MET-00086-000", "BraTS-MET-00086"),
        ("BraTS-PED-00002-000", "BraTS-PED-00002"),
        ("BraTS-SSA-00002-001", "BraTS-SSA-00002"),
        ("BraTS-GoAT-00002-001", "BraTS-GoAT-00002"),
        ("BraTS-MEN-RT-0012-2", "BraTS-MEN-RT-0012"),
        ("brats-gli-00005-000", "brats-gli-00005"),
    ],
)
def test_the_last_number_of_a_name_since_2023_is_a_time_point(tmp_path, subject, patient):
    assert patients(tmp_path, subject) == {subject: patient}


@pytest.mark.parametrize(
    "subject",
    [
        "Brats18_TCIA02_117_1",
        "BraTS19_CBICA_AAB_1",
        "BraTS20_Training_001",
        "BraTS2021_00000",
        "FeTS2022_00000",
        "BraTS-GoAT-00002",
        "TCGA-06-1802",
        "Oslo-0012-003",
        "xBraTS-GLI-00005-000",
        "BraTS-GLI-00005-000-b",
    ],
)
def test_any_other_name_is_a_patient_by_itself(tmp_path, subject):
    assert patients(tmp_path, subject) == {subject: subject}


def test_time_points_are_one_patient_within_one_cohort_only(tmp_path):
    men = FIRST.replace("GLI", "MEN")
    found = patients(tmp_path, FIRST, SECOND, OTHER, men)
    assert found[FIRST] == found[SECOND]
    assert len({found[FIRST], found[OTHER], found[men]}) == 3


def test_no_subject_is_no_patient(tmp_path):
    assert patients(tmp_path / "gone") == {}


# ------------------------------------------------------------------------------------- by the file


def test_the_file_overrides_names_and_leaves_the_others_alone(tmp_path):
    listed(tmp_path, "scan_a,P1", "scan_b,P1", f"{FIRST},P2", f"{SECOND},P3", "NOT_HERE,P1")
    assert patients(tmp_path, "scan_a", "scan_b", "scan_c", FIRST, SECOND) == {
        "scan_a": "P1",
        "scan_b": "P1",
        "scan_c": "scan_c",
        FIRST: "P2",
        SECOND: "P3",
    }


def test_a_subject_may_be_given_to_a_patient_that_others_have_by_name(tmp_path):
    listed(tmp_path, f"{OTHER},BraTS-GLI-00005", "b,a")
    found = patients(tmp_path, FIRST, SECOND, OTHER, "a", "b")
    assert set(found.values()) == {"BraTS-GLI-00005", "a"}


def test_as_a_spreadsheet_saves_it(tmp_path):
    rows = (
        "\ufeffPatient_ID ,Age, Subject_ID",
        '"Doe, 7",61, a ',
        ",,",
        *['"Doe, 7",62,b'] * 2,
        "",
    )
    text = "\r\n".join(rows)
    (tmp_path / "patients.csv").write_bytes(text.encode("utf-8"))
    assert patients(tmp_path, "a", "b") == {"a": "Doe, 7", "b": "Doe, 7"}


def test_only_the_data_folder_is_looked_into(tmp_path):
    below = tmp_path / "a"
    below.mkdir()
    listed(below, "a,P1")
    assert patients(tmp_path, "a") == {"a": "a"}


# ---------------------------------------------------------------------------- what cannot be followed


def test_two_patients_for_one_subject_are_a_contradiction(tmp_path):
    listed(tmp_path, "a,P1", "b,P1", "a,P2")
    text = complaint(tmp_path, "b")  # also where the subject is not there
    assert "line 4: subject a belongs to patient P2, but in line 2 to P1" in text
    assert "delete the wrong line" in text


def test_a_time_point_that_the_file_forgets_is_said(tmp_path):
    """Else a scan that came later would be a patient of its own."""
    listed(tmp_path, f"{FIRST},P1")
    text = complaint(tmp_path, FIRST, SECOND)
    assert f"add a line for {SECOND}" in text
    assert patients(tmp_path, FIRST, OTHER)[FIRST] == "P1"
    listed(tmp_path, f"{FIRST},BraTS-GLI-00005")  # says only what the name says
    assert set(patients(tmp_path, FIRST, SECOND).values()) == {"BraTS-GLI-00005"}


@pytest.mark.parametrize(
    ("header", "row", "said"),
    [
        ("Subject_ID", "a", "line 1: no column Patient_ID"),
        ("Subject_ID;Patient_ID", "a;b", "no column Subject_ID and no column Patient_ID"),
        ("", "", "no column Subject_ID"),
        ("Subject_ID,Patient_ID", "a,", "line 2: Patient_ID is empty"),
        ("Subject_ID,Patient_ID", "a", "line 2: Patient_ID is empty"),
        ("Subject_ID,Patient_ID", ",P1", "line 2: Subject_ID is empty"),
        ("Subject_ID,Patient_ID", "a,Doe, John", "line 2: more cells than the 2 columns"),
        ("Subject_ID,Patient_ID", "a,P\0001", "line 2: the Patient_ID holds a control character"),
        ("Subject_ID,Patient_ID", 'a,"P1', "quotation mark"),
    ],
)
def test_a_file_that_is_no_such_csv_is_refused(tmp_path, header, row, said):
    listed(tmp_path, row, header=header)
    assert said in complaint(tmp_path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    path = tmp_path / "patients.csv"
    path.write_bytes("Subject_ID,Patient_ID\na,Müller\n".encode("latin-1"))
    assert "CSV UTF-8" in complaint(tmp_path)
    path.unlink()
    path.mkdir()
    assert "Is a directory" in complaint(tmp_path)
    path.rmdir()
    path.symlink_to(tmp_path / "moved.csv")
    assert "No such file" in complaint(tmp_path)


# ---------------------------------------------------------------------------------- at several sites


def test_a_patient_at_two_sites_is_warned_about_at_the_later(tmp_path):
    sites = {"north": ["a", "b"], "south": ["c", "d"], "west": ["e"]}
    patients = {"a": "P1", "b": "P1", "c": "P1", "d": "P2", "e": "P1"}
    found = patients_at_two_sites(sites, patients)
    assert [(f.site, f.subject) for f in found] == [("south", "c"), ("west", "e")]
    assert {(f.severity, f.code) for f in found} == {("warning", "patient-at-two-sites")}
    assert all("subject a of site north" in f.what for f in found)


# ------------------------------------------------------------------------- who is one person after all


def test_patients_of_subjects_with_one_scan_are_one():
    before = {"a": "P1", "b": "P2", "c": "P2", "d": "P3", "e": "P4"}
    after = {"a": "P1", "b": "P1", "c": "P1", "d": "P1", "e": "P4"}
    assert joined(before, {"b": "a", "d": "c"}) == after
    assert joined(before, {"d": "c", "b": "a"}) == after
    assert joined(before, {}) == before


def test_a_line_about_nobody_is_warned_about(tmp_path):
    (tmp_path / "Case_3").mkdir()  # there, but not usable: that is said elsewhere
    (tmp_path / "Case_44_t1.nii").touch()
    wrong = "Case_02,P", "Case_4,P", "Case,P", "/etc,P", "..,Q", "[,Q"
    listed(tmp_path, "Case_1,P", "Case_3,P", "Case_44,P", *wrong)
    subjects = [Subject(i, tmp_path / i, {}, None) for i in ("Case_1", "Case_2")]
    found = unknown_in_list(subjects, tmp_path, site="Oslo")
    assert [f.what.split(",")[0] for f in found] == [
        f"names subject {name}" for name in ("..", "/etc", "Case", "Case_02", "Case_4", "[")
    ]
    assert {(f.site, f.file, f.severity) for f in found} == {("Oslo", "patients.csv", "warning")}


def test_without_a_file_or_a_stranger_nothing_is_warned_about(tmp_path):
    subjects = [Subject("Case_1", tmp_path, {}, None)]
    assert unknown_in_list(subjects, tmp_path, site="Oslo") == []
    listed(tmp_path, "Case_1,P")
    assert unknown_in_list(subjects, tmp_path, site="Oslo") == []
