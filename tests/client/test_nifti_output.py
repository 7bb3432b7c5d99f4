"""A written map is exact to a byte, stays within 0 and 1, and tells whether it was changed since."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest

from client.nifti_output import is_as_written, labels_file, map_file

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


@pytest.fixture(params=["out.nii", "out.nii.gz"])
def written(request, tmp_path) -> Path:
    path = tmp_path / request.param
    labels = np.random.default_rng(0).integers(0, 4, (6, 5, 4)).astype(np.uint8)
    path.write_bytes(labels_file(path, labels, AFFINE, AFFINE))
    return path


def test_values_read_back_lie_between_0_and_1(tmp_path):
    path = tmp_path / "map.nii"
    values = np.linspace(0, 1, 60, dtype=np.float32).reshape(3, 4, 5)
    path.write_bytes(map_file(path, values, AFFINE, AFFINE, "a map"))
    image = nibabel.load(path)
    for read in (image.get_fdata(), image.get_fdata(dtype=np.float32, caching="unchanged")):
        assert (read.min(), read.max() <= 1) == (0, True)
        assert np.abs(read - values).max() <= 0.5 / 255 + 1e-6
    assert is_as_written(path)


def test_a_file_is_as_written_until_anything_in_it_changes(written):
    assert is_as_written(written)
    assert bytes(nibabel.load(written).header["descrip"]).startswith(b"fedbrats labels ")
    packed = written.name.endswith(".gz")
    content = gzip.decompress(written.read_bytes()) if packed else written.read_bytes()

    def holds(changed: bytes) -> bool:
        written.write_bytes(gzip.compress(changed, 1) if packed else changed)
        return is_as_written(written)

    assert holds(content)  # only packed anew
    for place in (60, 200, 290, 352, len(content) - 1):  # header, description, affine, voxels
        changed = bytearray(content)
        changed[place] ^= 1
        assert not holds(bytes(changed)), place
    assert not holds(content[:-1])
    assert not holds(b"")


def test_what_is_not_ours_or_cannot_be_read_is_not_as_written(written, tmp_path):
    image = nibabel.load(written)
    other = tmp_path / "other.nii"
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine), other)
    assert not is_as_written(other)
    assert not is_as_written(tmp_path / "gone.nii.gz")
    assert not is_as_written(tmp_path)
    written.write_bytes(written.read_bytes()[:-20])
    assert not is_as_written(written)
