"""From a trusted scan to the network's input: crop to the brain, normalise, bring to the working grid.

The working grid is either a fixed grid (`resample`) or 1 mm voxels (`patches`). Everything works in
RAS orientation, which `sites.checks` has already established. Normalisation looks at one volume of
one modality at a time, so nothing about one subject depends on another. The way back, from the
network's output to the subject's own voxels, is `restore`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from common.brats import MODALITIES
from common.config import FederationConfig
from sites.checks import Scan

VERSION = 1  # raise it when the same recipe gives different voxels, so that caches are redone
MAX_VOXELS = 512**3  # of the working grid: a wrong voxel size must not ask for all memory
_BLOCK = 2**14  # doubles in the CPU's cache
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the cached voxels of a subject, besides its files."""

    mode: str = "patches"
    shape: Triple = (128, 128, 128)
    normalise: str = "zscore"
    modalities: tuple[str, ...] = MODALITIES
    label_coding: str = "auto"
    version: int = VERSION


def recipe_of(config: FederationConfig) -> Recipe:
    p = config.preprocess
    shape = p.shape if p.mode == "resample" else (0, 0, 0)  # patches have no grid of their own
    return Recipe(p.mode, shape, p.normalise, config.modalities, config.label_coding)


@dataclass(frozen=True)
class Geometry:
    """Where the working grid lies in the subject's own RAS grid (voxels; spacing in mm).

    `box` is the brain's bounding box; `truth_box` also encloses every labelled voxel, so that a
    label outside the brain still counts against a prediction.
    """

    shape: Triple
    spacing: tuple[float, float, float]
    box: tuple[Triple, Triple]
    truth_box: tuple[Triple, Triple]

    @property
    def box_shape(self) -> Triple:
        return _extent(self.box)

    @property
    def diagonal_mm(self) -> float:
        """Of the whole image: the HD95 given when exactly one of prediction and truth is empty."""
        return float(np.linalg.norm(np.multiply(self.shape, self.spacing)))


@dataclass(frozen=True)
class Prepared:
    """One subject ready for the network.

    image: float16 (C, X, Y, Z) on the working grid; labels: uint8 (X, Y, Z) on the same grid;
    truth: uint8 labels in the subject's own voxels inside `geometry.truth_box`. Labels and truth
    are None for a subject without a segmentation.
    """

    image: np.ndarray
    labels: np.ndarray | None
    truth: np.ndarray | None
    geometry: Geometry


def prepare(scan: Scan, recipe: Recipe) -> Prepared:
    """Crop, normalise and bring to the working grid.

    Raises:
        MemoryError: voxels of 1 mm would be more than MAX_VOXELS, as no head has.
    """
    volumes = [scan.images[modality] for modality in recipe.modalities]
    brain = volumes[0] != 0
    for volume in volumes[1:]:
        brain |= volume != 0
    box = _bounding_box(brain)
    truth_box = box
    if scan.labels is not None and scan.labels.any():
        truth_box = _union(box, _bounding_box(scan.labels != 0))
    shape = (brain.shape[0], brain.shape[1], brain.shape[2])
    geometry = Geometry(shape, scan.spacing, box, truth_box)
    target = _working_shape(geometry, recipe)

    crop = _slices(box)
    image = np.empty((len(volumes), *target), np.float16)
    normalised: np.ndarray = np.empty(geometry.box_shape, np.float32)
    for channel, volume in enumerate(volumes):
        _copy(volume[crop], normalised)
        _normalise(normalised, recipe.normalise)
        # torch rounds to fp16 as numpy does, ten times as fast
        torch.from_numpy(image[channel]).copy_(_resize_image(normalised, target))
    labels = truth = None
    if scan.labels is not None:
        truth = np.empty(_extent(truth_box), np.uint8)
        _copy(scan.labels[_slices(truth_box)], truth)
        labels = _resize_labels(np.ascontiguousarray(truth[_inside(box, truth_box)]), target)
    return Prepared(image, labels, truth, geometry)


