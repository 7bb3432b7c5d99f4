"""The healthy head of a phantom subject: a grid in millimetres and a map of tissues.

Implicit surfaces (cerebrum, cerebellum, brain stem), sulci and gyri from a smooth random field,
ventricles, deep grey matter, vessels and white-matter hyperintensities. All lengths are mm in
BraTS's 240x240x155 space; any other grid shows the same head at another resolution. No tumour
(`sites.phantom_tumour`) and no intensities (`sites.phantom_signal`). It looks like a brain to a
network, not to an anatomist: smooth sulci, a ball of a cerebellum, no corpus callosum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

CANONICAL_SHAPE = (240, 240, 155)
"""BraTS's grid, 1 mm; lengths everywhere in the phantom are mm of this space."""

AIR, CSF, GM, WM, DEEP_GM, VESSEL, EDEMA, NECROSIS, ENHANCING, NON_ENHANCING, WMH = range(11)
"""Tissue codes. Necrosis and non-enhancing tumour share BraTS label 1 but not their signal."""

_HEAD_MM = ((46.0, 194.0), (29.0, 209.0), (4.0, 146.0))  # nothing is drawn outside this box
_ORIGIN_MM = (120.0, 119.0, 76.0)

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Grid:
    """Voxel grid of a subject and, inside it, the box that holds the head.

    x, y, z are mm from the middle of the head, broadcastable over the box: x > 0 is left,
    y > 0 posterior, z > 0 superior (BraTS's LPS axes).
    """

    shape: Shape
    voxel_mm: tuple[float, float, float]
    box: tuple[slice, slice, slice]
    x: Array
    y: Array
    z: Array

    @property
    def box_shape(self) -> Shape:
        return (self.x.shape[0], self.y.shape[1], self.z.shape[2])

    @property
    def voxel_ml(self) -> float:
        return float(np.prod(self.voxel_mm)) / 1000


@dataclass(frozen=True)
class Patient:
    """What differs between heads: age in years (atrophy, hyperintensities), size per axis."""

    age: float
    head_scale: tuple[float, float, float]


@dataclass(frozen=True)
class Head:
    """Healthy anatomy over the grid's box.

    tissue: codes above, AIR outside the brain. depth_mm: distance below the brain's surface,
    positive inside. midline_mm: signed distance from the possibly shifted midline. rough: a
    smooth unit-variance field (9 mm) that later stages reuse to make surfaces irregular.
    """

    tissue: NDArray[np.uint8]
    depth_mm: Array
    midline_mm: Array
    rough: Array


def make_grid(shape: Shape) -> Grid:
    """The grid of `shape` voxels that covers BraTS's field of view."""
    voxel = tuple(full / n for full, n in zip(CANONICAL_SHAPE, shape, strict=True))
    box, axes = [], []
    for (low, high), n, size, origin in zip(_HEAD_MM, shape, voxel, _ORIGIN_MM, strict=True):
        start, stop = max(0, int(low / size)), min(n, int(np.ceil(high / size)))
        box.append(slice(start, stop))
        axes.append((np.arange(start, stop, dtype=np.float32) + 0.5) * np.float32(size) - origin)
    x, y, z = np.meshgrid(*(a.astype(np.float32) for a in axes), indexing="ij", sparse=True)
    return Grid(shape, (voxel[0], voxel[1], voxel[2]), (box[0], box[1], box[2]), x, y, z)


def smooth_field(rng: np.random.Generator, grid: Grid, scale_mm: float, flat: float = 1.0) -> Array:
    """Smooth Gaussian random field over the box, zero mean, unit variance.

    scale_mm is the Gaussian's sigma; `flat` stretches it along z. Computed on a grid coarser
    than the feature and interpolated, which is what keeps a full-size subject within seconds.
    """
    sigma = [scale_mm * k / v for k, v in zip((1.0, 1.0, flat), grid.voxel_mm, strict=True)]
    coarse = [
        max(2, int(np.ceil(n / max(1.0, s / 2))) + 1)
        for n, s in zip(grid.box_shape, sigma, strict=True)
    ]
    blur = [s * c / n for s, c, n in zip(sigma, coarse, grid.box_shape, strict=True)]
    field = ndimage.gaussian_filter(rng.standard_normal(coarse, dtype=np.float32), blur)
    field -= field.mean()
    field /= field.std() + 1e-9
    return _interpolate(field, grid.box_shape)


def _interpolate(field: Array, shape: Shape) -> Array:
    """Trilinear, corner to corner; separable, so several times faster than ndimage.zoom."""
    for axis, n in enumerate(shape):
        last = field.shape[axis] - 1
        at = np.linspace(0, last, n)
        below = np.minimum(at.astype(np.intp), last - 1)
        weight = (at - below).astype(np.float32).reshape([-1 if k == axis else 1 for k in range(3)])
        low = np.take(field, below, axis)
        field = low + (np.take(field, below + 1, axis) - low) * weight
    return np.ascontiguousarray(field, np.float32)


