"""DICOM files below a folder, grouped into series; headers only, no pixel is read.

Needs the extra `dicom` (pydicom, highdicom), except for `holds_dicom`. Which series is which modality
is `client.dicom_roles`, its voxels are `client.dicom_series`. No text of an error holds a value from a
file, because any of them can be about the patient: files are named, relative to the folder.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
ENHANCED_MR_IMAGES = (
    "1.2.840.10008.5.1.4.1.1.4.1",  # Enhanced MR
    "1.2.840.10008.5.1.4.1.1.4.4",  # Legacy Converted Enhanced MR
)
_DIRECTORY = "1.2.840.10008.1.3.10"  # DICOMDIR lists the files beside it and is no image
_MAGIC, _MAGIC_AT = b"DICM", 128
_SUFFIXES = (".dcm", ".dicom", ".ima")


class DicomError(ValueError):
    """DICOM files that cannot be used: one line with the file and a remedy, without patient data."""


@dataclass(frozen=True)
class Series:
    """One series: its files, sorted by name, and their headers (pydicom datasets) in that order."""

    root: Path  # the folder that names in errors are relative to
    files: tuple[Path, ...]
    headers: tuple[Any, ...]

    def name(self, place: int = 0) -> str:
        """A file's path below the root, for people."""
        return _relative(self.files[place], self.root)

    @property
    def enhanced(self) -> bool:
        """Whether one file holds all slices as frames."""
        return str(self.headers[0].SOPClassUID) in ENHANCED_MR_IMAGES


def holds_dicom(folder: Path) -> bool:
    """Whether some file below `folder` begins as DICOM files do; the first found decides."""
    return any(_is_dicom(path) for path in _files(folder))


def read_series(root: Path) -> list[Series]:
    """All series below `root`, sorted by their first file.

    Raises:
        DicomError: there is none, a file cannot be read or is no MR image, or the files are of more
            than one patient or study; or the extra is not installed.
    """
    pydicom, _ = dicom_libraries()
    found: dict[str, list[tuple[Path, Any]]] = {}
    seen: dict[str, Path] = {}  # SOP instance -> file
    first: dict[str, tuple[str, Path]] = {}
    for path in _files(root):
        file = _relative(path, root)
        if not _is_dicom(path):
            if path.suffix.lower() in _SUFFIXES:
                raise DicomError(
                    f"{file} is cut off or no DICOM file; export the series again, or remove it."
                )
            continue
        header = _header(pydicom, path, file)
        sop_class = text_of(header, "SOPClassUID", file)
        if sop_class == _DIRECTORY or path.name.upper() == "DICOMDIR":
            continue
        if sop_class != MR_IMAGE and sop_class not in ENHANCED_MR_IMAGES:
            kind = pydicom.uid.UID_dictionary.get(sop_class, ("of an unknown kind",))[0]
            raise DicomError(f"{file} is no MR image but {kind}; move it out of the folder.")
        for what, keyword in (("patient", "PatientID"), ("study", "StudyInstanceUID")):
            value = text_of(header, keyword, file)
            known, where = first.setdefault(keyword, (value, path))
            if value != known:
                raise DicomError(
                    f"{file} is of another {what} than {_relative(where, root)}; "
                    "give a folder with one study of one patient."
                )
        instance = text_of(header, "SOPInstanceUID", file)
        twin = seen.setdefault(instance, path)
        if twin != path:
            raise DicomError(
                f"{file} is the same image as {_relative(twin, root)}; remove one of the two."
            )
        uid = text_of(header, "SeriesInstanceUID", file)
        if not uid:
            raise DicomError(f"{file} names no series; export the series again.")
        found.setdefault(uid, []).append((path, header))
    if not found:
        raise DicomError(f"{root} holds no DICOM image; give the folder that holds the series.")
    return [Series(root, *zip(*members, strict=True)) for members in found.values()]


def dicom_libraries() -> tuple[Any, Any]:
    """pydicom and highdicom. Raises DicomError where the extra is not installed."""
    try:
        import highdicom
        import pydicom
    except ImportError:
        raise DicomError(
            "DICOM needs an extra: pip install -e '.[dicom]' -c constraints.txt in fedbrats' folder."
        ) from None
    return pydicom, highdicom


def text_of(header: Any, keyword: str, file: str) -> str:
    """An element as text, "" if it is absent or empty. Raises DicomError if it cannot be read."""
    value = value_of(header, keyword, file)
    return "" if value is None else str(value).strip()


def numbers_of(header: Any, keyword: str, count: int, file: str) -> tuple[float, ...]:
    """`count` finite numbers. Raises DicomError if the element does not hold exactly those."""
    value = value_of(header, keyword, file)
    try:
        if value is None:
            found: tuple[float, ...] = ()
        elif isinstance(value, int | float):
            found = (float(value),)
        else:
            found = tuple(float(part) for part in value)
    except (TypeError, ValueError):
        found = ()
    if len(found) != count or any(abs(number) > 1e6 or number != number for number in found):
        raise DicomError(
            f"{file} has no usable {keyword}; export the series as original MR images."
        )
    return found


def value_of(header: Any, keyword: str, file: str) -> Any:
    """An element, or None. pydicom decodes on access, so that a broken one shows only here."""
    try:
        with quiet():
            return header.get(keyword)
    except Exception:  # whatever pydicom raises holds the value, which may be the patient's
        raise DicomError(f"{file} holds a broken {keyword}; export the series again.") from None


@contextmanager
def quiet() -> Iterator[None]:
    """pydicom's warnings quote values, and those may be the patient's."""
    log = logging.getLogger("pydicom")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _header(pydicom: Any, path: Path, file: str) -> Any:
    try:
        with quiet():
            return pydicom.dcmread(path, stop_before_pixels=True)
    except OSError as problem:
        raise DicomError(f"{file} cannot be read ({problem.strerror or 'cut off'}).") from None
    except Exception:
        raise DicomError(f"{file} is cut off or damaged; export the series again.") from None


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(_MAGIC_AT)
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError as problem:
        raise DicomError(f"{path.name} cannot be read ({problem.strerror}).") from None


def _files(root: Path) -> Iterator[Path]:
    """Every file below `root`, hidden ones aside, folder by folder in the order of names."""
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield from (
            Path(folder, name)
            for name in sorted(names)
            if not name.startswith(".") and Path(folder, name).is_file()
        )


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root))
