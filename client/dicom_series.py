"""A study in DICOM as a subject that the rest of fedbrats can read: NIfTI files without patient data.

Reads classic and enhanced MR series through highdicom, applies the rescale slope, and turns DICOM's
axes (left, posterior, superior) to NIfTI's. Nothing is registered, resampled or skull-stripped: the
series must already lie on one grid and be skull-stripped, as BraTS has them, and `sites.checks` then
refuses what is not. Nothing is repaired: a missing slice, a tilted gantry or two time points in one
series are refused with the file's name. Needs the extra `dicom`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from client.dicom_files import (
    DicomError,
    Series,
    dicom_libraries,
    numbers_of,
    quiet,
    read_series,
    text_of,
)
from client.dicom_roles import choose
from sites.subject import Subject

SUBJECT_ID = "dicom"  # says nothing about the patient
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

_AGAIN = "export the series again, all of it"
_TURN = 1e-3  # of a unit vector: 0.1 mm at the edge of a brain
_SPACING = 0.03  # of the distance between slices, which may vary by it
_SAME_MM = 1e-3
_TILT = 0.005  # rad, as `sites.volumes` bears it


def find_series(folder: Path, modalities: Sequence[str]) -> dict[str, Series]:
    """The series of each modality below `folder`, in one sub-folder each or all mixed.

    Raises:
        DicomError: see `client.dicom_files.read_series` and `client.dicom_roles.choose`.
    """
    return choose(read_series(folder), modalities)


def subject_of(series: Mapping[str, Series], work: Path) -> Subject:
    """Write each modality's series to `work` (`dicom_t1.nii.gz` ...).

    The files hold the voxels (int16 where they are whole numbers, else float32) and where they lie,
    nothing else. `work` should be a private folder: the voxels are the patient's all the same.

    Raises:
        DicomError: a series cannot be used, with the file and what to do.
        OSError: `work` cannot be written.
    """
    images = {}
    for modality, one in series.items():
        images[modality] = work / f"{SUBJECT_ID}_{modality}.nii.gz"
        nibabel.save(_as_nifti(read_volume(one)), images[modality])
    return Subject(SUBJECT_ID, work, images, None)


def read_volume(series: Series) -> Any:
    """The voxels of a series as a `highdicom.Volume` (slices, rows, columns), rescaled.

    Raises:
        DicomError: as `subject_of` does.
    """
    pydicom, highdicom = dicom_libraries()
    _check_pixels(series, pydicom)
    ordered = _in_order(series)
    options = {"apply_real_world_transform": False, "apply_presentation_lut": False}
    datasets = []
    for place in ordered:
        try:
            with quiet():
                dataset = pydicom.dcmread(series.files[place])
                _ = dataset.pixel_array  # decoded and kept, so that a broken file is named
        except Exception:
            raise DicomError(
                f"{series.name(place)} is cut off or its pixels cannot be decoded; {_AGAIN}."
            ) from None
        datasets.append(dataset)
    try:
        with quiet():
            if series.enhanced:
                return highdicom.Image.from_dataset(datasets[0], copy=False).get_volume(
                    **options, rtol=_SPACING
                )
            return highdicom.get_volume_from_series(
                datasets, orientation_tol=_TURN, rtol=_SPACING, **options
            )
    except Exception:
        raise DicomError(
            f"{series.name()} and the files beside it are no regular stack of slices; {_AGAIN}."
        ) from None


def geometry_of(series: Series) -> Any:
    """Where the voxels of a series lie, as a `highdicom.VolumeGeometry`; from headers alone.

    Raises:
        DicomError: the slices are no regular stack.
    """
    _, highdicom = dicom_libraries()
    if series.enhanced:
        try:
            with quiet():
                image = highdicom.Image.from_dataset(series.headers[0])
                geometry = image.get_volume_geometry()
        except Exception:
            geometry = None
        if geometry is None:
            raise DicomError(f"{series.name()}: its frames are no regular stack; {_AGAIN}.")
        return geometry
    order = _in_order(series)
    first = series.headers[order[0]]
    name = series.name(order[0])
    positions = [_position(series, place) for place in order]
    return highdicom.VolumeGeometry.from_attributes(
        image_position=positions[0],
        image_orientation=numbers_of(first, "ImageOrientationPatient", 6, name),
        rows=int(first.Rows),
        columns=int(first.Columns),
        pixel_spacing=numbers_of(first, "PixelSpacing", 2, name),
        spacing_between_slices=float(np.linalg.norm(positions[-1] - positions[0]))
        / (len(order) - 1),
        number_of_frames=len(order),
        coordinate_system="PATIENT",
        frame_of_reference_uid=first.FrameOfReferenceUID,
    )


def _as_nifti(volume: Any) -> nibabel.Nifti1Image:
    """With BraTS's axes, left, posterior, superior, and an empty header otherwise."""
    voxels = volume.array
    whole = np.rint(voxels)
    if np.abs(voxels).max() <= np.iinfo(np.int16).max and np.array_equal(voxels, whole):
        voxels = whole.astype(np.int16)
    else:
        voxels = voxels.astype(np.float32)
    image = nibabel.Nifti1Image(voxels, LPS_TO_RAS @ volume.affine)
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt("LPS"))
    image = image.as_reoriented(turn)
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    image.header.set_xyzt_units("mm")
    return image


