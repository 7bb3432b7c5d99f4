"""`fed-client predict`: a segmentation in the subject's own space, or one clear line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch

from client.prediction import load_model
from common.brats import CODINGS
from common.config import FederationConfig
from common.model import initial_weights
from common.weights import BadWeights, save_weights
from sites.checks import examine
from sites.preprocess import Geometry, prepare, recipe_of
from sites.subject import discover

COMMAND = [sys.executable, "-c", "from client.cli import main; main()", "predict"]


def predict(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def config(tiny_config) -> FederationConfig:
    return tiny_config()


@pytest.fixture
def subject(cohort_data, tmp_path):
    """One subject's folder without its labels."""
    source = sorted(path for path in cohort_data.iterdir() if path.is_dir())[0]
    folder = tmp_path / source.name
    shutil.copytree(source, folder)
    (folder / f"{source.name}_seg.nii.gz").unlink()
    return folder


@pytest.fixture
def model(config, tmp_path):
    path = tmp_path / "model.safetensors"
    about = {"config": config.agreed(), "round": 1}
    save_weights(path, initial_weights(config), about)
    return path


def test_the_segmentation_has_the_subjects_own_grid_and_brats_labels(model, subject, tmp_path):
    out = tmp_path / "out.nii.gz"
    done = predict(model, subject, out, "--json")
    assert done.returncode == 0, done.stderr
    flair = nibabel.load(subject / f"{subject.name}_flair.nii.gz")
    written = nibabel.load(out)
    assert written.shape == flair.shape
    np.testing.assert_array_equal(written.affine, flair.affine)
    labels = np.asarray(written.dataobj)
    assert set(np.unique(labels)) <= set(CODINGS["brats"])
    volumes = json.loads(done.stdout)["millilitres"]
    voxel = abs(np.linalg.det(flair.affine[:3, :3])) / 1000
    assert volumes["ET"] == pytest.approx((labels == 4).sum() * voxel)
    assert volumes["WT"] == pytest.approx((labels > 0).sum() * voxel)


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PIR"])
def test_voxels_come_out_where_the_image_had_them(
    axes, config, cohort_data, subject, tmp_path, monkeypatch
):
    """With a perfect network the written labels are the true ones, in any orientation."""
    import client.prediction as prediction

    truth = nibabel.load(cohort_data / subject.name / f"{subject.name}_seg.nii.gz")
    turned = nibabel.orientations.axcodes2ornt(axes)
    for path in subject.glob("*.nii.gz"):
        image = nibabel.load(path)
        change = nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), turned)
        nibabel.save(image.as_reoriented(change), path)
    change = nibabel.orientations.ornt_transform(nibabel.io_orientation(truth.affine), turned)
    truth = truth.as_reoriented(change)
    nibabel.save(truth, subject / f"{subject.name}_seg.nii.gz")
    found = discover(subject).subjects[0]
    scan, _ = examine(found, modalities=config.modalities)
    assert scan is not None
    perfect = prepare(scan, recipe_of(config))

    def true_labels(network, image, geometry: Geometry, *rest):
        assert geometry == perfect.geometry
        return perfect.truth

    monkeypatch.setattr(prediction, "predict", true_labels)
    loaded = prediction.Model(torch.nn.Identity(), config, torch.device("cpu"))
    out = tmp_path / "out.nii"
    volumes, _ = prediction.segment_subject(loaded, found, out)
    assert volumes is not None
    np.testing.assert_array_equal(np.asarray(nibabel.load(out).dataobj), np.asarray(truth.dataobj))


def test_an_unusable_subject_is_named_and_nothing_is_written(model, subject, tmp_path):
    (subject / f"{subject.name}_t1ce.nii.gz").write_bytes(b"not an image")
    done = predict(model, subject, tmp_path / "out.nii.gz")
    assert done.returncode == 1
    assert f"{subject.name}_t1ce.nii.gz" in done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.nii.gz").exists()


def test_a_damaged_segmentation_beside_the_scan_does_not_matter(model, subject, tmp_path):
    (subject / f"{subject.name}_seg.nii.gz").write_bytes(b"not an image")
    done = predict(model, subject, tmp_path / "out.nii.gz")
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "out.nii.gz").exists()


def test_wrong_usage_and_wrong_models_are_one_line(model, subject, tmp_path):
    assert predict(model, subject, tmp_path / "out.png").returncode == 2
    assert predict(model, tmp_path / "gone", tmp_path / "out.nii").returncode == 2
    assert predict(tmp_path / "gone", subject, tmp_path / "out.nii").returncode == 2
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"pickle")
    done = predict(garbage, subject, tmp_path / "out.nii")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "garbage.safetensors" in done.stderr


def test_a_model_that_does_not_fit_its_configuration_is_refused(config, tmp_path):
    path = tmp_path / "model.safetensors"
    weights = initial_weights(config)
    weights.pop(next(iter(weights)))
    save_weights(path, weights, {"config": config.agreed()})
    with pytest.raises(BadWeights, match="lacks"):
        load_model(path)
    save_weights(path, weights, {})
    with pytest.raises(BadWeights, match="no configuration"):
        load_model(path)
    impossible = config.agreed()
    impossible["network"]["channels"] = [3]
    save_weights(path, weights, {"config": impossible})
    with pytest.raises(BadWeights, match="no configuration"):
        load_model(path)
