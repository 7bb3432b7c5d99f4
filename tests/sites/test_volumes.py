"""One NIfTI file: whatever its bytes, it is read as nibabel reads it or refused."""

from __future__ import annotations

import gzip
import random
import struct
import tracemalloc
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from sites import volumes
from sites.volumes import VolumeError, read_volume

SHAPE = (12, 13, 10)
AFFINE = np.array([[-1.0, 0, 0, 3], [0, -1.5, 0, 18], [0, 0, 2, -7], [0, 0, 0, 1]])  # L, P, S


def write(path: Path, dtype: str = "<i2", kind: type = nibabel.Nifti1Image) -> Path:
    voxels = np.random.default_rng(0).integers(0, 120, SHAPE).astype(dtype)
    picture = kind(voxels, AFFINE, dtype=voxels.dtype)
    picture.header.set_data_dtype(dtype)
    picture.set_qform(AFFINE, 1)
    nibabel.save(picture, path)
    return path


def patch(path: Path, offset: int, values: bytes) -> Path:
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[offset : offset + len(values)] = values
    path.write_bytes(gzip.compress(bytes(raw), 1))
    return path


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write(tmp_path / "x_t1.nii.gz")


def agrees_with_nibabel(path: Path) -> None:
    volume, canonical = read_volume(path), nibabel.as_closest_canonical(nibabel.load(path))
    np.testing.assert_allclose(volume.voxels, canonical.get_fdata(), rtol=1e-6)
    np.testing.assert_allclose(volume.affine, canonical.affine)
    np.testing.assert_allclose(volume.file_affine, nibabel.load(path).affine)
    assert volume.file_shape == nibabel.load(path).shape
    assert volume.voxels.flags.f_contiguous
    assert volume.voxels.dtype.isnative


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "X.NII.GZ"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_containers(tmp_path, name, kind):
    path = write(tmp_path / name.lower(), kind=kind)
    agrees_with_nibabel(path)
    read_volume(path.rename(tmp_path / name))


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i2", "<u2", ">i4", "<i8", "<f4", ">f8"])
def test_number_types(tmp_path, dtype):
    path = write(tmp_path / "x.nii.gz", dtype)
    agrees_with_nibabel(path)
    expected = np.dtype(dtype).newbyteorder("=") if dtype[-2] in "iu" else np.float32
    assert read_volume(path).voxels.dtype == expected


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "PSL", "SRP", "IPR"])
def test_any_straight_orientation_is_turned_to_ras(scan, axes):
    plain = nibabel.load(scan)
    turn = ornt_transform(io_orientation(plain.affine), axcodes2ornt(axes))
    nibabel.save(plain.as_reoriented(turn), scan)
    agrees_with_nibabel(scan)
    assert read_volume(scan).axes == axes


@pytest.mark.parametrize(("slope", "intercept"), [(2.5, 0), (1, 10), (0.1, -3)])
def test_scaling(scan, slope, intercept):
    agrees_with_nibabel(patch(scan, 112, struct.pack("<ff", slope, intercept)))


@pytest.mark.parametrize("slope", [0.0, np.nan])
def test_no_scaling_keeps_integers(scan, slope):
    agrees_with_nibabel(patch(scan, 112, struct.pack("<ff", slope, 5)))
    assert read_volume(scan).voxels.dtype == np.int16


@pytest.mark.parametrize(("sform", "qform"), [(0, 1), (2, 1), (1, 0), (4, 4)])
def test_either_form_is_enough_whatever_its_code(scan, sform, qform):
    agrees_with_nibabel(patch(scan, 252, struct.pack("<hh", qform, sform)))


