"""`fed-client check` as a user runs it: real processes, exit codes, what is printed where."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
LPS = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 15], [0, 0, 1, 0], [0, 0, 0, 1]])
COMMAND = [sys.executable, "-c", "from client.cli import main; main()"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd="/",
        timeout=60,
        **options,
    )


def write_subject(root: Path, number: int, modalities=("t1", "t1ce", "t2", "flair", "seg")) -> Path:
    folder = root / f"BraTS20_Training_{number:03}"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(number)
    for modality in modalities:
        voxels = np.zeros((16, 16, 16), np.int16)
        values = rng.integers(100, 200, (8, 8, 8))
        voxels[4:12, 4:12, 4:12] = 1 if modality == "seg" else values
        nibabel.save(nibabel.Nifti1Image(voxels, LPS), folder / f"{folder.name}_{modality}.nii.gz")
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Two sound subjects and a name with a space."""
    root = tmp_path / "North ward"
    write_subject(root, 1)
    write_subject(root, 2)
    return root


def test_sound_data(site):
    result = run("check", site)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "North ward: 2 subjects, 2 usable, 0 errors, 0 warnings\n"


def test_every_finding_is_a_whole_line_when_piped(site):
    broken = site / "BraTS20_Training_002" / "BraTS20_Training_002_t1ce.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-100])
    result = run("check", site, "--site", "Oslo")
    assert (result.returncode, result.stderr) == (1, "")
    (line,) = [row for row in result.stdout.splitlines() if broken.name in row]
    for text in ("Oslo", "BraTS20_Training_002", "error", "end too early", "Copy or download"):
        assert text in line
    assert result.stdout.endswith("Oslo: 2 subjects, 1 usable, 1 errors, 0 warnings\n")


def test_json_is_one_document_with_everything(site):
    write_subject(site, 3, ("t1", "t1ce", "flair", "seg"))
    copy = write_subject(site, 4)
    for path in (site / "BraTS20_Training_001").iterdir():
        (copy / path.name.replace("001", "004")).write_bytes(path.read_bytes())
    result = run("check", site, "--json")
    assert (result.returncode, result.stderr) == (1, "")
    document = json.loads(result.stdout)
    findings = document.pop("findings")
    assert document == {
        "site": "North ward",
        "subjects": 4,
        "usable": 2,
        "unusable": ["BraTS20_Training_003", "BraTS20_Training_004"],
        "errors": 2,
        "warnings": 0,
    }
    assert [(f["subject"], f["code"]) for f in findings] == [
        ("BraTS20_Training_003", "missing-modality"),
        ("BraTS20_Training_004", "same-patient-twice"),
    ]
    keys = ["site", "subject", "file", "severity", "code", "what", "remedy"]
    assert all(list(f) == keys and f["what"] and f["remedy"] for f in findings)


def test_only_agreed_modalities_and_no_labels(tmp_path):
    write_subject(tmp_path / "x", 1, ("t1ce", "flair"))
    assert run("check", tmp_path / "x").returncode == 1
    fewer = ["--modalities", "flair, T1ce"]
    assert run("check", tmp_path / "x", *fewer).returncode == 1
    assert run("check", tmp_path / "x", *fewer, "--no-labels").returncode == 0


def test_declared_coding(site):
    path = site / "BraTS20_Training_001" / "BraTS20_Training_001_seg.nii.gz"
    voxels = nibabel.load(path).get_fdata().astype(np.uint8)
    voxels[5, 5, 5:7] = 3, 4
    nibabel.save(nibabel.Nifti1Image(voxels, LPS), path)
    assert run("check", site).returncode == 1
    assert run("check", site, "--label-coding", "brats2013").returncode == 0


def test_one_subjects_folder(site):
    result = run("check", site / "BraTS20_Training_001")
    assert result.returncode == 0
    assert "BraTS20_Training_001: 1 subjects, 1 usable" in result.stdout


def test_warnings_do_not_fail(site):
    (site / "BraTS20_Training_001" / "BraTS20_Training_001_t1.nii").write_bytes(b"")
    twin = site / "BraTS20_Training_001" / "BraTS20_Training_001_t1.nii"
    nibabel.save(nibabel.load(f"{twin}.gz"), twin)
    result = run("check", site)
    assert result.returncode == 0
    assert "2 usable, 0 errors, 1 warnings" in result.stdout


