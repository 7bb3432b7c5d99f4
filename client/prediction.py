"""A trained model on a patient without labels: a segmentation in the subject's own space.

Writes BraTS labels (0, 1 NCR/NET, 2 ED, 4 ET) on the grid and affine of the subject's own files.
For research; not a medical device.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
import torch
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

from client.device import best_device, use_threads
from client.evaluation import predict
from common.brats import CODINGS, STRUCTURES
from common.config import FederationConfig
from common.files import write_atomically
from common.model import network_for
from common.weights import BadWeights, check_update, load_weights
from sites.checks import Scan, examine
from sites.finding import Finding
from sites.preprocess import Geometry, prepare, recipe_of
from sites.subject import Subject


@dataclass(frozen=True)
class Model:
    """A network ready to predict, and the configuration it was trained with."""

    network: torch.nn.Module
    config: FederationConfig
    device: torch.device


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
    return Model(network.to(device), config.model_copy(update={"training": here}), device)


def segment_subject(
    model: Model, subject: Subject, out: Path
) -> tuple[dict[str, float] | None, list[Finding]]:
    """Write the segmentation of one subject to `out` (.nii or .nii.gz).

    Returns:
        The volume of each structure in millilitres, or None if the subject cannot be used; and what
        was found about it.
    """
    recipe = recipe_of(model.config)
    # a segmentation that lies beside the scan is none of our business here
    unlabelled = replace(subject, segmentation=None)
    scan, findings = examine(unlabelled, modalities=recipe.modalities, require_labels=False)
    if scan is None:
        return None, findings
    prepared = prepare(scan, recipe)
    inside = predict(model.network, prepared.image, prepared.geometry, model.config, model.device)
    labels = _in_whole_image(inside, prepared.geometry)
    write_atomically(out, lambda temporary: _save(labels, scan, temporary, out))
    millilitres = float(np.prod(scan.spacing)) / 1000
    return {
        name: float(np.isin(labels, members).sum()) * millilitres
        for name, members in STRUCTURES.items()
    }, findings


def _in_whole_image(inside: np.ndarray, geometry: Geometry) -> np.ndarray:
    whole = np.zeros(geometry.shape, np.uint8)
    (x0, y0, z0), (x1, y1, z1) = geometry.truth_box
    whole[x0:x1, y0:y1, z0:z1] = inside
    return whole


def _save(labels: np.ndarray, scan: Scan, temporary: Path, out: Path) -> None:
    to_file = {system: file for file, system in CODINGS["brats"].items()}
    table = np.array([to_file[system] for system in range(len(to_file))], np.uint8)
    back = ornt_transform(io_orientation(scan.affine), io_orientation(scan.file_affine))
    own = np.ascontiguousarray(apply_orientation(table[labels], back))
    image = nibabel.Nifti1Image(own, scan.file_affine)
    image.set_qform(scan.file_affine, 1)
    image.set_sform(scan.file_affine, 1)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    if out.name.endswith(".gz"):
        content = gzip.compress(content, 6, mtime=0)
    temporary.write_bytes(content)
