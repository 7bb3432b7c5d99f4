"""Post-processing: every step does what it says, at any voxel size, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from skimage import morphology

from client.postprocessing import (
    NONE,
    PRESETS,
    PostProcessing,
    ball,
    postprocess,
)
from common.brats import BACKGROUND, ED, ET, NCR

ONE_MM = (1.0, 1.0, 1.0)


def certain(labels: np.ndarray) -> np.ndarray:
    """Probabilities of a network that is sure; among tumour labels it prefers ED where there is none."""
    probabilities = np.full((4, *labels.shape), 0.001, np.float32)
    probabilities[ED] += 0.001
    for label in range(4):
        probabilities[label][labels == label] = 0.996
    return probabilities / probabilities.sum(axis=0)


def cube(shape: int, label: int, start: tuple[int, int, int], side: int) -> np.ndarray:
    labels = np.zeros((shape,) * 3, np.uint8)
    labels[tuple(slice(s, s + side) for s in start)] = label
    return labels


def done(labels: np.ndarray, spacing=ONE_MM, **steps) -> np.ndarray:
    return postprocess(labels, certain(labels), spacing, PostProcessing(**steps))


@pytest.fixture
def random_tumour() -> tuple[np.ndarray, np.ndarray]:
    """Rugged labels with specks and holes, and the probabilities they come from."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    scores = np.stack([gaussian_filter(rng.normal(size=(24, 20, 16)), 1.2) * 12 for _ in range(4)])
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=0)
    return probabilities.argmax(axis=0).astype(np.uint8), probabilities.astype(np.float32)


def test_without_steps_the_labels_stay_as_they_are(random_tumour):
    labels, probabilities = random_tumour
    before = labels.copy()
    np.testing.assert_array_equal(postprocess(labels, probabilities, ONE_MM, NONE), before)
    for steps in PRESETS.values():
        postprocess(labels, probabilities, ONE_MM, steps)
    np.testing.assert_array_equal(labels, before)  # the argument is not written to


def test_the_threshold_is_on_the_sum_of_the_tumours_probabilities(random_tumour):
    labels, probabilities = random_tumour
    result = postprocess(labels, probabilities, ONE_MM, PostProcessing(threshold=0.6))
    for place in np.ndindex(labels.shape):
        p = probabilities[(slice(None), *place)]
        expected = 1 + int(np.argmax(p[1:])) if p[1:].sum() >= 0.6 else 0
        assert result[place] == expected


@pytest.mark.parametrize("step", ["opening_mm", "closing_mm"])
def test_opening_and_closing_agree_with_scikit_image(step, random_tumour):
    labels, probabilities = random_tumour
    padded = np.pad(labels > 0, 8)
    how = morphology.opening if step == "opening_mm" else morphology.closing
    expected = how(padded, morphology.ball(2))[8:-8, 8:-8, 8:-8]
    result = postprocess(labels, probabilities, ONE_MM, PostProcessing(**{step: 2.0}))
    np.testing.assert_array_equal(result > 0, expected)
    kept = expected & (labels > 0)
    np.testing.assert_array_equal(result[kept], labels[kept])
    new = expected & (labels == 0)
    assert bool(new.any()) == (step == "closing_mm")
    np.testing.assert_array_equal(result[new], 1 + probabilities[1:].argmax(axis=0)[new])


def test_a_ball_is_in_millimetres():
    assert ball(1, ONE_MM).sum() == 7
    assert ball(2, (1.0, 1.0, 4.0)).shape == (5, 5, 1)
    np.testing.assert_array_equal(ball(2, (2.0, 2.0, 2.0)), ball(1, ONE_MM))
    assert ball(0.5, (0.1, 0.1, 0.1)).sum() == ball(5, ONE_MM).sum()


def test_a_tumour_at_the_edge_of_the_image_is_not_eaten_by_closing():
    labels = cube(12, ED, (0, 0, 0), 6)
    np.testing.assert_array_equal(done(labels, closing_mm=3), labels)


def test_what_the_tumour_encloses_is_filled_and_what_is_open_is_not():
    labels = cube(14, ED, (2, 2, 2), 8)
    labels[5, 5, 5] = BACKGROUND
    assert done(labels, fill_holes=True)[5, 5, 5] == ED
    labels[5, 5, 5:] = BACKGROUND
    np.testing.assert_array_equal(done(labels, fill_holes=True), labels)


def test_small_pieces_of_each_region_become_what_surrounds_that_region():
    labels = cube(30, ED, (1, 1, 1), 12)
    labels[3:8, 3:8, 3:8] = NCR  # a core of 125 voxels with ET of 27 and, apart from it, of 1 in it
    labels[5:8, 5:8, 5:8] = ET
    labels[3, 3, 3] = ET
    labels[10:12, 10:12, 10:12] = NCR  # a second core of 8
    labels[20:22, 20:22, 20:22] = ET  # a speck of 8 elsewhere
    result = done(labels, smallest_mm3=9)
    expected = labels.copy()
    expected[3, 3, 3] = NCR
    expected[10:12, 10:12, 10:12] = ED
    expected[20:22, 20:22, 20:22] = BACKGROUND
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(done(labels, smallest_mm3=1), labels)


