"""DICOM in: every voxel where the scanner put it, the right modality, nothing about the patient."""

from __future__ import annotations

import subprocess
import sys
import warnings

import nibabel
import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")

from pydicom.uid import RLELossless, generate_uid  # noqa: E402

from client.dicom_files import DicomError, holds_dicom, read_series  # noqa: E402
from client.dicom_roles import role_of  # noqa: E402
from client.dicom_series import (  # noqa: E402
    find_series,
    geometry_of,
    read_volume,
    subject_of,
)
from common.brats import MODALITIES  # noqa: E402
from sites.checks import examine  # noqa: E402
from tests.client.dicom_study import (  # noqa: E402
    AFFINE,
    CLASSIC,
    PLANES,
    SHAPE,
    change,
    enhanced,
    write_series,
)


@pytest.fixture
def voxels() -> np.ndarray:
    return np.random.default_rng(5).permutation(np.prod(SHAPE)).reshape(SHAPE).astype(np.uint16)


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def refusal(folder, work, modalities=("t1",)) -> str:
    with pytest.raises(DicomError) as caught:
        subject_of(find_series(folder, modalities), work)
    text = str(caught.value)
    assert "\n" not in text
    for about_the_patient in ("SECRET", "Secret", "ller", "1950"):
        assert about_the_patient not in text
    assert not list(work.iterdir())
    return text


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("plane", PLANES)
def test_every_voxel_is_where_the_scanner_put_it(plane, reverse, voxels, tmp_path, work):
    files = write_series(
        tmp_path / "s" / "t1", voxels, plane=plane, reverse=reverse, slope=2.0, intercept=-5.0
    )
    subject = subject_of(find_series(tmp_path / "s", ["t1"]), work)
    image = nibabel.load(subject.images["t1"])
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
    inverse = np.linalg.inv(image.affine)
    values = np.asarray(image.dataobj)

    # against the array that the files were made of
    index = np.argwhere(np.ones(SHAPE, bool))
    there = nibabel.affines.apply_affine(inverse @ AFFINE, index)
    np.testing.assert_allclose(there, np.rint(there), atol=1e-4)
    found = values[tuple(np.rint(there).astype(int).T)]
    np.testing.assert_array_equal(found, voxels[tuple(index.T)].astype(int) * 2 - 5)
    # and against another reader of the files, nibabel's (which warns at import, so not above)
    with warnings.catch_warnings(action="ignore"):
        from nibabel.nicom.dicomwrappers import wrapper_from_data
    for path in files:
        data = pydicom.dcmread(path)
        slice_affine = wrapper_from_data(data).affine  # (row, column, 0) -> LPS mm
        pixels = np.argwhere(np.ones(data.pixel_array.shape, bool))
        lps = nibabel.affines.apply_affine(
            slice_affine, np.column_stack((pixels, 0 * pixels[:, 0]))
        )
        at = np.rint(nibabel.affines.apply_affine(inverse, lps * (-1, -1, 1))).astype(int)
        expected = data.pixel_array[tuple(pixels.T)].astype(int) * 2 - 5
        np.testing.assert_array_equal(values[tuple(at.T)], expected)

    series = read_series(tmp_path / "s")[0]
    assert geometry_of(series).geometry_equal(read_volume(series).get_geometry(), tol=1e-4)


def test_a_rescale_slope_with_fractions_gives_floats(voxels, tmp_path, work):
    write_series(tmp_path / "s" / "t1", voxels, slope=0.25)
    image = nibabel.load(subject_of(find_series(tmp_path / "s", ["t1"]), work).images["t1"])
    assert image.get_data_dtype() == np.float32
    assert set(np.unique(image.dataobj)) == set(np.unique(voxels * 0.25))


def test_the_files_written_hold_nothing_about_the_patient(voxels, tmp_path, work):
    write_series(tmp_path / "s" / "t1", voxels)
    subject = subject_of(find_series(tmp_path / "s", ["t1"]), work)
    assert subject.id == "dicom"
    assert [path.name for path in work.iterdir()] == ["dicom_t1.nii.gz"]
    image = nibabel.load(subject.images["t1"])
    content = image.to_bytes()
    for secret in (b"SECRET", b"Secret", b"M\xfcller", b"1950", b"2020"):
        assert secret not in content
    assert not image.header.extensions


def test_a_study_passes_the_ordinary_checks(tmp_path, work):
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, 12),) * 3, indexing="ij")
    rng = np.random.default_rng(1)
    for modality in MODALITIES:
        brain = np.where(x**2 + y**2 + z**2 < 0.8, rng.integers(200, 900, x.shape), 0)
        write_series(tmp_path / "study" / modality, brain, affine=np.diag([9.0, 10, 9, 1]))
    subject = subject_of(find_series(tmp_path / "study", MODALITIES), work)
    scan, findings = examine(subject, modalities=MODALITIES, require_labels=False)
    assert scan is not None, findings
    assert not findings
    np.testing.assert_allclose(scan.spacing, (9, 10, 9))


