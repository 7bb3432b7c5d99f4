"""Lesion-wise scores: cases made by hand, and against sets of voxels with loops, as the published
evaluation goes about it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from common.lesions import PENALTY_MM, lesion_scores
from common.metrics import hd95

MM = (1.0, 1.0, 1.0)


def empty(shape: tuple[int, int, int] = (40, 20, 20)) -> np.ndarray:
    return np.zeros(shape, bool)


def boxed(*boxes: tuple[int, int, int, int, int, int], shape=(40, 20, 20)) -> np.ndarray:
    mask = empty(shape)
    for x0, x1, y0, y1, z0, z1 in boxes:
        mask[x0:x1, y0:y1, z0:z1] = True
    return mask


A, B = (2, 6, 2, 6, 2, 6), (26, 30, 2, 6, 2, 6)  # two lesions of 64 mm^3, far apart


def test_a_missed_lesion_counts_as_much_as_a_found_one():
    found = lesion_scores(boxed(A), boxed(A, B), MM)
    assert (found.dice, found.hd95) == (0.5, PENALTY_MM / 2)
    assert (found.found, found.missed, found.false, found.uncounted) == (1, 1, 0, 0)


def test_a_false_lesion_counts_however_small_it_is():
    speck = (30, 31, 15, 16, 15, 16)
    found = lesion_scores(boxed(A, speck), boxed(A), MM)
    assert (found.dice, found.hd95) == (0.5, PENALTY_MM / 2)
    assert (found.found, found.false) == (1, 1)


def test_nothing_to_find_and_nothing_found_is_perfect():
    both = lesion_scores(empty(), empty(), MM)
    assert (both.dice, both.hd95) == (1, 0)
    perfect = lesion_scores(boxed(A, B), boxed(A, B), MM)
    assert (perfect.dice, perfect.hd95, perfect.found) == (1, 0, 2)


def test_one_empty_mask_is_as_bad_as_can_be():
    for found in (
        lesion_scores(empty(), boxed(A), MM),
        lesion_scores(boxed(A), empty(), MM),
    ):
        assert (found.dice, found.hd95) == (0, 374)


@pytest.mark.parametrize(("gap", "lesions"), [(6, 1), (7, 2)])
def test_true_parts_whose_dilations_touch_are_one_lesion(gap, lesions):
    """Three iterations on either side close a gap of six voxels."""
    second = (6 + gap, 10 + gap, 2, 6, 2, 6)
    found = lesion_scores(empty(), boxed(A, second), MM)
    assert found.missed == lesions


def test_lesions_of_50_cubic_millimetres_do_not_count_and_excuse_what_touches_them():
    small, larger = boxed((2, 7, 2, 7, 2, 4)), boxed((2, 7, 2, 7, 2, 4))
    larger[2, 2, 4] = True
    assert (small.sum(), larger.sum()) == (50, 51)
    ignored = lesion_scores(empty(), small, MM)
    assert (ignored.dice, ignored.hd95, ignored.missed, ignored.uncounted) == (1, 0, 0, 1)
    assert lesion_scores(empty(), larger, MM).missed == 1
    beside = boxed((9, 12, 2, 6, 2, 6))  # three voxels off: touches the dilation
    assert lesion_scores(beside, small, MM).false == 0
    beyond = boxed((10, 12, 2, 6, 2, 6))
    assert lesion_scores(beyond, small, MM).false == 1
    coarse = boxed((2, 9, 2, 3, 2, 3))  # 7 voxels of 8 mm^3
    assert lesion_scores(empty(), coarse, (2, 2, 2)).missed == 1


def test_a_component_over_two_lesions_counts_whole_in_each():
    bridge = boxed((2, 30, 2, 6, 2, 6))
    found = lesion_scores(bridge, boxed(A, B), MM)
    assert found.dice == pytest.approx(2 * 64 / (64 + bridge.sum()))
    assert (found.found, found.false) == (2, 0)


def test_components_that_meet_at_a_corner_are_one():
    diagonal = boxed((20, 22, 10, 12, 10, 12), (22, 24, 12, 14, 12, 14))
    assert lesion_scores(diagonal, boxed(A), MM).false == 1


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        lesion_scores(empty(), empty((3, 3, 3)), MM)


# ------------------------------------------------------------------------ an independent computation

Voxel = tuple[int, int, int]
STEPS = [step for step in itertools.product((-1, 0, 1), repeat=3) if any(step)]


def around(voxel: Voxel, most: int) -> list[Voxel]:
    """Neighbours that differ along at most `most` axes."""
    return [
        (voxel[0] + x, voxel[1] + y, voxel[2] + z)
        for x, y, z in STEPS
        if abs(x) + abs(y) + abs(z) <= most
    ]


def parts(voxels: set[Voxel]) -> list[set[Voxel]]:
    left, found = set(voxels), []
    while left:
        part, edge = set(), {left.pop()}
        while edge:
            part |= edge
            edge = {n for voxel in edge for n in around(voxel, 3) if n in left}
            left -= edge
        found.append(part)
    return found


def dilated(voxels: set[Voxel], shape: tuple[int, ...]) -> set[Voxel]:
    grown = set(voxels)
    for _ in range(3):
        grown |= {n for voxel in grown for n in around(voxel, 2)}
        grown = {v for v in grown if all(0 <= c < s for c, s in zip(v, shape, strict=True))}
    return grown


def masked(voxels: set[Voxel], shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


def naive(prediction: np.ndarray, truth: np.ndarray, spacing) -> tuple[float, float]:
    predicted = {tuple(v) for v in np.argwhere(prediction).tolist()}
    true = {tuple(v) for v in np.argwhere(truth).tolist()}
    shape = truth.shape
    components = parts(predicted)
    hit, dices, distances = set(), [], []
    for zone in parts(dilated(true, shape)):
        lesion = zone & true
        near = dilated(lesion, shape)
        touching = [n for n, component in enumerate(components) if component & near]
        hit |= set(touching)
        if len(lesion) * np.prod(spacing) <= 50:
            continue
        matched = set().union(*(components[n] for n in touching))
        dices.append(2 * len(matched & lesion) / (len(matched) + len(lesion)))
        distances.append(
            hd95(masked(matched, shape), masked(lesion, shape), spacing, 374.0) if matched else 374
        )
    false = len(components) - len(hit)
    if not dices and not false:
        return 1.0, 0.0
    n = len(dices) + false
    return sum(dices) / n, (sum(distances) + 374 * false) / n


@pytest.mark.parametrize("seed", range(12))
def test_random_lesions_score_as_by_loops_over_sets(seed):
    """Lesions of all sizes, anywhere in the image, and a prediction that shifts, drops and adds some."""
    random = np.random.default_rng(seed)
    shape = (30, 26, 22)
    spacing = (1.0, 1.0, 1.0) if seed % 2 else (1.0, 1.5, 0.8)
    truth, prediction = np.zeros(shape, bool), np.zeros(shape, bool)
    for _ in range(random.integers(1, 6)):
        size = random.integers(1, 7, 3)
        corner = random.integers(0, np.array(shape) - size)
        box = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
        truth[box] |= random.random(size) < 0.8
        if random.random() < 0.7:
            moved = np.clip(corner + random.integers(-3, 4, 3), 0, np.array(shape) - size)
            prediction[tuple(slice(c, c + s) for c, s in zip(moved, size, strict=True))] = True
    for _ in range(random.integers(0, 3)):
        x, y, z = random.integers(0, np.array(shape) - 2)
        prediction[x : x + 2, y : y + 2, z] = True
    found = lesion_scores(prediction, truth, spacing)
    dice, distance = naive(prediction, truth, spacing)
    assert found.dice == pytest.approx(dice, abs=1e-12)
    assert found.hd95 == pytest.approx(distance, abs=1e-9)
