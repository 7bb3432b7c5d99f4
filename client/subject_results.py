"""Every score of single subjects, whatever segments them: what an evaluation is made from.

A `Segmenter` turns a prepared subject into labels: as the rounds of a federation do, or as `fed-client
predict` does with flips and post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from client.evaluation import measured, predict
from client.postprocessing import NONE, in_words
from client.prediction import Model, Options, segment_image
from common.brats import BACKGROUND, STRUCTURES
from common.evaluation_document import EvaluationError
from common.evaluation_summary import SubjectResult
from common.full_memory import is_full_memory
from common.lesions import lesion_scores
from common.metrics import REGIONS
from sites.cache import CachedSubject
from sites.preprocess import placed

Segmenter = Callable[[CachedSubject], np.ndarray]
"""A prepared subject -> uint8 system labels in its own voxels inside `geometry.truth_box`."""
PLAIN = Options(postprocess=NONE)  # what the rounds of a federation are measured with


def segmenter_of(model: Model, options: Options) -> Segmenter:
    """The plain one where nothing else is asked for: its figures are those of the rounds to the last bit.

    Raises, when it segments:
        EvaluationError: the memory is too small for the subject.
    """
    segment = (
        plain_segmenter(model) if is_plain(options) else segmenter_as_predicted(model, options)
    )

    def failing_in_words(subject: CachedSubject) -> np.ndarray:
        try:
            return segment(subject)
        except (MemoryError, RuntimeError) as error:
            if not is_full_memory(error):
                raise
            raise EvaluationError(
                f"{subject.id} is too large for this machine's memory; move it elsewhere."
            ) from error

    return failing_in_words


def is_plain(options: Options) -> bool:
    return not options.flips and options.postprocess == NONE


def plain_segmenter(model: Model) -> Segmenter:
    """One pass of the network, as in the rounds of a federation."""

    def segment(subject: CachedSubject) -> np.ndarray:
        return predict(model.network, subject.image(), subject.geometry, model.config, model.device)

    return segment


def segmenter_as_predicted(model: Model, options: Options) -> Segmenter:
    """The labels of `client.prediction.segment`, inside the box that a subject's truth has."""

    def segment(subject: CachedSubject) -> np.ndarray:
        image = np.asarray(subject.image())
        labels = segment_image(model, image, subject.geometry, options).labels
        return placed(labels, subject.geometry)

    return segment


def segmentation_of(options: Options) -> dict[str, Any]:
    """How subjects were segmented, for an evaluation's document."""
    return {"flips": options.flips, "postprocess": asdict(options.postprocess)}


def segmentation_remarks(options: Options) -> list[str]:
    """What a reader must know of an evaluation that is not plain, in words."""
    if is_plain(options):
        return []
    steps = in_words(options.postprocess)
    flips = "the mean of the 8 mirror images" if options.flips else "no mirror images"
    after = f"post-processing ({steps})" if steps else "no post-processing"
    remark = (
        f"Segmented with {flips} and {after}: these are not the figures of the rounds, which measure the "
        "network's labels as they are."
    )
    return [remark]


def subject_result(
    site: str, subject: CachedSubject, labels: np.ndarray, *, patient: str, grade: str | None
) -> SubjectResult:
    """The scores of one subject's `labels`, as a `Segmenter` gives them.

    Raises:
        ValueError: the labels are not uint8 system labels of the truth's shape.
    """
    truth = np.asarray(subject.truth())
    geometry = subject.geometry
    whole = measured(subject, labels, surface_distances=True)
    scores = {structure: dict(own) for structure, own in whole.scores.items()}
    for region in REGIONS:
        predicted, true = (np.isin(of, STRUCTURES[region]) for of in (labels, truth))
        lesions = lesion_scores(
            predicted, true, geometry.spacing, whole_hd95=scores[region]["hd95"]
        )
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
