"""One subject's tumour in space: the surfaces of its labels, truth beside prediction, in a faint brain.

Surfaces are smoothed and coarser than voxels; volumes and distances are not to be read from them. For
research; not a medical device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mpl_toolkits.mplot3d.art3d import Poly3DCollection  # type: ignore[import-untyped]
from mpl_toolkits.mplot3d.axes3d import Axes3D  # type: ignore[import-untyped]
from scipy.ndimage import gaussian_filter
from skimage.measure import marching_cubes

from client.overlays import LABELS, Case
from common.console import RESEARCH_ONLY
from common.figures import GREY, LABEL_COLOURS, new_figure, styled

FINEST = 64  # cells along a tumour's longest side; more triangles show no more
BRAIN_CELLS = 40  # the same of the brain's faint outline
OPACITY = {"ED": 0.1, "NCR": 1.0, "ET": 0.8}
LIGHT = np.array([0.4, 0.7, 0.6]) / np.linalg.norm([0.4, 0.7, 0.6])


@styled
def scene_figure(case: Case, title: str) -> Figure:
    """The tumour's surfaces inside a faint brain: truth on the left, prediction on the right."""
    figure = new_figure(4.0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9.5)
    brain = _surface(case.brain, case.spacing, BRAIN_CELLS, smooth=1.5)
    for place, (what, labels) in enumerate(
        (("truth", case.truth), ("prediction", case.prediction)), start=1
    ):
        axes = figure.add_subplot(1, 2, place, projection="3d", computed_zorder=False)
        assert isinstance(axes, Axes3D)
        parts = [(brain, GREY, 0.03)]
        for name, label in LABELS:
            surface = _surface(labels == label, case.spacing, FINEST, smooth=0.8)
            parts.append((surface, LABEL_COLOURS[name], OPACITY[name]))
        _add_surfaces(axes, parts)
        size = np.multiply(labels.shape, case.spacing)
        for setter, length in zip((axes.set_xlim, axes.set_ylim, axes.set_zlim), size, strict=True):
            setter(0, length)
        axes.set_box_aspect(tuple(size), zoom=1.4)  # which changes an array
        axes.view_init(elev=15, azim=55)
        axes.set_axis_off()
        axes.set_title(what, loc="center", y=1.0)
        middle = size / 2
        for at, text in (
            ((size[0] * 1.06, middle[1], middle[2]), "R"),
            ((-size[0] * 0.06, middle[1], middle[2]), "L"),
            ((middle[0], size[1] * 1.06, middle[2]), "A"),
        ):
            axes.text(*map(float, at), text, color=GREY, fontsize=9, ha="center", va="center")
    handles = [Patch(facecolor=LABEL_COLOURS[n], edgecolor=GREY, label=n) for n, _ in LABELS]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, title=RESEARCH_ONLY)
    return figure


def _surface(
    mask: np.ndarray, spacing: tuple[float, float, float], cells: int, *, smooth: float
) -> np.ndarray:
    """Triangles (n, 3, 3) in mm around the mask; none where it is empty.

    `cells`: the longest side of the mask is cut into no more than about so many.
    """
    if not mask.any():
        return np.empty((0, 3, 3))
    occupied = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    begin = np.array([found[0] for found in occupied])
    box = tuple(slice(found[0], found[-1] + 1) for found in occupied)
    margin = 4
    solid = np.pad(mask[box].astype(np.float32), margin)
    softened = gaussian_filter(solid, smooth)
    if softened.max() <= 0.5:  # a few voxels only: shown as they are
        softened = solid
    step = max(1, round(max(mask[box].shape) / cells))
    try:
        corners, faces, _, _ = marching_cubes(softened, 0.5, spacing=spacing, step_size=step)
    except RuntimeError:  # smaller than a step
        corners, faces, _, _ = marching_cubes(solid, 0.5, spacing=spacing)
    shifted = corners + (begin - margin) * np.array(spacing)
    return np.asarray(shifted)[faces]


def _add_surfaces(axes: Axes3D, parts: Sequence[tuple[np.ndarray, str, float]]) -> None:
    """As one collection, so that what lies behind is drawn first whatever part it is of."""
    triangles, colours = [], []
    for surface, colour, opacity in parts:
        if not len(surface):
            continue
        normals = np.cross(surface[:, 1] - surface[:, 0], surface[:, 2] - surface[:, 0])
        normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
        brightness = 0.5 + 0.5 * np.abs(normals @ LIGHT)
        rgb = np.array(to_rgb(colour)) * brightness[:, None]
        triangles.append(surface)
        colours.append(np.column_stack([rgb, np.full(len(surface), opacity)]))
    if triangles:
        collection = Poly3DCollection(
            np.concatenate(triangles), facecolors=np.concatenate(colours), edgecolors="none",
            linewidths=0, antialiaseds=False,
        )  # fmt: skip
        axes.add_collection3d(collection)
