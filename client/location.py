"""Where in the brain a tumour lies: its side and lobes, by position only, so approximately.

No image is registered and no sulcus is looked at. The box around the subject's brain is scaled to the
box around the MNI152 brain, as Talairach and Tournoux did (1988): each axis in proportion, except that
z is scaled as x and y are and counted from the vertex, because scans end at varying levels of the
cerebellum and brainstem. Every voxel then takes the lobe of the nearest of 85 region centres
(`lobes.csv`; coordinates of AAL2, no atlas is shipped). White matter counts to the nearest lobe,
ventricles and corpus callosum to "deep".

Measured on the MNI152 brain, share of voxels with the atlas' own lobe (white matter: of its nearest
label): AAL2 90 % (partly the centres' own source), Neuromorphometrics 87 %, Desikan-Killiany 85 %;
between two of these atlases 90 to 92 %. Worst with Desikan-Killiany: insula 64 %, parietal 69 %, the
others 84 to 92 %. A box wrong by 5 mm at one end costs up to 3 points, 10 mm up to 6, 10 mm in the
same direction at both ends up to 8; a scan cut off up to 27 mm above the brain's lower end costs
nothing. Not known to this module: a tilted brain, one displaced by its tumour, one of which the front
or a side is missing. Real tumours (four of BraTS 2013) were compared by eye only.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

DEEP = "deep grey or white matter"
LOBES = ("frontal", "parietal", "temporal", "occipital", "insula", DEEP, "cerebellum")

_TABLE = Path(__file__).with_name("lobes.csv")
# Around the brain of MNI152, mm: right, anterior and superior are positive.
_MNI_X, _MNI_Y, _MNI_Z = (-71.5, 71.5), (-107.0, 73.5), (-71.5, 81.0)
_MIN_SLICE = 0.005  # of the largest slice; thinner ends are stray voxels, not brain
_MIDLINE_MM = 4.0  # MNI; closer to the midplane, the side is not known
_ONE_SIDE = 0.9  # of the voxels off the midline, from which on a tumour is on one side
_NAMED = 0.1  # of the tumour; lobes with less are not in the sentence


@dataclass(frozen=True)
class Location:
    """Shares are of the tumour's voxels: `left` + `right` is 1, and so is the sum of `lobes`.

    `side` is "left", "right" or "both sides" of the patient, or "midline"; `lobes` is sorted, largest
    share first, without lobes of share 0.
    """

    side: str
    left: float
    right: float
    lobes: dict[str, float]

    @property
    def text(self) -> str:
        """One sentence's worth, such as "left, mostly temporal (71 %) and insula (20 %);
        approximate, by position only"."""
        side = self.side
        if side in ("both sides", "midline"):
            side += f" (left {_percent(self.left)}, right {_percent(self.right)})"
        shares = list(self.lobes.items())
        named = [
            f"{lobe} ({_percent(share)})"
            for place, (lobe, share) in enumerate(shares)
            if place == 0 or share >= _NAMED
        ]
        listed = " and ".join(filter(None, (", ".join(named[:-1]), named[-1])))
        mostly = "mostly " if shares[0][1] >= 0.5 and len(shares) > 1 else ""
        return f"{side}, {mostly}{listed}; approximate, by position only"


def describe(
    mask: np.ndarray, brain: np.ndarray, spacing: tuple[float, float, float]
) -> Location | None:
    """Locate the voxels of `mask`; None if there are none.

    Args:
        mask: boolean (X, Y, Z) in RAS: x grows to the patient's right, y forwards, z upwards.
        brain: where the subject's skull-stripped brain is, of the same shape, tumour included.
        spacing: mm along x, y and z.

    Raises:
        ValueError: the shapes differ, or there is no brain.
    """
    if mask.shape != brain.shape:
        raise ValueError(f"a mask of {mask.shape} voxels for a brain of {brain.shape}")
    voxels = np.argwhere(mask)
    if not len(voxels):
        return None
    points = in_mni(voxels, brain, spacing)
    x = points[:, 0]
    right = float((x > 0).mean() + 0.5 * (x == 0).mean())
    off = np.abs(x) > _MIDLINE_MM
    if 2 * np.count_nonzero(off) <= len(x):
        side = "midline"
    else:
        right_off = float((x[off] > 0).mean())
        side = "both sides"
        if right_off >= _ONE_SIDE:
            side = "right"
        elif right_off <= 1 - _ONE_SIDE:
            side = "left"
    counts = np.bincount(lobe_of(points), minlength=len(LOBES))
    shares = {lobe: float(n / len(x)) for lobe, n in zip(LOBES, counts, strict=True) if n}
    return Location(side, 1 - right, right, dict(sorted(shares.items(), key=lambda s: -s[1])))


def in_mni(
    voxels: np.ndarray, brain: np.ndarray, spacing: tuple[float, float, float]
) -> np.ndarray:
    """Approximate MNI mm (n, 3) of the centres of `voxels` (n, 3 indices in RAS); see the module."""
    (x0, x1), (y0, y1), (z0, z1) = (
        (low * edge, high * edge) for (low, high), edge in zip(_extent(brain), spacing, strict=True)
    )
    scale_x = (_MNI_X[1] - _MNI_X[0]) / (x1 - x0)
    scale_y = (_MNI_Y[1] - _MNI_Y[0]) / (y1 - y0)
    # a brain is never taller than the whole one
    scale_z = min(float(np.sqrt(scale_x * scale_y)), (_MNI_Z[1] - _MNI_Z[0]) / (z1 - z0))
    mm = (voxels + 0.5) * np.asarray(spacing)
    return np.column_stack(
        (
            _MNI_X[0] + (mm[:, 0] - x0) * scale_x,
            _MNI_Y[0] + (mm[:, 1] - y0) * scale_y,
            _MNI_Z[1] + (mm[:, 2] - z1) * scale_z,
        )
    )


def lobe_of(points: np.ndarray) -> np.ndarray:
    """The index into LOBES of each point (n, 3) in MNI mm."""
    with _TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    centres = np.array([[float(row[axis]) for axis in "xyz"] for row in rows])
    lobes = [DEEP if row["lobe"] == "deep" else row["lobe"] for row in rows]
    mirrored = np.abs(points * (1, 0, 0)) + points * (0, 1, 1)
    nearest = cKDTree(centres).query(mirrored)[1]
    return np.array([LOBES.index(lobe) for lobe in lobes])[nearest]


def _extent(brain: np.ndarray) -> list[tuple[int, int]]:
    """First and one beyond the last index of the brain along each axis, stray voxels aside."""
    found = []
    for axis in range(3):
        area = np.count_nonzero(brain, axis=tuple(a for a in range(3) if a != axis))
        inside = np.flatnonzero(area > _MIN_SLICE * area.max())
        if not len(inside):
            raise ValueError("there is no brain")
        found.append((int(inside[0]), int(inside[-1]) + 1))
    return found


def _percent(share: float) -> str:
    return f"{round(100 * share)} %"
