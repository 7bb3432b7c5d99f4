"""Writes small MR series with pydicom alone, slice by slice, from an array in RAS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

MR = "1.2.840.10008.5.1.4.1.1.4"
STUDY, FRAME = generate_uid(), generate_uid()
AFFINE = np.array([[1.0, 0, 0, -30], [0, 1.5, 0, 12], [0, 0, 2.0, -7], [0, 0, 0, 1]])
SHAPE = (6, 7, 8)

# acquisition -> array axis of (slices, rows, columns), and whether rows and columns run against it
PLANES = {
    "axial": ((2, 1, 0), (True, True)),  # rows to posterior, columns to left
    "sagittal": ((0, 2, 1), (True, True)),  # rows to feet, columns to posterior
    "coronal": ((1, 2, 0), (True, True)),
}


def write_series(
    folder: Path,
    voxels: np.ndarray,
    *,
    plane: str = "axial",
    reverse: bool = False,
    affine: np.ndarray = AFFINE,
    series: str | None = None,
    slope: float = 1.0,
    intercept: float = 0.0,
    prefix: str = "im",
    **elements: Any,
) -> list[Path]:
    """`voxels` are the stored uint16 values (X, Y, Z) in RAS; returns the files in slice order."""
    folder.mkdir(parents=True, exist_ok=True)
    (slices, rows, columns), (rows_back, columns_back) = PLANES[plane]
    series = series or generate_uid()
    written = []

    def mm(index: dict[int, int]) -> np.ndarray:
        ras = affine[:3, :3] @ [index[0], index[1], index[2]] + affine[:3, 3]
        return ras * (-1, -1, 1)

    def direction(axis: int, back: bool) -> np.ndarray:
        edge = affine[:3, axis] * (-1, -1, 1) * (-1 if back else 1)
        return edge / np.linalg.norm(edge)

    number = range(voxels.shape[slices])
    for place, s in enumerate(reversed(number) if reverse else number):
        picture = np.take(voxels, s, axis=slices)  # the two other axes, in the order of the array
        if rows > columns:
            picture = picture.T
        picture = picture[:: -1 if rows_back else 1, :: -1 if columns_back else 1]
        corner = {
            slices: s,
            rows: voxels.shape[rows] - 1 if rows_back else 0,
            columns: voxels.shape[columns] - 1 if columns_back else 0,
        }
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MR
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"{prefix}{place:03}.dcm"
        data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = MR, meta.MediaStorageSOPInstanceUID
        data.SpecificCharacterSet = "ISO_IR 100"
        data.PatientName, data.PatientID = "Müller^Secret", "SECRET-77"
        data.PatientBirthDate, data.PatientSex = "19500102", "F"
        data.StudyInstanceUID, data.FrameOfReferenceUID = STUDY, FRAME
        data.SeriesInstanceUID, data.Modality, data.SeriesNumber = series, "MR", 3
        data.StudyDate, data.StudyTime, data.InstanceNumber = "20200101", "101010", place + 1
        data.Rows, data.Columns = picture.shape
        data.PixelSpacing = [
            float(np.linalg.norm(affine[:3, rows])),
            float(np.linalg.norm(affine[:3, columns])),
        ]
        data.SliceThickness = float(np.linalg.norm(affine[:3, slices]))
        data.ImagePositionPatient = [float(v) for v in mm(corner)]
        data.ImageOrientationPatient = [
            float(v) for v in (*direction(columns, columns_back), *direction(rows, rows_back))
        ]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelRepresentation = 0
        data.RescaleSlope, data.RescaleIntercept = slope, intercept
        for keyword, value in elements.items():
            setattr(data, keyword, value)
        data.PixelData = np.ascontiguousarray(picture, np.uint16).tobytes()
        data.save_as(path, enforce_file_format=True)
        written.append(path)
    return written


CLASSIC = {  # what the conversion to an enhanced image asks for besides
    **{"AccessionNumber": "", "StudyID": "", "ReferringPhysicianName": "", "Manufacturer": "m"},
    **{"ImageType": ["ORIGINAL", "PRIMARY", "M", "SE"], "BodyPartExamined": "BRAIN"},
    **{"Laterality": "", "PatientPosition": "HFS", "PixelAspectRatio": [1, 1]},
    **{"WindowCenter": 100, "WindowWidth": 200},
}


def enhanced(classic: Path, out: Path) -> None:
    """The classic series below `classic` as one multi-frame file."""
    import highdicom

    sources = [pydicom.dcmread(path) for path in sorted(classic.iterdir())]
    highdicom.legacy.LegacyConvertedEnhancedMRImage(
        sources, generate_uid(), 7, generate_uid(), 1
    ).save_as(out)


def change(path: Path, **elements: Any) -> None:
    """Set elements of a written file; None deletes one."""
    data = pydicom.dcmread(path)
    for keyword, value in elements.items():
        if value is None:
            delattr(data, keyword)
        else:
            setattr(data, keyword, value)
    data.save_as(path)
