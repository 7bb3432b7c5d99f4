"""The scores of one subject, whatever segmented it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import client.subject_results as module
from client.postprocessing import NONE, RECOMMENDED, REFERENCE
from client.prediction import Options, load_model, segment
from client.subject_results import (
    PLAIN,
    plain_segmenter,
    segmentation_remarks,
    segmenter_of,
    subject_result,
)
from common import lesions
from common.brats import STRUCTURES
from common.evaluation_document import EvaluationError
from common.evaluation_summary import LESION_METRICS, METRICS
from common.lesions import lesion_scores
from common.metrics import REGIONS, hd95
from common.model import initial_weights
from common.weights import save_weights
from sites.subject import discover


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


def test_hd95_of_a_lesion_that_is_all_there_is_is_not_computed_twice(
    make_subject, truth, monkeypatch
):
    """WT has two lesions, TC and ET one that is found in two pieces, and lastly a miss and a false one."""
    split = truth.copy()
    split[4, :10, :10] = 0
    moved = np.roll(truth, 12, axis=2)
    found_one = np.roll(truth, 1, axis=1)
    found_one[20:] = 0
    made = (np.roll(truth, 1, axis=1), split, found_one, moved, truth * 0)
    for number, labels in enumerate(made):
        subject = make_subject(f"x{number}", np.zeros((4, *truth.shape)), truth)
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(lesions, "hd95", lambda *a, calls=calls: calls.append(1) or hd95(*a))
            found = scored(subject, labels).scores
        for region in REGIONS:
            masks = (np.isin(of, STRUCTURES[region]) for of in (labels, truth))
            assert found[region]["lesion_hd95"] == lesion_scores(*masks, (1, 1, 1)).hd95
            if number < 3 and region != "WT":
                assert found[region]["lesion_hd95"] == found[region]["hd95"] > 0
        assert len(calls) == (2 if number < 3 else 4), "of WT's two lesions, and of what was missed"


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


@pytest.mark.parametrize(
    "options",
    [Options(flips=True), Options(postprocess=REFERENCE)],
    ids=["flips and recommended", "reference"],
)
def test_with_flips_and_steps_the_labels_are_those_that_predict_writes(
    options, prepared, cohort_data, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr("client.device.available_cores", lambda: 1)  # other sessions are here too
    config = tiny_config()
    torch.manual_seed(0)
    weights = {  # untrained ones say the same everywhere
        name: of + 0.3 * torch.randn_like(of) if of.is_floating_point() else of
        for name, of in initial_weights(config).items()
    }
    path = tmp_path / "model.safetensors"
    save_weights(path, weights, {"config": config.agreed()})
    model = load_model(path)
    subject = prepared.ready[0]
    [source] = [s for s in discover(cohort_data).subjects if s.id == subject.id]
    made, _ = segment(model, source, options)
    assert made is not None
    # labels outside the brain widen the box of the truth: here to the whole image
    whole = ((0, 0, 0), subject.geometry.shape)
    wide = replace(subject, geometry=replace(subject.geometry, truth_box=whole))
    labels = segmenter_of(model, options)(wide)
    np.testing.assert_array_equal(labels, made.labels)
    assert (labels != segmenter_of(model, PLAIN)(wide)).any(), "the options do something here"


@pytest.mark.parametrize("options", [PLAIN, Options(postprocess=REFERENCE)], ids=["plain", "steps"])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
    ids=["numpy", "cuda", "cpu"],
)
def test_too_little_memory_is_said_in_the_same_words_with_and_without_options(
    options, error, prepared, tiny_config, tmp_path, monkeypatch
):
    config = tiny_config()
    path = tmp_path / "model.safetensors"
    save_weights(path, initial_weights(config), {"config": config.agreed()})
    model = load_model(path)

    def exhausted(*_, **__):
        raise error

    monkeypatch.setattr(model.network, "forward", exhausted)
    subject = prepared.ready[0]
    with pytest.raises(
        EvaluationError, match=f"{subject.id} is too large for this machine's memory"
    ):
        segmenter_of(model, options)(subject)


def test_another_error_of_the_network_is_not_called_a_lack_of_memory(
    monkeypatch, make_subject, truth
):
    def broken(subject):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(module, "plain_segmenter", lambda model: broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        segmenter_of(None, PLAIN)(labelled(make_subject, truth))


def test_what_was_done_to_the_labels_is_said_unless_it_is_nothing():
    assert segmentation_remarks(PLAIN) == []
    [said] = segmentation_remarks(Options(postprocess=REFERENCE))
    assert "no mirror images" in said
    assert "threshold 0.5, opening 1 mm, closing 1 mm, no pieces under 100 mm³" in said
    [said] = segmentation_remarks(Options(flips=True, postprocess=NONE))
    assert "mean of the 8 mirror images and no post-processing" in said
    assert "holes filled" in segmentation_remarks(Options(postprocess=RECOMMENDED))[0]
