from __future__ import annotations

import numpy as np
import pytest

from sites.segmentation import translate


def run(in_file, coding="auto", file="x_seg.nii.gz", dtype=np.uint8):
    """Translate a volume that holds the labels `in_file`, in that order, among zeros."""
    voxels = np.zeros((5, 4, 3), dtype, order="F")
    voxels[: len(in_file), 2, 1] = in_file
    reports = []
    labels = translate(voxels, file, coding, lambda *finding: reports.append(finding))
    return labels, reports


@pytest.mark.parametrize(
    ("coding", "in_file", "in_system"),
    [
        ("auto", (1, 2, 4), (1, 2, 3)),
        ("auto", (2, 2), (2, 2)),
        ("auto", (), ()),
        ("brats", (1, 2, 4), (1, 2, 3)),
        ("brats2013", (1, 2, 3, 4), (1, 2, 1, 3)),
        ("brats2023", (1, 2, 3), (1, 2, 3)),
        ("msd", (1, 2, 3), (2, 1, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_codings(coding, in_file, in_system, dtype):
    labels, reports = run(in_file, coding, dtype=dtype)
    expected = np.zeros((5, 4, 3), np.uint8)
    expected[: len(in_system), 2, 1] = in_system
    np.testing.assert_array_equal(labels, expected)
    assert labels.dtype == np.uint8
    assert reports == []


@pytest.mark.parametrize(
    ("coding", "in_file", "code"),
    [
        ("auto", (3, 4), "ambiguous-labels"),
        ("auto", (7,), "unknown-label"),
        ("auto", (256,), "unknown-label"),  # not 0 after a careless cast to uint8
        ("auto", (257,), "unknown-label"),
        ("auto", (-1,), "negative-label"),
        ("auto", (1.5,), "fractional-labels"),
        ("auto", (np.nan,), "nan"),
        ("auto", (np.inf,), "nan"),
        ("brats", (3,), "unknown-label"),
        ("brats2023", (4,), "unknown-label"),
        ("msd", (4,), "unknown-label"),
        ("brats2013", (5,), "unknown-label"),
    ],
)
def test_labels_without_one_meaning_are_refused(coding, in_file, code):
    labels, ((file, severity, found, what, remedy),) = run(in_file, coding, dtype=np.float32)
    assert labels is None
    assert (file, severity, found) == ("x_seg.nii.gz", "error", code)
    assert what
    assert remedy


def test_the_way_out_of_ambiguity_is_named():
    _, ((*_, remedy),) = run((3, 4))
    assert "label_coding: brats2013" in remedy


def test_label_3_is_taken_for_enhancing_tumour_but_said_unless_the_name_is_of_2023():
    labels, ((_, severity, code, _, _),) = run((1, 2, 3))
    assert (severity, code) == ("warning", "label-3-for-4")
    assert labels.max() == 3
    assert run((1, 2, 3), file="BraTS-GLI-00001-000-seg.nii.gz")[1] == []
    assert run((1, 2, 3), "brats2023")[1] == []


def test_rounding_by_scl_slope_is_no_fraction():
    labels, reports = run((0.99999, 2.00001, 4), dtype=np.float32)
    assert reports == []
    assert labels[:3, 2, 1].tolist() == [1, 2, 3]


def test_an_image_in_place_of_a_segmentation_is_not_listed_voxel_by_voxel():
    voxels = np.arange(60, dtype=np.int16).reshape((5, 4, 3), order="F")
    reports = []
    assert translate(voxels, "x", "auto", lambda *finding: reports.append(finding)) is None
    ((*_, what, _),) = reports
    assert "is it an image" in what
    assert "59" not in what
