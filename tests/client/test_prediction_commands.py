"""`fed-client predict` as it is typed: what is written, said and refused, for one subject and many."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from common.brats import CODINGS
from common.config import FederationConfig
from common.model import initial_weights
from common.weights import save_weights

REAL = Path(__file__).parents[3] / "shared" / "data" / "real_cases"
pytestmark = pytest.mark.usefixtures("undisturbed_log")


def predict(*arguments: object):
    from client.cli import app

    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def write_model(path: Path, config: FederationConfig) -> Path:
    save_weights(path, initial_weights(config), {"config": config.agreed(), "round": 1})
    return path


@pytest.fixture(scope="module")
def model(tiny_config, tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.safetensors", tiny_config())


@pytest.fixture
def patients(cohort_data, tmp_path) -> Path:
    """A folder with three subjects without labels."""
    folder = tmp_path / "patients"
    for source in sorted(path for path in cohort_data.iterdir() if path.is_dir())[:3]:
        shutil.copytree(source, folder / source.name)
        (folder / source.name / f"{source.name}_seg.nii.gz").unlink()
    return folder


@pytest.fixture
def subject(patients) -> Path:
    return sorted(patients.iterdir())[0]


def test_one_subject_with_its_maps(model, subject, tmp_path):
    out = tmp_path / "out.nii.gz"
    done = predict(model, subject, out, "--json", "--probabilities", "--uncertainty", "--flips")
    assert done.exit_code == 0, done.output
    flair = nibabel.load(subject / f"{subject.name}_flair.nii.gz")
    written = nibabel.load(out)
    assert written.shape == flair.shape
    np.testing.assert_array_equal(written.affine, flair.affine)
    labels = np.asarray(written.dataobj)
    assert set(np.unique(labels)) <= set(CODINGS["brats"])
    document = json.loads(done.stdout)
    assert document["note"] == "For research; not a medical device."
    voxel = abs(np.linalg.det(flair.affine[:3, :3])) / 1000
    assert document["millilitres"]["ET"] == pytest.approx((labels == 4).sum() * voxel)
    assert document["millilitres"]["WT"] == pytest.approx((labels > 0).sum() * voxel)
    assert 0 <= document["flip_agreement"] <= 1
    assert {"warnings", "tumour_entropy"} <= document.keys()
    assert set(document["location"]) == {"side", "left", "right", "lobes", "text"}
    names = ["out.nii.gz", "out-probabilities.nii.gz", "out-entropy.nii.gz"]
    assert [Path(path).name for path in document["files"]] == names
    assert {path.name for path in tmp_path.iterdir()} == {*names, "patients"}
    probabilities = nibabel.load(tmp_path / names[1])
    assert probabilities.shape == (*flair.shape, 4)
    assert probabilities.get_data_dtype() == np.uint8
    assert np.abs(probabilities.get_fdata().sum(axis=-1) - 1).max() < 0.01


def test_what_is_typed_reaches_the_steps(model, subject, tmp_path):
    def options(*arguments: str) -> dict:
        out = tmp_path / "out"
        assert predict(model, subject, out, *arguments).exit_code == 0
        (entry,) = json.loads((out / "predictions.json").read_text())["subjects"]
        return entry["options"]["postprocess"]

    assert options("--postprocess", "none", "--tiny-et-mm3", "7") == {
        "threshold": None,
        "opening_mm": 0.0,
        "closing_mm": 0.0,
        "fill_holes": False,
        "smallest_mm3": 0.0,
        "tiny_et_mm3": 7.0,
    }
    changed = options("--opening-mm", "0", "--no-fill-holes", "--smallest-mm3", "9")
    assert (changed["opening_mm"], changed["fill_holes"], changed["smallest_mm3"]) == (0, False, 9)


def test_a_folder_of_subjects_with_a_bad_one_among_them(model, patients, tmp_path):
    good, bad, third = sorted(path.name for path in patients.iterdir())
    (patients / bad / f"{bad}_t1ce.nii.gz").write_bytes(b"not an image")
    out = tmp_path / "out"
    done = predict(model, patients, out)
    assert done.exit_code == 1
    assert f"{bad}_t1ce.nii.gz" in done.stdout
    assert "2 subjects segmented, 1 not" in done.stdout
    assert "not a medical device" in done.stdout
    files = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert files == {f"{good}.nii.gz", f"{third}.nii.gz", "predictions.json", "predictions.csv"}
    entries = json.loads((out / "predictions.json").read_text())["subjects"]
    assert [bool(entry["files"]) for entry in entries] == [True, False, True]
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert [row["subject"] for row in rows] == [good, bad, third]
    assert float(rows[0]["WT_ml"]) == pytest.approx(entries[0]["millilitres"]["WT"], abs=1e-4)
    assert (rows[1]["WT_ml"], bool(rows[1]["errors"])) == ("", True)


def test_a_reference_of_the_hospitals_own_subjects(model, cohort_data, subject, tmp_path):
    out, reference = tmp_path / "out", tmp_path / "reference.json"
    few = predict(model, subject, out, "--write-reference", reference, "--json")
    assert few.exit_code == 1
    assert "at least 5" in few.stderr
    assert json.loads(few.stdout)["subjects"][0]["files"]  # the work is not lost
    several = tmp_path / "several"
    several.mkdir()
    for source in sorted(path for path in cohort_data.iterdir() if path.is_dir())[:6]:
        (several / source.name).symlink_to(source)
    assert predict(model, several, out, "--write-reference", reference).exit_code == 0
    assert set(json.loads(reference.read_text())) == {
        *("model", "flips", "subjects", "median", "deviation")
    }
    image = nibabel.load(subject / f"{subject.name}_flair.nii.gz")
    other = np.asarray(nibabel.load(subject / f"{subject.name}_t2.nii.gz").dataobj)
    nibabel.save(nibabel.Nifti1Image(other, image.affine), subject / f"{subject.name}_flair.nii.gz")
    one = tmp_path / "one.nii.gz"
    plain = predict(model, subject, one, "--reference", reference)
    assert "unlike the 6 subjects of the reference" in plain.stdout
    wrong = predict(model, subject, one, "--flips", "--reference", reference)
    assert (wrong.exit_code, len(wrong.stderr.splitlines())) == (1, 1)
    assert "without flips" in wrong.stderr


def test_an_unusable_subject_is_named_and_nothing_is_written(model, subject, tmp_path):
    (subject / f"{subject.name}_t1ce.nii.gz").write_bytes(b"not an image")
    done = predict(model, subject, tmp_path / "out.nii.gz")
    assert done.exit_code == 1
    assert f"{subject.name}_t1ce.nii.gz" in done.stdout
    assert not (tmp_path / "out.nii.gz").exists()
    missing = predict(model, tmp_path, tmp_path / "new")
    assert missing.exit_code == 1
    (subject / f"{subject.name}_t1.nii.gz").unlink()
    done = predict(model, subject, tmp_path / "out.nii.gz")
    assert "modality t1 is missing" in done.stdout
    assert done.stderr.count("\n") == 1


def test_a_damaged_segmentation_beside_the_scan_does_not_matter(model, subject, tmp_path):
    (subject / f"{subject.name}_seg.nii.gz").write_bytes(b"not an image")
    done = predict(model, subject, tmp_path / "out.nii.gz")
    assert done.exit_code == 0, done.stdout
    assert (tmp_path / "out.nii.gz").exists()


def test_wrong_usage_is_exit_code_2_and_writes_nothing(model, patients, subject, tmp_path):
    out = tmp_path / "out.nii"
    for arguments in (
        (model, subject, tmp_path / "out.png"),
        (model, tmp_path / "gone", out),
        (tmp_path / "gone", subject, out),
        (model, patients, out),
        (model, subject, tmp_path / "gone" / "out.nii.gz"),
        (model, subject, out, "--postprocess", "best"),
        (model, subject, out, "--threshold", "2"),
        (model, subject, out, "--threshold", "nan"),
        (model, subject, out, "--opening-mm", "nan"),
        (model, subject, out, "--smallest-mm3", "inf"),
        (model, subject, out, "--tiny-et-mm3", "nan"),
        (model, patients, tmp_path / "new", "--write-reference", tmp_path / "gone" / "r.json"),
        (model, patients, tmp_path / "new", "--write-reference", patients),
        (model, subject, out, "--write-reference", tmp_path / "r.json"),
    ):
        done = predict(*arguments)
        assert done.exit_code == 2, arguments
    assert {path.name for path in tmp_path.iterdir()} == {"patients"}


def test_a_place_that_cannot_be_written_is_told_before_the_work(
    model, patients, subject, tmp_path, monkeypatch
):
    """Root may write everywhere, so that the answer is made up."""
    (closed := tmp_path / "closed").mkdir()
    monkeypatch.setattr("client.prediction.load_model", lambda path: pytest.fail("it began"))
    monkeypatch.setattr("common.files.os.access", lambda place, mode: place != closed)
    for arguments in (
        (model, subject, closed / "out.nii.gz"),
        (model, patients, closed / "new"),
        (model, patients, tmp_path / "new", "--write-reference", closed / "r.json"),
    ):
        done = predict(*arguments)
        assert (done.exit_code, f"{closed}: Permission denied" in done.stderr) == (1, True)


def test_a_scan_is_never_written_over(model, subject):
    scan = subject / f"{subject.name}_flair.nii.gz"
    before = scan.read_bytes()
    done = predict(model, subject, scan)
    assert done.exit_code == 1
    assert "would replace a scan" in done.stderr
    assert scan.read_bytes() == before


def test_nothing_is_replaced_that_is_not_an_unchanged_file_of_ours(model, subject, tmp_path):
    """A scan under any name, a map of somebody else's, and labels that were corrected."""
    out, entropy = tmp_path / "out.nii.gz", tmp_path / "out-entropy.nii.gz"
    scan = subject / f"{subject.name}_t1.nii.gz"
    renamed = tmp_path / "scan.nii.gz"
    shutil.copy(scan, renamed)
    for place, said in ((scan, "scan"), (renamed, "not written by this program")):
        before = place.read_bytes()
        done = predict(model, subject, place)
        assert (done.exit_code, said in done.stderr) == (1, True), done.output
        assert place.read_bytes() == before
    renamed.rename(entropy)
    assert predict(model, subject, out).exit_code == 0  # no map is asked for
    assert predict(model, subject, out, "--flips").exit_code == 0  # our own
    done = predict(model, subject, out, "--uncertainty")
    assert (done.exit_code, str(entropy) in done.stderr) == (1, True)
    image = nibabel.load(out)
    labels = np.asarray(image.dataobj).copy()
    labels[0, 0, 0] = 4
    nibabel.save(nibabel.Nifti1Image(labels, image.affine, image.header), out)
    before = out.read_bytes()
    done = predict(model, subject, out)
    assert (done.exit_code, "was changed" in done.stderr) == (1, True)
    assert out.read_bytes() == before