# -------------------------------------------------------------------------------- which is which

HEADERS = {
    "t1": {"SeriesDescription": "t1_mprage_sag_native"},
    "t1ce": {"SeriesDescription": "AX T1", "ContrastBolusAgent": "Gadovist"},
    "t2": {"ProtocolName": "T2_TSE_tra"},
    "flair": {"SeriesDescription": "t2_FLAIR_post"},
}


def test_series_all_mixed_in_one_folder_are_told_apart_by_their_headers(voxels, tmp_path, work):
    folder = tmp_path / "mixed"
    for number, (modality, elements) in enumerate(HEADERS.items()):
        write_series(folder, voxels + 1000 * number, prefix=modality[::-1], **elements)
    write_series(folder, voxels, prefix="zz", SeriesDescription="Localizer T1")
    subject = subject_of(find_series(folder, MODALITIES), work)
    assert list(subject.images) == list(MODALITIES)
    for number, path in enumerate(subject.images.values()):
        assert np.asarray(nibabel.load(path).dataobj).min() == 1000 * number


def test_a_folders_name_decides_against_its_header(voxels, tmp_path, work):
    write_series(tmp_path / "s" / "02_T1-ce" / "DICOM", voxels, SeriesDescription="t2 tse")
    assert list(subject_of(find_series(tmp_path / "s", ["t1ce"]), work).images) == ["t1ce"]


@pytest.mark.parametrize(
    ("elements", "role"),
    [
        ({"SeriesDescription": "T1 POST"}, "t1ce"),
        ({"SeriesDescription": "T1 pre contrast"}, "t1"),
        ({"SeriesDescription": "T1_PRECONTRAST"}, "t1"),
        ({"SeriesDescription": "T1 SE w/o"}, "t1"),
        ({"SeriesDescription": "T1w KM"}, "t1ce"),
        ({"SeriesDescription": "T1 noncontrast post biopsy"}, None),
        ({"SeriesDescription": "t1 without contrast", "ContrastBolusAgent": "Dotarem"}, None),
        ({"SeriesDescription": "t1 +C"}, "t1ce"),
        ({"SeriesDescription": "ep2d_diff_t2"}, None),
        ({"SeriesDescription": "T1 T2 map"}, None),
        ({"SeriesDescription": "Ax T1 FLAIR"}, "t1"),
        ({"RepetitionTime": 9000, "EchoTime": 120, "InversionTime": 2500}, "flair"),
        ({"RepetitionTime": 4500, "EchoTime": 95}, "t2"),
        ({"RepetitionTime": 550, "EchoTime": 9}, "t1"),
        ({"RepetitionTime": 2000, "EchoTime": 3, "InversionTime": 900}, "t1"),
        ({"RepetitionTime": 2000, "EchoTime": 50}, None),
        ({}, None),
    ],
)
def test_headers_are_read_as_a_radiographer_reads_them(elements, role, voxels, tmp_path):
    write_series(tmp_path, voxels[:, :, :2], **elements)
    assert role_of(read_series(tmp_path)[0]) == role


def test_two_candidates_are_listed_and_not_guessed_between(voxels, tmp_path, work):
    write_series(tmp_path / "s" / "a", voxels, SeriesDescription="T2 for Müller")
    write_series(tmp_path / "s" / "b", voxels, SeriesDescription="T2")
    text = refusal(tmp_path / "s", work, ["t2", "flair"])
    assert "2 series can be told to be t2" in text
    assert "a/im000.dcm" in text
    assert "b/im000.dcm" in text
    assert "named t2, flair" in text
    text = refusal(tmp_path / "s", work, ["flair"])
    assert "no series can be told to be flair" in text


# -------------------------------------------------------------------------------------- refusals


def test_a_missing_slice_is_named_by_its_neighbours(voxels, tmp_path, work):
    files = write_series(tmp_path / "s" / "t1", voxels)
    files[4].unlink()
    text = refusal(tmp_path / "s", work)
    assert "a slice is missing between" in text
    assert "t1/im003.dcm" in text
    assert "t1/im005.dcm" in text


@pytest.mark.parametrize(
    ("elements", "said"),
    [
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "another orientation than"),
        ({"PatientID": "SECRET-78"}, "of another patient than t1/im000.dcm"),
        ({"StudyInstanceUID": generate_uid()}, "of another study than t1/im000.dcm"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "no MR image but CT Image Storage"),
        ({"SamplesPerPixel": 3}, "a colour image"),
        ({"PixelSpacing": [3, 3]}, "another PixelSpacing"),
        ({"FrameOfReferenceUID": generate_uid()}, "another frame of reference"),
        ({"ImagePositionPatient": None}, "no usable ImagePositionPatient"),
        ({"SeriesInstanceUID": None}, "names no series"),
        ({"PixelData": b"\0\0"}, "cut off or its pixels cannot be decoded"),
    ],
)
def test_a_file_that_does_not_belong_is_named(elements, said, voxels, tmp_path, work):
    files = write_series(tmp_path / "s" / "t1", voxels)
    change(files[3], **elements)
    text = refusal(tmp_path / "s", work)
    assert said in text
    assert "t1/im003.dcm" in text


