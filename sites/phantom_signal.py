"""From tissues to intensities: what one scanner makes of a phantom subject.

A level per tissue and modality (measured on a real case in BraTS format), the subject's own
deviation from it, the infiltration gradient in oedema, then the scanner: partial volume (in-plane
and slice-thickness blur), bias field, gamma, Rician noise (Gudbjartsson and Patz 1995), gain.
No geometry (`sites.phantom_anatomy`, `sites.phantom_tumour`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sites.phantom_anatomy import (
    AIR,
    CSF,
    DEEP_GM,
    EDEMA,
    ENHANCING,
    GM,
    NECROSIS,
    NON_ENHANCING,
    VESSEL,
    WM,
    Array,
    Grid,
    smooth_field,
)
from sites.phantom_tumour import Disease, Tumour

SCANNED = ("flair", "t1", "t1ce", "t2")
"""Order of the rows of the level table and of a scanner's per-modality settings."""
_FLAIR, _T1, _T1CE, _T2 = range(4)

# Relative to grey matter (FLAIR, T2) or white matter (T1, T1ce); columns are the tissue codes
# AIR, CSF, GM, WM, DEEP_GM, VESSEL, EDEMA, NECROSIS, ENHANCING, NON_ENHANCING, WMH.
_LEVELS = np.array(
    [
        [0.0, 0.45, 1.00, 0.82, 0.95, 0.70, 1.65, 1.35, 1.50, 1.55, 1.55],
        [0.0, 0.36, 0.72, 1.00, 0.83, 0.55, 0.76, 0.50, 0.62, 0.62, 0.86],
        [0.0, 0.42, 0.80, 1.00, 0.88, 1.55, 0.80, 0.52, 1.62, 0.72, 0.88],
        [0.0, 2.35, 1.00, 0.78, 0.90, 0.60, 1.70, 2.20, 1.65, 1.95, 1.35],
    ],
    np.float32,
)


@dataclass(frozen=True)
class Scanner:
    """One site's scanner and protocol; the defaults are the reference every site deviates from.

    gain: stored value of the reference tissue per modality. gamma: exponent of the intensity
    scale. grey_white: T1 grey-white contrast, 1 as MPRAGE, 0.4 as spin echo. uptake: brightness
    of enhancement on T1ce. flair_csf: level of fluid on FLAIR, 0.45 well suppressed, 0.85 poorly.
    flair_lesion: contrast of lesions on FLAIR. noise: Rician sigma relative to the reference
    tissue. bias: log amplitude of the bias field. blur_mm: in-plane. slice_mm: through-plane,
    per modality. Per-modality settings follow SCANNED.
    """

    gain: tuple[float, float, float, float] = (300.0, 500.0, 600.0, 400.0)
    gamma: float = 1.0
    grey_white: float = 1.0
    uptake: float = 1.0
    flair_csf: float = 0.45
    flair_lesion: float = 1.0
    noise: float = 0.03
    bias: float = 0.08
    blur_mm: float = 0.55
    slice_mm: tuple[float, float, float, float] = (1.2, 0.5, 0.5, 1.2)


def scan(
    rng: np.random.Generator,
    grid: Grid,
    tumour: Tumour,
    disease: Disease,
    rough: Array,
    scanner: Scanner,
) -> dict[str, NDArray[np.int16]]:
    """One image per modality over the grid's box, int16, exactly 0 outside the brain."""
    levels = _subject_levels(rng, disease, scanner)
    brain = tumour.tissue != AIR
    edema = tumour.tissue == EDEMA
    solid = np.isin(tumour.tissue, (NECROSIS, ENHANCING, NON_ENHANCING))
    # oedema fades into white matter from the core outwards, unevenly
    fade = np.clip(1.15 - 0.55 * np.clip(tumour.edema, 0, 1) + 0.16 * tumour.grain, 0.45, 1.1)
    texture = 0.030 * smooth_field(rng, grid, 2.2) + 0.02 * rough
    images = {}
    for row, modality in enumerate(SCANNED):
        signal = levels[row][tumour.tissue]
        white = levels[row, WM]
        signal[edema] = white + (levels[row, EDEMA] - white) * fade[edema]
        signal[solid] *= 1 + 0.12 * tumour.grain[solid]
        signal *= 1 + texture
        images[modality] = _acquire(rng, grid, signal, brain, scanner, row)
    return images


