"""Does an input look like what the model was trained on, and does its prediction look trustworthy?

A simple out-of-distribution detection.

The model holds no statistics of its training data, for those would have left the hospitals. So three
things stand in: facts that every BraTS scan has, and this input lacks; signs in the prediction itself;
and, if the hospital has made one, a reference of its own earlier subjects (robust z-scores against
their median and spread), which stays at the hospital. What a file's own checks say (`sites.checks`:
no skull-stripping, thick slices, one file twice) is not said again here.

The limits were set on five real subjects and on synthetic ones (docs/prediction.md). No warning is no
promise: a scan can be unlike the training data in ways that none of this sees.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common.files import write_text_atomically
from sites.checks import Scan

Features = dict[str, float]
"""Name -> value. Of the input: "spacing/x" (mm), "brain_ml", "cut" (largest share of the brain's
widest cross-section that lies on a face of the image), and for each modality, over brain voxels,
"grain/t1" (0 smooth, 1 white noise), "skew/t1", "peak/t1" (99th percentile in standard deviations
above the mean); "alike/t1-t1ce" is the correlation of two modalities. Of the prediction:
"tumour_share" of the brain, "tumour_entropy" (0 to 1), "flip_agreement" (Dice), and of each region
"found_ml/WT", what the network found, and "removed_ml/WT", what post-processing took away of it."""

VOXEL_MM = 0.5, 2.0
BRAIN_ML = 700.0, 2200.0
MINIATURE_ML = 100.0  # with ordinary voxels nothing but a synthetic phantom on a small grid
CUT = 0.5
GRAIN = 0.9
SAME = 0.98
LARGEST_SHARE = 0.4
LARGEST_ENTROPY = 0.45
LEAST_AGREEMENT = 0.7
FEWEST = 5  # subjects of a reference
FAR = 6.0  # robust standard deviations
NORMAL = 1.4826  # a normal distribution's standard deviation, in median absolute deviations
LARGEST = 1e9  # intensity up to which float32 is wide enough
MUCH = 0.5  # of what the network found
# how large tumours are says nothing of the scan
NOT_COMPARED = ("cut", "tumour_share", "found_ml", "removed_ml")


class BadReference(ValueError):
    """A reference cannot be used; the text says why and what to do."""


@dataclass(frozen=True)
class Reference:
    """What is usual at this hospital: of each feature the median, and the median absolute deviation.

    `model` is the sha256 of the model file and `flips` whether it predicted with flips: entropy and
    agreement are theirs.
    """

    model: str
    flips: bool
    subjects: int
    median: dict[str, float]
    deviation: dict[str, float]


# ----------------------------------------------------------------------------------- the features


def input_features(scan: Scan) -> Features:
    """Of a scan that was read for exactly the modalities of the model; finite, or left out."""
    brain = brain_of(scan)
    features = {f"spacing/{axis}": step for axis, step in zip("xyz", scan.spacing, strict=True)}
    features["brain_ml"] = float(np.count_nonzero(brain) * np.prod(scan.spacing)) / 1000
    features["cut"] = _cut(brain)
    box = _box(brain)
    brain = brain[box]
    values = {}
    for modality, voxels in scan.images.items():
        volume = voxels[box].astype(np.float32)
        largest = float(np.abs(volume).max())
        if largest > LARGEST:  # squares would be infinite; no feature depends on the unit
            volume /= np.float32(largest)
        inside = volume[brain]
        inside = (inside - inside.mean(dtype=np.float64)) / max(float(inside.std()), 1e-6)
        values[modality] = inside
        spread = max(float(volume[brain].std()), 1e-6)
        features[f"grain/{modality}"] = _grain(volume, brain) / spread
        features[f"skew/{modality}"] = float((inside**3).mean(dtype=np.float64))
        features[f"peak/{modality}"] = float(np.percentile(inside, 99))
    for a, b in itertools.combinations(values, 2):
        features[f"alike/{a}-{b}"] = float((values[a] * values[b]).mean(dtype=np.float64))
    return {name: value for name, value in features.items() if math.isfinite(value)}


def prediction_features(
    tumour_voxels: int, brain_voxels: int, tumour_entropy: float | None, agreement: float | None
) -> Features:
    """What could not be computed is left out."""
    features = {"tumour_share": tumour_voxels / max(1, brain_voxels)}
    if tumour_entropy is not None:
        features["tumour_entropy"] = tumour_entropy
    if agreement is not None:
        features["flip_agreement"] = agreement
    return features


def brain_of(scan: Scan) -> np.ndarray:
    """Bool (X, Y, Z): where any modality is not 0."""
    brain: np.ndarray | None = None
    for voxels in scan.images.values():
        brain = voxels != 0 if brain is None else brain | (voxels != 0)
    assert brain is not None
    return brain


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    box = []
    for axis in range(3):
        occupied = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)


def _cut(brain: np.ndarray) -> float:
    shares = []
    for axis in range(3):
        areas = np.count_nonzero(brain, axis=tuple(a for a in range(3) if a != axis))
        shares.append(max(areas[0], areas[-1]) / areas.max())
    return float(max(shares))


def _grain(volume: np.ndarray, brain: np.ndarray) -> float:
    """Spread of the difference of neighbours, over that of independent voxels of unit spread."""
    spreads = []
    for axis in range(3):
        first = tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))
        second = tuple(slice(1, None) if a == axis else slice(None) for a in range(3))
        steps = (volume[second] - volume[first])[brain[second] & brain[first]]
        if steps.size:
            spreads.append(float(steps.std(dtype=np.float64)))
    return float(np.mean(spreads)) / math.sqrt(2) if spreads else 0.0


# ----------------------------------------------------------------------------------- the judgement


def judge(
    features: Mapping[str, float],
    found: Collection[str] = (),
    reference: Reference | None = None,
) -> list[str]:
    """Warnings in words, none if all looks ordinary.

    `found` holds the codes of the findings about the subject's files; what they say is not repeated.
    """
    warnings = [*_of_the_grid(features, found), *_of_the_images(features, found)]
    warnings += _of_the_prediction(features)
    if reference is not None:
        warnings += _unusual(features, reference)
    return warnings


def _of_the_grid(features: Mapping[str, float], found: Collection[str]) -> list[str]:
    warnings = []
    spacing = [features[f"spacing/{axis}"] for axis in "xyz"]
    odd = min(spacing) < VOXEL_MM[0] or max(spacing) > VOXEL_MM[1]
    if odd and "anisotropic" not in found:
        size = " x ".join(f"{step:.3g}" for step in spacing)
        warnings.append(f"voxels of {size} mm are far from the 1 mm that BraTS models learn from")
    brain = features["brain_ml"]
    miniature = brain < MINIATURE_ML and min(spacing) >= VOXEL_MM[0]
    if (
        not BRAIN_ML[0] <= brain <= BRAIN_ML[1]
        and not miniature
        and "not-skull-stripped" not in found
    ):
        warnings.append(
            f"a brain of {brain:.0f} ml is implausible (1000 to 1900 are usual): a part is missing, "
            "something else was left in, or the voxel size in the header is wrong"
        )
    if features["cut"] > CUT and "not-skull-stripped" not in found:
        warnings.append("the brain is cut off at an edge of the image")
    return warnings


def _of_the_images(features: Mapping[str, float], found: Collection[str]) -> list[str]:
    warnings = []
    for name, value in features.items():
        kind, _, which = name.partition("/")
        if kind == "grain" and value > GRAIN:
            warnings.append(f"{which} looks like noise: neighbouring voxels have little in common")
        if kind == "alike" and abs(value) > SAME and "identical-modalities" not in found:
            a, b = which.split("-")
            warnings.append(
                f"{a} and {b} are nearly the same image: one of them may be mislabelled"
            )

    def alike(a: str, b: str) -> float | None:
        return features.get(f"alike/{a}-{b}")

    t1 = alike("t1", "t1ce")
    t2 = [a for a in (alike("t1", "t2"), alike("t1ce", "t2")) if a is not None]
    if t1 is not None and t1 < 0.2:
        warnings.append(
            "t1 and t1ce do not look alike, as they should: two modalities are swapped, or one has "
            "inverted contrast"
        )
    elif t1 is not None and len(t2) == 2 and t1 < max(t2):
        warnings.append("t2 looks more like a t1 than t1 and t1ce do: modalities may be swapped")
    flair = [a for a in (alike("t1", "flair"), alike("t1ce", "flair")) if a is not None]
    if flair and max(flair) < -0.2:
        warnings.append("flair is the opposite of the T1 images: one has inverted contrast")
    if features.get("skew/t2", 1.0) < -0.5:
        warnings.append("t2 shows no bright fluid: it has inverted contrast or is no T2")
    if features.get("peak/t1", -9.0) > features.get("peak/t1ce", 9.0) + 0.5:
        warnings.append("t1 has brighter spots than t1ce: the two may be swapped")
    return warnings


def _of_the_prediction(features: Mapping[str, float]) -> list[str]:
    share = features.get("tumour_share", 0.0)
    warnings = _of_the_postprocessing(features)
    if "tumour_share" in features and share == 0:
        found, removed = (features.get(f"{kind}_ml/WT", 0.0) for kind in ("found", "removed"))
        if found == 0:
            return [
                "no tumour was found at all; the model has learnt from scans with a tumour only"
            ]
        if removed < found:
            warnings.append("all of the tumour lies where every scan is 0")
        return warnings
    if share > LARGEST_SHARE:
        warnings.append(f"{share:.0%} of the brain were taken for tumour, which is implausible")
    entropy = features.get("tumour_entropy", 0.0)
    if entropy > LARGEST_ENTROPY:
        warnings.append(
            f"the model is unsure of what it took for tumour (mean entropy {entropy:.2f} of 1)"
        )
    agreement = features.get("flip_agreement", 1.0)
    if agreement < LEAST_AGREEMENT:
        warnings.append(
            f"the mirror images of the scan are segmented differently (mean Dice {agreement:.2f})"
        )
    return warnings


def _of_the_postprocessing(features: Mapping[str, float]) -> list[str]:
    """Of the whole tumour what is MUCH; of its parts only what is all, for they are small anyway."""
    warnings = []
    for region, words in (("WT", "tumour"), ("TC", "tumour core"), ("ET", "enhancing tumour")):
        found = features.get(f"found_ml/{region}", 0.0)
        removed = features.get(f"removed_ml/{region}", 0.0)
        if found > 0 and removed >= found * (MUCH if region == "WT" else 1):
            warnings.append(
                f"post-processing removed {millilitres(removed)} of {millilitres(found)} ml of {words} "
                "that the network found; --postprocess none shows it"
            )
            if removed == found:
                break  # hence its parts too
    return warnings


def millilitres(volume: float) -> str:
    """With a decimal, or two digits where that would hide a small focus."""
    return f"{volume:.1f}" if volume >= 1 else f"{volume:.2g}"


# ----------------------------------------------------------------------------------- the reference


def reference_of(subjects: Sequence[Mapping[str, float]], *, model: str, flips: bool) -> Reference:
    """What is usual among these subjects, by the features that all of them have.

    Raises:
        BadReference: fewer than FEWEST subjects.
    """
    if len(subjects) < FEWEST:
        raise BadReference(
            f"a reference needs at least {FEWEST} segmented subjects, found {len(subjects)}"
        )
    names = [
        name
        for name in subjects[0]
        if name.partition("/")[0] not in NOT_COMPARED
        and all(name in features for features in subjects)
    ]
    median, deviation = {}, {}
    for name in names:
        values = np.array([features[name] for features in subjects])
        median[name] = float(np.median(values))
        deviation[name] = float(np.median(np.abs(values - median[name])))
    return Reference(model, flips, len(subjects), median, deviation)


def z_score(name: str, value: float, reference: Reference) -> float:
    """In robust standard deviations; few subjects can agree by chance, so those are not taken for
    smaller than 0.05, nor than a twentieth of the median."""
    median = reference.median[name]
    spread = max(NORMAL * reference.deviation[name], 0.05, abs(median) / 20)
    return (value - median) / spread


def _unusual(features: Mapping[str, float], reference: Reference) -> list[str]:
    warnings = []
    for name in reference.median:
        if name in features and abs(z_score(name, features[name], reference)) > FAR:
            kind, _, which = name.partition("/")
            warnings.append(
                f"{_WORDS[kind].format(which)} is {features[name]:.3g}, unlike the "
                f"{reference.subjects} subjects of the reference (median {reference.median[name]:.3g})"
            )
    return warnings


_WORDS = {
    "spacing": "the voxel size along {}, in mm,",
    "brain_ml": "the brain's volume in ml",
    "grain": "the grain of {}",
    "skew": "the skewness of {}",
    "peak": "the brightest percentile of {}",
    "alike": "the likeness of {}",
    "tumour_entropy": "the mean entropy in the tumour",
    "flip_agreement": "the agreement of the mirror images",
}


def save_reference(path: Path, reference: Reference) -> None:
    """Raises OSError if it cannot be written."""
    document = json.dumps(asdict(reference), indent=1, allow_nan=False)
    write_text_atomically(path, document + "\n")


def is_reference(path: Path) -> bool:
    """Whether a file reads as a reference, of whatever model."""
    try:
        return _read(path) is not None
    except (BadReference, OSError):
        return False


def load_reference(path: Path, *, model: str, flips: bool) -> Reference:
    """Read a reference made with this model (sha256 of its file), with or without flips.

    Raises:
        BadReference: it is no such file, or was made with another model or other flips.
        OSError: it cannot be read.
    """
    reference = _read(path)
    values = (*reference.median.values(), *reference.deviation.values())
    if not all(math.isfinite(v) for v in values) or any(
        name.partition("/")[0] not in _WORDS for name in reference.median
    ):
        raise BadReference(f"{path}: is no reference of this version of fedbrats; {_AGAIN}.")
    if reference.model != model:
        raise BadReference(f"{path}: was made with another model; {_AGAIN}.")
    if reference.flips != flips:
        how = "with" if reference.flips else "without"
        raise BadReference(f"{path}: was made {how} flips; do the same here, or {_AGAIN}.")
    return reference


_AGAIN = "write it again with --write-reference"


def _read(path: Path) -> Reference:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return Reference(
            str(document["model"]),
            bool(document["flips"]),
            int(document["subjects"]),
            {str(name): float(value) for name, value in document["median"].items()},
            {str(name): float(document["deviation"][name]) for name in document["median"]},
        )
    except (
        *(ValueError, KeyError, TypeError, AttributeError),
        *(OverflowError, RecursionError),  # a number without end, lists within lists
    ) as error:
        raise BadReference(f"{path}: is no reference of fedbrats; {_AGAIN}.") from error
