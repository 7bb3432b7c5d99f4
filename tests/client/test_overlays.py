"""Overlays show the right voxels, the right way round."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.overlays import (
    AXIS,
    PLANES,
    Case,
    case_of,
    case_title,
    fullest_slices,
    slice_of,
    slices_figure,
)
from client.prediction import Model
from client.subject_results import plain_segmenter
from common.brats import ED, ET, NCR
from common.figures import draw

SHAPE = (12, 10, 8)
DEVICE = torch.device("cpu")


class Repeats(torch.nn.Module):
    """Takes the first channel for labels, so that what it predicts is known."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        labels = batch[:, 0].round().long().clamp(0, 3)
        return 10 * torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float()


def a_case(truth: np.ndarray, prediction: np.ndarray, spacing=(1.0, 1.0, 1.0)) -> Case:
    brain = np.ones(truth.shape, bool)
    return Case("s", "flair", brain.astype(np.float32), brain, truth, prediction, spacing)


def labels_with(*voxels: tuple[tuple[int, int, int], int]) -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    for place, label in voxels:
        labels[place] = label
    return labels


def test_the_patients_right_is_on_the_left_of_axial_and_coronal_slices():
    """RAS: the first index grows to the right, the second to the front, the third upwards."""
    labels = labels_with(((11, 9, 7), ET))  # right, front, top
    axial = slice_of(labels, "axial", 7)
    assert axial.shape == (10, 12)
    assert np.argwhere(axial == ET).tolist() == [[9, 0]], "in front (top row), on the left"
    coronal = slice_of(labels, "coronal", 9)
    assert coronal.shape == (8, 12)
    assert np.argwhere(coronal == ET).tolist() == [[7, 0]], "on top, on the left"
    sagittal = slice_of(labels, "sagittal", 11)
    assert sagittal.shape == (8, 10)
    assert np.argwhere(sagittal == ET).tolist() == [[7, 0]], "on top, the face on the left"


def test_each_plane_is_the_one_with_most_tumour():
    rng = np.random.default_rng(0)
    truth = (rng.random(SHAPE) > 0.9).astype(np.uint8) * ED
    truth[:, :, 5] = NCR
    truth[3] = ET
    found = fullest_slices(a_case(truth, np.zeros_like(truth)))
    for plane in PLANES:
        counts = [
            sum(int(v != 0) for v in np.take(truth, index, AXIS[plane]).flat)
            for index in range(SHAPE[AXIS[plane]])
        ]
        assert counts[found[plane]] == max(counts)
    assert (found["axial"], found["sagittal"]) == (5, 3)


def test_without_tumour_in_truth_the_predictions_is_shown_and_without_any_the_middle():
    nothing = np.zeros(SHAPE, np.uint8)
    predicted = labels_with(((1, 2, 3), ED))
    shown = fullest_slices(a_case(nothing, predicted))
    assert shown == {"sagittal": 1, "coronal": 2, "axial": 3}
    middle = fullest_slices(a_case(nothing, nothing))
    assert middle == {"sagittal": 6, "coronal": 5, "axial": 4}


def test_a_case_has_scan_truth_and_prediction_in_the_same_voxels(make_subject, tiny_config):
    labels = labels_with(((2, 3, 4), ET), ((2, 3, 5), ED))
    image = np.zeros((4, *SHAPE), np.float32)
    image[0] = labels
    image[3, 1:9, 1:9, 1:7] = np.linspace(1, 2, 8)[:, None, None]  # flair
    config = tiny_config()
    case = case_of(make_subject("s", image, labels), config.modalities, labels.copy())
    assert case.modality == "flair"
    assert (case.truth == labels).all()
    assert (case.prediction == labels).all()
    assert (case.brain == (image != 0).any(axis=0)).all()
    assert case.image[~case.brain].max() == 0
    inside = case.image[1:9, 4, 1]
    assert (np.diff(inside) >= 0).all()
    assert (inside[0], inside[-1]) == (0, 1)


def test_a_case_on_another_grid_comes_back_to_the_subjects_own(make_subject, tiny_config):
    """The working grid has half the voxels; the scan's bright half stays on its side."""
    truth = np.zeros((16, 16, 16), np.uint8)
    truth[8:12, 8:12, 8:12] = ED
    small = np.zeros((4, 8, 8, 8), np.float32)
    small[:, :4], small[:, 4:] = 1, 2
    small[0] = 0
    small[0, 4:6, 4:6, 4:6] = ED
    subject = make_subject("s", small, small[0].astype(np.uint8), truth)
    model = Model(Repeats(), tiny_config(), DEVICE)
    case = case_of(subject, model.config.modalities, plain_segmenter(model)(subject))
    assert case.image.shape == case.truth.shape == case.prediction.shape == (16, 16, 16)
    assert (case.prediction == truth).mean() > 0.99
    assert case.image[:7].max() < case.image[9:].min()


def test_slices_are_drawn_for_every_case(tmp_path):
    tumour = labels_with(((2, 3, 4), ET), ((2, 3, 5), ED), ((3, 3, 4), NCR))
    cases = [a_case(tumour, tumour, (1.0, 1.0, 3.0)), a_case(tumour * 0, tumour * 0)]
    titles = ["best: $s$ <b>", "worst: other"]
    figure = slices_figure(cases, titles)
    svg = draw(figure, tmp_path, "slices", "").svg.read_text(encoding="utf-8")
    for text in ("best: $s$ &lt;b&gt;", *PLANES, "ET truth", "NCR predicted", ">R<", ">A<"):
        assert text in svg
    panels = [axes for row in figure.subfigs for axes in row.axes]
    assert len(panels) == 6
    # a voxel three times as high as wide in coronal and sagittal slices, square from above
    assert [axes.get_aspect() for axes in panels[:3]] == [1.0, 3.0, 3.0]


def test_a_title_names_subject_site_and_figures():
    title = case_title("best", "Oslo", "BraTS_1", {"WT": 0.91234, "TC": 0.5, "ET": 1.0})
    assert title == "best: BraTS_1 (Oslo), Dice WT 0.912, TC 0.500, ET 1.000"


@pytest.mark.parametrize("label", [NCR, ED, ET])
def test_only_predicted_voxels_are_filled(label):
    truth = np.zeros(SHAPE, np.uint8)
    prediction = labels_with(((4, 4, 4), label))
    figure = slices_figure([a_case(truth, prediction)], ["x"])
    fill = figure.subfigs[0].axes[0].images[1].get_array()
    assert np.argwhere(fill[..., 3] > 0).tolist() == [[4, SHAPE[0] - 1 - 4]]
