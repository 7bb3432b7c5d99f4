from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sites.phantom import LARGEST_AXIS, SMALLEST_SHAPE, SiteModel, synthesise
from sites.phantom_signal import Scanner

SHAPE = (40, 40, 28)
SITE = SiteModel(1, "CBICA")


def ids(n: int) -> list[str]:
    return [f"BraTS20_Training_{k:03d}" for k in range(1, n + 1)]


def test_subject_looks_like_a_brats_subject() -> None:
    phantom = synthesise(0, "BraTS20_Training_001", SITE, "HGG", SHAPE)
    assert set(phantom.images) == {"t1", "t1ce", "t2", "flair"}
    brain = phantom.images["t1"] > 0
    assert 1000 < phantom.facts.brain_ml < 2000  # an adult's, in ml
    for image in phantom.images.values():
        assert (image.dtype, image.shape) == (np.int16, SHAPE)
        assert image.min() == 0  # skull-stripped
        assert np.array_equal(image > 0, brain)
    assert phantom.labels.dtype == np.uint8
    assert set(np.unique(phantom.labels)) == {0, 1, 2, 4}
    assert brain[phantom.labels > 0].all()


def test_facts_are_the_labelled_volumes() -> None:
    phantom = synthesise(5, "BraTS20_Training_003", SITE, "HGG", SHAPE)
    ml = (240 / SHAPE[0]) * (240 / SHAPE[1]) * (155 / SHAPE[2]) / 1000
    counts = {label: int((phantom.labels == label).sum()) for label in (1, 2, 4)}
    assert phantom.facts.wt_ml == pytest.approx(sum(counts.values()) * ml, abs=0.01)
    assert phantom.facts.tc_ml == pytest.approx((counts[1] + counts[4]) * ml, abs=0.01)
    assert phantom.facts.et_ml == pytest.approx(counts[4] * ml, abs=0.01)


@pytest.mark.parametrize("other", ["seed", "subject", "site"])
def test_another_seed_subject_or_site_is_another_scan(other: str) -> None:
    first = synthesise(0, "BraTS20_Training_001", SITE, "HGG", SHAPE)
    second = synthesise(
        1 if other == "seed" else 0,
        "BraTS20_Training_002" if other == "subject" else "BraTS20_Training_001",
        replace(SITE, scanner=Scanner(noise=0.06)) if other == "site" else SITE,
        "HGG",
        SHAPE,
    )
    assert not np.array_equal(first.images["t1"], second.images["t1"])
    # the patient stays the same whichever scanner is used
    assert np.array_equal(first.labels, second.labels) == (other == "site")


def test_low_grade_tumours_enhance_far_less_than_high_grade() -> None:
    share = {
        grade: [
            phantom.facts.et_ml / phantom.facts.wt_ml
            for phantom in (synthesise(0, i, SITE, grade, SHAPE) for i in ids(30))
        ]
        for grade in ("HGG", "LGG")
    }
    assert np.mean(share["HGG"]) > 5 * np.mean(share["LGG"])
    assert sum(s == 0 for s in share["LGG"]) >= 8  # enhancement is often absent
    assert sum(s == 0 for s in share["HGG"]) <= 2


def test_tissues_stand_out_where_a_radiologist_expects_them() -> None:
    z: dict[tuple[str, int], list[float]] = {}
    for subject_id in ids(12):
        phantom = synthesise(0, subject_id, SITE, "HGG", SHAPE)
        for modality, image in phantom.images.items():
            values = image[image > 0].astype(float)
            for label in (1, 2, 4):
                inside = image[phantom.labels == label].astype(float)
                z.setdefault((modality, label), []).append(
                    (inside.mean() - values.mean()) / values.std()
                )
    level = {key: float(np.mean(values)) for key, values in z.items()}
    assert level["flair", 2] > 1  # oedema is bright on FLAIR
    assert level["t1ce", 4] > 1.5 > level["t1ce", 2]  # only enhancement takes up contrast
    assert level["t1", 4] < 0
    assert level["t1ce", 1] < 0 < level["t2", 1]  # necrosis is dark on T1ce, bright on T2


def test_annotators_of_a_site_draw_wider_or_tighter() -> None:
    def whole(annotator_mm: float) -> float:
        site = replace(SITE, annotator_mm=annotator_mm)
        return sum(synthesise(0, i, site, "HGG", SHAPE).facts.wt_ml for i in ids(8))

    assert whole(-0.9) < 0.97 * whole(0) < 0.97 * 0.97 * whole(0.9)


def test_smallest_shape_holds_every_tumour() -> None:
    for grade in ("HGG", "LGG"):
        site = replace(SITE, tumour_size=0.75, annotator_mm=-0.9)
        phantoms = [synthesise(2, i, site, grade, SMALLEST_SHAPE) for i in ids(60)]
        assert min(int((p.labels > 0).sum()) for p in phantoms) >= 1


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((16, 16, 12), "16x16x12 is too small"),
        ((80, 80, 8), "at least 32x32x20"),
        ((80, 80), "three axes"),
        ((80, LARGEST_AXIS + 1, 80), "too large"),
    ],
)
def test_unsupported_shape_is_refused(shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        synthesise(0, "BraTS20_Training_001", SITE, "HGG", shape)  # type: ignore[arg-type]


def test_unknown_grade_is_refused() -> None:
    with pytest.raises(ValueError, match="HGG or LGG"):
        synthesise(0, "BraTS20_Training_001", SITE, "II", SHAPE)
