"""Every score of single subjects, whatever segments them: what an evaluation is made from.

A `Segmenter` turns a prepared subject into labels; another one (with flips, with post-processing) is put
in its place without a change here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from client.evaluation import predict
from client.prediction import Model
from common.brats import BACKGROUND, STRUCTURES
from common.evaluation_summary import SubjectResult
from common.lesions import lesion_scores
from common.metrics import REGIONS, subject_metrics
from sites.cache import CachedSubject

Segmenter = Callable[[CachedSubject], np.ndarray]
"""A prepared subject -> uint8 system labels in its own voxels inside `geometry.truth_box`."""


def plain_segmenter(model: Model) -> Segmenter:
    """One pass of the network, as in the rounds of a federation."""
    # as in training: convolutions over channels-last volumes are the fast ones
    network = model.network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    fast = replace(model, network=network)

    def segment(subject: CachedSubject) -> np.ndarray:
        return predict(fast.network, subject.image(), subject.geometry, fast.config, fast.device)

    return segment


def subject_result(
    site: str, subject: CachedSubject, labels: np.ndarray, *, patient: str, grade: str | None
) -> SubjectResult:
    """The scores of one subject's `labels`, as a `Segmenter` gives them.

    Raises:
        ValueError: the labels are not uint8 system labels of the truth's shape.
    """
    truth = np.asarray(subject.truth())
    geometry = subject.geometry
    measured = subject_metrics(
        subject.id,
        labels,
        truth,
        outside=math.prod(geometry.shape) - truth.size,
        spacing=geometry.spacing,
        diagonal_mm=geometry.diagonal_mm,
        surface_distances=True,
    )
    scores = {structure: dict(own) for structure, own in measured.scores.items()}
    for region in REGIONS:
        predicted, true = (np.isin(of, STRUCTURES[region]) for of in (labels, truth))
        lesions = lesion_scores(predicted, true, geometry.spacing)
        scores[region] |= {"lesion_dice": lesions.dice, "lesion_hd95": lesions.hd95}
    millilitres = math.prod(geometry.spacing) / 1000
    return SubjectResult(
        site=site,
        subject=subject.id,
        patient=patient,
        grade=grade or None,
        tumour_ml=int((truth != BACKGROUND).sum()) * millilitres,
        scores=scores,
    )
