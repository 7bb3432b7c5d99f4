"""The glioma of a phantom subject: where it is, what it does to the head, how it is annotated.

Noise-deformed ellipsoids. High grade: oedema that seeks white matter around an enhancing ring
around necrosis, sometimes a satellite. Low grade: mostly non-enhancing tumour, little oedema,
enhancement often absent. Labels are drawn by an annotator, so their surfaces are not exactly
those of the tissue. No intensities (`sites.phantom_signal`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sites.phantom_anatomy import (
    AIR,
    CSF,
    EDEMA,
    ENHANCING,
    NECROSIS,
    NON_ENHANCING,
    VESSEL,
    WM,
    Array,
    Grid,
    Head,
    Mask,
    smooth_field,
)

FILE_NCR, FILE_ED, FILE_ET = 1, 2, 4
"""Labels as BraTS 2017-2021 writes them to a file."""


@dataclass(frozen=True)
class Lesion:
    """Centre in mm of the grid's axes, radii of the core and of the oedema around it in mm."""

    centre: tuple[float, float, float]
    core_mm: float
    edema_mm: float


@dataclass(frozen=True)
class Disease:
    """Drawn before the head, because a mass moves the anatomy. The first lesion is the main one.

    push_mm: how far tissue beside the core is moved. flair: brightness of the lesion over white
    matter on FLAIR relative to a typical one; mismatch: how far the core of a low-grade tumour
    is dark on FLAIR while bright on T2 (0 not at all; the "T2-FLAIR mismatch" sign).
    """

    grade: str
    lesions: tuple[Lesion, ...]
    push_mm: float
    flair: float
    mismatch: float


@dataclass(frozen=True)
class Tumour:
    """The tumour in its head, over the grid's box.

    tissue: the head's tissues with the tumour drawn in. core and edema: below 1 inside, growing
    outwards. grain: smooth unit-variance field, the texture of the core. room: where the tumour
    can be (not air, not behind the falx).
    """

    tissue: NDArray[np.uint8]
    core: Array
    edema: Array
    grain: Array
    room: Mask
    has_edema: bool


def draw_disease(rng: np.random.Generator, grade: str, size: float) -> Disease:
    """Place lesions in the cerebral white matter; `size` scales their radii (a site's case mix)."""
    low_grade = grade == "LGG"
    for _ in range(50):
        side = rng.choice([-1, 1])
        centre = np.array([side * rng.uniform(18, 44), rng.uniform(-48, 48), rng.uniform(-18, 34)])
        if np.sum((centre / (56, 72, 52)) ** 2) < 0.75:
            break
    typical = 18.5 if low_grade else 20.0
    core = float(np.clip(rng.lognormal(np.log(typical), 0.33) * size, 7, 36))
    margin = rng.gamma(2.0, 2.2) if low_grade else rng.gamma(2.4, 4.8)
    edema = core + float(margin) * size
    lesions = [Lesion(_triple(centre), core, edema)]
    if not low_grade and rng.random() < 0.18:  # a satellite
        away = rng.normal(size=3)
        away *= (edema + rng.uniform(6, 18)) / np.sqrt(np.sum(away**2))
        small = core * float(rng.uniform(0.25, 0.5))
        place = np.clip(centre + away, [-48, -60, -25], [48, 60, 42])
        lesions.append(Lesion(_triple(place), small, small + float(rng.uniform(3, 8))))
    push = float(rng.uniform(0.0, 0.35)) * core * (0.5 if low_grade else 1.0)
    flair = float(np.clip(rng.normal(0.80 if low_grade else 1.0, 0.18), 0.45, 1.3))
    mismatch = float(rng.uniform(0.2, 0.6)) if low_grade and rng.random() < 0.4 else 0.0
    return Disease(grade, tuple(lesions), push, flair, mismatch)


def _triple(point: NDArray[np.float64]) -> tuple[float, float, float]:
    return (float(point[0]), float(point[1]), float(point[2]))


def displaced_coordinates(grid: Grid, disease: Disease) -> tuple[Array, Array, Array]:
    """Coordinates pulled towards the main lesion: anatomy drawn in them is pushed away from it."""
    main = disease.lesions[0]
    cx, cy, cz = main.centre
    dx, dy, dz = grid.x - cx, grid.y - cy, grid.z - cz
    distance = np.sqrt(dx**2 + dy**2 + dz**2)
    reach = np.square(distance / (2.2 * main.core_mm))
    pull = disease.push_mm * np.exp(-reach) / np.maximum(distance, 1.0)
    return grid.x - dx * pull, grid.y - dy * pull, grid.z - dz * pull