def ellipsoid(
    x: Array,
    y: Array,
    z: Array,
    centre: tuple[float, float, float],
    radii: tuple[float, float, float],
) -> Array:
    """Distance from the centre in radii: below 1 inside."""
    return np.sqrt(
        ((x - centre[0]) / radii[0]) ** 2
        + ((y - centre[1]) / radii[1]) ** 2
        + ((z - centre[2]) / radii[2]) ** 2
    )


def draw_patient(rng: np.random.Generator, grade: str) -> Patient:
    """Low-grade patients are younger: 43 against 60 years, as in BraTS's survival table."""
    age = float(np.clip(rng.normal(60 if grade == "HGG" else 43, 13), 18, 90))
    sx, sy, sz = (float(s) for s in rng.normal(1, 0.035, 3))
    return Patient(age, (sx, sy, sz))


def build_head(
    rng: np.random.Generator,
    grid: Grid,
    patient: Patient,
    displaced: tuple[Array, Array, Array],
    strip_mm: float,
) -> Head:
    """Tissues of one head.

    `displaced` are the grid's coordinates pulled towards a mass, so that structures drawn in
    them move away from it; the skull side of the brain is drawn in the grid's own coordinates
    and stays. strip_mm > 0 leaves a rim outside the brain, < 0 strips into it.
    """
    low = smooth_field(rng, grid, 22)
    rough = smooth_field(rng, grid, 9)
    fold = smooth_field(rng, grid, 4.3, flat=1.15)
    x, y, z = displaced

    cortex_mm = _cerebrum(grid, patient, low, rough)
    cerebellum_mm = (1 - ellipsoid(grid.x, grid.y, grid.z, (0, 50, -43), (49, 31, 25))) * 27
    cerebellum_mm += 0.8 * rough
    stem_mm = (1 - ellipsoid(grid.x, grid.y, grid.z, (0, 19, -46), (14, 14, 40))) * 14
    depth_mm = np.maximum(np.maximum(cortex_mm, cerebellum_mm), stem_mm)

    # interhemispheric fissure: everywhere but where the hemispheres are joined
    parted = (
        (grid.z > 30) | (grid.y < -38) | (grid.y > 34) | ((grid.z > 16) & (np.abs(grid.y) > 22))
    )
    fissure_mm = np.abs(x + 1.2 * low) - 0.9 - 0.02 * (patient.age - 40)
    atrophy = float(np.clip((patient.age - 35) / 45, 0, 1.2)) * rng.uniform(0.6, 1.3)

    tissue = np.full(grid.box_shape, WM, np.uint8)
    sulcus = (0.13 + 0.13 * atrophy) * np.clip(1 - cortex_mm / 15, 0, 1)
    ridge = np.abs(fold)
    gyri = (cortex_mm < 3.2 + 0.7 * rough) | (
        ridge < sulcus + 0.50 * np.clip(1.35 - cortex_mm / 19, 0, 1)
    )
    tissue[gyri | (parted & (fissure_mm < 3.4) & (cortex_mm > 0))] = GM
    tissue[(ridge < sulcus) & (cortex_mm < 16)] = CSF
    tissue[parted & (fissure_mm < 0)] = CSF
    tissue[cortex_mm < 0.7] = CSF
    _add_hindbrain(tissue, grid, fold, cortex_mm, cerebellum_mm, stem_mm)
    ventricle, plexus = _add_deep_structures(rng, tissue, grid, (x, y, z), rough, atrophy)

    vessel = (np.abs(smooth_field(rng, grid, 6.0)) < 0.035) & (np.abs(rough) < 0.30)
    vessel &= ((tissue == CSF) | (cortex_mm < 9)) & (depth_mm > 0)
    vessel |= parted & (np.abs(x) < 1.8) & (cortex_mm < 3.5) & (cortex_mm > 0) & (grid.z > 0)
    tissue[vessel | ((ventricle < 0.9) & plexus)] = VESSEL  # bright on T1ce, never tumour

    _add_hyperintensities(rng, tissue, grid, patient.age, ventricle, cortex_mm)
    tissue[depth_mm + strip_mm <= 0] = AIR
    return Head(tissue, depth_mm, np.broadcast_to(x, grid.box_shape), rough)