def test_without_forms_the_axes_of_brats_are_assumed(scan):
    volume = read_volume(patch(scan, 252, struct.pack("<hh", 0, 0)))
    assert not volume.oriented
    assert volume.axes == "LPS"
    expected = [[-1.0, 0, 0, 0], [0, -1.5, 0, 1.5 * 12], [0, 0, 2, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(volume.file_affine, expected)


@pytest.mark.parametrize(
    ("degrees", "refused"), [(0.1, False), (1, True), (10, True), (44, True), (90, False)]
)
def test_tilt(scan, degrees, refused):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    voxels = np.asanyarray(nibabel.load(scan).dataobj)
    nibabel.save(nibabel.Nifti1Image(voxels, AFFINE @ turn), scan)
    if refused:
        with pytest.raises(VolumeError) as caught:
            read_volume(scan)
        assert caught.value.code == "oblique"
    else:
        read_volume(scan)


@pytest.mark.parametrize(
    ("offset", "values", "code"),
    [
        (40, struct.pack("<8h", 3, 32000, 32000, 32000, 1, 1, 1, 1), "too-large"),
        (40, struct.pack("<8h", 3, 500, 500, 500, 1, 1, 1, 1), "truncated"),
        (40, struct.pack("<8h", 3, -5, 13, 10, 1, 1, 1, 1), "bad-header"),
        (40, struct.pack("<8h", 9, 12, 13, 10, 1, 1, 1, 1), "bad-header"),
        (40, struct.pack("<8h", 2, 12, 130, 1, 1, 1, 1, 1), "single-slice"),
        (40, struct.pack("<8h", 5, 12, 13, 10, 1, 3, 1, 1), "not-3d"),
        (46, struct.pack("<h", 9), "surplus-voxels"),
        (46, struct.pack("<h", 11), "truncated"),
        (70, struct.pack("<h", 9999), "bad-datatype"),
        (70, struct.pack("<h", 128), "bad-datatype"),  # RGB
        (80, struct.pack("<fff", 0.001, 0.001, 0.001), "implausible-spacing"),
        (108, struct.pack("<f", 1e9), "bad-header"),
        (108, struct.pack("<f", np.nan), "bad-header"),
        (108, struct.pack("<f", -4), "bad-header"),
        (112, struct.pack("<ff", 2, np.inf), "bad-header"),
        (280, struct.pack("<f", np.nan), "bad-affine"),
        (280, struct.pack("<12f", *[0.0] * 12), "implausible-spacing"),
        (344, b"ni1\0", "not-nifti"),
    ],
)
def test_header_nonsense_is_refused_by_its_own_name(scan, offset, values, code):
    if offset == 80:  # pixdim counts only without forms
        patch(scan, 252, bytes(4))
    patch(scan, offset, values)
    with pytest.raises(VolumeError) as caught:
        read_volume(scan)
    assert caught.value.code == code


@pytest.mark.parametrize("edge", [32000, 500])
def test_a_header_bomb_costs_no_memory(scan, edge):
    patch(scan, 40, struct.pack("<4h", 3, edge, edge, edge))
    tracemalloc.start()
    with pytest.raises(VolumeError):
        read_volume(scan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def test_a_gzip_bomb_behind_a_sound_header_is_not_unpacked(scan):
    scan.write_bytes(scan.read_bytes() + gzip.compress(bytes(100_000_000), 1))
    tracemalloc.start()
    with pytest.raises(VolumeError) as caught:
        read_volume(scan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.code == "surplus-voxels"
    assert peak < 1e6


def test_parts_of_a_split_gzip_are_one_file(scan):
    raw = gzip.decompress(scan.read_bytes())
    scan.write_bytes(gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]))
    agrees_with_nibabel(scan)


def test_parts_larger_than_any_buffer_are_one_file(tmp_path):
    path = tmp_path / "x.nii.gz"
    voxels = np.random.default_rng(0).integers(0, 30000, (64, 64, 60), np.int16)
    raw = nibabel.Nifti1Image(voxels, AFFINE).to_bytes()
    path.write_bytes(gzip.compress(raw[:300_000], 0) + gzip.compress(raw[300_000:], 0))
    agrees_with_nibabel(path)


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "u1", "<f4", "<f8"])
@pytest.mark.parametrize("offset", [352.0, 353.0])
def test_a_sound_gzip_is_unpacked_at_once(tmp_path, monkeypatch, dtype, offset):
    path = write(tmp_path / "x.nii.gz", dtype)
    raw = gzip.decompress(path.read_bytes())
    raw = raw[:352] + bytes(int(offset) - 352) + raw[352:]
    path.write_bytes(gzip.compress(raw))
    patch(path, 108, struct.pack("<f", offset))
    agrees_with_nibabel(path)
    monkeypatch.delattr(volumes, "_streamed")
    agrees_with_nibabel(path)


