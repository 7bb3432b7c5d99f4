"""One subject's prediction against its truth, as slices in three planes.

Both are in the subject's own voxels, where metrics are computed; the scan behind them is what the
network was given, brought to those voxels. What is drawn is a picture of a patient's head: it stays
where the scans are. For research; not a medical device. As surfaces in space: `client.scene`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, withStroke

from common.brats import ED, ET, NCR
from common.console import RESEARCH_ONLY
from common.figures import GREY, LABEL_COLOURS, new_figure, shown_name, styled
from sites.cache import CachedSubject
from sites.preprocess import Geometry

LABELS = (("ED", ED), ("NCR", NCR), ("ET", ET))  # outermost first
PLANES = ("axial", "coronal", "sagittal")
AXIS = {"axial": 2, "coronal": 1, "sagittal": 0}  # that a plane cuts, of RAS voxels
MODALITIES = ("flair", "t1ce", "t2", "t1")  # the first that a federation has is shown
CONVENTION = (
    "Radiological convention: the patient's right (R) is on the left of axial and coronal slices; sagittal "
    "slices have the face (A) on the left."
)


@dataclass(frozen=True)
class Case:
    """Arrays (X, Y, Z) in RAS voxels of `spacing` mm inside `geometry.truth_box`.

    image: float32, 0 (dark) to 1, 0 outside the brain; brain: bool; truth, prediction: uint8 system
    labels.
    """

    subject: str
    modality: str
    image: np.ndarray
    brain: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    spacing: tuple[float, float, float]


def case_of(subject: CachedSubject, modalities: Sequence[str], prediction: np.ndarray) -> Case:
    """Bring the scan of a cached subject that has labels beside its truth and the prediction.

    Nothing in it needs the cache any more.

    Args:
        modalities: of the cached image's channels.
        prediction: as a `client.subject_results.Segmenter` gives it.
    """
    channels = subject.image()
    modality = next(m for m in MODALITIES if m in modalities)
    image = np.asarray(channels[modalities.index(modality)], np.float32)
    brain: np.ndarray = np.asarray(np.any(np.asarray(channels) != 0, axis=0))
    geometry = subject.geometry
    low, high = np.percentile(image[brain], (1, 99.5)) if brain.any() else (0.0, 1.0)
    bright = np.clip((image - low) / max(float(high - low), 1e-6), 0, 1)
    return Case(
        subject=subject.id,
        modality=modality,
        image=_to_own_voxels(np.asarray(bright * brain), geometry, "trilinear"),
        brain=_to_own_voxels(brain.astype(np.float32), geometry, "trilinear") > 0.5,
        truth=np.array(subject.truth()),
        prediction=prediction,
        spacing=geometry.spacing,
    )


def fullest_slices(case: Case) -> dict[str, int]:
    """Plane -> the slice with most tumour in truth; without one in the prediction, else the middle."""
    labels = case.truth if case.truth.any() else case.prediction
    found = {}
    for plane, axis in AXIS.items():
        others = tuple(other for other in range(3) if other != axis)
        counts = (labels != 0).sum(axis=others)
        found[plane] = int(counts.argmax()) if counts.any() else labels.shape[axis] // 2
    return found


def slice_of(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """A slice as it is seen on a screen, row 0 at the bottom, in radiological convention."""
    if plane == "axial":
        return volume[::-1, :, index].T
    if plane == "coronal":
        return volume[::-1, index, :].T
    return volume[index, ::-1, :].T


@styled
def slices_figure(cases: Sequence[Case], titles: Sequence[str]) -> Figure:
    """A row for each case with its three planes: prediction filled, truth as dashed outlines."""
    figure = new_figure(3.35 * len(cases) + 0.4)
    rows = figure.subfigures(len(cases), 1, squeeze=False)
    for row, case, title in zip(rows[:, 0], cases, titles, strict=True):
        row.suptitle(title, x=0.01, ha="left", fontsize=9.5)
        chosen = fullest_slices(case)
        for place, plane in enumerate(PLANES, start=1):
            _draw_plane(row.add_subplot(1, 3, place), case, plane, chosen[plane])
    handles: list[Patch | Line2D] = [
        Patch(
            facecolor=to_rgba(LABEL_COLOURS[name], 0.75), edgecolor=GREY, label=f"{name} predicted"
        )
        for name, _ in LABELS
    ]
    handles += [
        Line2D([], [], color=LABEL_COLOURS[name], linestyle=(0, (3, 1.2)), label=f"{name} truth",
               path_effects=[withStroke(linewidth=3.2, foreground="black"), Normal()])
        for name, _ in LABELS
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=6, title=RESEARCH_ONLY)
    return figure


def _draw_plane(axes: Axes, case: Case, plane: str, index: int) -> None:
    sx, sy, sz = case.spacing
    aspect = {"axial": sy / sx, "coronal": sz / sx, "sagittal": sz / sy}[plane]
    image, truth, prediction = (
        slice_of(volume, plane, index) for volume in (case.image, case.truth, case.prediction)
    )
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, origin="lower", aspect=aspect)
    fill = np.zeros((*image.shape, 4))
    for name, label in LABELS:
        fill[prediction == label] = to_rgba(LABEL_COLOURS[name], 0.5)
    axes.imshow(fill, origin="lower", aspect=aspect, interpolation="nearest")
    for name, label in LABELS:
        mask = truth == label
        if mask.any() and not mask.all():
            drawn = axes.contour(mask, levels=[0.5], colors=[LABEL_COLOURS[name]], linewidths=1.3)
            drawn.set_linestyle((0, (3, 1.2)))
            drawn.set_path_effects([withStroke(linewidth=2.2, foreground="black"), Normal()])
    axes.set_axis_off()
    left, right = ("A", "P") if plane == "sagittal" else ("R", "L")
    words: dict[str, Any] = {"color": "white", "fontsize": 8.5, "transform": axes.transAxes}
    # a path effect would turn text into outlines in the SVG
    words["bbox"] = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 1.5}
    for across, text, side in ((0.01, left, "left"), (0.99, right, "right")):
        axes.text(across, 0.5, text, ha=side, **words)
    axes.text(0.02, 0.98, plane, ha="left", va="top", **words)


def case_title(rank: str, site: str, subject: str, dice: dict[str, float]) -> str:
    scores = ", ".join(f"{region} {value:.3f}" for region, value in dice.items())
    return f"{rank}: {shown_name(subject)} ({shown_name(site)}), Dice {scores}"


def _to_own_voxels(volume: np.ndarray, geometry: Geometry, mode: str) -> np.ndarray:
    """A working-grid volume on the subject's own voxels inside `truth_box`, 0 outside the brain's box."""
    tensor = torch.from_numpy(np.ascontiguousarray(volume, np.float32))[None, None]
    if volume.shape != geometry.box_shape:
        tensor = F.interpolate(tensor, size=geometry.box_shape, mode=mode, align_corners=False)
    low, high = geometry.truth_box
    whole = np.zeros(np.subtract(high, low), np.float32)
    offset = np.subtract(geometry.box[0], low)
    inside = tuple(slice(o, o + n) for o, n in zip(offset, geometry.box_shape, strict=True))
    whole[inside] = tensor[0, 0].numpy()
    return whole