def _check_pixels(series: Series, pydicom: Any) -> None:
    """That the pixels are grey and a decoder for them is installed."""
    for place, header in enumerate(series.headers):
        name = series.name(place)
        if text_of(header, "SamplesPerPixel", name) not in ("", "1"):
            raise DicomError(f"{name} is a colour image; give the original MR series.")
        syntax = text_of(header.file_meta, "TransferSyntaxUID", name)
        with quiet():
            uid = pydicom.uid.UID(syntax)
        if not uid.is_transfer_syntax:
            raise DicomError(f"{name} names no transfer syntax that is known; {_AGAIN}.")
        if not uid.is_compressed:
            continue
        try:
            available = pydicom.pixels.get_decoder(uid).is_available
        except NotImplementedError:
            available = False
        if not available:
            raise DicomError(
                f"{name} is compressed ({uid.name}) and no decoder for it is installed; export the "
                "series uncompressed, decompress it (dcmdjpeg, gdcmconv --raw), or for JPEG "
                "Lossless: pip install pylibjpeg pylibjpeg-libjpeg."
            )


def _in_order(series: Series) -> list[int]:
    """Places of a classic series' files along its slices, against the direction of rows x columns: the
    order in which highdicom stacks them.

    Raises:
        DicomError: the slices are no regular stack; the text names a file.
    """
    if series.enhanced:
        if len(series.files) > 1:
            raise DicomError(
                f"{series.name(1)}: a series of several multi-frame files; keep the one to be used."
            )
        return [0]
    if len(series.files) == 1:
        raise DicomError(f"{series.name()} is a single slice; {_AGAIN}.")
    first, first_name = series.headers[0], series.name()
    axes = np.reshape(numbers_of(first, "ImageOrientationPatient", 6, first_name), (2, 3))
    if np.abs(axes @ axes.T - np.eye(2)).max() > _TURN:
        raise DicomError(f"{first_name} has row and column axes that are not square; {_AGAIN}.")
    normal = -np.cross(axes[0], axes[1])
    frame = text_of(first, "FrameOfReferenceUID", first_name)
    if not frame:
        raise DicomError(f"{first_name} has no FrameOfReferenceUID; {_AGAIN}.")
    for place, header in enumerate(series.headers):
        name = series.name(place)
        turned = np.reshape(numbers_of(header, "ImageOrientationPatient", 6, name), (2, 3)) - axes
        if np.abs(turned).max() > _TURN:
            raise DicomError(
                f"{name} has another orientation than {first_name} of the same series; "
                "move the slices that do not belong (a localizer?) out of the folder."
            )
        for keyword, count in (("PixelSpacing", 2), ("Rows", 1), ("Columns", 1)):
            here = numbers_of(header, keyword, count, name)
            if here != numbers_of(first, keyword, count, first_name) or min(here) <= 0:
                raise DicomError(f"{name} has another {keyword} than {first_name}; {_AGAIN}.")
        if text_of(header, "FrameOfReferenceUID", name) != frame:
            raise DicomError(
                f"{name} is in another frame of reference than {first_name}; {_AGAIN}."
            )
    positions = np.array([_position(series, place) for place in range(len(series.files))])
    along = positions @ normal
    order = [int(place) for place in np.argsort(along, kind="stable")]
    _check_stack(series, order, positions[order], along[order], normal)
    return order


def _check_stack(
    series: Series, order: list[int], positions: np.ndarray, along: np.ndarray, normal: np.ndarray
) -> None:
    """`positions` (n, 3) mm and `along` the normal, both in the order of slices."""
    steps = np.diff(along)
    usual = float(np.median(steps))
    if same := np.flatnonzero(steps < _SAME_MM).tolist():
        raise DicomError(
            f"{series.name(order[same[0]])} and {series.name(order[same[0] + 1])} lie at the same "
            "place: several echoes or time points in one series; keep one of them."
        )
    if gaps := np.flatnonzero(np.abs(steps - usual) > _SPACING * usual).tolist():
        what = "a slice is missing" if steps[gaps[0]] > 1.5 * usual else "slices are uneven"
        before, after = (series.name(order[gaps[0] + i]) for i in (0, 1))
        raise DicomError(f"{what} between {before} and {after}; {_AGAIN}.")
    sideways = np.linalg.norm(np.diff(positions, axis=0) - np.outer(steps, normal), axis=1)
    if (sideways > _TILT * steps + _SAME_MM).any():
        raise DicomError(
            f"{series.name(order[0])}: the slices are stacked at a slant (gantry tilt); "
            "resample the series onto a rectangular grid."
        )


def _position(series: Series, place: int) -> np.ndarray:
    name = series.name(place)
    return np.array(numbers_of(series.headers[place], "ImagePositionPatient", 3, name))
