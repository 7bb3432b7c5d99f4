"""`fed-client predict` on a DICOM study: the labels of the same scans as NIfTI, and refusals."""

from __future__ import annotations

import shutil

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine
from typer.testing import CliRunner

from client.dicom_seg import is_own, labels_of
from common.model import initial_weights
from common.weights import save_weights

pytest.importorskip("highdicom", reason="needs the extra dicom")
from tests.client.dicom_study import write_series
from tests.client.test_dicom_seg import by_hand

pytestmark = pytest.mark.usefixtures("undisturbed_log")
MODALITIES = ("t1", "t1ce", "t2", "flair")


def predict(*arguments: object):
    from client.cli import app

    return CliRunner().invoke(app, ["predict", *map(str, arguments), "--postprocess", "none"])


@pytest.fixture(scope="module")
def model(tiny_config, tmp_path_factory):
    config, path = tiny_config(), tmp_path_factory.mktemp("model") / "model.safetensors"
    save_weights(path, initial_weights(config), {"config": config.agreed(), "round": 1})
    return path


@pytest.fixture(scope="module")
def subject(cohort_data):
    return sorted(path for path in cohort_data.iterdir() if path.is_dir())[0]


@pytest.fixture(scope="module")
def study(subject, tmp_path_factory):
    """The subject's scans as DICOM series, each acquired in another plane."""
    folder = tmp_path_factory.mktemp("study")
    planes = ("axial", "sagittal", "coronal", "axial")
    for modality, plane in zip(MODALITIES, planes, strict=True):
        image = nibabel.as_closest_canonical(
            nibabel.load(next(subject.glob(f"*_{modality}.nii.gz")))
        )
        voxels = np.asarray(image.dataobj).astype(np.uint16)
        write_series(folder / modality, voxels, plane=plane, affine=image.affine)
    return folder


def places(path) -> dict[int, set[tuple[float, ...]]]:
    """RAS mm of each label's voxels, of a NIfTI file."""
    labels, affine = labels_of(path)
    return {
        label: {
            tuple(np.round(p, 2) + 0.0) for p in apply_affine(affine, np.argwhere(labels == label))
        }
        for label in (1, 2, 3)
    }


def test_a_study_gives_what_the_same_scans_give_as_nifti(model, subject, study, tmp_path):
    for source, out in ((subject, "nifti.nii.gz"), (study, "dicom.nii.gz"), (study, "dicom.dcm")):
        done = predict(model, source, tmp_path / out)
        assert done.exit_code == 0, done.output
        assert "For research; not a medical device." in done.output
    usual = places(tmp_path / "nifti.nii.gz")
    assert any(usual.values())
    assert places(tmp_path / "dicom.nii.gz") == usual
    assert by_hand(tmp_path / "dicom.dcm") == usual
    assert (tmp_path / "dicom.dcm").stat().st_mode & 0o077 == 0  # it names the patient
    assert is_own(tmp_path / "dicom.dcm")


def test_a_dicom_file_of_somebody_elses_is_not_replaced(model, study, tmp_path):
    theirs = tmp_path / "scan.dcm"
    shutil.copy(next((study / "flair").iterdir()), theirs)
    before = theirs.read_bytes()
    done = predict(model, study, theirs)
    assert (done.exit_code, "no DICOM-SEG of fedbrats" in done.stderr) == (1, True)
    assert theirs.read_bytes() == before


def test_wrong_usage_is_said_before_anything_is_written(model, subject, study, tmp_path):
    wrong = {
        "holds no DICOM": (subject, tmp_path / "seg.dcm"),
        "one DICOM study": (study, tmp_path / "folder"),
        "among the scans": (study, study / "flair" / "seg.dcm"),
        "maps are NIfTI": (study, tmp_path / "seg.dcm", "--uncertainty"),
    }
    before = sorted(study.rglob("*"))
    for text, arguments in wrong.items():
        done = predict(model, *arguments)
        assert done.exit_code == 2, done.output
        assert text in " ".join(done.output.replace("│", " ").split())
    assert sorted(study.rglob("*")) == before
    assert not list(tmp_path.iterdir())


def test_a_study_without_a_modality_is_one_line(model, study, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(study, part, ignore=shutil.ignore_patterns("t1ce"))
    done = predict(model, part, tmp_path / "seg.nii.gz")
    assert done.exit_code == 1
    assert "t1ce" in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "seg.nii.gz").exists()
