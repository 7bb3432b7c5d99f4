"""Surfaces lie where the labels are, in millimetres, and what is drawn says which is which."""

from __future__ import annotations

import math

import numpy as np
import pytest

from client.overlays import Case
from client.scene import _surface, scene_figure
from common.brats import ED, ET, NCR
from common.figures import draw_pixels

GRID = (40, 36, 32)


def ball(centre, radius, spacing=(1.0, 1.0, 1.0)) -> np.ndarray:
    """`centre` in voxels, `radius` in mm."""
    places = np.moveaxis(np.indices(GRID), 0, -1)
    return np.linalg.norm((places - centre) * spacing, axis=-1) <= radius


def volume(triangles: np.ndarray) -> float:
    """Of a closed surface, by the divergence theorem."""
    a, b, c = triangles[:, 0], triangles[:, 1], triangles[:, 2]
    return abs(float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum()) / 6)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 2.0, 1.5)])
def test_a_balls_surface_encloses_its_volume_at_its_place(spacing):
    centre = np.array([20, 17, 15])
    surface = _surface(ball(centre, 9.0, spacing), spacing, 64, smooth=0.8)
    assert volume(surface) == pytest.approx(4 / 3 * math.pi * 9.0**3, rel=0.08)
    corners = surface.reshape(-1, 3)
    assert corners.mean(axis=0) == pytest.approx(centre * spacing, abs=0.3)
    assert np.linalg.norm(corners - centre * spacing, axis=1) == pytest.approx(9.0, abs=1.5)


def test_a_ball_at_the_border_is_closed_too():
    surface = _surface(ball((0, 0, 0), 8.0), (1.0, 1.0, 1.0), 64, smooth=0.8)
    edges = surface[:, 1] - surface[:, 0], surface[:, 2] - surface[:, 0]
    assert np.cross(*edges).sum(axis=0) == pytest.approx(0, abs=1e-2), (
        "what is closed has no way out"
    )
    assert volume(surface) == pytest.approx(ball((0, 0, 0), 8.0).sum(), rel=0.2)


def test_fewer_cells_give_fewer_triangles():
    mask = ball((20, 18, 16), 14.0)
    many, few = (len(_surface(mask, (1.0, 1.0, 1.0), cells, smooth=0.8)) for cells in (64, 7))
    assert 0 < few < many / 8


def test_a_single_voxel_is_shown_and_nothing_has_no_surface():
    mask = np.zeros(GRID, bool)
    assert len(_surface(mask, (1.0, 1.0, 1.0), 64, smooth=0.8)) == 0
    mask[5, 6, 7] = True
    corners = _surface(mask, (1.0, 1.0, 1.0), 64, smooth=0.8).reshape(-1, 3)
    assert corners.mean(axis=0) == pytest.approx([5, 6, 7])


def test_truth_and_prediction_are_drawn_beside_each_other(tmp_path):
    truth = np.zeros(GRID, np.uint8)
    truth[ball((15, 18, 16), 6)], truth[ball((15, 18, 16), 4)] = ED, ET
    prediction = np.zeros(GRID, np.uint8)
    prediction[ball((15, 18, 16), 2)] = NCR
    brain = ball((20, 18, 16), 15)
    case = Case("s", "flair", brain.astype(np.float32), brain, truth, prediction, (1.0, 1.0, 1.0))
    figure = scene_figure(case, "$s$")
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("truth", "prediction")
    # one collection each, so that what lies behind is drawn first; truth has two labels
    counts = [len(axes.collections[0].get_facecolor()) for axes in (left, right)]
    assert len(left.collections) == len(right.collections) == 1
    assert counts[0] > counts[1] > 0
    assert draw_pixels(figure, tmp_path, "scene", "").png.stat().st_size > 10_000
