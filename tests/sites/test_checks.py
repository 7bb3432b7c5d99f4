"""The edge cases of BraTS data: what each must be called, for which file, and how severe it is.

A subject is written with nibabel from arrays that this file makes itself, then spoiled in one way.
"""

from __future__ import annotations

import gzip
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from common.brats import MODALITIES
from sites.checks import Scan, examine, same_patient_twice
from sites.finding import Finding
from sites.subject import discover

REAL = Path("/work/shared/data/real_cases")
ID = "BraTS20_Training_001"
SHAPE = (24, 24, 20)
LPS = np.array([[-1.0, 0, 0, 0], [0, -1, 0, SHAPE[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])  # BraTS
RAS = np.diag([1.0, 1, 1, 1])
X, Y, Z = np.indices(SHAPE)
BRAIN = ((X - 10) / 8) ** 2 + ((Y - 13) / 9) ** 2 + ((Z - 9) / 8) ** 2 < 1  # symmetric to no axis


def tumour(labels: tuple[int, int, int] = (1, 2, 4)) -> np.ndarray:
    """In RAS: a core, a rim around it and oedema, in the file's labels."""
    necrosis, oedema, enhancing = labels
    seg = np.zeros(SHAPE, np.uint8)
    seg[6:14, 8:16, 5:12] = oedema
    seg[8:12, 10:14, 7:11] = enhancing
    seg[9:11, 11:13, 8:10] = necrosis
    return seg


def image(modality: str, seed: int = 0) -> np.ndarray:
    """In RAS: int16 noise in the brain, 0 elsewhere."""
    noise = np.random.default_rng([seed, MODALITIES.index(modality)]).integers(50, 900, SHAPE)
    return np.where(BRAIN, noise, 0).astype(np.int16)


def save(path: Path, ras: np.ndarray, affine: np.ndarray = LPS, *, big_endian=False) -> Path:
    """Write RAS voxels on LPS axes, header as BraTS has it (codes 1 and 1)."""
    header = nibabel.Nifti1Header(endianness=">" if big_endian else "<")
    header.set_data_dtype(ras.dtype)
    picture = nibabel.Nifti1Image(ras[::-1, ::-1], affine, header)
    picture.set_sform(affine, 1)
    picture.set_qform(affine, 1)
    nibabel.save(picture, path)
    return path


def write_subject(root: Path, subject_id: str = ID, seed: int = 0) -> Path:
    folder = root / subject_id
    folder.mkdir(parents=True)
    for modality in MODALITIES:
        save(folder / f"{subject_id}_{modality}.nii.gz", image(modality, seed))
    save(folder / f"{subject_id}_seg.nii.gz", tumour())
    return folder


def of(folder: Path, role: str) -> Path:
    return folder / f"{folder.name}_{role}.nii.gz"


def patch(path: Path, offset: int, values: bytes) -> None:
    """Overwrite bytes of the unpacked file."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[offset : offset + len(values)] = values
    path.write_bytes(gzip.compress(bytes(raw), 1))


def unpack(path: Path) -> Path:
    plain = path.with_suffix("")
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    return plain


def inspect(root: Path, **options) -> tuple[list[Scan], list[Finding]]:
    """All of a site, as `fed-client check` and training do."""
    options = {"modalities": MODALITIES} | options
    discovery = discover(root, modalities=options["modalities"], site="north")
    scans, findings, members = [], list(discovery.findings), []
    for subject in discovery.subjects:
        scan, found = examine(subject, site="north", **options)
        assert (scan is None) == any(f.severity == "error" for f in found)
        findings += found
        if scan is not None:
            scans.append(scan)
            members.append(("north", subject.id, scan.digest))
    return scans, findings + same_patient_twice(members)


# ---------------------------------------------------------------- 51 cases: what is done to a subject
# Each takes the subject's folder and spoils it.


def nothing(folder: Path) -> None:
    pass


def no_enhancing(folder: Path) -> None:
    save(of(folder, "seg"), tumour((1, 2, 1)))


def plain_nii(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        unpack(path)
        path.unlink()


def kaggle_name(folder: Path) -> None:
    other = folder.rename(folder.parent / "BraTS20_Training_355")
    for path in sorted(other.iterdir()):
        path.rename(other / path.name.replace("001", "355"))
    unpack(of(other, "seg")).rename(other / "W39_1998.09.19_Segm.nii")
    of(other, "seg").unlink()


def junk(folder: Path) -> None:
    (folder / f"._{ID}_t1.nii.gz").write_bytes(b"\0\5\x16\7Mac OS X")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder.parent / "name_mapping.csv").write_text("Grade\n")
    (folder.parent / "__MACOSX" / folder.name).mkdir(parents=True)
    (folder.parent / "__MACOSX" / folder.name / f"{ID}_t1.nii.gz").write_bytes(b"x")


def float64(folder: Path) -> None:
    for role in (*MODALITIES, "seg"):
        path = of(folder, role)
        save(path, nibabel.load(path).get_fdata()[::-1, ::-1])


def scaled(folder: Path) -> None:
    save(of(folder, "t2"), (image("t2") * 3).astype(np.int16))
    patch(of(folder, "t2"), 112, struct.pack("<ff", 1 / 3, 0.0))  # scl_slope, scl_inter
    save(of(folder, "seg"), (tumour() * 50).astype(np.uint8))
    patch(of(folder, "seg"), 112, struct.pack("<ff", 0.02, 0.0))


def trailing_axis(folder: Path) -> None:
    patch(of(folder, "t1"), 40, struct.pack("<5h", 4, *SHAPE, 1))


def big_endian(folder: Path) -> None:
    for modality in MODALITIES:
        save(of(folder, modality), image(modality), big_endian=True)


def names_of_2023(folder: Path) -> None:
    new = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f", "seg": "seg"}
    other = folder.rename(folder.parent / "BraTS-GLI-00001-000")
    save(other / f"{ID}_seg.nii.gz", tumour((1, 2, 3)))
    for old, name in new.items():
        (other / f"{ID}_{old}.nii.gz").rename(other / f"{other.name}-{name}.nii.gz")


def label_3(folder: Path) -> None:
    save(of(folder, "seg"), tumour((1, 2, 3)))


def empty_label(folder: Path) -> None:
    save(of(folder, "seg"), np.zeros(SHAPE, np.uint8))


def one_voxel(folder: Path) -> None:
    seg = np.zeros(SHAPE, np.uint8)
    seg[10, 12, 9] = 4
    save(of(folder, "seg"), seg)


def all_ras(folder: Path) -> None:
    for path in folder.iterdir():
        ras = np.asanyarray(nibabel.load(path).dataobj)[::-1, ::-1]
        save(path, ras[::-1, ::-1], RAS)


def no_forms(folder: Path) -> None:
    for path in folder.iterdir():
        patch(path, 252, struct.pack("<hh", 0, 0))


def t1_twice(folder: Path) -> None:
    shutil.copy(of(folder, "t1"), of(folder, "t1ce"))


def skull(folder: Path) -> None:
    save(of(folder, "t2"), image("t2") + np.int16(7))


def tumour_outside(folder: Path) -> None:
    seg = tumour()
    seg[:4, :4, :4] = 2
    save(of(folder, "seg"), seg)


def named_in_header(folder: Path) -> None:
    patch(of(folder, "flair"), 148, b"MUSTERMANN^ERIKA 19640812")  # descrip


def both_extensions(folder: Path) -> None:
    unpack(of(folder, "t1ce"))


def thick_slices(folder: Path) -> None:
    for path in folder.iterdir():
        ras = np.asanyarray(nibabel.load(path).dataobj)[::-1, ::-1]
        save(path, ras, LPS @ np.diag([1.0, 1, 5, 1]))


def bad_crc(folder: Path) -> None:
    path = of(folder, "t1")
    raw = path.read_bytes()
    path.write_bytes(raw[:-8] + bytes([raw[-8] ^ 1]) + raw[-7:])


def cut_gz(folder: Path) -> None:
    path = of(folder, "t1")
    path.write_bytes(path.read_bytes()[:-3000])


def cut_nii(folder: Path) -> None:
    path = unpack(of(folder, "t1"))
    of(folder, "t1").unlink()
    path.write_bytes(path.read_bytes()[:-1])


def zero_bytes(folder: Path) -> None:
    of(folder, "t1").write_bytes(b"")


def web_page(folder: Path) -> None:
    of(folder, "t1").write_bytes(b"<!DOCTYPE html><html>Please log in</html>")


def header_bomb(folder: Path) -> None:
    patch(of(folder, "t1"), 40, struct.pack("<4h", 3, 32000, 32000, 32000))


def other_shape(folder: Path) -> None:
    save(of(folder, "t2"), image("t2")[:, :, :-1])


def with_value(role: str, value: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        voxels = image(role).astype(np.float32)
        voxels[10, 12, 9] = value
        save(of(folder, role), voxels)

    return spoil


def without(role: str) -> Callable[[Path], None]:
    return lambda folder: of(folder, role).unlink()


def with_labels(*labels: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        seg = tumour().astype(np.float32 if any(i != int(i) for i in labels) else np.int16)
        seg[7, 9, 6 : 6 + len(labels)] = labels
        save(of(folder, "seg"), seg)

    return spoil


def moved(turn: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: save(of(folder, "t2"), image("t2"), LPS @ turn) and None


def rotated(degrees: float) -> np.ndarray:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def flipped_header(folder: Path) -> None:
    save(of(folder, "t1"), image("t1"), LPS @ np.diag([-1.0, 1, 1, 1]))


def replaced(role: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda folder: save(of(folder, role), change(image(role))) and None


def four_volumes(folder: Path) -> None:
    voxels = np.stack([image("t1")] * 4, axis=-1)
    nibabel.save(nibabel.Nifti1Image(voxels, LPS), of(folder, "t1"))


def other_id(folder: Path) -> None:
    of(folder, "t1").rename(folder / "BraTS20_Training_002_t1.nii.gz")


def two_files(folder: Path) -> None:
    save(folder / f"{ID}_t1.nii", image("t1", seed=5))


def copied(folder: Path) -> None:
    other = folder.parent / "BraTS20_Training_002"
    other.mkdir()
    for path in folder.iterdir():
        shutil.copy(path, other / path.name.replace("001", "002"))


def link_to_nowhere(folder: Path) -> None:
    of(folder, "t1").unlink()
    of(folder, "t1").symlink_to("gone")


ACCEPTED = {
    "reference": nothing,
    "no enhancing tumour": no_enhancing,
    "uncompressed": plain_nii,
    "Kaggle's misnamed segmentation": kaggle_name,
    "junk files": junk,
    "float64": float64,
    "scl_slope": scaled,
    "trailing axis of 1": trailing_axis,
    "big-endian": big_endian,
    "names and labels of 2023": names_of_2023,
}
WARNED = {  # what is done, code, file that is named
    "label 3 instead of 4": (label_3, "label-3-for-4", "seg.nii.gz"),
    "empty label": (empty_label, "empty-segmentation", "seg.nii.gz"),
    "one voxel": (one_voxel, "tiny-segmentation", "seg.nii.gz"),
    "all RAS": (all_ras, "unusual-orientation", "t1.nii.gz"),
    "no qform, no sform": (no_forms, "no-orientation", "t1.nii.gz"),
    "t1 is t1ce": (t1_twice, "identical-modalities", "t1ce.nii.gz"),
    "skull": (skull, "not-skull-stripped", "t2.nii.gz"),
    "tumour outside": (tumour_outside, "segmentation-outside-brain", "seg.nii.gz"),
    "text in descrip": (named_in_header, "personal-text", "flair.nii.gz"),
    "both extensions": (both_extensions, "both-extensions", "t1ce.nii"),
    "thick slices": (thick_slices, "anisotropic", "t1.nii.gz"),
}
REFUSED = {
    "gzip CRC": (bad_crc, "damaged-gzip", "t1.nii.gz"),
    "cut gzip": (cut_gz, "truncated", "t1.nii.gz"),
    "cut nii": (cut_nii, "truncated", "t1.nii"),
    "0 bytes": (zero_bytes, "empty-file", "t1.nii.gz"),
    "web page": (web_page, "not-nifti", "t1.nii.gz"),
    "header bomb": (header_bomb, "too-large", "t1.nii.gz"),
    "other shape": (other_shape, "shape-mismatch", "t2.nii.gz"),
    "NaN": (with_value("t1", np.nan), "nan", "t1.nii.gz"),
    "Inf": (with_value("t1", np.inf), "infinite", "t1.nii.gz"),
    "no t2": (without("t2"), "missing-modality", ""),
    "no segmentation": (without("seg"), "missing-segmentation", ""),
    "label 7": (with_labels(7), "unknown-label", "seg.nii.gz"),
    "labels 3 and 4": (with_labels(3), "ambiguous-labels", "seg.nii.gz"),
    "fractional labels": (with_labels(1.5), "fractional-labels", "seg.nii.gz"),
    "negative label": (with_labels(-1), "negative-label", "seg.nii.gz"),
    "oblique": (moved(rotated(10)), "oblique", "t2.nii.gz"),
    "other affine": (moved(np.diag([1.0, 1, 1.2, 1])), "affine-mismatch", "t2.nii.gz"),
    "flipped header": (flipped_header, "affine-mismatch", "t1.nii.gz"),
    "four volumes": (four_volumes, "not-3d", "t1.nii.gz"),
    "one slice": (replaced("t1", lambda v: v[:, :, :1]), "single-slice", "t1.nii.gz"),
    "all zero": (replaced("t1", np.zeros_like), "all-zero", "t1.nii.gz"),
    "constant": (replaced("t1", np.ones_like), "constant", "t1.nii.gz"),
    "negative": (replaced("t1", lambda v: v - np.int16(9)), "negative-intensities", "t1.nii.gz"),
    "complex": (replaced("t1", lambda v: v.astype(np.complex64)), "bad-datatype", "t1.nii.gz"),
    "other id": (other_id, "id-mismatch", "BraTS20_Training_002_t1.nii.gz"),
    "two files": (two_files, "two-different-files", "t1.nii"),
    "the same patient twice": (copied, "same-patient-twice", ""),
    # beyond the 51
    "mirrored voxels": (replaced("t2", lambda v: v[:, ::-1]), "flipped-modality", "t2.nii.gz"),
    "packed .nii": (
        lambda f: of(f, "t1").rename(f / f"{ID}_t1.nii") and None,
        "wrong-extension",
        "t1.nii",
    ),
    "unpacked .nii.gz": (
        lambda f: unpack(of(f, "t1")).replace(of(f, "t1")) and None,
        "wrong-extension",
        "t1.nii.gz",
    ),
    "more voxels than said": (
        lambda f: patch(of(f, "t1"), 46, struct.pack("<h", 10)),
        "surplus-voxels",
        "t1.nii.gz",
    ),
    "spacing of 0": (
        lambda f: [patch(of(f, "t1"), o, bytes(20)) for o in (80, 252)] and None,
        "implausible-spacing",
        "t1.nii.gz",
    ),
    "two files, one elsewhere": (
        lambda f: save(f / f"{ID}_t1.nii", image("t1"), LPS + 5 * np.eye(4, k=3)) and None,
        "two-different-files",
        "t1.nii",
    ),
    "link to nowhere": (
        link_to_nowhere,
        "unreadable",
        "t1.nii.gz",
    ),
}


@pytest.mark.parametrize("spoil", ACCEPTED.values(), ids=ACCEPTED)
def test_sound_data_are_read_as_they_are_without_a_word(tmp_path, spoil):
    spoil(write_subject(tmp_path))
    (scan,), findings = inspect(tmp_path)
    assert findings == []
    for modality in MODALITIES:
        np.testing.assert_allclose(scan.images[modality], image(modality), rtol=1e-6)
    expected = tumour((1, 2, 1)) if spoil is no_enhancing else tumour((1, 2, 3))
    np.testing.assert_array_equal(scan.labels, expected)
    assert scan.labels.dtype == np.uint8
    assert scan.spacing == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("spoil", "code", "file"), WARNED.values(), ids=WARNED)
def test_odd_data_are_used_and_named(tmp_path, spoil, code, file):
    spoil(write_subject(tmp_path))
    (scan,), (finding,) = inspect(tmp_path)
    assert (finding.severity, finding.code) == ("warning", code)
    assert (finding.site, finding.subject, finding.file) == ("north", ID, f"{ID}_{file}")
    np.testing.assert_array_equal(scan.images["flair"], image("flair"))  # RAS, whatever the file


@pytest.mark.parametrize(("spoil", "code", "file"), REFUSED.values(), ids=REFUSED)
def test_bad_data_are_refused_and_the_odd_file_is_blamed(tmp_path, spoil, code, file):
    spoil(write_subject(tmp_path))
    scans, (finding,) = inspect(tmp_path)
    assert (finding.severity, finding.code) == ("error", code)
    assert finding.file.removeprefix(f"{ID}_") == file
    assert finding.what
    assert finding.remedy
    if code == "same-patient-twice":
        assert finding.subject == "BraTS20_Training_002"
        assert ID in finding.what
    else:
        assert (finding.subject, scans) == (ID, [])


def test_a_site_without_subjects_is_an_error(tmp_path):
    _, (finding,) = inspect(tmp_path)
    assert (finding.severity, finding.code, finding.subject) == ("error", "empty-site", "")


def test_the_same_patient_at_two_sites_is_found_whatever_the_files_look_like(tmp_path):
    """dup_site_a alone is sound; its copy at another site has other names, dtype and axes."""
    (a,), none = inspect(write_subject(tmp_path / "a").parent)
    assert none == []
    folder = write_subject(tmp_path / "b", "BraTS20_Training_300")
    float_copy = image("t1").astype(np.float64)
    save(of(folder, "t1"), float_copy[::-1, ::-1], RAS)
    for role in ("t1ce", "t2", "flair", "seg"):
        source = tumour() if role == "seg" else image(role)
        save(of(folder, role), source[::-1, ::-1], RAS)
    (b,), _ = inspect(tmp_path / "b")
    (c,), _ = inspect(write_subject(tmp_path / "c", seed=1).parent)
    members = [(site, s.subject.id, s.digest) for site, s in (("a", a), ("b", b), ("c", c))]
    twice, same_id = same_patient_twice(members)
    assert (twice.severity, twice.code) == ("warning", "same-patient-at-two-sites")
    assert (twice.site, twice.subject) == ("b", "BraTS20_Training_300")
    assert "site a" in twice.what
    assert (same_id.severity, same_id.code) == ("warning", "same-id-at-two-sites")
    assert (same_id.site, same_id.subject) == ("c", ID)


def test_a_scan_is_recognised_by_any_of_its_modalities(tmp_path):
    """Whatever the subject, the files, the number types and the set of modalities are called."""
    (scan,), _ = inspect(write_subject(tmp_path / "a").parent)
    assert len(scan.fingerprints) == len(MODALITIES)
    assert list(scan.fingerprints) == sorted(scan.fingerprints)
    assert scan.digest in scan.fingerprints
    single = {}
    for modality in MODALITIES:
        (one,), _ = inspect(tmp_path / "a", modalities=(modality,))
        assert one.fingerprints == (one.digest,)
        single[modality] = one.digest
    assert set(single.values()) == set(scan.fingerprints)

    renamed = tmp_path / "b" / "BraTS-GLI-00007-000"
    renamed.mkdir(parents=True)
    for new, old in (("t1n", "t1"), ("t1c", "t1ce"), ("t2w", "t2"), ("t2f", "flair")):
        floats = image(old).astype(np.float32)
        save(renamed / f"{renamed.name}-{new}.nii.gz", floats[::-1, ::-1], RAS)
    save(renamed / f"{renamed.name}-seg.nii.gz", tumour()[::-1, ::-1], RAS)
    (other,), _ = inspect(tmp_path / "b", modalities=MODALITIES[::-1])
    assert other.subject.id == renamed.name
    assert other.fingerprints == scan.fingerprints
    assert other.digest == single["flair"]


def test_a_changed_voxel_changes_the_fingerprint_of_its_modality_only(tmp_path):
    folder = write_subject(tmp_path)
    (before,), _ = inspect(tmp_path)
    voxels = image("t2")
    voxels[tuple(np.argwhere(voxels)[0])] += 1
    save(of(folder, "t2"), voxels)
    (after,), _ = inspect(tmp_path)
    assert len(set(before.fingerprints) & set(after.fingerprints)) == 3
    assert len(after.fingerprints) == 4


# ------------------------------------------------------------------------------------ further rules


def test_only_what_was_asked_for_is_required(tmp_path):
    folder = write_subject(tmp_path)
    for role in ("t1", "t2", "seg"):
        of(folder, role).unlink()
    (scan,), findings = inspect(tmp_path, modalities=("t1ce", "flair"), require_labels=False)
    assert findings == []
    assert list(scan.images) == ["t1ce", "flair"]
    assert scan.labels is None


def test_an_unneeded_modality_is_not_even_read(tmp_path):
    zero_bytes(write_subject(tmp_path))
    (_,), findings = inspect(tmp_path, modalities=("t1ce", "flair"))
    assert findings == []


def test_without_a_majority_both_files_are_named(tmp_path):
    folder = write_subject(tmp_path)
    save(of(folder, "flair"), image("flair")[:, :-1])
    options = {"modalities": ("t1ce", "flair"), "require_labels": False}
    of(folder, "seg").unlink()
    _, (finding,) = inspect(tmp_path, **options)
    assert finding.code == "shape-mismatch"
    assert finding.file == f"{ID}_t1ce.nii.gz, {ID}_flair.nii.gz"
    assert "24x24x20" in finding.what
    assert "24x23x20" in finding.what
    save(of(folder, "flair"), image("flair"), RAS)
    _, (finding,) = inspect(tmp_path, **options)
    assert finding.code == "affine-mismatch"
    assert finding.file == f"{ID}_t1ce.nii.gz, {ID}_flair.nii.gz"


def test_two_against_two_is_no_majority(tmp_path):
    folder = write_subject(tmp_path)
    of(folder, "seg").unlink()
    for role in ("t1ce", "t2"):
        save(of(folder, role), image(role)[:, :-1])
    _, (finding,) = inspect(tmp_path, require_labels=False)
    assert finding.code == "shape-mismatch"
    assert finding.file.split(", ") == [of(folder, role).name for role in MODALITIES]


def test_every_problem_is_reported_at_once(tmp_path):
    folder = write_subject(tmp_path)
    for spoil in (zero_bytes, other_shape, with_labels(7), without("flair")):
        spoil(folder)
    _, findings = inspect(tmp_path)
    codes = {f.code for f in findings}
    assert codes == {"empty-file", "shape-mismatch", "unknown-label", "missing-modality"}


@pytest.mark.parametrize("axis", [0, 1, 2, (0, 1)])
@pytest.mark.parametrize("role", MODALITIES)
def test_a_mirrored_modality_is_found_whichever_it_is(tmp_path, role, axis):
    folder = write_subject(tmp_path)
    save(of(folder, role), np.flip(image(role), axis))
    _, (finding,) = inspect(tmp_path)
    assert (finding.code, finding.file) == ("flipped-modality", of(folder, role).name)


def test_ragged_brain_edges_are_not_taken_for_mirroring(tmp_path):
    """Skull stripping of each modality by itself, off by a voxel, and a cut field of view."""
    folder = write_subject(tmp_path)
    eroded = np.where(np.roll(BRAIN, 1, 0) & np.roll(BRAIN, -1, 1), image("t1"), 0)
    save(of(folder, "t1"), eroded.astype(np.int16))
    cut = image("flair")
    cut[:, :, :6] = 0
    save(of(folder, "flair"), cut)
    _, findings = inspect(tmp_path)
    assert findings == []


def test_integers_stay_integers_and_memory_is_dense(tmp_path):
    write_subject(tmp_path)
    (scan,), _ = inspect(tmp_path)
    for voxels in (*scan.images.values(), scan.labels):
        assert voxels.flags.f_contiguous  # torch.from_numpy refuses negative strides
    assert {v.dtype for v in scan.images.values()} == {np.dtype(np.int16)}


def test_texts_hold_nothing_of_the_header(tmp_path, capfd, caplog):
    """Neither findings nor logs, even where nibabel itself would complain about the header."""
    folder = write_subject(tmp_path)
    named_in_header(folder)
    patch(of(folder, "flair"), 228, b"SECRET_AUX")
    patch(of(folder, "t1"), 80, struct.pack("<f", -7.5))  # nibabel would repair and log it
    patch(of(folder, "t1"), 252, struct.pack("<hh", 1, 0))
    patch(of(folder, "t1"), 148, b"MUSTERMANN^ERIKA")
    _, findings = inspect(tmp_path)
    assert {f.code for f in findings} == {"personal-text", "bad-affine"}
    streams = capfd.readouterr()
    assert streams.out + streams.err + caplog.text == ""
    text = "".join(str(f.as_dict()) for f in findings)
    for secret in ("MUSTERMANN", "ERIKA", "1964", "SECRET", "7.5"):
        assert secret not in text


# --------------------------------------------------------------------------------------- real scans


@pytest.mark.skipif(not REAL.is_dir(), reason="real scans are not part of the repository")
def test_real_scans_are_usable():
    scans, findings = inspect(REAL / "two_modalities", modalities=("t1ce", "flair"))
    assert (len(scans), findings) == (4, [])
    assert all(set(np.unique(scan.labels)) == {0, 1, 2, 3} for scan in scans)
    folder = REAL / "MICCAI_BraTS2020_ValidationData"
    (scan,), (finding,) = inspect(folder, require_labels=False)
    assert finding.code == "unusual-orientation"  # this one is RAS indeed
    assert scan.images["t1"].shape == (240, 240, 155)


def test_want_of_memory_is_a_finding_of_the_subject(cohort_data, monkeypatch):
    def too_much(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("sites.checks._check_images", too_much)
    scan, findings = examine(discover(cohort_data).subjects[0], modalities=MODALITIES, site="s")
    assert scan is None
    assert [(f.site, f.severity, f.code) for f in findings] == [("s", "error", "no-memory")]
