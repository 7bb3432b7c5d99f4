"""A predicted segmentation as DICOM-SEG, on the grid of the series that it was predicted from.

Binary segments NCR, ED and ET, in the codes of DICOM's context group 7168 for brain lesions. The file
is an object of the patient's study: as DICOM requires, it holds the patient's and the study's data,
copied from the source series. Needs the extra `dicom`. For research; not a medical device.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from client.dicom_files import DicomError, Series, dicom_libraries, quiet
from client.dicom_series import LPS_TO_RAS, geometry_of
from common.brats import CODINGS, ED, ET, N_CLASSES, NCR
from common.console import RESEARCH_ONLY
from common.files import write_atomically

MANUFACTURER = "fedbrats"
_LONGEST = 64  # characters of a short text in DICOM
_SEGMENTS = (  # label, label in words, code, its scheme, its meaning
    (NCR, "NCR necrotic, non-enhancing core", "6574001", "SCT", "Necrosis"),
    (ED, "ED peritumoural edema", "79654002", "SCT", "Edema"),
    (ET, "ET enhancing tumour", "C113842", "NCIt", "Enhancing Lesion"),
)
_TYPE_2 = (  # must be there, may be empty; older files lack some
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"),
    *("StudyDate", "StudyTime", "ReferringPhysicianName", "SeriesNumber", "InstanceNumber"),
)


def labels_of(segmentation: Path) -> tuple[np.ndarray, np.ndarray]:
    """System labels (uint8) and affine (4x4, voxel -> RAS mm) of a file that `predict` wrote."""
    image: Any = nibabel.load(segmentation)
    table = np.zeros(256, np.uint8)
    for in_file, in_system in CODINGS["brats"].items():
        table[in_file] = in_system
    return table[np.asarray(image.dataobj, dtype=np.uint8)], image.affine


def write_dicom_seg(
    labels: np.ndarray, affine: np.ndarray, source: Series, out: Path, *, model: str
) -> None:
    """Write `labels` as one DICOM-SEG file that refers to the images of `source`.

    Args:
        labels: system labels 0..3 (X, Y, Z), axes in any order and direction.
        affine: 4x4, voxel -> RAS mm; voxels must be the source's own, turned or cropped at most.
        source: the series shown with the segmentation, FLAIR or T1ce say (`find_series`).
        out: written whole or not at all. Holds patient data, so only its owner can read it.
        model: the model's name, for the algorithm's identification.

    Raises:
        DicomError: the labels lie on another grid than the source, or its headers do not suffice.
        ValueError: there are labels other than 0..3.
        OSError: `out` cannot be written.
    """
    _, highdicom = dicom_libraries()
    if labels.ndim != 3 or labels.max(initial=0) >= N_CLASSES or labels.min(initial=0) < 0:
        raise ValueError("labels are 0..3 in three dimensions")
    geometry = geometry_of(source)
    frame = geometry.frame_of_reference_uid
    volume = highdicom.Volume(
        labels.astype(np.uint8), LPS_TO_RAS @ affine, "PATIENT", frame_of_reference_uid=frame
    )
    try:
        matched = volume.match_geometry(geometry, tol=1e-2)
    except (RuntimeError, ValueError):
        matched = None
    if matched is None or np.count_nonzero(matched.array) != np.count_nonzero(labels):
        raise DicomError(
            f"the segmentation does not lie on the grid of {source.name()}; "
            "choose the folder that it was predicted from."
        )
    try:
        with quiet():
            segmentation = _segmentation(matched, source, model)
            write_atomically(out, lambda file: segmentation.save_as(file), private=True)
    except OSError:
        raise
    except Exception as problem:  # its text can hold the patient's data
        raise DicomError(
            f"{source.name()}: its header does not suffice for a DICOM-SEG "
            f"({type(problem).__name__}); export the series as original MR images."
        ) from None


def is_own(path: Path) -> bool:
    """Whether a file is a DICOM-SEG of fedbrats; False for whatever cannot be read."""
    pydicom, _ = dicom_libraries()
    try:
        with quiet():
            header = pydicom.dcmread(path, stop_before_pixels=True)
    except Exception:  # pydicom raises many things
        return False
    return header.get("Modality") == "SEG" and header.get("Manufacturer") == MANUFACTURER


def _segmentation(volume: Any, source: Series, model: str) -> Any:
    pydicom, highdicom = dicom_libraries()
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    from common.code_hash import code_hash

    name = _short(f"fedbrats {model}")
    version = code_hash()[:16]
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=name, family=codes.cid7162.ArtificialIntelligence, version=version
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=label,
            segment_label=words,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=Code(value, scheme, meaning),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            tracking_uid=highdicom.UID(),
            tracking_id=f"fedbrats {words.split()[0]}",
            anatomic_regions=[codes.SCT.Brain],
        )
        for label, words, value, scheme, meaning in _SEGMENTS
    ]
    images = []
    for header in source.headers:
        absent = [keyword for keyword in _TYPE_2 if keyword not in header]
        image = copy.deepcopy(header) if absent else header
        for keyword in absent:
            setattr(image, keyword, None)
        images.append(image)
    return highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=volume,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=highdicom.UID(),
        series_number=1000 + int(images[0].SeriesNumber or 0),
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=name,
        software_versions=version,
        device_serial_number=version,
        content_label="BRATS_TUMOUR",
        content_description=RESEARCH_ONLY,
        series_description=_short(f"Tumour segmentation. {RESEARCH_ONLY}"),
        transfer_syntax_uid=pydicom.uid.ExplicitVRLittleEndian,
    )


def _short(text: str) -> str:
    return text.replace("\\", "/")[:_LONGEST]