def test_pieces_are_measured_in_cubic_millimetres_and_touch_at_corners():
    labels = cube(10, ED, (2, 2, 2), 2)
    labels[4, 4, 4] = ED  # shares a corner only: 9 voxels in all
    labels[6:9, 6:9, 6:9] = ED  # the largest, which stays
    labels[5, 5, 5] = BACKGROUND
    small = (slice(2, 5),) * 3
    assert (done(labels, smallest_mm3=9)[small] > 0).sum() == 9
    assert not done(labels, smallest_mm3=9.1)[small].any()
    half = (0.5, 1.0, 1.0)
    assert (done(labels, half, smallest_mm3=4.5)[small] > 0).sum() == 9
    assert not done(labels, half, smallest_mm3=4.6)[small].any()


def test_the_largest_piece_of_a_region_stays_however_small():
    labels = cube(10, ET, (2, 2, 2), 2)
    labels[7, 7, 7] = ET
    expected = cube(10, ET, (2, 2, 2), 2)
    np.testing.assert_array_equal(done(labels, smallest_mm3=1000), expected)


def test_a_tiny_enhancing_tumour_becomes_necrosis_a_larger_one_stays():
    labels = cube(12, NCR, (2, 2, 2), 6)
    labels[3:5, 3:5, 3] = ET
    labels[6, 6, 6] = ET  # 5 voxels in two pieces, counted together
    np.testing.assert_array_equal(done(labels, tiny_et_mm3=5), labels)
    result = done(labels, tiny_et_mm3=5.1)
    np.testing.assert_array_equal(result, np.where(labels == ET, NCR, labels))
    assert (done(labels, (2, 1, 1), tiny_et_mm3=5.1) == ET).sum() == 5


def test_an_empty_prediction_stays_empty():
    empty = np.zeros((8, 8, 8), np.uint8)
    for preset in PRESETS.values():
        steps = replace(preset, opening_mm=1, closing_mm=2, fill_holes=True)
        assert not postprocess(empty, certain(empty), ONE_MM, steps).any()


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 20, 20), (1, 1, 1)])
def test_opening_does_not_delete_a_piece_that_the_network_is_sure_of(shape):
    labels = cube(40, ED, (20, 4, 4), 9)  # opening leaves something of this one
    labels[tuple(slice(2, 2 + side) for side in shape)] = ET
    result = done(labels, opening_mm=1)
    assert (result == ET).sum() == np.prod(shape)
    assert (result == ED).sum() < (labels == ED).sum()  # its edges are trimmed as before


def test_opening_deletes_a_doubtful_speck_unless_it_is_all_there_is():
    speck = cube(24, ET, (2, 2, 2), 2)
    sure = cube(24, ED, (12, 12, 12), 7)
    labels = np.maximum(speck, sure)
    probabilities = certain(labels)
    probabilities[:, speck > 0] = np.array([0.3, 0.1, 0.1, 0.5])[:, None]
    opening = PostProcessing(opening_mm=1)
    result = postprocess(labels, probabilities, ONE_MM, opening)
    assert not (result == ET).any()
    assert (result == ED).any()
    alone = np.where(sure > 0, np.uint8(0), labels)
    alone[20, 20, 20] = NCR  # as doubtful, and smaller
    probabilities = certain(alone)
    probabilities[:, alone > 0] = np.array([0.3, 0.1, 0.1, 0.5])[:, None]
    np.testing.assert_array_equal(postprocess(alone, probabilities, ONE_MM, opening), speck)


def test_a_probability_of_just_the_threshold_is_tumour():
    probabilities = np.zeros((4, 2, 1, 1), np.float32)
    probabilities[0], probabilities[ED] = [[[0.5]], [[0.75]]], [[[0.5]], [[0.25]]]
    labels = np.zeros((2, 1, 1), np.uint8)
    result = postprocess(labels, probabilities, ONE_MM, PostProcessing(threshold=0.5))
    np.testing.assert_array_equal(result.ravel(), [ED, BACKGROUND])


def test_small_pieces_go_from_the_whole_tumour_inwards():
    """The largest piece of a region that stays is the largest of what is left of the region around it."""
    labels = cube(24, ED, (2, 2, 2), 8)
    labels[4, 4, 4] = ET  # all the core of the tumour proper
    labels[18:20, 18:20, 18:20] = ET  # a speck, but the largest core
    expected = cube(24, ED, (2, 2, 2), 8)
    expected[4, 4, 4] = ET
    np.testing.assert_array_equal(done(labels, smallest_mm3=9), expected)
    labels = cube(24, NCR, (2, 2, 2), 8)
    labels[4, 4, 4] = ET
    labels[12:22, 12:22, 12:22] = ED
    labels[18:20, 18:20, 18:20] = ET  # a small core, but the largest ET
    expected = labels.copy()
    expected[18:20, 18:20, 18:20] = ED
    np.testing.assert_array_equal(done(labels, smallest_mm3=9), expected)


@pytest.mark.parametrize("side", [0.1, 0.3, 0.7])
def test_sizes_that_are_equal_but_for_rounding_are_equal(side):
    labels = cube(16, ET, (2, 2, 2), 3)
    labels[8:14, 8:14, 8:14] = NCR
    size = 27 * side**3
    spacing = (side,) * 3
    for volume in (size, size * (1 + 1e-9), np.nextafter(size, 1e9)):
        np.testing.assert_array_equal(done(labels, spacing, tiny_et_mm3=volume), labels)
        np.testing.assert_array_equal(done(labels, spacing, smallest_mm3=volume), labels)
    assert not (done(labels, spacing, tiny_et_mm3=size * 1.001) == ET).any()
    assert not (done(labels, spacing, smallest_mm3=size * 1.001) == ET).any()