N_BYTES = struct.pack("<I", 352 + 2 * int(np.prod(SHAPE)))
ODDITIES = {  # of a gzip file: bytes -> bytes, and what it is refused for
    "its size within it": (lambda z: z[:3] + b"\4" + z[4:10] + b"\4\0" + N_BYTES + z[10:], None),
    "zeros behind it": (lambda z: z + bytes(512), None),
    "an empty part behind it": (lambda z: z + gzip.compress(b""), None),
    "a little more behind it": (lambda z: z + gzip.compress(bytes(100)), None),
    "the whole once more": (lambda z: z + z, "surplus-voxels"),
    "garbage behind it": (lambda z: z + b"garbage", "damaged-gzip"),
    "garbage that ends as it does": (lambda z: z + b"garbage" + z[-8:], "damaged-gzip"),
    "a wrong checksum": (lambda z: z[:-8] + b"\1\2\3\4" + z[-4:], "damaged-gzip"),
    "a wrong size": (lambda z: z[:-4] + struct.pack("<I", 3000), "damaged-gzip"),
    "4 GB claimed": (lambda z: z[:-4] + b"\xff" * 4, "damaged-gzip"),
    "no end": (lambda z: z[:-6], "truncated"),
    "half of it": (lambda z: z[: len(z) // 2], "truncated"),
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_odd_gzip_files_are_judged_as_streams_are_and_cost_no_memory(scan, monkeypatch, oddity):
    change, code = ODDITIES[oddity]
    scan.write_bytes(change(gzip.compress(gzip.decompress(scan.read_bytes()))))
    for _ in ("unpacked at once where possible", "always a stream"):
        if code is None:
            agrees_with_nibabel(scan)
        else:
            tracemalloc.start()
            with pytest.raises(VolumeError) as caught:
                read_volume(scan)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert caught.value.code == code
            assert peak < 1e6
        monkeypatch.setattr(volumes, "_unpacked", lambda *_: None)


@pytest.mark.parametrize(
    "text", [b"FSL5.0.10", b"TE=2.6;Time=123035.000;phase=1", b"SPM - 3D normalized", b"ITK 5.3"]
)
def test_text_of_imaging_software_is_no_person(scan, text):
    assert not read_volume(patch(scan, 148, text)).personal


@pytest.mark.parametrize(
    "text",
    [
        b"MUSTERMANN^ERIKA",
        b"Mustermann, Erika",
        b"dob 12.8.1964",
        b"1964-08-12",
        b"PatId: 12",
        b"patient 12",
        b"00123456",
    ],
)
@pytest.mark.parametrize("where", ["descrip", "aux_file", "extension"])
def test_text_about_a_person_is_found(scan, text, where):
    picture = nibabel.load(scan)
    if where == "extension":
        picture.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", text))
    else:
        picture.header[where] = text
    nibabel.save(picture, scan)
    assert read_volume(scan).personal
    agrees_with_nibabel(scan)


def test_a_dicom_header_within_the_file_is_about_a_person(scan):
    picture = nibabel.load(scan)
    picture.header.extensions.append(nibabel.nifti1.Nifti1Extension(2, b"\x10\x00" * 8))
    nibabel.save(picture, scan)
    assert read_volume(scan).personal


def test_damaged_bytes_are_refused_or_change_no_voxel(scan):
    sound, expected, rng = scan.read_bytes(), read_volume(scan).voxels, random.Random(1)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            damaged = bytearray(sound)
            for _ in range(rng.choice([1, 1, 3, 20])):
                damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
            scan.write_bytes(damaged[: rng.choice([None, None, rng.randrange(len(damaged))])])
            try:
                np.testing.assert_array_equal(read_volume(scan).voxels, expected)
            except VolumeError:
                refused += 1
    assert refused > 200


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_nonsense_headers_raise_nothing_else(tmp_path, kind, capfd):
    path = write(tmp_path / "x.nii.gz", kind=kind)
    sound, rng = gzip.decompress(path.read_bytes()), random.Random(2)
    codes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            damaged = bytearray(sound)
            for _ in range(rng.choice([1, 2, 5, 40])):
                at = rng.randrange(540 if kind is nibabel.Nifti2Image else 352)
                damaged[at] = rng.choice([0, 127, 128, 255, rng.randrange(256)])
            path.write_bytes(gzip.compress(bytes(damaged), 0))
            try:
                read_volume(path)
            except VolumeError as error:
                codes.add(error.code)
    assert {"not-nifti", "bad-affine", "bad-datatype", "truncated"} <= codes
    assert capfd.readouterr().err == ""
