"""From the network's probabilities to the labels that are written: thresholds, shapes, small pieces.

Sizes are millimetres and cubic millimetres, so a step does the same at any voxel size. Every result
is a label map, hence ET lies in TC and TC in WT whatever was changed. What the steps gain or lose is
measured by benchmarks/postprocessing.py and stands in docs/prediction.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from common.brats import BACKGROUND, ED, ET, NCR, STRUCTURES

TOUCHING = np.ones((3, 3, 3), bool)  # voxels of one component share a corner at least, as in BraTS
CERTAIN = 0.8  # mean probability of tumour from which a piece is more than a doubtful speck
SAME = 1 - 1e-6  # 1000 times 0.001 need not be 1: sizes that differ by less are equal


@dataclass(frozen=True)
class PostProcessing:
    """The steps in the order in which they are done; each default leaves everything as it is.

    threshold: the whole tumour is where the probabilities of the three tumour labels sum to this
        or more, instead of where one of them beats the background.
    opening_mm, closing_mm: radius of the ball by which the whole tumour is opened (bridges and doubtful
        specks go), then closed (gaps are filled). Opening trims: a piece narrower than the ball stays as
        it is if its mean probability of tumour is CERTAIN or more, the largest piece if nothing else does.
    fill_holes: what the whole tumour encloses belongs to it.
    smallest_mm3: pieces smaller than this go, of the whole tumour to background, of the core to ED,
        of the enhancing tumour to NCR; a region's largest piece always stays.
    tiny_et_mm3: if all ET together is smaller than this, it becomes NCR, as the winners of BraTS do:
        a few stray voxels where the truth has no ET at all cost a Dice of 0.
    """

    threshold: float | None = None
    opening_mm: float = 0.0
    closing_mm: float = 0.0
    fill_holes: bool = False
    smallest_mm3: float = 0.0
    tiny_et_mm3: float = 0.0


NONE = PostProcessing()
REFERENCE = PostProcessing(threshold=0.5, opening_mm=1.0, closing_mm=1.0, smallest_mm3=100.0)
RECOMMENDED = PostProcessing(opening_mm=1.0, fill_holes=True)
PRESETS = {"none": NONE, "reference": REFERENCE, "recommended": RECOMMENDED}


def postprocess(
    labels: np.ndarray, probabilities: np.ndarray, spacing: Sequence[float], steps: PostProcessing
) -> np.ndarray:
    """uint8 system labels (X, Y, Z) after the steps; `labels` itself is left as it is.

    Args:
        labels: uint8 system labels (X, Y, Z), the most probable class of each voxel.
        probabilities: (4, X, Y, Z) of the system labels.
        spacing: of the voxels, in mm.
    """
    likeliest = probabilities[1:].argmax(axis=0).astype(np.uint8) + np.uint8(1)
    result = labels.copy()
    if steps.threshold is not None:
        tumour = probabilities[1:].sum(axis=0) >= steps.threshold
        result = np.where(tumour, likeliest, np.uint8(BACKGROUND))
    if steps.opening_mm > 0 or steps.closing_mm > 0 or steps.fill_holes:
        tumour = _shaped(result != BACKGROUND, probabilities, spacing, steps)
        result[~tumour] = BACKGROUND
        new = tumour & (result == BACKGROUND)
        result[new] = likeliest[new]
    voxel = float(np.prod(spacing))
    if steps.smallest_mm3 > 0:
        for region, instead in (("WT", BACKGROUND), ("TC", ED), ("ET", NCR)):
            mask = np.isin(result, STRUCTURES[region])
            result[_small_pieces(mask, steps.smallest_mm3 / voxel)] = instead
    if steps.tiny_et_mm3 > 0:
        enhancing = result == ET
        if np.count_nonzero(enhancing) * voxel < steps.tiny_et_mm3 * SAME:
            result[enhancing] = NCR
    return result


def in_words(steps: PostProcessing) -> str:
    """Every step that does something, in the order in which they are done; empty without any."""
    said = [
        (steps.threshold is not None, f"threshold {steps.threshold}"),
        (steps.opening_mm > 0, f"opening {steps.opening_mm:g} mm"),
        (steps.closing_mm > 0, f"closing {steps.closing_mm:g} mm"),
        (steps.fill_holes, "holes filled"),
        (steps.smallest_mm3 > 0, f"no pieces under {steps.smallest_mm3:g} mm³"),
        (steps.tiny_et_mm3 > 0, f"ET under {steps.tiny_et_mm3:g} mm³ in all is NCR"),
    ]
    return ", ".join(words for on, words in said if on)


def _shaped(
    tumour: np.ndarray,
    probabilities: np.ndarray,
    spacing: Sequence[float],
    steps: PostProcessing,
) -> np.ndarray:
    margin = 1 + int(np.ceil(max(steps.opening_mm, steps.closing_mm) / min(spacing)))
    if not tumour.any():
        return tumour
    box = tuple(
        slice(max(0, span.start), span.stop) for span in ndimage.find_objects(tumour.astype(int))[0]
    )
    # padded, for scipy takes what lies beyond the edge for background when it erodes
    mask = np.pad(tumour[box], margin)
    if steps.opening_mm > 0:
        certainty = np.pad(1 - probabilities[BACKGROUND][box], margin)
        mask = _opened(mask, certainty, ball(steps.opening_mm, spacing))
    if steps.closing_mm > 0:
        mask = ndimage.binary_closing(mask, ball(steps.closing_mm, spacing))
    if steps.fill_holes:
        mask = ndimage.binary_fill_holes(mask)
    result = np.zeros_like(tumour)
    result[box] = mask[margin:-margin, margin:-margin, margin:-margin]
    return result


def _opened(mask: np.ndarray, certainty: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The opened mask, and whole what opening would delete though the network is sure of it."""
    opened: np.ndarray = ndimage.binary_opening(mask, by)
    pieces, _ = ndimage.label(mask, TOUCHING)
    sizes = np.bincount(pieces.ravel())
    stays = np.bincount(pieces.ravel(), opened.ravel()) > 0
    mean = np.bincount(pieces.ravel(), certainty.ravel()) / np.maximum(sizes, 1)
    whole = ~stays & (mean >= CERTAIN)
    whole[0] = False  # no piece, but what is around them
    if not (stays.any() or whole.any()):
        whole[1 + int(sizes[1:].argmax())] = True
    return opened | whole[pieces]


def ball(radius_mm: float, spacing: Sequence[float]) -> np.ndarray:
    """The voxels within a radius of a voxel's centre (bool, odd sides), whatever their shape."""
    reach = [int(np.floor(radius_mm / step + 1e-6)) for step in spacing]
    places = np.meshgrid(
        *(np.arange(-n, n + 1) * step for n, step in zip(reach, spacing, strict=True)),
        indexing="ij",
    )
    return np.sqrt(sum(place**2 for place in places)) <= radius_mm * (1 + 1e-6)


def _small_pieces(mask: np.ndarray, voxels: float) -> np.ndarray:
    """Where the connected pieces of fewer than so many voxels lie, the largest of all excepted."""
    pieces, _ = ndimage.label(mask, TOUCHING)
    sizes = np.bincount(pieces.ravel())
    small = sizes < voxels * SAME
    small[0] = False  # no piece, but what is around them
    if len(sizes) > 1:
        small[1 + int(sizes[1:].argmax())] = False
    return small[pieces]
