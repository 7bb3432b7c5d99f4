"""A trained model on a patient without labels: labels, probabilities and how far to trust them.

Everything is on the subject's own voxels, turned to RAS; writing it in the orientation of the
subject's files is `client.nifti_output`, the command line `client.prediction_commands`.
For research; not a medical device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from client.device import best_device, use_threads
from client.evaluation import class_scores
from client.familiarity import (
    Features,
    Reference,
    brain_of,
    input_features,
    judge,
    prediction_features,
)
from client.flips import flipped_scores
from client.nifti_output import labels_file, map_file
from client.postprocessing import RECOMMENDED, PostProcessing, postprocess
from common.brats import BACKGROUND, N_CLASSES, STRUCTURES
from common.config import FederationConfig
from common.files import write_together
from common.full_memory import is_full_memory
from common.metrics import REGIONS
from common.model import network_for
from common.weights import BadWeights, check_update, load_weights
from sites.checks import examine
from sites.finding import Finding
from sites.preprocess import Geometry, best_class, own_scores, prepare, recipe_of
from sites.subject import Subject


@dataclass(frozen=True)
class Model:
    """A network ready to predict, and the configuration it was trained with."""

    network: torch.nn.Module
    config: FederationConfig
    device: torch.device


@dataclass(frozen=True)
class Options:
    """What to do with a subject, and which maps to keep besides the labels.

    flips: average over the 8 mirror images, at 8 times the time.
    probabilities, uncertainty: keep the maps; what is derived from them is computed anyway.
    """

    flips: bool = False
    postprocess: PostProcessing = RECOMMENDED
    probabilities: bool = False
    uncertainty: bool = False


@dataclass(frozen=True, eq=False)
class Prediction:
    """One subject segmented; every array is on the subject's whole grid, (X, Y, Z) in RAS.

    subject: its id.
    labels: uint8 system labels.
    brain: bool, where any modality is not 0.
    probabilities: float32 (4, X, Y, Z) of the system labels before post-processing, or None.
    entropy: float32, of those probabilities; 0 sure, 1 all four equally likely (entropy / ln 4),
        or None.
    spacing: mm; affine: 4x4, RAS voxel -> mm; file_affine: 4x4, the files' own voxel -> mm.
    volumes_ml: of each of `common.brats.STRUCTURES`; found_ml: the same before post-processing.
    tumour_entropy: mean entropy inside the predicted whole tumour; None if there is none.
    flip_agreement: mean Dice of the mirror images' whole tumours with the result's; None without flips.
    features: what the warnings were decided from (`client.familiarity`).
    warnings: what makes the input or the prediction doubtful, in words.
    findings: what was found about the subject's files.
    """

    subject: str
    labels: np.ndarray
    brain: np.ndarray
    probabilities: np.ndarray | None
    entropy: np.ndarray | None
    spacing: tuple[float, float, float]
    affine: np.ndarray
    file_affine: np.ndarray
    volumes_ml: dict[str, float]
    found_ml: dict[str, float]
    tumour_entropy: float | None
    flip_agreement: float | None
    features: Features
    warnings: tuple[str, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, eq=False)
class Segmented:
    """What a network and the steps after it make of one image, inside `geometry.box`, (X, Y, Z) in RAS.

    labels: uint8 system labels after post-processing.
    probabilities: float32 (4, X, Y, Z) of the system labels before it.
    found, removed: voxels of each of `common.brats.STRUCTURES` before it, and those of them that it
        took away.
    flip_agreement: as in `Prediction`.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    found: dict[str, int]
    removed: dict[str, int]
    flip_agreement: float | None


def load_model(path: Path) -> Model:
    """Read a run's `model.safetensors`.

    Raises:
        BadWeights: it is not a model file of fedbrats, or it does not fit its own configuration.
    """
    weights, about = load_weights(path)
    try:
        config = FederationConfig.model_validate(about["config"])
        network = network_for(config)
    except (KeyError, ValueError) as error:  # pydantic's refusals are ValueErrors too
        raise BadWeights(f"{path}: holds no configuration that this version knows.") from error
    check_update(weights, network.state_dict())
    network.load_state_dict(weights)
    # the machine it was trained on may have had other cores, and bf16
    here = config.training.model_copy(update={"threads": None})
    if here.precision == "bf16":
        here = here.model_copy(update={"precision": "auto"})
    use_threads(here)
    device = best_device()
    # as in training, so that labels are equal to the voxel in bf16 too
    network = network.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return Model(network, config.model_copy(update={"training": here}), device)