def _subject_levels(rng: np.random.Generator, disease: Disease, scanner: Scanner) -> Array:
    """The level table for this subject on this scanner."""
    levels = _LEVELS * np.exp(rng.normal(0, 0.035, _LEVELS.shape)).astype(np.float32)
    for row, tissue in ((_T1, GM), (_T1CE, GM), (_T1, DEEP_GM)):
        levels[row, tissue] = 1 - (1 - levels[row, tissue]) * scanner.grey_white
    levels[_FLAIR, CSF] = scanner.flair_csf
    levels[_FLAIR, GM] *= float(np.exp(rng.normal(0.06, 0.06)))  # cortex is often near lesions
    lesion = [EDEMA, ENHANCING, NON_ENHANCING]
    white = levels[_FLAIR, WM]
    levels[_FLAIR, lesion] = white + (levels[_FLAIR, lesion] - white) * (
        disease.flair * scanner.flair_lesion
    )
    levels[_FLAIR, NON_ENHANCING] *= 1 - disease.mismatch
    levels[_FLAIR, NECROSIS] = scanner.flair_csf + rng.uniform(0.1, 1.2)  # fluid .. proteinaceous
    uptake = scanner.uptake * rng.uniform(0.6, 1.15)
    levels[_T1CE, ENHANCING] = 1 + (levels[_T1CE, ENHANCING] - 1) * uptake
    levels[_T1CE, VESSEL] = 1 + (levels[_T1CE, VESSEL] - 1) * scanner.uptake
    return levels


def _acquire(
    rng: np.random.Generator,
    grid: Grid,
    signal: Array,
    brain: NDArray[np.bool_],
    scanner: Scanner,
    row: int,
) -> NDArray[np.int16]:
    """Partial volume, bias field, gamma, noise, gain. Half of the noise is added before the blur:
    BraTS images are resampled, so their noise is correlated."""
    signal += 0.7 * scanner.noise * rng.standard_normal(signal.shape, dtype=np.float32)
    vx, vy, vz = grid.voxel_mm
    blur = (scanner.blur_mm / vx, scanner.blur_mm / vy, scanner.slice_mm[row] / vz)
    signal = ndimage.gaussian_filter(signal, blur, truncate=3.0)
    signal *= _bias_field(rng, grid, scanner.bias)
    inside = np.power(np.maximum(signal[brain], 0), np.float32(scanner.gamma))
    noise = 0.6 * scanner.noise * rng.standard_normal((2, inside.size), dtype=np.float32)
    inside = np.sqrt((inside + noise[0]) ** 2 + noise[1] ** 2)
    gain = scanner.gain[row] * float(np.exp(rng.normal(0, 0.12)))
    image = np.zeros(grid.box_shape, np.int16)
    image[brain] = np.clip(np.rint(inside * gain), 1, 32000)  # 0 means "not brain" in BraTS
    return image


def _bias_field(rng: np.random.Generator, grid: Grid, amplitude: float) -> Array:
    """Smooth multiplicative shading: exponential of a random quadratic over the head, and of
    blotches about 25 mm wide, which no polynomial removes."""
    x, y, z = (
        np.linspace(-1, 1, n, dtype=np.float32).reshape([-1 if k == axis else 1 for k in range(3)])
        for axis, n in enumerate(grid.box_shape)
    )
    k = rng.normal(0, 0.45 * amplitude, 8).astype(np.float32)
    log = k[0] * x + k[1] * y + k[2] * z + k[3] * x * y + k[4] * y * z
    log = log + k[5] * x**2 + k[6] * y**2 + k[7] * z**2
    log = log + smooth_field(rng, grid, 25) * np.float32(0.5 * amplitude)
    return np.exp(log - log.mean())
