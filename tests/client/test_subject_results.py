"""The scores of one subject, whatever segmented it."""

from __future__ import annotations

import numpy as np
import pytest

from client.prediction import load_model
from client.subject_results import plain_segmenter, subject_result
from common.brats import STRUCTURES
from common.evaluation_summary import LESION_METRICS, METRICS
from common.metrics import REGIONS
from common.model import initial_weights
from common.weights import save_weights


def scored(subject, labels, **more):
    return subject_result("s", subject, labels, **{"patient": "p", "grade": "", **more})


def labelled(make_subject, truth):
    return make_subject("x", np.zeros((4, *truth.shape)), truth)


@pytest.fixture
def truth():
    labels = np.zeros((30, 20, 20), np.uint8)
    labels[2:8, 2:8, 2:8] = 2
    labels[3:7, 3:7, 3:7] = 3
    labels[20:26, 10:16, 10:16] = 2  # a second lesion, without a core
    return labels


def test_a_perfect_segmentation_is_perfect_in_every_score(make_subject, truth):
    found = scored(labelled(make_subject, truth), truth.copy(), grade="HGG")
    assert (found.site, found.subject, found.patient, found.grade) == ("s", "x", "p", "HGG")
    assert found.tumour_ml == pytest.approx(2 * 216 / 1000)
    for structure in STRUCTURES:
        scores = found.scores[structure]
        distances = {m: v for m, v in scores.items() if "hd95" in m}
        assert set(distances.values()) == {0}
        assert {v for m, v in scores.items() if m not in distances} == {1}
        wanted = {*METRICS, *(LESION_METRICS if structure in REGIONS else ())}
        assert scores.keys() == wanted


def test_a_missed_lesion_costs_half_the_lesion_wise_dice_and_less_of_the_other(make_subject, truth):
    labels = truth.copy()
    labels[20:] = 0
    scores = scored(labelled(make_subject, truth), labels).scores
    assert scores["WT"]["lesion_dice"] == pytest.approx(0.5)
    assert scores["WT"]["dice"] == pytest.approx(2 / 3)
    assert scores["ET"]["lesion_dice"] == scores["TC"]["lesion_dice"] == 1


def test_no_grade_is_none(make_subject, truth):
    assert scored(labelled(make_subject, truth), truth).grade is None


def test_a_subject_without_tumour_that_is_left_alone_is_perfect(make_subject):
    nothing = np.zeros((9, 9, 9), np.uint8)
    found = scored(labelled(make_subject, nothing), nothing.copy())
    assert found.tumour_ml == 0
    assert found.regions_dice == 1
    assert found.scores["ET"]["lesion_dice"] == 1


def test_labels_of_another_shape_are_refused(make_subject, truth):
    with pytest.raises(ValueError, match="differ in shape"):
        scored(labelled(make_subject, truth), truth[:-1])


def test_a_model_segments_a_prepared_subject_inside_its_truth_box(prepared, tiny_config, tmp_path):
    config = tiny_config()
    path = tmp_path / "model.safetensors"
    save_weights(path, initial_weights(config), {"config": config.agreed()})
    subject = prepared.ready[0]
    labels = plain_segmenter(load_model(path))(subject)
    assert (labels.shape, labels.dtype) == (subject.truth().shape, np.uint8)