def grow_tumour(rng: np.random.Generator, grid: Grid, head: Head, disease: Disease) -> Tumour:
    """Draw the tumour's tissues into the head."""
    core, edema = _extent(rng, grid, head, disease)
    room = (head.tissue != AIR) & (head.depth_mm > 1.0)
    room &= ~((head.tissue == CSF) & (core > 0.8))
    callosum = (grid.y / 36) ** 2 + ((grid.z - 12) / 14) ** 2 + 0.25 * head.rough <= 1
    side = np.sign(disease.lesions[0].centre[0])
    beyond_falx = ~callosum & (head.midline_mm * side < -1.0)
    room = (room & ~beyond_falx) | ((core < 0.7) & (head.tissue != AIR))

    grain = smooth_field(rng, grid, 5.0)
    inside = (core < 1) & room
    around = (edema < 1) & room & (head.tissue != VESSEL)
    has_edema = True
    if disease.grade == "LGG":
        enhances = rng.random() >= 0.30
        enhancing = inside & (grain > 1.35) & (core < 0.85) & enhances
        necrosis = inside & (core < 0.25) & (rng.random() < 0.3)
        has_edema = bool(rng.random() < 0.85)
        if not has_edema:
            around &= inside
    else:
        enhances = rng.random() >= 0.015
        inner = 1 - float(rng.uniform(0.16, 0.50)) * (1 + 0.45 * grain)  # ring, nodules, septa
        enhancing = inside & (((core > inner) & (grain > -1.5)) | (grain > 1.6)) & enhances
        necrosis = inside & (smooth_field(rng, grid, 6.0) <= 0.9) & enhances
    tissue = head.tissue.copy()
    tissue[around] = EDEMA
    tissue[inside] = NON_ENHANCING
    tissue[necrosis] = NECROSIS
    tissue[enhancing] = ENHANCING
    return Tumour(tissue, core, edema, grain, room, has_edema)


def _extent(
    rng: np.random.Generator, grid: Grid, head: Head, disease: Disease
) -> tuple[Array, Array]:
    """Fields that are below 1 inside the core, and inside core plus oedema."""
    core = np.full(grid.box_shape, 9.0, np.float32)
    edema = np.full(grid.box_shape, 9.0, np.float32)
    white = ndimage.gaussian_filter(
        (head.tissue == WM).astype(np.float32), [1.6 / v for v in grid.voxel_mm]
    )
    for lesion in disease.lesions:
        axes, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        stretch = np.exp(rng.normal(0, 0.18, 3))
        stretch /= stretch.prod() ** (1 / 3)
        m = ((axes / stretch) @ axes.T).astype(np.float32)
        dx, dy, dz = (
            g - np.float32(c) for g, c in zip((grid.x, grid.y, grid.z), lesion.centre, strict=True)
        )
        distance = np.sqrt(sum((m[i, 0] * dx + m[i, 1] * dy + m[i, 2] * dz) ** 2 for i in range(3)))
        shape_noise = smooth_field(rng, grid, max(4.0, 0.55 * lesion.core_mm))
        edema_noise = smooth_field(rng, grid, max(5.0, 0.4 * lesion.edema_mm))
        this_core = distance / lesion.core_mm + 0.20 * shape_noise + 0.06 * head.rough
        this_edema = distance / lesion.edema_mm + 0.22 * edema_noise + 0.10 * head.rough
        this_edema += 0.60 * (0.85 - white)  # oedema spreads along white matter
        np.minimum(core, this_core, out=core)
        np.minimum(edema, np.minimum(this_edema, this_core), out=edema)
    return core, edema


def annotate(
    rng: np.random.Generator,
    grid: Grid,
    tumour: Tumour,
    disease: Disease,
    annotator_mm: float,
) -> NDArray[np.uint8]:
    """Labels over the box in BraTS's file coding {0, 1, 2, 4}.

    annotator_mm: how far this site's annotators draw outside (+) or inside (-) the true surface.
    """
    main = disease.lesions[0]
    hand = 0.7 * smooth_field(rng, grid, 3.0)
    outline = (1 - tumour.edema) * main.edema_mm + annotator_mm + hand
    core_outline = (1 - tumour.core) * main.core_mm + 0.6 * (annotator_mm + hand)
    diseased = np.isin(tumour.tissue, (EDEMA, NECROSIS, ENHANCING, NON_ENHANCING))
    reachable = ndimage.binary_dilation(diseased, iterations=2) & (tumour.tissue != VESSEL)
    whole = (outline > 0) & tumour.room & (diseased | reachable)
    if not tumour.has_edema:
        whole &= (tumour.core < 1) & tumour.room
    core = (core_outline > 0) & tumour.room & whole
    labels = np.zeros(grid.box_shape, np.uint8)
    labels[whole] = FILE_ED
    labels[core] = FILE_NCR
    labels[core & (tumour.tissue == ENHANCING)] = FILE_ET
    _drop_specks(labels, max(8, round(0.06 / grid.voxel_ml)))
    return labels


def _drop_specks(labels: NDArray[np.uint8], fewest: int) -> None:
    """Curated labels have no stray voxels; the largest piece stays whatever its size."""
    pieces, n = ndimage.label(labels > 0)
    if n > 1:
        sizes = np.bincount(pieces.ravel())
        small = sizes < fewest
        small[0] = False
        small[1 + int(sizes[1:].argmax())] = False
        labels[small[pieces]] = 0