def test_an_older_file_is_said_to_be_older(model, subject, tmp_path):
    out = tmp_path / "out.nii.gz"
    (left := tmp_path / f".{out.name}.4194305.tmp").touch()  # above the largest number of a process
    assert predict(model, subject, out).exit_code == 0
    assert not left.exists()
    (subject / f"{subject.name}_t1ce.nii.gz").write_bytes(b"not an image")
    done = predict(model, subject, out)
    assert done.exit_code == 1
    assert f"{out}, which is there, is of an earlier call" in done.stderr


def test_a_map_that_cannot_be_written_is_named_and_no_labels_are_left(model, subject, tmp_path):
    out, entropy = tmp_path / "out.nii.gz", tmp_path / "out-entropy.nii.gz"
    entropy.mkdir()
    done = predict(model, subject, out, "--uncertainty")
    assert (done.exit_code, f"{entropy} cannot be written" in done.stderr) == (1, True)
    assert {path.name for path in tmp_path.iterdir()} == {"patients", entropy.name}


def test_intensities_near_the_end_of_float32_make_no_noise(model, subject, tmp_path, recwarn):
    for path in subject.glob("*.nii.gz"):
        image = nibabel.load(path)
        huge = np.asarray(image.dataobj).astype(np.float32)
        huge *= 1e36 / huge.max()
        nibabel.save(nibabel.Nifti1Image(huge, image.affine), path)
    done = predict(model, subject, tmp_path / "out.nii.gz", "--json")
    assert done.exit_code == 0, done.output
    json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_a_wrong_model_is_one_line(subject, tmp_path):
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"pickle")
    done = predict(garbage, subject, tmp_path / "out.nii")
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert "garbage.safetensors" in done.stderr


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real cases in ../shared")
@pytest.mark.parametrize(
    ("folder", "modalities"),
    [
        ("MICCAI_BraTS2020_ValidationData/BraTS20_Validation_901", "t1,t1ce,t2,flair"),
        ("two_modalities/BraTS20_Training_911", "t1ce,flair"),
    ],
)
def test_a_real_patient_is_segmented_in_its_own_space(folder, modalities, tiny_config, tmp_path):
    config = tiny_config(f"modalities=[{modalities}]")
    model = write_model(tmp_path / "model.safetensors", config)
    subject, out = REAL / folder, tmp_path / "out.nii.gz"
    done = predict(model, subject, out, "--json")
    assert done.exit_code == 0, done.output
    scan = nibabel.load(next(subject.glob("*_flair.nii.gz")))
    written = nibabel.load(out)
    assert written.shape == scan.shape
    for theirs, ours in (
        (scan.affine, written.affine),
        (scan.affine, written.get_qform()),
        (scan.affine, written.get_sform()),
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (1, 1)
    labels = np.asarray(written.dataobj)
    assert set(np.unique(labels)) <= {0, 1, 2, 4}
    assert not labels[np.asarray(scan.dataobj) == 0].all()
    doubts = json.loads(done.stdout)[
        "warnings"
    ]  # an untrained model's own doubts are to be expected
    for word in ("mm", "ml", "noise", "swapped", "contrast", "cut off", "same image", "fluid"):
        assert not any(word in warning for warning in doubts), doubts
