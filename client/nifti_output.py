"""Maps on a subject's RAS grid, written as NIfTI in the orientation and place of the subject's own files.

Labels are written in BraTS's coding (0, 1 NCR/NET, 2 ED, 4 ET). Probabilities and entropy are written
as bytes with the header's scale 1/255, which every NIfTI reader applies by itself: NIfTI has no
16-bit floats, and 32-bit ones would take ten times the space for digits that mean nothing. A value is
at most 1/510 off.

The header's description ends in a digest of the rest of the file. So a file tells whether it is as it
was written, or a person has worked on it since (`is_as_written`) and it must not be replaced.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

from common.brats import CODINGS

SUFFIXES = (".nii", ".nii.gz")
STEPS = 255  # of a map between 0 and 1
SCALE = float(np.nextafter(np.float32(1 / STEPS), np.float32(0)))  # 255 of them are not more than 1
AUTHOR = b"fedbrats"
HEADER = 348  # bytes
DESCRIPTION = slice(148, 228)


def labels_file(
    path: Path, labels: np.ndarray, affine: np.ndarray, file_affine: np.ndarray
) -> bytes:
    """The bytes of a file of uint8 system labels (X, Y, Z), compressed if `path` ends in .gz.

    Args:
        affine: 4x4, RAS voxel -> mm, of `labels`.
        file_affine: 4x4, voxel -> mm, of the subject's own files; the file has it too.
    """
    to_file = {system: file for file, system in CODINGS["brats"].items()}
    table = np.array([to_file[system] for system in range(len(to_file))], np.uint8)
    return _file(path, table[labels], affine, file_affine, scale=None, about="labels")


def map_file(
    path: Path, values: np.ndarray, affine: np.ndarray, file_affine: np.ndarray, about: str
) -> bytes:
    """Values from 0 to 1 as (X, Y, Z), or as (N, X, Y, Z): a 4-D file, N last as NIfTI wants it.

    `about` goes into the header's description (50 letters). Otherwise as `labels_file`.
    """
    steps = np.rint(values * np.float32(STEPS)).astype(np.uint8)
    volumes = np.moveaxis(steps, 0, -1) if steps.ndim == 4 else steps
    return _file(path, volumes, affine, file_affine, scale=SCALE, about=about)


def is_as_written(path: Path) -> bool:
    """Whether a file is one of fedbrats' (labels or a map) that nothing has changed since.

    Compressing it anew is no change. False for whatever cannot be read.
    """
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            header = file.read(HEADER)
            if not header[DESCRIPTION].startswith(AUTHOR):
                return False  # a large file of somebody else's is not read to its end
            content = header + file.read()
    except (OSError, EOFError, zlib.error):
        return False
    return header[DESCRIPTION].rstrip(b"\0").endswith(_digest(content))


def _digest(content: bytes | bytearray) -> bytes:
    """16 hex digits of all but the description."""
    before, after = (
        memoryview(content)[: DESCRIPTION.start],
        memoryview(content)[DESCRIPTION.stop :],
    )
    digest = hashlib.sha256(before)
    digest.update(after)
    return digest.hexdigest()[:16].encode()


def _file(
    path: Path,
    voxels: np.ndarray,
    affine: np.ndarray,
    file_affine: np.ndarray,
    *,
    scale: float | None,
    about: str,
) -> bytes:
    back = ornt_transform(io_orientation(affine), io_orientation(file_affine))
    own = np.asfortranarray(apply_orientation(voxels, back))  # as in the file
    image = nibabel.Nifti1Image(own, file_affine)
    image.set_qform(file_affine, 1)
    image.set_sform(file_affine, 1)
    image.header.set_xyzt_units("mm")
    if scale is not None:
        image.header.set_slope_inter(scale, 0)
    content = bytearray(image.to_bytes())
    words = b"%s %s %s" % (AUTHOR, about.encode("ascii", "replace")[:50], _digest(content))
    content[DESCRIPTION] = words.ljust(DESCRIPTION.stop - DESCRIPTION.start, b"\0")
    # without a time the same labels are the same bytes
    return gzip.compress(content, 6, mtime=0) if path.name.endswith(".gz") else bytes(content)