def test_no_subject_at_all(tmp_path):
    result = run("check", tmp_path, "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["findings"][0]["code"] == "empty-site"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check"], "DATA"),
        (["chek", "."], "chek"),
        (["check", "/nowhere/at/all"], "does not exist"),
        (["check", __file__], "is not a folder"),
        (["check", "/x" * 5000], "cannot be opened"),
        (["check", ".", "--modalities", "t1cee"], "did you mean t1ce"),
        (["check", ".", "--modalities", ","], "at least one modality"),
        (["check", ".", "--label-coding", "mds"], "msd"),
        (["check", ".", "--labels"], "--labels"),
    ],
)
def test_wrong_usage_is_2_and_said_in_words(arguments, said):
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr


def test_a_missing_folder_is_one_line(tmp_path):
    assert len(run("check", tmp_path / "gone").stderr.splitlines()) == 1


def test_names_that_no_terminal_can_show_do_no_harm(site):
    folder = os.fsencode(site) + b"/BraTS20_Training_001"
    os.rename(folder, os.fsencode(site) + b"/\xff\x1b[31m")
    for json_too in ([], ["--json"]):
        result = run("check", site, "--site", "[bold]\x1b[2J", *json_too)
        assert result.returncode == 0
        assert "\x1b" not in result.stdout
    bad = os.fsencode(site) + b"/\xff\x1b[31m/\xff\x1b[31m_t1.nii.gz"
    with open(bad, "wb") as file:
        file.write(b"x")
    result = run("check", site)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "\x1b" not in result.stdout


def test_a_reader_that_stops_early_is_no_crash(site):
    command = [*COMMAND, "check", str(site), "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.wait(timeout=30)


def test_a_narrow_terminal_gets_a_bar_and_a_table_that_cuts_nothing(site):
    (site / "BraTS20_Training_002" / "BraTS20_Training_002_t1ce.nii.gz").write_bytes(b"")
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "check", str(site)], stdout=follower, stderr=follower, env=ENVIRONMENT
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            if not (more := os.read(leader, 65536)):
                break
        except OSError:  # Linux's end of file on a pseudo-terminal
            break
        shown += more
    os.close(leader)
    assert process.wait(timeout=30) == 1
    letters = "".join(c for c in shown.decode() if c.isalnum() or c in "_.")
    assert "…" not in shown.decode()
    assert "checking" in shown.decode()
    assert "2subjects1usable1errors0warnings" in letters


def test_help_needs_no_heavy_import():
    code = (
        "import sys, client.cli; "
        "print(*{'numpy', 'nibabel', 'torch', 'monai', 'flwr', 'pydantic'} & set(sys.modules))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert loaded.stdout.strip() == ""
    result = run("check", "--help")
    assert result.returncode == 0
    for option in ("--site", "--modalities", "--label-coding", "--no-labels", "--json"):
        assert option in result.stdout


def test_a_patients_csv_that_cannot_be_followed_is_found(tmp_path, cohort_data):
    data = tmp_path / "data"
    shutil.copytree(next(cohort_data.rglob("*_seg.nii*")).parent, data / "BraTS20_Training_001")
    (data / "patients.csv").write_text("Subject_ID,Person\na,b\n")
    result = subprocess.run(
        [*COMMAND, "check", str(data), "--json"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    found = json.loads(result.stdout)["findings"]
    (finding,) = [f for f in found if f["code"] == "patients"]
    assert "patients.csv" in finding["what"]
    assert "Patient_ID" in finding["what"]


def test_a_line_of_patients_csv_about_nobody_is_warned_about(site):
    (site / "patients.csv").write_text("Subject_ID,Patient_ID\nBraTS20_Training_1,P\n")
    result = run("check", site)
    assert result.returncode == 0
    assert "names subject BraTS20_Training_1, of which no file is there" in " ".join(
        result.stdout.split()
    )
    assert "0 errors, 1 warnings" in result.stdout