def segment(
    model: Model,
    subject: Subject,
    options: Options | None = None,
    reference: Reference | None = None,
) -> tuple[Prediction | None, list[Finding]]:
    """Segment one subject; a segmentation that lies beside the scan is not read.

    Returns:
        The prediction, or None if the subject cannot be used; and what was found about its files.

    Raises:
        MemoryError: the subject is larger than any head, or than the memory.
    """
    options = options or Options()
    recipe = recipe_of(model.config)
    unlabelled = replace(subject, segmentation=None)
    scan, findings = examine(unlabelled, modalities=recipe.modalities, require_labels=False)
    if scan is None:
        return None, findings
    prepared = prepare(scan, recipe)
    geometry = prepared.geometry
    segmented = segment_image(model, prepared.image, geometry, options)
    labels, probabilities = segmented.labels, segmented.probabilities
    entropy = normalised_entropy(probabilities)

    brain = brain_of(scan)
    tumour = labels != BACKGROUND
    tumour_entropy = float(entropy[tumour].mean()) if tumour.any() else None
    millilitres = float(np.prod(scan.spacing)) / 1000
    codes = {finding.code for finding in findings}
    labels = _in_whole_image(labels, geometry, BACKGROUND)
    inside = int(np.count_nonzero(brain & (labels != BACKGROUND)))
    found_ml = {name: count * millilitres for name, count in segmented.found.items()}
    features = input_features(scan) | prediction_features(
        inside, int(np.count_nonzero(brain)), tumour_entropy, segmented.flip_agreement
    )
    for region in REGIONS:
        features[f"found_ml/{region}"] = found_ml[region]
        features[f"removed_ml/{region}"] = segmented.removed[region] * millilitres
    return Prediction(
        subject=subject.id,
        labels=labels,
        brain=brain,
        probabilities=_whole_probabilities(probabilities, geometry)
        if options.probabilities
        else None,
        entropy=_in_whole_image(entropy, geometry, 0) if options.uncertainty else None,
        spacing=scan.spacing,
        affine=scan.affine,
        file_affine=scan.file_affine,
        volumes_ml={
            name: float(np.isin(labels, members).sum()) * millilitres
            for name, members in STRUCTURES.items()
        },
        found_ml=found_ml,
        tumour_entropy=tumour_entropy,
        flip_agreement=segmented.flip_agreement,
        features=features,
        warnings=tuple(judge(features, codes, reference)),
        findings=tuple(findings),
    ), findings


def segment_image(
    model: Model, image: np.ndarray, geometry: Geometry, options: Options
) -> Segmented:
    """From a prepared image (C, X, Y, Z) on the working grid to labels in the subject's own voxels.

    Raises:
        MemoryError: there is not enough of it.
    """
    scores, agreement = _scores(model, image, options.flips)
    own = own_scores(scores, geometry)
    bare = best_class(own)
    probabilities = torch.softmax(own, dim=0).cpu().numpy()
    labels = postprocess(bare, probabilities, geometry.spacing, options.postprocess)
    found, removed = {}, {}
    for name, members in STRUCTURES.items():
        before = np.isin(bare, members)
        found[name] = int(np.count_nonzero(before))
        removed[name] = int(np.count_nonzero(before & ~np.isin(labels, members)))
    return Segmented(labels, probabilities, found, removed, agreement)


def normalised_entropy(probabilities: np.ndarray) -> np.ndarray:
    """float32 (X, Y, Z): -sum p ln p / ln 4 of probabilities (4, X, Y, Z); 0 sure, 1 clueless."""
    entropy: np.ndarray = np.zeros(probabilities.shape[1:], np.float32)
    for p in probabilities:  # one class at a time: four maps of logarithms would be 150 MB
        entropy -= p * np.log(np.maximum(p, np.float32(1e-12)))
    return np.clip(entropy / np.float32(math.log(N_CLASSES)), 0, 1)


def save(prediction: Prediction, labels: Path) -> list[Path]:
    """Write the labels to `labels` (.nii or .nii.gz), and the maps that were kept beside it.

    Raises:
        OSError: a file cannot be written, which `filename` names; nothing has changed then.
    """
    place = prediction.affine, prediction.file_affine
    probabilities, entropy = map_paths(labels)
    files = {labels: labels_file(labels, prediction.labels, *place)}
    if prediction.probabilities is not None:
        about = "probabilities: background, NCR, ED, ET"
        files[probabilities] = map_file(probabilities, prediction.probabilities, *place, about)
    if prediction.entropy is not None:
        files[entropy] = map_file(entropy, prediction.entropy, *place, "entropy, 0 sure to 1")
    write_together(files)
    return list(files)


def written_by(options: Options, labels: Path) -> list[Path]:
    """The files that `save` will write for these options."""
    probabilities, entropy = map_paths(labels)
    maps = [(options.probabilities, probabilities), (options.uncertainty, entropy)]
    return [labels, *(path for wanted, path in maps if wanted)]


def map_paths(labels: Path) -> tuple[Path, Path]:
    """Where the probabilities and the entropy of a segmentation lie."""
    suffix = ".nii.gz" if labels.name.endswith(".nii.gz") else ".nii"
    stem = labels.name.removesuffix(suffix)
    return (
        labels.with_name(f"{stem}-probabilities{suffix}"),
        labels.with_name(f"{stem}-entropy{suffix}"),
    )


def _scores(model: Model, image: np.ndarray, flips: bool) -> tuple[torch.Tensor, float | None]:
    try:
        if flips:
            return flipped_scores(model.network, image, model.config, model.device)
        return class_scores(model.network, image, model.config, model.device), None
    except RuntimeError as error:  # torch's own are no MemoryErrors
        if not is_full_memory(error):
            raise
        raise MemoryError(str(error)) from error


def _in_whole_image(inside: np.ndarray, geometry: Geometry, around: float) -> np.ndarray:
    whole = np.full(geometry.shape, around, inside.dtype)
    (x0, y0, z0), (x1, y1, z1) = geometry.box
    whole[x0:x1, y0:y1, z0:z1] = inside
    return whole


def _whole_probabilities(inside: np.ndarray, geometry: Geometry) -> np.ndarray:
    whole = np.zeros((N_CLASSES, *geometry.shape), np.float32)
    (x0, y0, z0), (x1, y1, z1) = geometry.box
    whole[BACKGROUND] = 1
    whole[:, x0:x1, y0:y1, z0:z1] = inside
    return whole
