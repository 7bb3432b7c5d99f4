"""Lesion-wise Dice and HD95 as in BraTS 2023: every lesion of the truth counts alike, and so does
every false one.

After Saluja et al., https://github.com/rachitsaluja/BraTS-2023-Metrics (brats_metrics.py), with its
constants for the glioma challenge:

- The truth is dilated by 3 iterations of the 18-neighbourhood; the true voxels within one
  26-connected component of that are one lesion.
- A lesion is compared with all predicted 26-connected components, whole, that touch its dilation.
  None does: Dice 0, HD95 374 mm. A component may touch several lesions and then counts in each.
- Lesions of 50 mm^3 or less are not counted, whether found or not.
- A predicted component that touches no lesion, not even an uncounted one, is a false one whatever
  its size: Dice 0, HD95 374 mm.
- The score is the mean over counted and false lesions; with none of either, Dice 1 and HD95 0.

The one deviation: HD95 is MONAI's over surface voxels (`common.metrics.hd95`), while theirs is
DeepMind's, which puts the surface between voxels and weights it by area; so ours differs from theirs
by a fraction of a voxel. Lesions and Dice are the same, for voxels of any size: the 3 iterations
are voxels, the 50 mm^3 are mm^3, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.metrics import bounding_box, hd95

DILATION = 3  # iterations
SMALLEST_MM3 = 50.0  # a lesion must be larger to count
PENALTY_MM = 374.0  # of a missed and of a false lesion


@dataclass(frozen=True)
class LesionScores:
    """Means over counted and false lesions, and how many of the counted were `found` or `missed`,
    how many components are `false`, and how many true lesions are too small to count."""

    dice: float
    hd95: float
    found: int
    missed: int
    false: int
    uncounted: int


def lesion_scores(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    *,
    whole_hd95: float | None = None,
) -> LesionScores:
    """Lesion-wise scores of two boolean masks (X, Y, Z) of one region; `spacing` is in mm.

    `whole_hd95` is `common.metrics.hd95` of the two masks, if it is known: a single lesion that the whole
    prediction touches has this very number, which then is not computed again.
    The masks may be a crop that holds all of both. Raises ValueError if their shapes differ.
    """
    from scipy import ndimage

    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction and truth differ in shape: {prediction.shape} and {truth.shape}"
        )
    # dilated lesions that meet outside of a box that holds both masks meet inside of it, too
    box = bounding_box(prediction | truth)
    if box is None:
        return LesionScores(1.0, 0.0, 0, 0, 0, 0)
    prediction, truth = prediction[box], truth[box]
    touching = ndimage.generate_binary_structure(3, 3)
    around = ndimage.generate_binary_structure(3, 2)
    dilated = ndimage.binary_dilation(truth, around, iterations=DILATION)
    zones, n_lesions = ndimage.label(dilated, touching)
    components, n_components = ndimage.label(prediction, touching)

    touches = np.zeros((n_lesions + 1, n_components + 1), bool)
    touches[zones.ravel(), components.ravel()] = True
    touches[0] = touches[:, 0] = False  # of the background
    volumes = np.bincount(zones[truth], minlength=n_lesions + 1) * float(np.prod(spacing))
    dices, distances, found = [], [], 0
    counted = [lesion for lesion in range(1, n_lesions + 1) if volumes[lesion] > SMALLEST_MM3]
    for lesion in counted:
        true = (zones == lesion) & truth
        predicted = touches[lesion][components]
        found += bool(touches[lesion].any())
        dices.append(2 * int((true & predicted).sum()) / int(true.sum() + predicted.sum()))
        alone = n_lesions == 1 and n_components > 0 and bool(touches[lesion, 1:].all())
        if alone and whole_hd95 is not None:
            distances.append(whole_hd95)
        else:
            distances.append(hd95(predicted, true, spacing, PENALTY_MM))
    false = n_components - int(touches.any(axis=0).sum())
    n = len(counted) + false
    return LesionScores(
        dice=sum(dices) / n if n else 1.0,
        hd95=(sum(distances) + false * PENALTY_MM) / n if n else 0.0,
        found=found,
        missed=len(counted) - found,
        false=false,
        uncounted=n_lesions - len(counted),
    )
