from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import (
    ConfusionMatrixMetric,
    DiceMetric,
    HausdorffDistanceMetric,
    MeanIoU,
    get_confusion_matrix,
)
from scipy.ndimage import binary_erosion
from scipy.spatial import cKDTree

from common.brats import STRUCTURES
from common.metrics import (
    confusion_matrix,
    hd95,
    mean_dice,
    structure_scores,
    subject_metrics,
    summarise,
    voxel_accuracy,
)

DIAGONAL = math.sqrt(240**2 + 240**2 + 155**2)


def volumes(seed: int = 0, shape: tuple[int, ...] = (9, 7, 8)) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 4, shape, dtype=np.uint8)
    noise = generator.integers(0, 4, shape, dtype=np.uint8)
    return np.where(generator.random(shape) < 0.6, truth, noise), truth


def blobs() -> tuple[np.ndarray, np.ndarray]:
    """A nested tumour and a shifted, smaller prediction of it, both away from the edge."""
    grid = np.indices((30, 26, 22))
    drawn = []
    for centre, radii in (((14, 12, 10), (8, 5, 3)), ((16, 13, 10), (7, 5, 2))):
        distance = np.sqrt(sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)))
        labels = np.zeros(grid.shape[1:], np.uint8)
        for radius, label in zip(radii, (2, 3, 1), strict=True):
            labels[distance <= radius] = label
        drawn.append(labels)
    return drawn[1], drawn[0]


def naive_scores(prediction: np.ndarray, truth: np.ndarray, labels: tuple[int, ...]):
    tp = fp = fn = tn = 0
    for p, t in zip(prediction.ravel(), truth.ravel(), strict=True):
        inside_p, inside_t = int(p) in labels, int(t) in labels
        tp += inside_p and inside_t
        fp += inside_p and not inside_t
        fn += inside_t and not inside_p
        tn += not inside_p and not inside_t
    return {
        "dice": 2 * tp / (2 * tp + fp + fn),
        "iou": tp / (tp + fp + fn),
        "sensitivity": tp / (tp + fn),
        "specificity": tn / (tn + fp),
        "precision": tp / (tp + fp),
    }


def one_hot(labels: np.ndarray) -> torch.Tensor:
    members = [np.isin(labels, list(values)) for values in STRUCTURES.values()]
    return torch.from_numpy(np.stack(members))[None].float()


def metrics_of(prediction: np.ndarray, truth: np.ndarray, **options):
    settings = {"outside": 0, "spacing": (1, 1, 1), "diagonal_mm": DIAGONAL}
    settings |= {"surface_distances": True, **options}
    return subject_metrics("subject", prediction, truth, **settings)


def test_confusion_matrix_counts_every_pair_of_labels():
    prediction, truth = volumes()
    expected = np.zeros((4, 4), np.int64)
    for p, t in zip(prediction.ravel(), truth.ravel(), strict=True):
        expected[t, p] += 1
    found = confusion_matrix(prediction, truth)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)


def test_confusion_matrix_does_not_depend_on_memory_layout():
    prediction, truth = volumes()
    expected = confusion_matrix(prediction, truth)
    for p, t in (
        (np.asfortranarray(prediction), truth),
        (np.asfortranarray(prediction), np.asfortranarray(truth)),
        (prediction[::-1], truth[::-1]),
        (prediction.transpose(2, 0, 1), truth.transpose(2, 0, 1)),
    ):
        np.testing.assert_array_equal(confusion_matrix(p, t), expected)


def test_labels_that_are_none_are_refused():
    prediction, truth = volumes()
    for label in (4, 64, 255):  # 64 would wrap round to a valid pair in uint8
        spoiled = truth.copy()
        spoiled[0, 0, 0] = label
        with pytest.raises(ValueError, match=f"found {label}"):
            confusion_matrix(prediction, spoiled)
        with pytest.raises(ValueError, match=f"found {label}"):
            confusion_matrix(spoiled, truth)
    with pytest.raises(ValueError, match="shape"):
        confusion_matrix(prediction[1:], truth)
    with pytest.raises(ValueError, match="uint8"):
        confusion_matrix(prediction.astype(np.float32), truth)


