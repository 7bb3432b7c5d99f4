"""What the numbers in a segmentation file mean, and whether they can be a tumour.

Translates a file's label coding to the system's labels. Reading the file is `sites.volumes`,
comparing it with the images' grid `sites.checks`.
"""

from __future__ import annotations

import numpy as np

from common.brats import BACKGROUND, CODINGS
from sites.finding import Report

MAX_OUTSIDE = 0.01  # of the tumour; expert labels reach a few voxels beyond the brain's edge

_DECLARED = "label_coding in the federation file (--label-coding in fed-client check and evaluate)"


def translate(voxels: np.ndarray, file: str, coding: str, report: Report) -> np.ndarray | None:
    """System labels, uint8 in Fortran order, or None after reporting an error.

    `voxels` is in Fortran order; `coding` is `auto` or a key of `common.brats.CODINGS`.
    """
    flat = voxels.ravel(order="F")  # a view: volumes are in Fortran order
    inside = flat != 0
    marked = flat[inside]
    present = np.unique(marked)
    fix = f"Correct the segmentation; {_DECLARED} says what labels mean."
    if present.dtype.kind == "f":
        if not np.isfinite(present).all():
            report(file, "error", "nan", "labels are not numbers (NaN or infinite)", fix)
            return None
        if np.abs(present - np.rint(present)).max(initial=0) > 1e-4:  # rounding of scl_slope
            what = "labels are not whole numbers, as after resampling with interpolation"
            remedy = "Resample the original segmentation with nearest neighbour."
            report(file, "error", "fractional-labels", what, remedy)
            return None
        marked, present = np.rint(marked), np.unique(np.rint(present))
    if present.size and present[0] < 0:
        report(file, "error", "negative-label", "holds negative labels", fix)
        return None

    known = CODINGS[coding] if coding != "auto" else CODINGS["brats"] | CODINGS["brats2023"]
    unknown = [int(label) for label in present if label not in known]
    if unknown:
        legal = ", ".join(map(str, sorted(known)))
        what = f"holds label {unknown[0]}, which is none of {legal}"
        if len(unknown) > 20:
            what = f"holds {len(unknown)} values other than {legal}: is it an image?"
        report(file, "error", "unknown-label", what, fix)
        return None
    if coding == "auto":
        if 3 in present and 4 in present:
            what = "holds both label 3 and label 4, which have several meanings"
            remedy = (
                "Declare label_coding: brats2013 if 3 is non-enhancing tumour (BraTS 2013 and "
                "2015); remove the resection cavity (4) from BraTS 2024 files. "
                f"It is {_DECLARED}."
            )
            report(file, "error", "ambiguous-labels", what, remedy)
            return None
        coding = "brats2023" if 3 in present else "brats"
        if 3 in present and not _named_as_2023(file):
            what = "label 3 instead of 4 is taken for enhancing tumour, as BraTS has it since 2023"
            remedy = f"Nothing if so; otherwise declare {_DECLARED}."
            report(file, "warning", "label-3-for-4", what, remedy)

    table = np.zeros(256, dtype=np.uint8)
    for in_file, in_system in CODINGS[coding].items():
        table[in_file] = in_system
    labels = np.full(flat.shape, BACKGROUND, dtype=np.uint8)
    labels[inside] = table[marked.astype(np.uint8)]
    return labels.reshape(voxels.shape, order="F")


def _named_as_2023(file: str) -> bool:
    return "-seg." in file.lower()


def check_tumour(labels: np.ndarray, brain: np.ndarray, file: str, report: Report) -> None:
    """Warn if there is next to no tumour, or tumour where the images hold nothing (`brain` is
    true where any image is non-zero)."""
    tumour = labels != BACKGROUND
    n = int(np.count_nonzero(tumour))
    remedy = "Make sure that this is the subject's segmentation."
    if n == 0:
        report(file, "warning", "empty-segmentation", "no voxel is marked as tumour", remedy)
    elif n == 1:
        report(file, "warning", "tiny-segmentation", "a single voxel is marked as tumour", remedy)
    outside = n - int(np.count_nonzero(tumour & brain))
    if outside > MAX_OUTSIDE * n:
        what = f"{outside / n:.0%} of the marked tumour lies outside the brain"
        report(file, "warning", "segmentation-outside-brain", what, remedy)
