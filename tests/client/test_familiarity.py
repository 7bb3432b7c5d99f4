"""What is unlike the training data is said in words, and an ordinary subject gets no warning."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from client.familiarity import (
    BadReference,
    Reference,
    input_features,
    judge,
    load_reference,
    prediction_features,
    reference_of,
    save_reference,
)
from common.brats import MODALITIES
from sites.checks import Scan, examine
from sites.subject import discover

TRUSTED = prediction_features(500, 10_000, 0.2, 0.95)


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[Scan]:
    from sites.phantom_cohort import write_cohort

    out = tmp_path_factory.mktemp("phantom")
    write_cohort(out, sites=3, subjects_per_site=2, shape=(48, 48, 32), seed=3)
    scans = []
    for subject in discover(out).subjects:
        scan, _ = examine(subject, modalities=MODALITIES)
        assert scan is not None
        scans.append(scan)
    return scans


@pytest.fixture(scope="module")
def usual(scans) -> Reference:
    return reference_of([input_features(s) | TRUSTED for s in scans], model="m", flips=True)


def changed(scan: Scan, **images: np.ndarray) -> Scan:
    return dataclasses.replace(scan, images=dict(scan.images) | images)


def inverted(voxels: np.ndarray) -> np.ndarray:
    return np.where(voxels > 0, voxels.max() + 1 - voxels, 0)


def noise(voxels: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.where(voxels > 0, rng.integers(1, 1000, voxels.shape), 0)


def warnings_of(scan: Scan, reference: Reference | None = None) -> list[str]:
    return judge(input_features(scan) | TRUSTED, (), reference)


def test_ordinary_subjects_get_no_warning(scans, usual):
    for scan in scans:
        assert warnings_of(scan) == []
        assert warnings_of(scan, usual) == []


@pytest.mark.parametrize("modality", MODALITIES)
def test_noise_in_place_of_an_image_is_named(modality, scans):
    for scan in scans:
        said = " ".join(warnings_of(changed(scan, **{modality: noise(scan.images[modality])})))
        assert f"{modality} looks like noise" in said


@pytest.mark.parametrize("modality", ["t1", "t1ce", "t2"])
def test_inverted_contrast_is_noticed(modality, scans):
    for scan in scans:
        assert warnings_of(changed(scan, **{modality: inverted(scan.images[modality])}))


@pytest.mark.parametrize("pair", list(itertools.combinations(MODALITIES, 2))[1:])
def test_swapped_modalities_are_noticed_with_a_reference(pair, scans, usual):
    """All but t1 with t1ce, which a tumour that enhances little makes too much alike."""
    a, b = pair
    noticed = [
        bool(warnings_of(changed(scan, **{a: scan.images[b], b: scan.images[a]}), usual))
        for scan in scans
    ]
    assert sum(noticed) >= len(scans) - 1, noticed


def test_swapped_modalities_are_noticed_without_one_where_their_contrast_tells(scans):
    for scan in scans:
        for a, b in (("t1", "t2"), ("t1ce", "t2")):
            assert warnings_of(changed(scan, **{a: scan.images[b], b: scan.images[a]}))


def test_a_copy_with_other_numbers_is_noticed_but_not_what_the_checks_say_already(scans):
    scan = scans[0]
    copied = changed(scan, t1ce=scan.images["t1"] * 2)
    assert any("nearly the same" in w for w in warnings_of(copied))
    features = input_features(copied) | TRUSTED
    assert not any("nearly the same" in w for w in judge(features, ["identical-modalities"]))


def test_the_grid_is_judged(scans):
    features = input_features(scans[0]) | TRUSTED

    def said(**changes: float) -> str:
        return " ".join(judge(features | {k.replace("_mm", ""): v for k, v in changes.items()}))

    assert "far from the 1 mm" in " ".join(judge(features | {"spacing/z": 5.0}))
    assert "far from the 1 mm" not in " ".join(
        judge(features | {"spacing/z": 5.0}, ["anisotropic"])
    )
    assert "implausible" in said(brain_ml=400.0)
    assert "implausible" in said(brain_ml=2400.0)
    assert said(brain_ml=1400.0) == ""
    # 60 ml is a phantom on a small grid, unless the voxels are wrong too
    assert said(brain_ml=60.0) == ""
    assert "implausible" in " ".join(judge(features | {"spacing/x": 0.3, "brain_ml": 60.0}))


def test_a_brain_that_is_cut_off_is_noticed(scans):
    scan = scans[0]
    half = {m: v[:, :, v.shape[2] // 2 :] for m, v in scan.images.items()}
    assert any("cut off" in w for w in warnings_of(changed(scan, **half)))


def test_signs_in_the_prediction_are_judged():
    ordinary = {f"spacing/{axis}": 1.0 for axis in "xyz"} | {"brain_ml": 1400.0, "cut": 0.0}

    def said(*arguments) -> str:
        return " ".join(judge(ordinary | prediction_features(*arguments)))

    assert said(100, 1000, 0.2, 0.9) == ""
    assert said(100, 1000, None, None) == ""
    assert "no tumour" in said(0, 1000, None, None)
    assert "60% of the brain" in said(600, 1000, 0.2, None)
    assert "unsure" in said(100, 1000, 0.8, None)
    assert "mirror images" in said(100, 1000, 0.2, 0.4)


def test_what_post_processing_took_away_is_said_and_not_that_there_was_nothing():
    ordinary = {f"spacing/{axis}": 1.0 for axis in "xyz"} | {"brain_ml": 1400.0, "cut": 0.0}

    def said(left: int, found: float, removed: float, **more: float) -> list[str]:
        volumes = {"found_ml/WT": found, "removed_ml/WT": removed}
        more = {name.replace("_ml_", "_ml/"): value for name, value in more.items()}
        return judge(ordinary | prediction_features(left, 1000, None, None) | volumes | more)

    (all_gone,) = said(0, 0.812, 0.812, found_ml_ET=0.2, removed_ml_ET=0.2)
    assert "post-processing removed 0.81 of 0.81 ml of tumour" in all_gone
    (much,) = said(100, 12.0, 8.0)
    assert "removed 8.0 of 12.0 ml of tumour" in much
    assert said(100, 12.0, 2.0, found_ml_ET=1.0, removed_ml_ET=0.9) == []
    (part,) = said(100, 12.0, 0.0, found_ml_ET=0.008, removed_ml_ET=0.008)
    assert "removed 0.008 of 0.008 ml of enhancing tumour" in part
    (outside,) = said(0, 12.0, 1.0)
    assert "where every scan is 0" in outside
    (nothing,) = said(0, 0.0, 0.0)
    assert "no tumour was found" in nothing


def test_grain_is_1_for_white_noise_and_small_for_a_smooth_image(scans):
    shape = scans[0].images["t1"].shape
    ramp = np.broadcast_to(np.arange(1, shape[0] + 1)[:, None, None], shape)
    white = np.random.default_rng(0).normal(1000, 10, shape)
    scan = dataclasses.replace(scans[0], images={"t1": white, "t2": ramp})
    features = input_features(scan)
    assert features["grain/t1"] == pytest.approx(1, abs=0.02)
    assert features["grain/t2"] < 0.1
    assert features["alike/t1-t2"] == pytest.approx(
        np.corrcoef(white.ravel(), ramp.ravel())[0, 1], abs=1e-5
    )


def test_a_reference_is_median_and_deviation_and_outliers_are_named():
    subjects = [{"grain/t1": 0.3 + 0.01 * i, "tumour_share": 0.1} for i in range(7)]
    made = reference_of(subjects, model="m", flips=False)
    assert made.median == {"grain/t1": pytest.approx(0.33)}  # how large tumours are is no matter
    assert made.deviation == {"grain/t1": pytest.approx(0.02)}
    grid = {f"spacing/{axis}": 1.0 for axis in "xyz"} | {"brain_ml": 1400.0, "cut": 0.0}
    # a spread of at least 0.05: 6 of them are 0.3
    assert judge(grid | {"grain/t1": 0.62}, (), made) == []
    (warning,) = judge(grid | {"grain/t1": 0.64}, (), made)
    assert "grain of t1 is 0.64" in warning
    assert "7 subjects" in warning


def test_intensities_near_the_end_of_float32_are_judged_as_others_are(scans):
    scan = scans[0]
    huge = {m: v.astype(np.float32) * np.float32(1e33) for m, v in scan.images.items()}
    with np.errstate(all="raise"):
        features = input_features(changed(scan, **huge))
    usual = input_features(scan)
    assert features.keys() == usual.keys()
    for name, value in usual.items():
        assert features[name] == pytest.approx(value, abs=1e-4), name


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model": "m", "flips": 0, "subjects": 1e999}'])
def test_a_file_made_to_break_the_reader_is_no_reference(text, tmp_path):
    path = tmp_path / "reference.json"
    path.write_text(text)
    with pytest.raises(BadReference, match="no reference"):
        load_reference(path, model="m", flips=False)


def test_a_reference_is_read_back_and_refused_where_it_does_not_belong(usual, tmp_path):
    path = tmp_path / "reference.json"
    save_reference(path, usual)
    assert load_reference(path, model="m", flips=True) == usual
    with pytest.raises(BadReference, match="another model"):
        load_reference(path, model="other", flips=True)
    with pytest.raises(BadReference, match="with flips"):
        load_reference(path, model="m", flips=False)
    with pytest.raises(BadReference, match="at least 5"):
        reference_of([TRUSTED] * 4, model="m", flips=True)
    document = json.loads(path.read_text())
    for broken in (
        "{",
        "[]",
        json.dumps(document | {"median": 3}),
        json.dumps(document | {"median": {"strange": 1}, "deviation": {"strange": 1}}),
        json.dumps(document | {"median": {"cut": float("nan")}, "deviation": {"cut": 1}}),
    ):
        path.write_text(broken)
        with pytest.raises(BadReference, match="is no reference"):
            load_reference(path, model="m", flips=True)