def test_scores_equal_a_voxel_loop():
    prediction, truth = volumes()
    scores = structure_scores(confusion_matrix(prediction, truth))
    assert list(scores) == list(STRUCTURES)
    for structure, labels in STRUCTURES.items():
        assert scores[structure] == pytest.approx(naive_scores(prediction, truth, labels))
    accuracy = voxel_accuracy(confusion_matrix(prediction, truth))
    assert accuracy == pytest.approx((prediction == truth).mean())


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_scores_and_hd95_equal_monai():
    prediction, truth = blobs()
    found = metrics_of(prediction, truth, spacing=(1.0, 2.0, 0.5)).scores
    ours, theirs = one_hot(prediction), one_hot(truth)
    confusion = ConfusionMatrixMetric(metric_name=["sensitivity", "specificity", "precision"])
    confusion(ours, theirs)
    expected = {
        "dice": DiceMetric()(ours, theirs)[0],
        "iou": MeanIoU()(ours, theirs)[0],
        "hd95": HausdorffDistanceMetric(include_background=True, percentile=95)(
            ours, theirs, spacing=(1.0, 2.0, 0.5)
        )[0],
    }
    for name, values in expected.items():
        for structure, value in zip(STRUCTURES, values, strict=True):
            assert found[structure][name] == pytest.approx(value.item(), rel=1e-6), name
    sums = {structure: confusion_of(ours, theirs, i) for i, structure in enumerate(STRUCTURES)}
    for structure, values in sums.items():
        for name, value in values.items():
            assert found[structure][name] == pytest.approx(value)


def test_counts_equal_monais_to_the_voxel():
    prediction, truth = volumes()
    counts = get_confusion_matrix(one_hot(prediction), one_hot(truth))[0]
    confusion = confusion_matrix(prediction, truth)
    for labels, (tp, fp, tn, fn) in zip(STRUCTURES.values(), counts.long().tolist(), strict=True):
        hit = confusion[np.ix_(labels, labels)].sum()
        true, predicted = confusion[list(labels)].sum(), confusion[:, list(labels)].sum()
        assert (hit, predicted - hit, true - hit) == (tp, fp, fn)
        assert confusion.sum() - true - predicted + hit == tn


def confusion_of(ours: torch.Tensor, theirs: torch.Tensor, channel: int) -> dict[str, float]:
    metric = ConfusionMatrixMetric(
        metric_name=["sensitivity", "specificity", "precision"], reduction="mean"
    )
    metric(ours[:, channel : channel + 1], theirs[:, channel : channel + 1])
    values = [value.item() for value in metric.aggregate()]
    return dict(zip(["sensitivity", "specificity", "precision"], values, strict=True))


def test_hd95_is_the_larger_of_the_two_directed_percentiles():
    """By scipy alone, and different here from the percentile of the pooled distances (medpy)."""
    prediction, truth = (volume == 3 for volume in blobs())
    truth = truth.copy()
    truth[25:28, 18:23, 8:14] = True  # something far away that only one direction sees
    spacing = np.array([1.0, 2.0, 0.5])
    surfaces = [np.argwhere(mask & ~binary_erosion(mask)) * spacing for mask in (prediction, truth)]
    there = cKDTree(surfaces[1]).query(surfaces[0])[0]
    back = cKDTree(surfaces[0]).query(surfaces[1])[0]
    expected = max(np.percentile(there, 95), np.percentile(back, 95))
    assert hd95(prediction, truth, spacing, DIAGONAL) == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(np.percentile(np.concatenate([there, back]), 95), rel=0.01)


def test_hd95_of_two_voxels_at_opposite_corners():
    """Closed form; and structures at the edge of the image are surface too."""
    prediction, truth = np.zeros((2, 10, 12, 14), bool)
    prediction[0, 0, 0] = truth[-1, -1, -1] = True
    distance = math.hypot(9 * 1.0, 11 * 2.0, 13 * 0.5)
    assert hd95(prediction, truth, (1.0, 2.0, 0.5), DIAGONAL) == pytest.approx(distance)
    assert hd95(truth, truth, (1, 1, 1), DIAGONAL) == 0


def test_a_crop_with_its_outside_scores_as_the_whole_image():
    prediction, truth = blobs()
    box = np.s_[5:26, 3:22, 2:20]
    assert confusion_matrix(prediction[box], truth[box])[1:].sum() == (truth > 0).sum()
    whole = metrics_of(prediction, truth)
    outside = truth.size - truth[box].size
    cropped = metrics_of(prediction[box], truth[box], outside=outside)
    assert cropped == whole
    assert metrics_of(prediction[box], truth[box]).voxel_accuracy < whole.voxel_accuracy