def _cerebrum(grid: Grid, patient: Patient, low: Array, rough: Array) -> Array:
    """Depth below the surface of the cerebrum in mm: a superellipsoid cut by the skull base."""
    x, y, z = grid.x, grid.y, grid.z
    wide, long, tall = patient.head_scale
    half_width = 65.0 * wide * (1 + 0.10 * y / 84)
    half_height = np.where(z > 0, 63.0 * tall, 48.0 * tall).astype(np.float32)
    p = 2.25
    radius = (
        np.abs(x / half_width) ** p + np.abs(y / (84 * long)) ** p + np.abs(z / half_height) ** p
    ) ** (1 / p)
    depth = (1 - radius) * 66 + 1.6 * low
    orbital = np.minimum(z + 26 + 0.25 * np.minimum(y + 10, 0) + 2.0 * rough, 30)
    temporal = np.minimum(np.abs(x) - 16, 12) + 0 * z
    front_base = (z < -18) & (y < 14)
    depth = np.where(front_base, np.minimum(depth, np.maximum(orbital, temporal)), depth)
    tentorium = np.maximum(z + 30 - 0.35 * np.maximum(y - 30, 0), 14 - np.maximum(y - 16, 0))
    return np.minimum(depth, tentorium).astype(np.float32, copy=False)


def _add_hindbrain(
    tissue: NDArray[np.uint8],
    grid: Grid,
    fold: Array,
    cortex_mm: Array,
    cerebellum_mm: Array,
    stem_mm: Array,
) -> None:
    inside = (cerebellum_mm > 0) & (cerebellum_mm >= cortex_mm)
    folia = np.sin(1.15 * grid.z + 0.25 * grid.y + 2.2 * fold)[inside]
    tissue[inside] = np.where(folia > 0.15 - 0.05 * cerebellum_mm[inside], GM, WM)
    tissue[inside & (cerebellum_mm < 1.2)] = CSF
    tissue[(stem_mm > 0) & (stem_mm > cerebellum_mm - 6) & (cortex_mm < 2)] = WM


def _add_deep_structures(
    rng: np.random.Generator,
    tissue: NDArray[np.uint8],
    grid: Grid,
    displaced: tuple[Array, Array, Array],
    rough: Array,
    atrophy: float,
) -> tuple[Array, Mask]:
    """Ventricles and deep grey matter. -> (ventricle field, below 1 inside; choroid plexus)."""
    size = float(np.exp(rng.normal(0, 0.12))) * (0.75 + 0.45 * atrophy)
    core = tuple(  # all of it lies in the middle of the head: leave the rest alone
        slice(*np.searchsorted(axis.ravel(), (low, high)))
        for axis, low, high in ((grid.x, -48, 48), (grid.y, -66, 68), (grid.z, -52, 36))
    )
    x, y, z = (np.broadcast_to(a, grid.box_shape)[core] for a in displaced)
    side = np.abs(x)
    ventricle = np.full(grid.box_shape, 9, np.float32)
    ventricle[core] = np.minimum.reduce(
        [
            ellipsoid(side, y, z, (9, -14, 12), (5.2 * size, 25, 6.5 * size)),  # frontal horn
            ellipsoid(side, y, z, (16, 22, 10), (6.5 * size, 20, 7.0 * size)),  # atrium
            ellipsoid(side, y, z, (23, 42, 4), (4.0 * size, 17, 5.0 * size)),  # occipital horn
            ellipsoid(side, y, z, (28, 12, -14), (3.6 * size, 22, 4.2 * size)),  # temporal horn
            ellipsoid(side, y, z, (0, 0, -4), (1.9 * size, 13, 9)),  # third
            ellipsoid(side, y, z, (0, 34, -36), (7 * size, 5, 8)),  # fourth
        ]
    ) - (0.07 * rough[core])
    thalamus = ((11.0, 2.0, -2.0), (8.0, 15.0, 9.0))
    putamen = ((27.0, -8.0, -1.0), (7.0, 17.0, 10.0))
    caudate = ((15.0, -22.0, 8.0), (5.0, 12.0, 9.0))
    for centre, radii in (thalamus, putamen, caudate):
        nucleus = ellipsoid(side, y, z, centre, radii) + 0.06 * rough[core] < 1
        tissue[core][nucleus & (ventricle[core] > 1)] = DEEP_GM
    plexus = np.zeros(grid.box_shape, bool)
    plexus[core] = ellipsoid(side, y, z, (17, 25, 8), (3, 7, 4)) < 1
    tissue[ventricle < 1] = CSF
    return ventricle, plexus


def _add_hyperintensities(
    rng: np.random.Generator,
    tissue: NDArray[np.uint8],
    grid: Grid,
    age: float,
    ventricle: Array,
    cortex_mm: Array,
) -> None:
    """Age-related white-matter hyperintensities: bright on FLAIR and T2 like oedema, unlabelled."""
    load = float(rng.gamma(1.5, 0.5)) * max(0.0, age - 45) / 35
    white = tissue == WM
    tissue[white & (ventricle > 1) & (ventricle < 1.0 + 0.28 * load)] = WMH  # periventricular caps
    spots = smooth_field(rng, grid, 3.0) > 3.4 - 0.55 * load
    tissue[white & spots & (cortex_mm > 10)] = WMH
