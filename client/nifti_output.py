"""Maps on a subject's RAS grid, written as NIfTI in the orientation and place of the subject's own files.

Labels are written in BraTS's coding (0, 1 NCR/NET, 2 ED, 4 ET). Probabilities and entropy are written
as bytes with the header's scale 1/255, which every NIfTI reader applies by itself: NIfTI has no
16-bit floats, and 32-bit ones would take ten times the space for digits that mean nothing. A value is
at most 1/510 off.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

from common.brats import CODINGS
from common.files import write_atomically

SUFFIXES = (".nii", ".nii.gz")
STEPS = 255  # of a map between 0 and 1


def save_labels(
    path: Path, labels: np.ndarray, affine: np.ndarray, file_affine: np.ndarray
) -> None:
    """Write uint8 system labels (X, Y, Z).

    Args:
        affine: 4x4, RAS voxel -> mm, of `labels`.
        file_affine: 4x4, voxel -> mm, of the subject's own files; the written file has it too.

    Raises:
        OSError: it cannot be written; `path` is then as it was before.
    """
    to_file = {system: file for file, system in CODINGS["brats"].items()}
    table = np.array([to_file[system] for system in range(len(to_file))], np.uint8)
    _save(path, table[labels], affine, file_affine, scale=None, about="fedbrats labels")


def save_map(
    path: Path, values: np.ndarray, affine: np.ndarray, file_affine: np.ndarray, about: str
) -> None:
    """Write values from 0 to 1 as (X, Y, Z), or as (N, X, Y, Z): a 4-D file, N last as NIfTI wants it.

    `about` goes into the header's description (79 letters). Otherwise as `save_labels`.
    """
    steps = np.rint(values * np.float32(STEPS)).astype(np.uint8)
    volumes = np.moveaxis(steps, 0, -1) if steps.ndim == 4 else steps
    _save(path, volumes, affine, file_affine, scale=1 / STEPS, about=about)


def _save(
    path: Path,
    voxels: np.ndarray,
    affine: np.ndarray,
    file_affine: np.ndarray,
    *,
    scale: float | None,
    about: str,
) -> None:
    back = ornt_transform(io_orientation(affine), io_orientation(file_affine))
    own = np.asfortranarray(apply_orientation(voxels, back))  # as in the file
    image = nibabel.Nifti1Image(own, file_affine)
    image.set_qform(file_affine, 1)
    image.set_sform(file_affine, 1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = about.encode("ascii", "replace")[:79]
    if scale is not None:
        image.header.set_slope_inter(scale, 0)
    content = image.to_bytes()
    if path.name.endswith(".gz"):
        content = gzip.compress(content, 6, mtime=0)  # same labels, same bytes
    write_atomically(path, lambda temporary: _write(temporary, content))


def _write(temporary: Path, content: bytes) -> None:
    temporary.write_bytes(content)
