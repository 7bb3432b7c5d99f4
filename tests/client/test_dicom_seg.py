"""DICOM-SEG out: the labels come back from the file where they were, in the right segments."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")

from client.dicom_files import DicomError  # noqa: E402
from client.dicom_seg import labels_of, write_dicom_seg  # noqa: E402
from client.dicom_series import find_series, subject_of  # noqa: E402
from tests.client.dicom_study import (  # noqa: E402
    AFFINE,
    CLASSIC,
    PLANES,
    SHAPE,
    change,
    enhanced,
    write_series,
)

CODES = {1: ("6574001", "SCT"), 2: ("79654002", "SCT"), 3: ("C113842", "NCIt")}


@pytest.fixture
def labels() -> np.ndarray:
    drawn = np.random.default_rng(3).choice(4, SHAPE, p=[0.7, 0.1, 0.1, 0.1]).astype(np.uint8)
    drawn[0] = drawn[:, 0] = drawn[:, :, 0] = drawn[:, :, -2:] = 0  # whole slices stay empty
    return drawn


def source_of(folder, **how):
    stored = np.arange(np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE)
    write_series(folder / "flair", stored, **how)
    return find_series(folder, ["flair"])["flair"]


def millimetres(labels: np.ndarray, affine: np.ndarray) -> dict[int, set[tuple[float, ...]]]:
    """Of each label's voxels, RAS, rounded to hundredths."""
    return {
        label: {
            tuple(np.round(point, 2) + 0.0)
            for point in nibabel.affines.apply_affine(affine, np.argwhere(labels == label))
        }
        for label in (1, 2, 3)
    }


def read_back(path) -> dict[int, set[tuple[float, ...]]]:
    volume = highdicom.seg.segread(path).get_volume(combine_segments=True, skip_overlap_checks=True)
    return millimetres(volume.array, np.diag([-1, -1, 1, 1]) @ volume.affine)


def by_hand(path) -> dict[int, set[tuple[float, ...]]]:
    """The same from the frames' own positions, without highdicom."""
    data = pydicom.dcmread(path)
    shared = data.SharedFunctionalGroupsSequence[0]
    along = [float(v) for v in shared.PlaneOrientationSequence[0].ImageOrientationPatient]
    row_mm, column_mm = (float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing)
    found: dict[int, set[tuple[float, ...]]] = {1: set(), 2: set(), 3: set()}
    for frame, group in zip(
        np.atleast_3d(data.pixel_array), data.PerFrameFunctionalGroupsSequence, strict=True
    ):
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        corner = np.array([float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient])
        for r, c in np.argwhere(frame):
            lps = corner + c * column_mm * np.array(along[:3]) + r * row_mm * np.array(along[3:])
            found[number].add(tuple(np.round(lps * (-1, -1, 1), 2) + 0.0))
    return found


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("plane", PLANES)
def test_labels_come_back_where_they_were(plane, reverse, labels, tmp_path):
    source = source_of(tmp_path, plane=plane, reverse=reverse)
    write_dicom_seg(labels, AFFINE, source, tmp_path / "out.dcm", model="m")
    expected = millimetres(labels, AFFINE)
    assert read_back(tmp_path / "out.dcm") == expected
    assert by_hand(tmp_path / "out.dcm") == expected
    # each frame refers to the very slice that it lies on
    seg = pydicom.dcmread(tmp_path / "out.dcm")
    positions = {h.SOPInstanceUID: h.ImagePositionPatient for h in source.headers}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        image = frame.DerivationImageSequence[0].SourceImageSequence[0]
        np.testing.assert_allclose(
            positions[image.ReferencedSOPInstanceUID],
            frame.PlanePositionSequence[0].ImagePositionPatient,
            atol=1e-3,
        )


def test_an_enhanced_source_will_do(labels, tmp_path):
    stored = np.ones(SHAPE, np.uint16)
    write_series(tmp_path / "classic" / "flair", stored, plane="sagittal", **CLASSIC)
    (tmp_path / "s" / "flair").mkdir(parents=True)
    enhanced(tmp_path / "classic" / "flair", tmp_path / "s" / "flair" / "all.dcm")
    source = find_series(tmp_path / "s", ["flair"])["flair"]
    write_dicom_seg(labels, AFFINE, source, tmp_path / "out.dcm", model="m")
    assert by_hand(tmp_path / "out.dcm") == millimetres(labels, AFFINE)