EMPTY = [
    # in truth, predicted, dice, iou, sensitivity, precision, hd95
    (False, False, 1.0, 1.0, 1.0, 1.0, 0.0),
    (False, True, 0.0, 0.0, math.nan, 0.0, 373.13),
    (True, False, 0.0, 0.0, 0.0, math.nan, 373.13),
]


@pytest.mark.parametrize("row", EMPTY)
def test_empty_structures_follow_brats(row):
    in_truth, predicted, *expected = row
    prediction, truth = np.full((2, 4, 4, 4), 0, np.uint8)
    truth[1, 1, 1] = prediction[1, 1, 1] = 2  # some ED, so that the image is not empty
    truth[2, 2, 2] = 3 if in_truth else 0
    prediction[3, 3, 3] = 3 if predicted else 0
    scores = metrics_of(prediction, truth).scores
    names = ["dice", "iou", "sensitivity", "precision", "hd95"]
    found = [scores["ET"][name] for name in names]
    assert found == pytest.approx(expected, abs=0.005, nan_ok=True)
    assert scores["NCR"]["dice"] == 1  # nowhere
    assert scores["ED"]["dice"] == 1  # perfect


def test_an_image_without_tumour_at_all():
    empty = np.zeros((4, 4, 4), np.uint8)
    scores = metrics_of(empty, empty)
    assert scores.voxel_accuracy == 1
    for structure in STRUCTURES:
        assert scores.scores[structure] == {
            "dice": 1, "iou": 1, "sensitivity": 1, "specificity": 1, "precision": 1, "hd95": 0
        }  # fmt: skip
    full = np.full((4, 4, 4), 3, np.uint8)
    assert math.isnan(metrics_of(full, full).scores["WT"]["specificity"])


def test_summary_averages_what_is_defined_and_says_over_how_many():
    empty = np.zeros((4, 4, 4), np.uint8)
    tumour = empty.copy()
    tumour[1:3, 1:3, 1:3] = 3
    half = empty.copy()
    half[1:3, 1:3, 1] = 3
    site = summarise(
        [
            metrics_of(tumour, tumour, loss=0.1),
            metrics_of(half, tumour, loss=0.3),
            metrics_of(tumour, empty, loss=0.8),  # sensitivity undefined
        ]
    )
    assert site.n == 3
    assert site.means["dice/ET"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert site.means["sensitivity/ET"] == pytest.approx((1 + 0.5) / 2)
    assert site.means["precision/ET"] == pytest.approx(2 / 3)
    assert site.means["loss"] == pytest.approx(0.4)
    assert site.defined["sensitivity/ET"] == 2
    assert site.defined["dice/ET"] == site.defined["loss"] == 3
    assert site.means["hd95/ET"] > DIAGONAL / 3
    assert mean_dice(site) == pytest.approx(site.means["dice/ET"])  # WT = TC = ET here


def test_headline_figure_is_the_mean_over_regions_not_labels():
    prediction, truth = blobs()
    subject = metrics_of(prediction, truth, surface_distances=False)
    site = summarise([subject])
    expected = [
        naive_scores(prediction, truth, STRUCTURES[name])["dice"] for name in ("WT", "TC", "ET")
    ]
    assert mean_dice(site) == pytest.approx(np.mean(expected))
    assert "hd95" not in subject.scores["WT"]
    assert "hd95/WT" not in site.means
    assert "loss" not in site.means


def test_undefined_for_all_no_subjects_and_a_broken_loss():
    empty = np.zeros((4, 4, 4), np.uint8)
    tumour = np.full((4, 4, 4), 3, np.uint8)
    site = summarise([metrics_of(tumour, empty, loss=math.nan), metrics_of(tumour, empty, loss=1)])
    assert math.isnan(site.means["sensitivity/ET"])
    assert site.defined["sensitivity/ET"] == 0
    assert math.isnan(site.means["loss"])  # a diverged subject must not vanish from the mean
    nobody = summarise([])
    assert nobody.n == 0
    assert math.isnan(mean_dice(nobody))
