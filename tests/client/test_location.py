"""Side and lobe of a tumour: textbook places give the names a textbook gives them."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from client.location import DEEP, LOBES, describe, in_mni, lobe_of

REAL = Path(__file__).parents[3] / "shared" / "data" / "real_cases" / "two_modalities"

# MNI mm of structures as papers and textbooks report them; negative x is the patient's left.
TEXTBOOK = [
    ("Broca's area", (-48, 20, 16), "left", "frontal"),
    ("hand knob of the precentral gyrus", (36, -20, 60), "right", "frontal"),
    ("frontal pole", (-24, 60, 6), "left", "frontal"),
    ("supplementary motor area", (-8, 0, 62), "left", "frontal"),
    ("angular gyrus", (-46, -64, 36), "left", "parietal"),
    ("superior parietal lobule", (26, -60, 60), "right", "parietal"),
    ("somatosensory cortex", (48, -26, 52), "right", "parietal"),
    ("Heschl's gyrus", (46, -18, 6), "right", "temporal"),
    ("amygdala", (-22, -4, -20), "left", "temporal"),
    ("temporal pole", (42, 12, -32), "right", "temporal"),
    ("primary visual cortex", (8, -84, 2), "right", "occipital"),
    ("lateral occipital cortex", (-38, -82, 0), "left", "occipital"),
    ("insula", (38, 4, 0), "right", "insula"),
    ("putamen", (-26, 4, 0), "left", DEEP),
    ("thalamus", (12, -18, 8), "right", DEEP),
    ("cerebellar hemisphere", (-26, -64, -38), "left", "cerebellum"),
]
GRIDS = [  # spacing (mm), head's lower corner (MNI mm), voxels; the last is cut off at z = -45
    ((1.0, 1.0, 1.0), (-100, -130, -85), (200, 230, 180)),
    ((2.0, 1.5, 3.0), (-73, -110, -72), (73, 124, 52)),
    ((1.0, 1.0, 2.0), (-90, -140, -45), (180, 240, 70)),
]


def head(grid) -> tuple[np.ndarray, list[np.ndarray]]:
    """An ellipsoid as large as the MNI brain, and the MNI mm of the grid's voxels along each axis."""
    spacing, corner, shape = grid
    axes = [c + s * (np.arange(n) + 0.5) for c, s, n in zip(corner, spacing, shape, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    return (x / 71.5) ** 2 + ((y + 16.75) / 90.25) ** 2 + ((z - 4.75) / 76.25) ** 2 < 1, axes


def ball(axes: list[np.ndarray], centre: tuple[float, ...], radius: float) -> np.ndarray:
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    a, b, c = centre
    return (x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 <= radius**2


@pytest.mark.parametrize("grid", GRIDS, ids=["1 mm", "coarse and cropped", "cut off below"])
def test_textbook_places_get_their_textbook_names(grid):
    brain, axes = head(grid)
    for name, centre, side, lobe in TEXTBOOK:
        found = describe(ball(axes, centre, 4), brain, grid[0])
        assert found is not None
        assert (found.side, next(iter(found.lobes))) == (side, lobe), name
        assert found.lobes[lobe] >= 0.5, name
        assert found.text.startswith(side)


def test_a_larger_brain_is_scaled_to_the_atlas():
    brain, axes = head(GRIDS[1])
    larger = (2.0 * 1.15, 1.5 * 1.1, 3.0 * 1.12)
    for name, centre, side, lobe in TEXTBOOK:
        found = describe(ball(axes, centre, 4), brain, larger)
        assert found is not None
        assert (found.side, next(iter(found.lobes))) == (side, lobe), name


def test_stray_voxels_outside_the_brain_change_nothing():
    brain, axes = head(GRIDS[0])
    mask = ball(axes, (-48, 20, 16), 8)
    before = describe(mask, brain, GRIDS[0][0])
    brain[0, 5, 3] = brain[-1, -1, -1] = True
    assert describe(mask, brain, GRIDS[0][0]) == before


def test_mirroring_the_head_swaps_left_and_right_and_nothing_else():
    brain, axes = head(GRIDS[0])
    mask = ball(axes, (-48, 20, 16), 12)
    here, there = (describe(m, b, (1, 1, 1)) for m, b in ((mask, brain), (mask[::-1], brain[::-1])))
    assert here is not None
    assert there is not None
    assert (here.side, there.side) == ("left", "right")
    assert here.left == pytest.approx(there.right)
    assert here.lobes == pytest.approx(there.lobes, abs=0.02)


def test_a_tumour_across_the_midline_has_a_share_on_each_side():
    brain, axes = head(GRIDS[0])
    butterfly = ball(axes, (-16, 28, 10), 14) | ball(axes, (20, 28, 10), 10)
    found = describe(butterfly, brain, (1, 1, 1))
    assert found is not None
    assert found.side == "both sides"
    x = axes[0][np.argwhere(butterfly)[:, 0]]
    assert found.left == pytest.approx((x < 0).mean(), abs=0.01)
    assert found.left + found.right == pytest.approx(1)
    assert f"left {round(100 * found.left)} %" in found.text
    pons = describe(ball(axes, (0, -28, -32), 5), brain, (1, 1, 1))
    assert pons is not None
    assert pons.side == "midline"
    assert next(iter(pons.lobes)) == DEEP


def test_shares_are_of_the_voxels_sorted_and_said_in_one_sentence():
    brain, axes = head(GRIDS[0])
    mask = ball(axes, (-46, -8, -4), 16)
    found = describe(mask, brain, (1, 1, 1))
    assert found is not None
    points = in_mni(np.argwhere(mask), brain, (1, 1, 1))
    names = [LOBES[i] for i in lobe_of(points)]
    assert found.lobes == {n: pytest.approx(names.count(n) / len(names)) for n in set(names)}
    shares = list(found.lobes.values())
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    first, second = list(found.lobes)[:2]
    expected = f"left, mostly {first} ({round(100 * shares[0])} %)"
    assert found.text.startswith(expected)
    assert f"{second} ({round(100 * shares[1])} %)" in found.text
    assert found.text.endswith("; approximate, by position only")


def test_no_tumour_has_no_location_and_no_brain_is_refused():
    brain, _ = head(GRIDS[1])
    nothing = np.zeros_like(brain)
    assert describe(nothing, brain, GRIDS[1][0]) is None
    with pytest.raises(ValueError, match="no brain"):
        describe(brain, nothing, GRIDS[1][0])
    with pytest.raises(ValueError, match="voxels for a brain of"):
        describe(brain[1:], brain, GRIDS[1][0])


@pytest.mark.skipif(not REAL.is_dir(), reason="the real cases are not on this machine")
@pytest.mark.parametrize(
    ("number", "side", "lobe"),  # read off the slices by eye
    [(911, "right", "temporal"), (912, "left", "parietal"), (914, "left", "frontal")],
)
def test_real_tumours_are_where_an_eye_sees_them(number, side, lobe):
    name = f"BraTS20_Training_{number}"
    image, labels = (
        nibabel.as_closest_canonical(nibabel.load(REAL / name / f"{name}_{role}.nii.gz"))
        for role in ("flair", "seg")
    )
    brain, mask = (np.asarray(i.dataobj)[::2, ::2, ::2] > 0 for i in (image, labels))
    found = describe(mask, brain, (2.0, 2.0, 2.0))
    assert found is not None
    assert (found.side, next(iter(found.lobes))) == (side, lobe)