def own_scores(scores: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The network's class scores (4, X, Y, Z) on the working grid, in the subject's own voxels.

    Returns:
        The same four scores for every voxel of `geometry.box`, by linear interpolation.
    """
    if scores.shape[1:] == geometry.box_shape:
        return scores
    return F.interpolate(
        scores[None].float(), size=geometry.box_shape, mode="trilinear", align_corners=False
    )[0]


def best_class(scores: torch.Tensor) -> np.ndarray:
    """uint8 labels (X, Y, Z): the class with the highest of the scores (4, X, Y, Z); of equals, the
    first. Where no score is a number it is the background."""
    if scores.device.type != "cpu":
        return scores.max(dim=0).indices.to(torch.uint8).cpu().numpy()
    # Slice by slice, which stays in the cache: 4 to 6 times as fast on a CPU as torch's max(dim), and
    # its argmax(dim) is slower still.
    values = scores.detach().float().numpy()
    labels = np.zeros(values.shape[1:], np.uint8)
    for x, plane in enumerate(labels):
        best, *others = np.array(values[:, x], order="C")  # a copy, which may be written to
        for number, score in enumerate(others, start=1):
            better = (score > best).view(np.uint8)
            np.maximum(plane, np.multiply(better, np.uint8(number), out=better), out=plane)
            np.maximum(best, score, out=best)
    return labels


def placed(inside: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Labels of `geometry.box` inside `geometry.truth_box`; what is around the brain is background."""
    labels = np.zeros(_extent(geometry.truth_box), np.uint8)
    labels[_inside(geometry.box, geometry.truth_box)] = inside
    return labels


def restore(scores: torch.Tensor, geometry: Geometry) -> np.ndarray:
    """The network's class scores (4, X, Y, Z) on the working grid, as labels in the subject's voxels.

    Scores are interpolated, then the best class is taken, so borders stay smooth.

    Returns:
        uint8 labels inside `geometry.truth_box`; outside the brain box they are background.
    """
    return placed(best_class(own_scores(scores, geometry)), geometry)


def _working_shape(geometry: Geometry, recipe: Recipe) -> Triple:
    if recipe.mode == "resample":
        return recipe.shape
    millimetres = np.multiply(geometry.box_shape, geometry.spacing)
    x, y, z = (max(1, round(float(length))) for length in millimetres)
    if x * y * z > MAX_VOXELS:
        raise MemoryError(f"the brain would be {x}x{y}x{z} mm")
    return x, y, z


def _copy(volume: np.ndarray, to: np.ndarray) -> None:
    """By planes, so that what is read next to each other stays in the CPU's cache: a scan is in
    Fortran order, and a network's input in C order."""
    for y in range(volume.shape[1]):
        to[:, y] = volume[:, y]


def _normalise(volume: np.ndarray, how: str) -> None:
    """In place. By planes, too, so that each step on one finds it in the cache."""
    if how == "minmax":
        low, high = float(volume.min()), float(volume.max())
        for plane in volume:
            plane -= low
            plane /= max(high - low, 1e-6)
        return
    values = volume[volume != 0]
    if values.size == 0:
        return
    mean = float(values.mean(dtype=np.float64))
    deviation = _deviation(values, mean)
    for plane in volume:
        outside = plane == 0
        plane -= mean
        plane /= max(deviation, 1e-6)
        np.copyto(plane, 0.0, where=outside)  # outside the brain there is nothing to normalise
        # a lone bright voxel must not overflow fp16 or drown the rest
        np.clip(plane, -20.0, 20.0, out=plane)


def _deviation(values: np.ndarray, mean: float) -> float:
    """The standard deviation, without a copy of all values in double precision."""
    squares = 0.0
    for start in range(0, values.size, _BLOCK):
        apart = np.subtract(values[start : start + _BLOCK], mean, dtype=np.float64)
        squares += float(np.square(apart, out=apart).sum())
    return math.sqrt(squares / values.size)


def _resize_image(volume: np.ndarray, target: Triple) -> torch.Tensor:
    tensor = torch.from_numpy(volume)[None, None]
    if volume.shape == target:
        return tensor[0, 0]
    # linear interpolation skips voxels along an axis that shrinks to half or less: average there,
    # and only there, as averaging repeats voxels along an axis that grows
    pairs = zip(volume.shape, target, strict=True)
    averaged = tuple(new if old >= 2 * new else old for old, new in pairs)
    if averaged != volume.shape:
        tensor = F.interpolate(tensor, size=averaged, mode="area")
    return F.interpolate(tensor, size=target, mode="trilinear", align_corners=False)[0, 0]


def _resize_labels(labels: np.ndarray, target: Triple) -> np.ndarray:
    if labels.shape == target:
        return labels
    tensor = torch.from_numpy(labels)[None, None]
    return F.interpolate(tensor, size=target, mode="nearest-exact")[0, 0].numpy()


def _bounding_box(mask: np.ndarray) -> tuple[Triple, Triple]:
    # first along the axis that is slowest in Fortran order: all of its planes at once
    columns = np.logical_or.reduce(mask, axis=2)
    spans = []
    for occupied in (columns.any(axis=1), columns.any(axis=0), mask.any(axis=(0, 1))):
        where = np.flatnonzero(occupied)
        spans.append((int(where[0]), int(where[-1]) + 1))
    (x0, x1), (y0, y1), (z0, z1) = spans
    return (x0, y0, z0), (x1, y1, z1)


def _union(a: tuple[Triple, Triple], b: tuple[Triple, Triple]) -> tuple[Triple, Triple]:
    x0, y0, z0 = (min(pair) for pair in zip(a[0], b[0], strict=True))
    x1, y1, z1 = (max(pair) for pair in zip(a[1], b[1], strict=True))
    return (x0, y0, z0), (x1, y1, z1)


def _slices(box: tuple[Triple, Triple]) -> tuple[slice, slice, slice]:
    (x0, y0, z0), (x1, y1, z1) = box
    return slice(x0, x1), slice(y0, y1), slice(z0, z1)


def _inside(box: tuple[Triple, Triple], outer: tuple[Triple, Triple]) -> tuple[slice, ...]:
    """Where `box` is in an array of the voxels of `outer`."""
    pairs = zip(_slices(box), outer[0], strict=True)
    return tuple(slice(part.start - first, part.stop - first) for part, first in pairs)


def _extent(box: tuple[Triple, Triple]) -> Triple:
    (x0, y0, z0), (x1, y1, z1) = box
    return x1 - x0, y1 - y0, z1 - z0
