"""How well a segmentation agrees with the truth, per subject and per site.

Everything but HD95 comes from one confusion matrix per subject; labels are those of `common.brats`
and scores are reported for its STRUCTURES (labels ET, ED, NCR; regions TC, WT). With TP, FP, FN, TN
the voxels of one structure: dice 2TP/(2TP+FP+FN), iou TP/(TP+FP+FN), sensitivity TP/(TP+FN),
specificity TN/(TN+FP), precision TP/(TP+FP).

Empty structures follow BraTS, so that a case without enhancing tumour counts:

                                dice  iou  sensitivity  precision  hd95
    neither truth nor predicted  1     1       1            1      0
    predicted, not in the truth  0     0     undefined      0      the image's diagonal
    in the truth, not predicted  0     0       0        undefined  the image's diagonal

373.13 mm is that diagonal for 240x240x155 voxels of 1 mm. Undefined is NaN and is left out of
means, which say how many subjects they are over. Specificity is undefined where the truth fills
the image; it is close to 1 for any tumour and says little.

Not here: resampling a prediction to the subject's own grid, lesion-wise scores (BraTS 2023), and
averaging over sites.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.brats import BACKGROUND, N_CLASSES, STRUCTURES

REGIONS = ("WT", "TC", "ET")
"""The regions of the headline figure: the mean of their Dice."""


@dataclass(frozen=True)
class SubjectMetrics:
    subject: str
    scores: dict[str, dict[str, float]]  # structure -> metric -> value; hd95 only if computed
    voxel_accuracy: float
    loss: float | None


@dataclass(frozen=True)
class SiteMetrics:
    """Means over the subjects of a site, under flat names: "dice/WT", "hd95/TC", "voxel_accuracy",
    "loss". A name appears if any subject has it; its mean is NaN if it is undefined for all."""

    n: int
    means: dict[str, float]
    defined: dict[str, int]  # over how many subjects each mean is


def confusion_matrix(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Voxel counts (4, 4), int64: rows are true labels, columns predicted ones.

    Both arrays are uint8 labels 0..3 of the same shape. Raises ValueError otherwise.
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction and truth differ in shape: {prediction.shape} and {truth.shape}"
        )
    if prediction.dtype != np.uint8 or truth.dtype != np.uint8:
        raise ValueError(
            f"prediction and truth must be uint8 labels, not {prediction.dtype} and {truth.dtype}"
        )
    pairs = truth * np.uint8(N_CLASSES) + prediction
    counts = np.bincount(pairs.ravel(order="K"), minlength=N_CLASSES**2)  # "K": without a copy
    largest = max((int(labels.max()) for labels in (prediction, truth) if labels.size), default=0)
    if largest >= N_CLASSES:
        raise ValueError(f"labels must be 0 to {N_CLASSES - 1}; found {largest}")
    return counts.reshape(N_CLASSES, N_CLASSES).astype(np.int64, copy=False)


def structure_scores(confusion: np.ndarray) -> dict[str, dict[str, float]]:
    """Structure -> {"dice", "iou", "sensitivity", "specificity", "precision"} of one subject."""
    total = int(confusion.sum())
    scores = {}
    for structure, labels in STRUCTURES.items():
        true = int(confusion[list(labels)].sum())
        predicted = int(confusion[:, list(labels)].sum())
        hit = int(confusion[np.ix_(labels, labels)].sum())
        union = true + predicted - hit
        both_empty = union == 0
        scores[structure] = {
            "dice": 1.0 if both_empty else 2 * hit / (true + predicted),
            "iou": 1.0 if both_empty else hit / union,
            "sensitivity": 1.0 if both_empty else _ratio(hit, true),
            "specificity": _ratio(total - union, total - true),
            "precision": 1.0 if both_empty else _ratio(hit, predicted),
        }
    return scores


def voxel_accuracy(confusion: np.ndarray) -> float:
    """The share of voxels whose label, background included, is right."""
    return _ratio(int(np.trace(confusion)), int(confusion.sum()))


def hd95(
    prediction_mask: np.ndarray,
    truth_mask: np.ndarray,
    spacing: Sequence[float],
    diagonal_mm: float,
) -> float:
    """The 95th-percentile Hausdorff distance in mm between two boolean masks of one shape.

    By MONAI: the larger of the two directed 95th percentiles of the distances between surface
    voxels (DeepMind's surface-distance definition; medpy instead pools both directions before
    taking one percentile). Voxels at the edge of the image count as surface. `spacing` is in mm
    along each axis; `diagonal_mm` is the answer if exactly one mask is empty, and 0 if both are.
    """
    box = bounding_box(prediction_mask | truth_mask)
    if box is None:
        return 0.0
    prediction, truth = prediction_mask[box], truth_mask[box]
    if not prediction.any() or not truth.any():
        return float(diagonal_mm)
    # Imported here because only this function needs MONAI, which takes seconds to load.
    from monai.metrics import compute_hausdorff_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 warns of its own call
        distance = compute_hausdorff_distance(
            prediction[None, None],
            truth[None, None],
            include_background=True,
            percentile=95,
            spacing=[float(step) for step in spacing],
        )
    return float(distance)


def subject_metrics(
    subject_id: str,
    prediction: np.ndarray,
    truth: np.ndarray,
    *,
    outside: int,
    spacing: Sequence[float],
    diagonal_mm: float,
    surface_distances: bool,
    loss: float | None = None,
) -> SubjectMetrics:
    """All metrics of one subject, from uint8 labels (X, Y, Z) on its own grid.

    The arrays may be a crop that holds all truth and all prediction: `outside` is the number of
    voxels left out, background in both. `spacing` (mm) and `diagonal_mm` (of the whole image) are
    used for HD95, computed if `surface_distances`. Raises ValueError as `confusion_matrix` does.
    """
    confusion = confusion_matrix(prediction, truth)
    confusion[BACKGROUND, BACKGROUND] += outside
    scores = structure_scores(confusion)
    if surface_distances:
        box = bounding_box((prediction | truth) != BACKGROUND) or ()  # once for all structures
        for structure, labels in STRUCTURES.items():
            member = np.isin(np.arange(N_CLASSES), labels)
            masks = member[prediction[box]], member[truth[box]]
            scores[structure]["hd95"] = hd95(*masks, spacing, diagonal_mm)
    return SubjectMetrics(subject_id, scores, voxel_accuracy(confusion), loss)


def summarise(subjects: Sequence[SubjectMetrics]) -> SiteMetrics:
    """Means over subjects, each over the subjects for which the value is defined.

    A NaN loss is no undefined value but a broken training, so it makes the mean loss NaN."""
    values: dict[str, list[float]] = {}
    for subject in subjects:
        for structure, scores in subject.scores.items():
            for metric, value in scores.items():
                values.setdefault(f"{metric}/{structure}", []).append(value)
        values.setdefault("voxel_accuracy", []).append(subject.voxel_accuracy)
        if subject.loss is not None:
            values.setdefault("loss", []).append(subject.loss)
    defined = {
        name: [value for value in listed if name == "loss" or not math.isnan(value)]
        for name, listed in values.items()
    }
    return SiteMetrics(
        n=len(subjects),
        means={
            name: math.fsum(listed) / len(listed) if listed else math.nan
            for name, listed in defined.items()
        },
        defined={name: len(listed) for name, listed in defined.items()},
    )


def mean_dice(metrics: SiteMetrics) -> float:
    """The headline figure, by which the best model is chosen: mean Dice over WT, TC and ET.

    NaN for a site without subjects."""
    return mean_over_regions(metrics, "dice")


def mean_over_regions(metrics: SiteMetrics, metric: str) -> float:
    """Of "dice", "iou" or "hd95" over WT, TC and ET; NaN where one of them is missing."""
    values = (metrics.means.get(f"{metric}/{region}", math.nan) for region in REGIONS)
    return math.fsum(values) / len(REGIONS)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """The smallest box that holds every true voxel, or None if there is none."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        occupied = np.flatnonzero(mask.any(axis=others))
        if not occupied.size:
            return None
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)