def test_two_echoes_in_one_series_are_refused(voxels, tmp_path, work):
    series = generate_uid()
    write_series(tmp_path / "s" / "t1", voxels, series=series)
    write_series(tmp_path / "s" / "t1", voxels, series=series, prefix="second")
    assert "lie at the same place" in refusal(tmp_path / "s", work)


def test_the_same_image_twice_is_refused(voxels, tmp_path, work):
    files = write_series(tmp_path / "s" / "t1", voxels)
    (tmp_path / "s" / "t1" / "zcopy.dcm").write_bytes(files[2].read_bytes())
    text = refusal(tmp_path / "s", work)
    assert "t1/zcopy.dcm is the same image as t1/im002.dcm" in text


def test_slices_stacked_at_a_slant_are_refused(voxels, tmp_path, work):
    tilted = AFFINE.copy()
    tilted[1, 2] = 0.2  # 6 degrees: rows move forwards with every slice
    write_series(tmp_path / "s" / "t1", voxels, affine=tilted)
    assert "gantry tilt" in refusal(tmp_path / "s", work)


def test_an_enhanced_multi_frame_image_is_a_series_of_its_own(voxels, tmp_path, work):
    write_series(tmp_path / "classic" / "t1", voxels, plane="coronal", slope=2.0, **CLASSIC)
    (tmp_path / "s" / "t1").mkdir(parents=True)
    enhanced(tmp_path / "classic" / "t1", tmp_path / "s" / "t1" / "all.dcm")
    image = nibabel.load(subject_of(find_series(tmp_path / "s", ["t1"]), work).images["t1"])
    index = np.argwhere(np.ones(SHAPE, bool))
    at = np.rint(nibabel.affines.apply_affine(np.linalg.inv(image.affine) @ AFFINE, index))
    found = np.asarray(image.dataobj)[tuple(at.astype(int).T)]
    np.testing.assert_array_equal(found, voxels[tuple(index.T)].astype(int) * 2)
    series = read_series(tmp_path / "s")[0]
    assert geometry_of(series).geometry_equal(read_volume(series).get_geometry(), tol=1e-4)
    (work / "dicom_t1.nii.gz").unlink()

    broken = tmp_path / "s" / "t1" / "all.dcm"
    broken.write_bytes(broken.read_bytes()[:-100])
    assert "t1/all.dcm" in refusal(tmp_path / "s", work)


@pytest.mark.parametrize("kept", [0, 100, 700, -20])
def test_a_file_that_is_cut_off_is_named(kept, voxels, tmp_path, work):
    files = write_series(tmp_path / "s" / "t1", voxels)
    files[5].write_bytes(files[5].read_bytes()[:kept])
    assert "t1/im005.dcm" in refusal(tmp_path / "s", work)


def test_a_compressed_series_is_read_where_a_decoder_is_and_else_refused(voxels, tmp_path, work):
    files = write_series(tmp_path / "s" / "t1", voxels)
    for path in files:
        data = pydicom.dcmread(path)
        data.compress(RLELossless, generate_instance_uid=False)
        data.save_as(path)
    image = nibabel.load(subject_of(find_series(tmp_path / "s", ["t1"]), work).images["t1"])
    assert set(np.unique(image.dataobj)) == set(np.unique(voxels))
    (work / "dicom_t1.nii.gz").unlink()

    data = pydicom.dcmread(files[1])
    data.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    data.save_as(files[1])
    text = refusal(tmp_path / "s", work)
    assert "t1/im001.dcm is compressed" in text
    assert "no decoder" in text


def test_a_folder_without_dicom_is_told_from_one_with_it(voxels, tmp_path, work):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "x_t1.nii.gz").write_bytes(b"\x1f\x8b" + b"DICM" * 50)
    assert not holds_dicom(tmp_path / "a")
    assert "holds no DICOM image" in refusal(tmp_path / "a", work)
    write_series(tmp_path / "a" / "deep", voxels[:, :, :2])
    assert holds_dicom(tmp_path / "a")


def test_without_the_extra_one_line_says_what_to_install(tmp_path):
    (tmp_path / "f").write_bytes(b"\0" * 128 + b"DICM")
    program = (
        "import sys; sys.modules['pydicom'] = sys.modules['highdicom'] = None\n"
        "from pathlib import Path\n"
        "from client.dicom_files import holds_dicom\n"
        "from client.dicom_series import find_series\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "assert holds_dicom(folder)\n"
        "try: find_series(folder, ['t1'])\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (
        done.stdout
        == "DICOM needs an extra: pip install -e '.[dicom]' -c constraints.txt in fedbrats' folder.\n"
    ), done.stderr
