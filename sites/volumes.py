"""Read one NIfTI volume, trusting nothing in it, and turn it to RAS axes.

The header is parsed by nibabel and judged before memory for voxels is set aside; then every byte
of the file is read, because damage to a gzip file shows only there. A sound gzip file of one part,
as nearly all are, is unpacked in one go by libdeflate, 2.5 times as fast as by zlib; any other is
read as a stream, which knows what is wrong with it. What the voxels mean (labels, an empty image,
files that do not match each other) is for `sites.checks`.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import deflate
import nibabel
import numpy as np
from nibabel.affines import obliquity, voxel_sizes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt2axcodes
from nibabel.spatialimages import HeaderDataError

MAX_VOXELS = 512**3  # BraTS has 8.9 million; anything beyond this is a broken header
MAX_HEADER_BYTES = 2**20  # the header and its extensions
MIN_SPACING_MM, MAX_SPACING_MM = 0.1, 20.0
MAX_TILT_RAD = 0.005  # 0.6 mm at the edge of a brain, 120 mm from its centre
_DEFLATE_LIMIT = 1032  # no deflate stream expands further (zlib's technical notes)

# Software names itself in these fields, and dcm2niix an echo time; a person's data looks like this:
# DICOM's SURNAME^GIVEN or Surname, Given, an announcing word, a long number, a full date.
_PERSONAL = re.compile(
    rb"[a-z]\^[a-z]|\b(?:patient\w*|pat_?(?:id|name)?|pid|mrn|dob|born|birth\w*|name)\b|\d{7}"
    rb"|(?-i:\b[A-Z][a-z]+, ?[A-Z][a-z]+\b)"
    rb"|\b(?:19|20)\d\d[./-]\d\d?[./-]\d\d?\b|\b\d\d?[./-]\d\d?[./-](?:19|20)\d\d\b",
    re.IGNORECASE,
)
_DICOM_EXTENSION = 2


class VolumeError(Exception):
    """A file that cannot be used, with what `sites.finding.Finding` says about it."""

    def __init__(self, code: str, what: str, remedy: str) -> None:
        super().__init__(what)
        self.code, self.what, self.remedy = code, what, remedy


@dataclass(frozen=True)
class Volume:
    """One volume as (X, Y, Z) along right, anterior, superior; Fortran order, as in the file."""

    voxels: np.ndarray  # the file's integer type (native byte order), float32 for anything else
    affine: np.ndarray  # 4x4, RAS voxel -> mm
    file_affine: np.ndarray  # 4x4, the file's own voxel -> mm
    file_shape: tuple[int, int, int]
    axes: str  # what the file's axes point to, "LPS" in BraTS
    oriented: bool  # False: no orientation in the file, BraTS's axes were assumed
    personal: bool  # free text in the header looks like it is about a person


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, int, int]
    dtype: np.dtype
    offset: int  # of the first voxel, in bytes
    scaling: tuple[float, float]  # slope, intercept
    affine: np.ndarray
    ornt: np.ndarray  # nibabel's orientation array
    oriented: bool


def read_volume(path: Path, *, most_bytes: int | None = None) -> Volume:
    """Read a `.nii` or `.nii.gz` file whole.

    Accepts NIfTI-1 and -2, either byte order, any real number type, `scl_slope`, and trailing axes
    of length 1; at most `most_bytes` of voxels, if given. Raises `VolumeError` for everything else,
    whatever the bytes: nothing else escapes.
    """
    remedy = "Copy or download the file again from its source."
    try:
        size = path.stat().st_size
        if size == 0:
            raise VolumeError("empty-file", "the file is empty (0 bytes)", remedy)
        compressed = path.name.lower().endswith(".gz")
        with path.open("rb") as raw:
            _check_container(raw.read(256), compressed)
            raw.seek(0)
            if not compressed:
                return _read(raw, None, size, most_bytes)
            stream = gzip.GzipFile(fileobj=raw, mode="rb")
            return _read(stream, raw, size * _DEFLATE_LIMIT, most_bytes)
    except EOFError:
        raise VolumeError("truncated", "the compressed data end too early", remedy) from None
    except (gzip.BadGzipFile, zlib.error):
        raise VolumeError("damaged-gzip", "the compressed data are damaged", remedy) from None
    except OSError as error:
        what = f"the file cannot be read ({error.strerror or type(error).__name__})"
        remedy = "Check that the file exists, its permissions and the disk."
        raise VolumeError("unreadable", what, remedy) from None
    except MemoryError:
        what = "there is not enough free memory to hold the volume"
        remedy = "Free memory, or check the size of the scan."
        raise VolumeError("no-memory", what, remedy) from None


def _check_container(start: bytes, compressed: bool) -> None:
    remedy = "Put the scan itself there, as NIfTI-1 or NIfTI-2."
    if start.startswith(b"\x1f\x8b"):
        if not compressed:
            what = "the file is gzip-compressed but its name does not end in .gz"
            raise VolumeError("wrong-extension", what, "Rename it to .nii.gz.")
    elif start.lstrip()[:1] == b"<":
        what = "the file is a web page or XML, not a NIfTI scan"
        raise VolumeError("not-nifti", what, "Download the scan again; you may have to log in.")
    elif compressed:
        if _nifti_kind(start) is not None:
            what = "the file is not compressed although its name ends in .gz"
            raise VolumeError("wrong-extension", what, "Rename it to .nii.")
        raise VolumeError("not-nifti", "the file is not gzip-compressed NIfTI", remedy)


def _nifti_kind(start: bytes) -> tuple[Any, str] | None:
    """(header class, byte order) from the first field of a header."""
    kinds = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
    for endianness, order in (("<", "little"), (">", "big")):
        if kind := kinds.get(int.from_bytes(start[:4], order)):  # type: ignore[arg-type]
            return kind, endianness
    return None


def _read(stream: Any, packed: BinaryIO | None, limit: int, most_bytes: int | None) -> Volume:
    """From the unpacked `stream`, or at once from the `packed` file below it where that works."""
    start = stream.read(540)
    found = _nifti_kind(start)
    remedy = "Put the scan itself there, as NIfTI-1 or NIfTI-2."
    if found is None:
        raise VolumeError("not-nifti", "the file is not NIfTI", remedy)
    kind, endianness = found
    n_header = kind.template_dtype.itemsize
    if len(start) < n_header:
        raise VolumeError("truncated", "the file ends within its header", remedy)
    # check=False: nibabel's own check logs header fields, and repairs what should be refused
    fields = kind(start[:n_header], endianness=endianness, check=False)
    if bytes(fields["magic"])[:3] not in (b"n+1", b"n+2"):  # a .hdr/.img pair or Analyze 7.5
        raise VolumeError("not-nifti", "the file is not single-file NIfTI", remedy)
    header = _judge(fields, limit)
    n_bytes = int(np.prod(header.shape, dtype=object)) * header.dtype.itemsize
    if most_bytes is not None and n_bytes > most_bytes:
        what = (
            f"the voxels are {n_bytes // 10**6} MB, more than the {most_bytes // 10**6} MB accepted"
        )
        remedy = "Save the scan with 16-bit whole numbers, or only the head."
        raise VolumeError("too-large", what, remedy)

    extensions = start[n_header:] + stream.read(max(0, header.offset - len(start)))
    surplus = start[header.offset :]  # voxels already read, when the header is the shorter kind
    content = None if packed is None else _unpacked(packed, header.offset + n_bytes)
    if content is None:
        flat = _streamed(stream, surplus, header)
    else:
        flat = np.frombuffer(content, header.dtype, offset=header.offset)
    voxels = _native(flat, header).reshape(header.shape, order="F")
    ras = np.asfortranarray(apply_orientation(voxels, header.ornt))
    return Volume(
        voxels=ras,
        affine=header.affine @ inv_ornt_aff(header.ornt, header.shape),
        file_affine=header.affine,
        file_shape=header.shape,
        axes="".join(ornt2axcodes(header.ornt)),
        oriented=header.oriented,
        personal=_about_a_person(fields, extensions[: max(0, header.offset - n_header)]),
    )


def _judge(fields: Any, limit: int) -> _Header:
    """Everything the header decides, checked; `limit` is the most bytes the file can unpack to."""
    damaged = "Export or download the scan again; its header is damaged."
    ndim, *dims = (int(d) for d in fields["dim"])
    if not 1 <= ndim <= 7 or any(d < 1 for d in dims[:ndim]):
        raise VolumeError("bad-header", "the header's dimensions make no sense", damaged)
    dims = dims[:ndim]
    if any(d > 1 for d in dims[3:]):
        what = f"holds {int(np.prod(dims[3:], dtype=object))} volumes, not one"
        raise VolumeError("not-3d", what, "Split it into one 3-D file per modality.")
    if ndim < 3 or min(dims[:3]) == 1:
        what = f"is a single slice ({'x'.join(map(str, dims[:3]))})"
        raise VolumeError("single-slice", what, "Provide the whole 3-D volume.")
    shape = (dims[0], dims[1], dims[2])

    dtype = _dtype(fields)
    n_voxels = shape[0] * shape[1] * shape[2]
    if n_voxels > MAX_VOXELS:
        what = f"the header claims {'x'.join(map(str, shape))} voxels, more than any scan has"
        raise VolumeError("too-large", what, damaged)
    n_header = fields.template_dtype.itemsize
    offset = float(fields["vox_offset"])
    if offset == 0:  # some writers leave it out
        offset = n_header + 4
    if not n_header <= offset <= MAX_HEADER_BYTES or offset != int(offset):
        raise VolumeError("bad-header", "the header says nonsense about where it ends", damaged)
    if int(offset) + n_voxels * dtype.itemsize > limit:
        what = "the file is too short for the number of voxels its header claims"
        raise VolumeError("truncated", what, "Copy or download the file again from its source.")

    affine, oriented = _affine(fields, shape)
    spacing = voxel_sizes(affine)
    if not (np.all(spacing >= MIN_SPACING_MM) and np.all(spacing <= MAX_SPACING_MM)):
        what = f"voxels are {'x'.join(f'{s:.3g}' for s in spacing)} mm, which no brain MRI has"
        raise VolumeError("implausible-spacing", what, "Correct the voxel size in the header.")
    ornt = io_orientation(affine)
    if np.nanmax(obliquity(affine), initial=0.0) > MAX_TILT_RAD:
        what = "the voxel axes are tilted against the patient axes (oblique)"
        raise VolumeError("oblique", what, "Resample all files of the subject to straight axes.")
    if sorted(ornt[:, 0]) != [0, 1, 2]:
        raise VolumeError("bad-affine", "the header's orientation makes no sense", damaged)
    return _Header(shape, dtype, int(offset), _scaling(fields), affine, ornt, oriented)


def _dtype(fields: Any) -> np.dtype:
    remedy = "Save the scan with whole numbers or floating-point numbers."
    try:
        dtype = np.dtype(fields.get_data_dtype())
    except (HeaderDataError, KeyError):
        raise VolumeError("bad-datatype", "the header's voxel type is unknown", remedy) from None
    if dtype.kind == "c":
        raise VolumeError("bad-datatype", "voxels are complex numbers", remedy)
    if dtype.kind not in "iuf":
        raise VolumeError("bad-datatype", "voxels are colours, not intensities", remedy)
    return dtype


def _scaling(fields: Any) -> tuple[float, float]:
    slope, intercept = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0 or not np.isfinite(slope):  # the standard: not scaled
        return 1.0, 0.0
    if not np.isfinite(intercept):
        remedy = "Correct scl_inter in the header, or export the scan again."
        raise VolumeError("bad-header", "the header's intensity offset is not a number", remedy)
    return slope, intercept


def _affine(fields: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray, bool]:
    """(4x4 voxel -> mm, whether the file says so). Without sform and qform the axes of BraTS are
    taken: left, posterior, superior, origin as ITK writes it."""
    if fields["sform_code"] == 0 and fields["qform_code"] == 0:
        x, y, z = np.abs(fields["pixdim"][1:4].astype(np.float64))
        affine = np.diag([-x, -y, z, 1.0])
        affine[1, 3] = (shape[1] - 1) * y
        oriented = False
    else:
        try:
            with np.errstate(all="ignore"):
                affine = np.asarray(fields.get_best_affine(), dtype=np.float64)
        except (HeaderDataError, ValueError, ArithmeticError):
            affine = np.full((4, 4), np.nan)
        oriented = True
    with np.errstate(all="ignore"):
        sound = np.isfinite(affine).all() and np.abs(affine).max() < 1e6
    if not sound:
        remedy = "Export the scan again, or correct the qform and sform."
        raise VolumeError("bad-affine", "the header's orientation makes no sense", remedy)
    return affine, oriented


def _unpacked(packed: BinaryIO, n_bytes: int) -> bytearray | None:
    """All `n_bytes` of a gzip file that is one sound part of exactly that size, else None.

    Where `packed` is read from next stays as it was.
    """
    place = packed.tell()
    size = packed.seek(0, io.SEEK_END)
    if size > n_bytes + n_bytes // 64 + 2**16:  # no packer makes a file that much larger
        packed.seek(place)
        return None
    packed.seek(0)
    content = packed.read(size)
    packed.seek(place)
    # A part ends with its size, and libdeflate is silent about what follows the first part. That
    # nothing does is certain if the size stands at the very end of the file and nowhere else.
    if content[-4:] != n_bytes.to_bytes(4, "little"):
        return None
    n = len(content)
    numbers = (np.frombuffer(content, "<u4", (n - shift) // 4, shift) for shift in range(4))
    if sum(int(np.count_nonzero(number == n_bytes)) for number in numbers) > 1:
        return None
    try:
        # never larger than what the judged header asks for, whatever the file says
        unpacked = deflate.gzip_decompress(content, n_bytes)
    except (deflate.DeflateError, ValueError):
        return None
    return unpacked if len(unpacked) == n_bytes else None


def _streamed(stream: Any, already: bytes, header: _Header) -> np.ndarray:
    """The voxels in the file's order. Reads to the end of the file, where gzip's CRC is."""
    flat = np.empty(int(np.prod(header.shape)), dtype=header.dtype)
    target = flat.view(np.uint8).data
    filled = min(len(already), len(target))
    target[:filled] = already[:filled]
    while filled < len(target):
        n = stream.readinto(target[filled:])
        if not n:
            what = f"the file ends after {filled / len(target):.0%} of the voxels"
            remedy = "Copy or download the file again from its source."
            raise VolumeError("truncated", what, remedy)
        filled += n
    left = max(0, len(already) - len(target))
    slice_bytes = header.shape[0] * header.shape[1] * header.dtype.itemsize
    while left < slice_bytes and (more := stream.read(io.DEFAULT_BUFFER_SIZE)):
        left += len(more)
    if left >= slice_bytes:
        what = "the file holds more voxels than its header says"
        raise VolumeError("surplus-voxels", what, "Export the scan again; its header is wrong.")
    return flat


def _native(flat: np.ndarray, header: _Header) -> np.ndarray:
    """The same numbers scaled, as an integer type of this machine or as float32."""
    if not header.dtype.isnative:
        flat = flat.byteswap(inplace=True).view(header.dtype.newbyteorder("="))
    slope, intercept = header.scaling
    if (slope, intercept) != (1.0, 0.0):
        with np.errstate(all="ignore"):
            scaled = np.multiply(flat, slope, dtype=np.float64)
            scaled += intercept
            flat = scaled.astype(np.float32)
    elif flat.dtype.kind == "f":
        with np.errstate(all="ignore"):
            flat = flat.astype(np.float32, copy=False)
    return flat


def _about_a_person(fields: Any, extensions: bytes) -> bool:
    names = ("descrip", "aux_file", "intent_name", "db_name", "data_type")
    texts = [fields[name].tobytes() for name in names if name in fields.keys()]  # noqa: SIM118
    has_extension = len(extensions) > 12 and extensions[0] != 0
    if has_extension:
        texts.append(extensions[12:])
        # esize, ecode: little or big, as the header
        code = extensions[8:12]
        if _DICOM_EXTENSION in (int.from_bytes(code, "little"), int.from_bytes(code, "big")):
            return True
    return any(_PERSONAL.search(text) for text in texts)