def test_a_predicted_file_on_the_converted_grid_comes_back_in_place(labels, tmp_path):
    """The way that `predict` goes: DICOM to NIfTI, a segmentation on its grid, DICOM-SEG."""
    source = source_of(tmp_path, plane="sagittal")
    (tmp_path / "work").mkdir()
    subject = subject_of(find_series(tmp_path, ["flair"]), tmp_path / "work")
    image = nibabel.load(subject.images["flair"])
    to_own = np.linalg.inv(AFFINE) @ image.affine
    index = np.argwhere(np.ones(image.shape, bool))
    own = np.rint(nibabel.affines.apply_affine(to_own, index)).astype(int)
    in_file = np.array([0, 1, 2, 4], np.uint8)[labels[tuple(own.T)]].reshape(image.shape)
    nibabel.save(nibabel.Nifti1Image(in_file, image.affine), tmp_path / "seg.nii.gz")

    write_dicom_seg(*labels_of(tmp_path / "seg.nii.gz"), source, tmp_path / "o.dcm", model="m")
    assert read_back(tmp_path / "o.dcm") == millimetres(labels, AFFINE)


def test_segments_are_coded_and_the_patient_is_the_sources(labels, tmp_path):
    source = source_of(tmp_path)
    write_dicom_seg(labels, AFFINE, source, tmp_path / "out.dcm", model="round 9, " + "x" * 90)
    seg = highdicom.seg.segread(tmp_path / "out.dcm")
    header = source.headers[0]
    assert seg.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.4"
    assert seg.PatientName == header.PatientName == "Müller^Secret"
    for keyword in ("PatientID", "PatientBirthDate", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert seg.get(keyword) == header.get(keyword)
    assert seg.SeriesInstanceUID != header.SeriesInstanceUID
    assert seg.ContentDescription == "For research; not a medical device."
    assert seg.SegmentationType == "BINARY"
    assert [s.SegmentLabel.split()[0] for s in seg.SegmentSequence] == ["NCR", "ED", "ET"]
    for segment in seg.SegmentSequence:
        kind = segment.SegmentedPropertyTypeCodeSequence[0]
        assert (kind.CodeValue, kind.CodingSchemeDesignator) == CODES[segment.SegmentNumber]
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        assert segment.SegmentAlgorithmName.startswith("fedbrats round 9, xxx")
        assert len(segment.SegmentAlgorithmName) <= 64
    assert len({s.TrackingUID for s in seg.SegmentSequence}) == 3
    referred = seg.ReferencedSeriesSequence[0]
    assert referred.SeriesInstanceUID == header.SeriesInstanceUID


@pytest.mark.parametrize("kept", [[], [2], [1, 3]])
def test_structures_that_are_not_there_are_empty_segments(kept, labels, tmp_path):
    source = source_of(tmp_path)
    labels[~np.isin(labels, kept)] = 0
    write_dicom_seg(labels, AFFINE, source, tmp_path / "out.dcm", model="m")
    assert len(highdicom.seg.segread(tmp_path / "out.dcm").SegmentSequence) == 3
    assert by_hand(tmp_path / "out.dcm") == millimetres(labels, AFFINE)


def test_labels_on_another_grid_are_refused_and_nothing_is_written(labels, tmp_path):
    source = source_of(tmp_path)
    shifted, larger = AFFINE.copy(), AFFINE.copy()
    shifted[0, 3] += 0.4
    larger[:3, :3] *= 1.1
    beyond = AFFINE.copy()
    beyond[2, 3] += 4 * 2.0  # whole voxels, so that a part of the tumour leaves the scan
    for affine in (shifted, larger, beyond):
        with pytest.raises(DicomError, match="does not lie on the grid of flair/"):
            write_dicom_seg(labels, affine, source, tmp_path / "out.dcm", model="m")
    with pytest.raises(ValueError, match=r"0\.\.3"):
        write_dicom_seg(labels + 2, AFFINE, source, tmp_path / "out.dcm", model="m")
    assert not list(tmp_path.glob("*out.dcm*"))


def test_old_sources_that_lack_empty_elements_do(labels, tmp_path):
    for path in write_series(tmp_path / "flair", np.ones(SHAPE, np.uint16)):
        change(path, PatientBirthDate=None, SeriesNumber=None, StudyTime=None, PatientSex=None)
    source = find_series(tmp_path, ["flair"])["flair"]
    write_dicom_seg(labels, AFFINE, source, tmp_path / "out.dcm", model="m")
    assert read_back(tmp_path / "out.dcm") == millimetres(labels, AFFINE)
    assert "PatientBirthDate" not in source.headers[0]


def test_a_source_that_does_not_suffice_is_named_without_its_values(labels, tmp_path):
    for path in write_series(tmp_path / "flair", np.ones(SHAPE, np.uint16)):
        change(path, StudyInstanceUID=None)
    source = find_series(tmp_path, ["flair"])["flair"]
    with pytest.raises(DicomError, match=r"flair/im000\.dcm: its header does not suffice"):
        write_dicom_seg(labels, AFFINE, source, tmp_path / "out.dcm", model="m")
    assert not (tmp_path / "out.dcm").exists()
