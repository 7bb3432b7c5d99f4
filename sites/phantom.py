"""One synthetic BraTS subject: anatomy, then tumour, then labels, then the site's scanner.

Nothing comes from a patient. A subject is a function of (seed, subject id, site, grade, shape)
alone: it is bit-identical whatever else is generated, in whatever order or process (same numpy
and scipy). Files, numbering and sites are `sites.phantom_cohort`. Scores reached on it say that a
federation works; they say nothing clinical.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sites.phantom_anatomy import CANONICAL_SHAPE, Grid, build_head, draw_patient, make_grid
from sites.phantom_signal import Scanner, scan
from sites.phantom_tumour import (
    FILE_ET,
    FILE_NCR,
    annotate,
    displaced_coordinates,
    draw_disease,
    grow_tumour,
)

SMALLEST_SHAPE = (32, 32, 20)
"""Here the smallest tumours still have a few voxels (7.5 mm each); below, some have none."""
LARGEST_AXIS = 512

_Stored = TypeVar("_Stored", np.int16, np.uint8)

# One random stream per stage, so that a change in one leaves the others as they were.
_PATIENT, _DISEASE, _HEAD, _TUMOUR, _LABELS, _SIGNAL, _FIELD_OF_VIEW = range(7)


@dataclass(frozen=True)
class SiteModel:
    """What a site does to its subjects, besides which patients it sees.

    number: the institution's number in BraTS 2021/FeTS; token: its code in BraTS 2019 ids, "" for
    IvyGAP. strip_mm: skull stripping, > 0 leaves a rim, < 0 cuts into the brain. tumour_size:
    factor on radii. annotator_mm: labels drawn outside (+) or inside (-) the tumour's surface.
    """

    number: int
    token: str
    scanner: Scanner = field(default_factory=Scanner)
    strip_mm: float = 0.0
    tumour_size: float = 1.0
    annotator_mm: float = 0.0


@dataclass(frozen=True)
class Facts:
    """Truth about a subject: years of age, and volumes in ml of what was labelled."""

    age: float
    brain_ml: float
    wt_ml: float
    tc_ml: float
    et_ml: float


@dataclass(frozen=True)
class Phantom:
    """images: modality -> int16 (X, Y, Z); labels: uint8 with {0, 1, 2, 4}; axes L, P, S."""

    images: dict[str, NDArray[np.int16]]
    labels: NDArray[np.uint8]
    facts: Facts


def checked_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape as three ints.

    Raises:
        ValueError: not three axes, or an axis too short or too long for a head to be drawn on.
    """
    sizes = tuple(int(n) for n in shape)
    if len(sizes) != 3:
        raise ValueError(f"a phantom needs three axes, got {len(sizes)}: {sizes}")
    if any(n < least for n, least in zip(sizes, SMALLEST_SHAPE, strict=True)):
        raise ValueError(
            f"shape {_by(sizes)} is too small for a head with a tumour: at least "
            f"{_by(SMALLEST_SHAPE)} voxels (80x80x52 trains in minutes, "
            f"{_by(CANONICAL_SHAPE)} is BraTS)"
        )
    if max(sizes) > LARGEST_AXIS:
        raise ValueError(f"shape {_by(sizes)} is too large: at most {LARGEST_AXIS} along an axis")
    return (sizes[0], sizes[1], sizes[2])


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)


def synthesise(
    seed: int,
    subject_id: str,
    site: SiteModel,
    grade: str,
    shape: tuple[int, int, int] = CANONICAL_SHAPE,
) -> Phantom:
    """One subject as its site scanned and annotated it. 0.1 s at 80x80x52, 2 s at 240x240x155.

    Raises:
        ValueError: seed is negative, grade is not HGG or LGG, or the shape is not supported.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if grade not in ("HGG", "LGG"):
        raise ValueError(f"grade must be HGG or LGG, got {grade!r}")
    grid = make_grid(checked_shape(shape))

    def stream(stage: int) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(subject_id.encode()), stage])

    patient = draw_patient(stream(_PATIENT), grade)
    disease = draw_disease(stream(_DISEASE), grade, site.tumour_size)
    moved = displaced_coordinates(grid, disease)
    head = build_head(stream(_HEAD), grid, patient, moved, site.strip_mm)
    tumour = grow_tumour(stream(_TUMOUR), grid, head, disease)
    box_labels = annotate(stream(_LABELS), grid, tumour, disease, site.annotator_mm)
    box_images = scan(stream(_SIGNAL), grid, tumour, disease, head.rough, site.scanner)

    below = _cut_off(stream(_FIELD_OF_VIEW), grid)
    images = {name: _whole(image, grid, below) for name, image in box_images.items()}
    labels = _whole(box_labels, grid, below)
    facts = Facts(
        age=round(patient.age, 3),
        brain_ml=round(int((images["t1"] > 0).sum()) * grid.voxel_ml, 1),
        wt_ml=round(int((labels > 0).sum()) * grid.voxel_ml, 2),
        tc_ml=round(int(np.isin(labels, (FILE_NCR, FILE_ET)).sum()) * grid.voxel_ml, 2),
        et_ml=round(int((labels == FILE_ET).sum()) * grid.voxel_ml, 2),
    )
    return Phantom(images, labels, facts)


def _cut_off(rng: np.random.Generator, grid: Grid) -> int:
    """Slices lost at the bottom: 3 % of real scans do not cover the whole brain."""
    return round(18 / grid.voxel_mm[2]) if rng.random() < 0.03 else 0


def _whole(part: NDArray[_Stored], grid: Grid, below: int) -> NDArray[_Stored]:
    """The box placed in its full grid, without the lowest `below` slices of the box."""
    full = np.zeros(grid.shape, part.dtype)
    full[grid.box] = part
    full[:, :, : grid.box[2].start + below] = 0
    return full
