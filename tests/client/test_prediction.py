"""A subject segmented: labels, probabilities and entropy in the subject's own space, or refused."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy.stats import entropy as entropy_of

from client.evaluation import class_scores
from client.evaluation import predict as labels_in_box
from client.flips import flipped_scores
from client.postprocessing import NONE, PostProcessing
from client.prediction import (
    Model,
    Options,
    load_model,
    normalised_entropy,
    save,
    segment,
    segment_image,
)
from client.prediction_summary import summary_of
from common.config import FederationConfig
from common.model import initial_weights, network_for
from common.precision import autocast_dtype
from common.weights import BadWeights, save_weights
from sites.checks import examine
from sites.preprocess import prepare, recipe_of
from sites.subject import Subject, discover

BARE = Options(postprocess=NONE, probabilities=True, uncertainty=True)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tiny_config) -> FederationConfig:
    return tiny_config()


@pytest.fixture
def subject(cohort_data) -> Subject:
    return discover(cohort_data).subjects[0]


def model_of(config: FederationConfig) -> Model:
    torch.manual_seed(0)
    network = network_for(config)
    for parameter in network.parameters():  # untrained ones say the same everywhere
        parameter.data += torch.randn_like(parameter) * 0.3
    return Model(network, config, CPU)


@pytest.mark.parametrize("mode", ["resample", "patches"])
def test_without_flips_and_steps_the_labels_are_those_that_evaluation_measures(
    mode, tiny_config, subject
):
    config = tiny_config(f"preprocess.mode={mode}", "training.patch=[32,32,32]")
    model = model_of(config)
    scan, _ = examine(subject, modalities=config.modalities, require_labels=False)
    assert scan is not None
    prepared = prepare(replace(scan, labels=None), recipe_of(config))
    inside = labels_in_box(model.network, prepared.image, prepared.geometry, config, CPU)
    expected = np.zeros(prepared.geometry.shape, np.uint8)
    expected[tuple(slice(a, b) for a, b in zip(*prepared.geometry.box, strict=True))] = inside

    made, _ = segment(model, subject, BARE)
    assert made is not None
    np.testing.assert_array_equal(made.labels, expected)
    assert len(np.unique(made.labels)) > 1
    assert made.probabilities is not None
    assert made.entropy is not None
    # the maps fit the labels
    np.testing.assert_allclose(made.probabilities.sum(axis=0), 1, atol=1e-5)
    assert (made.probabilities.argmax(axis=0) == made.labels).mean() > 0.9999
    expected_entropy = entropy_of(made.probabilities, axis=0) / math.log(4)
    np.testing.assert_allclose(made.entropy, expected_entropy, atol=1e-4)
    tumour = made.labels > 0
    assert made.tumour_entropy == pytest.approx(expected_entropy[tumour].mean(), abs=1e-4)
    assert made.volumes_ml["WT"] == pytest.approx(tumour.sum() * np.prod(made.spacing) / 1000)
    lean, _ = segment(model, subject, Options(postprocess=NONE))
    assert lean is not None
    assert (lean.probabilities, lean.entropy) == (None, None)
    np.testing.assert_array_equal(lean.labels, made.labels)


def test_entropy_is_0_where_sure_and_1_where_all_is_equally_likely():
    probabilities = np.zeros((4, 1, 1, 2), np.float32)
    probabilities[2, ..., 0] = 1
    probabilities[..., 1] = 0.25
    np.testing.assert_allclose(normalised_entropy(probabilities), [[[0, 1]]], atol=1e-6)


def test_flips_are_the_mean_of_the_probabilities_of_the_mirror_images(config):
    model = model_of(config)
    image = np.random.default_rng(0).normal(size=(4, 32, 32, 32)).astype(np.float16)
    scores, agreement = flipped_scores(model.network, image, config, CPU)
    singles = []
    for x, y, z in itertools.product((1, -1), repeat=3):
        mirrored = image[:, ::x, ::y, ::z].copy()
        p = torch.softmax(class_scores(model.network, mirrored, config, CPU), dim=0).numpy()
        singles.append(p[:, ::x, ::y, ::z])
    mean = np.mean(singles, axis=0)
    np.testing.assert_allclose(torch.softmax(scores, dim=0).numpy(), mean, atol=1e-5)
    together = mean.argmax(axis=0) > 0
    tumours = [p.argmax(axis=0) > 0 for p in singles]
    dice = [2 * (t & together).sum() / (t.sum() + together.sum()) for t in tumours]
    assert agreement == pytest.approx(np.mean(dice), abs=1e-3)
    assert np.ptp(singles, axis=0).max() > 0.01  # the mirror images are not all the same


def test_a_network_that_flips_with_its_input_agrees_with_itself(config):
    class Voxelwise(torch.nn.Module):
        def forward(self, images):
            return images * 3

    image = np.random.default_rng(0).normal(size=(4, 8, 8, 8)).astype(np.float16)
    scores, agreement = flipped_scores(Voxelwise(), image, config, CPU)
    assert agreement == 1
    plain = class_scores(Voxelwise(), image, config, CPU)
    np.testing.assert_allclose(torch.softmax(scores, 0), torch.softmax(plain, 0), atol=1e-6)


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PIR"])
def test_voxels_come_out_where_the_image_had_them(axes, config, cohort_data, tmp_path, monkeypatch):
    """With a perfect network the written labels are the true ones, in any orientation; the maps too."""
    import client.prediction as prediction

    source = next(path for path in sorted(cohort_data.iterdir()) if path.is_dir())
    folder = tmp_path / source.name
    shutil.copytree(source, folder)
    turned = nibabel.orientations.axcodes2ornt(axes)
    for path in folder.glob("*.nii.gz"):
        image = nibabel.load(path)
        change = nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), turned)
        nibabel.save(image.as_reoriented(change), path)
    truth = nibabel.load(folder / f"{source.name}_seg.nii.gz")
    found = discover(folder).subjects[0]
    scan, _ = examine(found, modalities=config.modalities)
    assert scan is not None
    assert scan.labels is not None
    probability = np.array([0.1, 0.1, 0.3, 0.7])  # of the true label; the rest is spread evenly

    def true_scores(model, image, flips):
        (x0, y0, z0), (x1, y1, z1) = prepare(scan, recipe_of(config)).geometry.box
        inside = scan.labels[x0:x1, y0:y1, z0:z1]
        return torch.log(true_probabilities(inside)), None

    def true_probabilities(labels):
        others = (1 - probability[labels]) / 3
        others[labels < 2] = 0.03
        p = np.broadcast_to(others, (4, *labels.shape)).copy()
        np.put_along_axis(p, labels[None].astype(int), 1 - 3 * others[None], axis=0)
        return torch.from_numpy(p.astype(np.float32))

    monkeypatch.setattr(prediction, "_scores", true_scores)
    made, _ = segment(Model(torch.nn.Identity(), config, CPU), found, BARE)
    assert made is not None
    labels, probabilities, entropy = save(made, tmp_path / "out.nii")
    np.testing.assert_array_equal(np.asarray(nibabel.load(labels).dataobj), truth.dataobj)
    written = nibabel.load(probabilities)
    assert written.shape == (*truth.shape, 4)
    np.testing.assert_allclose(written.affine, truth.affine)
    # NCR and ED stand out in the files' own axes too; half a step of 1/255 is the most that is lost
    values = written.get_fdata()
    true = np.asarray(truth.dataobj)
    assert np.abs(values[true == 4] - [0.1, 0.1, 0.1, 0.7]).max() <= 0.5 / 255 + 1e-6
    assert np.abs(values[true == 2] - [7 / 30, 7 / 30, 0.3, 7 / 30]).max() <= 0.5 / 255 + 1e-6
    of_et = entropy_of([0.1, 0.1, 0.1, 0.7]) / math.log(4)
    assert np.abs(nibabel.load(entropy).get_fdata()[true == 4] - of_et).max() <= 0.5 / 255 + 1e-6


def test_a_tumour_that_post_processing_removed_is_not_called_none(config, subject, monkeypatch):
    import client.prediction as prediction

    def speck(model, image, flips):
        scores = torch.zeros(4, *image.shape[1:])
        scores[0] = 1
        scores[3, 14:18, 14:18, 14:18] = 2.5
        return scores, None

    monkeypatch.setattr(prediction, "_scores", speck)
    model = Model(torch.nn.Identity(), config, CPU)
    kept, _ = segment(model, subject)  # doubtful, but all there is
    bare, _ = segment(model, subject, BARE)
    emptied, _ = segment(model, subject, Options(postprocess=PostProcessing(threshold=0.9)))
    assert kept is not None
    assert bare is not None
    assert emptied is not None
    assert kept.volumes_ml["ET"] > 0
    assert bare.volumes_ml == bare.found_ml == emptied.found_ml
    assert emptied.volumes_ml["WT"] == 0
    said = " ".join(emptied.warnings)
    assert "post-processing removed" in said
    assert "no tumour" not in said
    assert summary_of(emptied)["millilitres_before_postprocessing"]["ET"] == bare.volumes_ml["ET"]


@pytest.mark.skipif(autocast_dtype("auto", CPU) is None, reason="needs a CPU that computes in bf16")
def test_in_bf16_too_the_labels_are_those_that_training_measures(
    tiny_config, subject, tmp_path, monkeypatch
):
    monkeypatch.setattr("client.device.available_cores", lambda: 1)  # other sessions are here too
    torch.set_num_threads(1)  # on their number the last bits of a sum depend, and bf16 shows them
    config = tiny_config("training.precision=auto", "network.channels=[16,16,16,16,16]")
    path = tmp_path / "model.safetensors"
    of_training = model_of(config).network
    save_weights(path, of_training.state_dict(), {"config": config.agreed()})
    of_training = of_training.to(memory_format=torch.channels_last_3d)  # as client.app makes it
    scan, _ = examine(subject, modalities=config.modalities, require_labels=False)
    assert scan is not None
    prepared = prepare(replace(scan, labels=None), recipe_of(config))
    inside = labels_in_box(of_training, prepared.image, prepared.geometry, config, CPU)
    model = load_model(path)
    made = segment_image(model, prepared.image, prepared.geometry, BARE)
    scores = class_scores(of_training, prepared.image, config, CPU)
    assert torch.equal(class_scores(model.network, prepared.image, config, CPU), scores)
    np.testing.assert_array_equal(made.labels, inside)


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


def test_an_unusable_subject_gives_no_prediction(config, subject, tmp_path):
    broken = tmp_path / "t1.nii.gz"
    broken.write_bytes(b"not an image")
    images = dict(subject.images) | {"t1": Path(broken)}
    made, findings = segment(model_of(config), replace(subject, images=images))
    assert made is None
    assert [f.file for f in findings if f.severity == "error"] == ["t1.nii.gz"]


def test_torchs_own_error_of_a_full_memory_is_a_memory_error(config, subject):
    class Greedy(torch.nn.Module):
        def forward(self, images):
            return torch.empty(1, 4, 10**6, 10**6, 10**3)

    with pytest.raises(MemoryError):
        segment(Model(Greedy(), config, CPU), subject)
