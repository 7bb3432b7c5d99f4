"""Decide whether a subject can be trusted: read its files whole, compare them, translate labels.

Every oddity is named as a finding; nothing is repaired except what has one right answer (axes
turned to RAS, labels translated). Finding files by name is `sites.subject`, reading one file
`sites.volumes`; nothing here crops, resamples or normalises.

The flipped-modality and skull-stripping checks rest on BraTS's convention that everything outside
the brain is exactly 0 and that all modalities of a subject share one grid.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine, voxel_sizes

from common.brats import CODINGS
from sites.finding import Finding, Report, Severity
from sites.segmentation import check_tumour, translate
from sites.subject import SEGMENTATION, Subject, role_of
from sites.volumes import Volume, VolumeError, read_volume

MIN_BACKGROUND = 0.05  # of the voxels; a skull-stripped volume has 0.4 (cropped) to 0.87 zeros
MAX_BRAIN_ML = 2500.0  # skull-stripped brains have 1000 to 1900 ml, heads more than 3000
MAX_ANISOTROPY = 3.0  # longest to shortest voxel edge
AFFINE_TOLERANCE = 0.1  # of the shortest voxel edge, anywhere in the volume
MIRROR_GAIN, MIRROR_DICE = 0.02, 0.95  # overlap of brain masks that gives a flipped modality away


@dataclass(frozen=True)
class Scan:
    """A subject that was read whole and can be trusted. All arrays are (X, Y, Z) in RAS."""

    subject: Subject
    images: dict[str, np.ndarray]  # the file's integer type, or float32
    labels: np.ndarray | None  # uint8 system labels 0..3
    spacing: tuple[float, float, float]  # mm along the RAS axes
    affine: np.ndarray  # 4x4, RAS voxel -> mm
    file_affine: np.ndarray  # 4x4, the files' own voxel -> mm
    file_shape: tuple[int, int, int]
    digest: str  # sha256 of the first modality's RAS voxels, whatever number type held them
    fingerprints: tuple[str, ...]
    """The same of every modality, sorted and without its name: two scans that share one share a
    patient, whatever they are called and whichever modalities were asked for."""


def examine(
    subject: Subject,
    *,
    modalities: Sequence[str],
    coding: str = "auto",
    require_labels: bool = True,
    site: str = "",
) -> tuple[Scan | None, list[Finding]]:
    """Read every file of the subject that `modalities` asks for, and the segmentation if any.

    `coding` is `auto` or a key of `common.brats.CODINGS`. The scan is None exactly if a finding is
    an error. Never raises for bad data or want of memory; raises ValueError for an unknown coding or no
    modality.
    """
    if coding != "auto" and coding not in CODINGS:
        raise ValueError(f"unknown label coding {coding!r}: one of auto, {', '.join(CODINGS)}")
    if not modalities:
        raise ValueError("no modality asked for")
    found: list[Finding] = []
    try:
        return _scan(subject, modalities, coding, require_labels, site, found), found
    except MemoryError:
        what, remedy = "there is not enough free memory to check it", "Free memory."
        return None, [*found, Finding(site, subject.id, "", "error", "no-memory", what, remedy)]


def _scan(
    subject: Subject,
    modalities: Sequence[str],
    coding: str,
    require_labels: bool,
    site: str,
    findings: list[Finding],
) -> Scan | None:
    """As `examine`, adding to `findings`."""

    def report(file: str, severity: Severity, code: str, what: str, remedy: str) -> None:
        findings.append(Finding(site, subject.id, file, severity, code, what, remedy))

    paths = {m: subject.images[m] for m in modalities if m in subject.images}
    if subject.segmentation is not None:
        paths[SEGMENTATION] = subject.segmentation
    wanted = (*modalities, SEGMENTATION) if require_labels else tuple(modalities)
    _report_missing(subject, [role for role in wanted if role not in paths], report)

    volumes: dict[str, Volume] = {}
    for role, path in paths.items():
        volume = _read(path, report)
        if volume is not None:
            _compare_duplicates(path, volume, subject.duplicates.get(role, ()), report)
            volumes[role] = volume
    names = {role: path.name for role, path in paths.items()}
    _check_headers(volumes, names, report)
    together = _check_grids(volumes, names, report)

    images = {m: volumes[m].voxels for m in modalities if m in volumes}
    brain = _check_images(images, names, volumes, report)
    if together:
        _check_mirrored(images, names, report)
    labels = None
    if SEGMENTATION in volumes:
        voxels, file = volumes[SEGMENTATION].voxels, names[SEGMENTATION]
        labels = translate(voxels, file, coding, report)
        if labels is not None and together and brain is not None:
            check_tumour(labels, brain, file, report)

    if any(f.severity == "error" for f in findings):
        return None
    first = volumes[modalities[0]]
    x, y, z = (float(edge) for edge in voxel_sizes(first.affine))
    digests = {modality: _digest(voxels) for modality, voxels in images.items()}
    return Scan(
        subject=subject,
        images=images,
        labels=labels,
        spacing=(x, y, z),
        affine=first.affine,
        file_affine=first.file_affine,
        file_shape=first.file_shape,
        digest=digests[modalities[0]],
        fingerprints=tuple(sorted(set(digests.values()))),
    )


def same_patient_twice(members: Iterable[tuple[str, str, str]]) -> list[Finding]:
    """Findings for (site, subject id, digest) members that are one patient.

    Equal voxels under two ids of one site are an error, at two sites a warning, since the site
    cannot mend it alone; so is one id with different voxels at two sites. The first member in the
    order given is kept, each further one gets the finding. Digests find byte-equal voxels only.
    """
    findings = []
    by_digest: dict[str, tuple[str, str]] = {}
    by_id: dict[str, str] = {}
    for site, subject_id, digest in members:
        first_site, first_id = by_digest.setdefault(digest, (site, subject_id))
        other_site = by_id.setdefault(subject_id, site)
        severity: Severity = "warning"
        if (first_site, first_id) != (site, subject_id):
            code, severity = "same-patient-twice", "error"
            what = f"holds the very same scan as subject {first_id}"
            remedy = "Find out which id is right and remove the other folder."
            if first_site != site:
                code, severity = "same-patient-at-two-sites", "warning"
                what += f" of site {first_site}"
                remedy = (
                    "Agree which site keeps it: a patient must not count twice, nor be trained on "
                    "at one site and tested on at the other."
                )
        elif other_site != site:
            code = "same-id-at-two-sites"
            what = f"site {other_site} has another scan under the same id"
            remedy = "Make sure that these are different patients; if not, keep one of them."
        else:
            continue
        findings.append(Finding(site, subject_id, "", severity, code, what, remedy))
    return findings


# ------------------------------------------------------------------------------------- the files


def _report_missing(subject: Subject, roles: list[str], report: Report) -> None:
    if not roles:
        return
    try:
        others = [
            path.name
            for path in sorted(subject.folder.iterdir())
            if path.name.lower().endswith((".nii", ".nii.gz"))
            and not path.name.startswith(".")
            and role_of(path.name, subject.folder.name) is None
        ]
    except OSError:
        others = []
    hint = f" A file of unknown role lies there: {others[0]}." if others else ""
    for role in roles:
        if role == SEGMENTATION:
            code, what = "missing-segmentation", "there is no segmentation"
            remedy = f"Add {subject.id}_seg.nii.gz, or leave the subject out of training."
        else:
            code, what = "missing-modality", f"modality {role} is missing"
            remedy = f"Add {subject.id}_{role}.nii.gz, or use a federation, or a model, of fewer modalities."
        report("", "error", code, what + ".", remedy + hint)


def _read(path: Path, report: Report) -> Volume | None:
    try:
        return read_volume(path)
    except VolumeError as problem:
        report(path.name, "error", problem.code, problem.what, problem.remedy)
        return None


def _compare_duplicates(path: Path, volume: Volume, others: Iterable[Path], report: Report) -> None:
    for other in others:
        twin = _read(other, report)
        if twin is None:
            continue
        same = (
            twin.file_shape == volume.file_shape
            and np.allclose(twin.file_affine, volume.file_affine)
            and np.array_equal(twin.voxels, volume.voxels)
        )
        if same:
            what = f"the same scan is there twice, also as {path.name}, which is used"
            report(other.name, "warning", "both-extensions", what, "Delete one of the two.")
        else:
            what = f"differs from {path.name}, which claims the same role"
            remedy = "Find out which one is right and move the other away."
            report(other.name, "error", "two-different-files", what, remedy)


def _check_headers(volumes: Mapping[str, Volume], names: Mapping[str, str], report: Report) -> None:
    """Warnings on what a header says by itself; one per kind, as files of a subject are alike."""

    def warn(roles: list[str], code: str, what: str, remedy: str) -> None:
        if roles:
            report(names[roles[0]], "warning", code, what + _more(roles), remedy)

    warn(
        [r for r, v in volumes.items() if not v.oriented],
        "no-orientation",
        "the header has no orientation (qform, sform); BraTS's axes left, posterior, superior "
        "are assumed",
        "Write the true orientation into the header; with wrong axes, left and right may swap.",
    )
    turned = [r for r, v in volumes.items() if v.axes != "LPS"]
    if turned and len({volumes[r].axes for r in volumes}) == 1:  # else affine-mismatch says it
        warn(
            turned,
            "unusual-orientation",
            f"stored with axes {volumes[turned[0]].axes}, not LPS as in BraTS; it is turned",
            "Nothing, if the orientation in the header is true.",
        )
    warn(
        [r for r, v in volumes.items() if _anisotropy(v) >= MAX_ANISOTROPY],
        "anisotropic",
        "voxels are much longer in one direction than in another (thick slices)",
        "Use a 3-D acquisition if there is one; resampling adds no detail.",
    )
    warn(
        [r for r, v in volumes.items() if v.personal],
        "personal-text",
        "free text in the header looks like it is about a person",
        "Clear the header's text fields and extensions (de-identify) before sharing the file.",
    )


def _check_grids(volumes: Mapping[str, Volume], names: Mapping[str, str], report: Report) -> bool:
    """Whether all volumes share one grid; the odd ones against a majority are blamed."""
    remedy = "Register and resample the subject's files onto one grid."
    roles = list(volumes)
    shapes = {role: volumes[role].file_shape for role in roles}
    usual, odd = _majority(roles, lambda a, b: shapes[a] == shapes[b])
    if odd and usual:
        for role in odd:
            what = (
                f"has {_x(shapes[role])} voxels, the subject's other files {_x(shapes[usual[0]])}"
            )
            report(names[role], "error", "shape-mismatch", what, remedy)
    elif odd:
        what = "the files have different shapes: " + ", ".join(
            f"{names[role]} {_x(shapes[role])}" for role in odd
        )
        report(", ".join(names[role] for role in odd), "error", "shape-mismatch", what, remedy)
        return False

    usual, strayed = _majority(usual, lambda a, b: _same_place(volumes[a], volumes[b]))
    if strayed and usual:
        for role in strayed:
            what = _difference(volumes[role], volumes[usual[0]])
            report(names[role], "error", "affine-mismatch", what, remedy)
    elif strayed:
        what = "the files disagree about where in space they are: " + ", ".join(
            f"{names[role]} ({volumes[role].axes})" for role in strayed
        )
        report(", ".join(names[r] for r in strayed), "error", "affine-mismatch", what, remedy)
    return not odd and not strayed


def _majority(roles: list[str], alike: Callable[[str, str], bool]) -> tuple[list[str], list[str]]:
    """(those that more than half agree with, the others); all are others without a majority."""
    best = max(([b for b in roles if alike(a, b)] for a in roles), key=len, default=[])
    if 2 * len(best) <= len(roles):
        return [], roles
    return best, [role for role in roles if role not in best]


def _same_place(a: Volume, b: Volume) -> bool:
    """Whether no corner of the volume moves by more than a fraction of a voxel."""
    corners = np.array(list(itertools.product(*((0, n - 1) for n in a.file_shape))))
    moved = apply_affine(a.file_affine, corners) - apply_affine(b.file_affine, corners)
    limit = AFFINE_TOLERANCE * voxel_sizes(a.file_affine).min()
    return bool(np.linalg.norm(moved, axis=1).max() <= limit)


def _difference(odd: Volume, usual: Volume) -> str:
    if odd.axes != usual.axes:
        return f"is stored with axes {odd.axes}, the subject's other files with {usual.axes}"
    if not np.allclose(voxel_sizes(odd.affine), voxel_sizes(usual.affine), rtol=1e-3):
        return "has another voxel size than the subject's other files"
    return "lies elsewhere in space than the subject's other files"


# ------------------------------------------------------------------------------------ the images


def _check_images(
    images: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    volumes: Mapping[str, Volume],
    report: Report,
) -> np.ndarray | None:
    """Judge the intensities of each image; returns where any is non-zero, if they share a shape."""
    brain: np.ndarray | None = None
    facts: dict[str, tuple[float, float, int]] = {}
    whole: list[str] = []
    for modality, voxels in images.items():
        # two passes find NaN and infinity too: both reach the minimum or the maximum
        low, high = voxels.min(), voxels.max()
        problem = _unusable(float(low), float(high))
        if problem is not None:
            report(names[modality], "error", *problem)
            continue
        inside = voxels != 0
        n_inside = int(np.count_nonzero(inside))
        facts[modality] = (float(low), float(high), n_inside)
        millilitres = n_inside * abs(np.linalg.det(volumes[modality].affine[:3, :3])) / 1000
        if n_inside > (1 - MIN_BACKGROUND) * voxels.size or millilitres > MAX_BRAIN_ML:
            whole.append(modality)
        if brain is None:
            brain = inside
        elif brain.shape == inside.shape:
            brain |= inside
    if whole:
        what = "does not look skull-stripped: too little of it is exactly 0" + _more(whole)
        remedy = "Remove the skull and set the background to 0, as BraTS does (e.g. HD-BET)."
        report(names[whole[0]], "warning", "not-skull-stripped", what, remedy)
    for a, b in itertools.combinations(facts, 2):
        if facts[a] == facts[b] and np.array_equal(images[a], images[b]):
            what = f"has the very same voxels as {names[a]}"
            remedy = "One of the two is mislabelled; find the true scan."
            report(names[b], "warning", "identical-modalities", what, remedy)
    return brain


def _unusable(low: float, high: float) -> tuple[str, str, str] | None:
    """(code, what, remedy) for intensities that cannot be a scan."""
    again = "Export the scan again, or mend the step that made it."
    if np.isnan(low) or np.isnan(high):
        return "nan", "holds voxels that are not a number (NaN)", again
    if np.isinf(low) or np.isinf(high):
        return "infinite", "holds voxels that are infinite or too large for float32", again
    if low == high == 0:
        return "all-zero", "every voxel is 0", again
    if low == high:
        return "constant", "every voxel has the same value", again
    if low < 0:
        remedy = "Use the scan before normalisation, background 0 and tissue above 0."
        return "negative-intensities", "holds negative intensities", remedy
    return None


def _check_mirrored(
    images: Mapping[str, np.ndarray], names: Mapping[str, str], report: Report
) -> None:
    """Find a modality whose voxels are mirrored although its header is as the others': its brain
    fits theirs clearly better once mirrored. Left against right is found only where the modalities'
    masks agree well, as in BraTS: a brain overlaps its own left-right mirror image by 0.96."""
    masks = {m: _coarse(v) for m, v in images.items()}
    masks = {m: mask for m, mask in masks.items() if 0 < mask.mean() < 1 - MIN_BACKGROUND}
    axes = [a for n in (1, 2, 3) for a in itertools.combinations(range(3), n)]
    against: dict[str, int] = defaultdict(int)
    for a, b in itertools.combinations(masks, 2):
        as_is = _dice(masks[a], masks[b])
        if as_is > 1 - MIRROR_GAIN:
            continue
        mirrored = max(_dice(masks[a], np.flip(masks[b], axis)) for axis in axes)
        if mirrored >= max(MIRROR_DICE, as_is + MIRROR_GAIN):
            against[a] += 1
            against[b] += 1
    odd = [m for m in against if against[m] == max(against.values())]
    for modality in odd:
        what = "the brain is mirrored against the subject's other modalities"
        if len(odd) > 1:
            others = ", ".join(names[m] for m in odd if m != modality)
            what = f"the brain is mirrored against {others}; which one is right cannot be told"
        remedy = "Export the modality again; its voxels do not fit the orientation in its header."
        report(names[modality], "error", "flipped-modality", what, remedy)


def _coarse(voxels: np.ndarray) -> np.ndarray:
    """A mask of non-zero voxels on about 48 points per axis, placed symmetrically."""
    picks = []
    for n in voxels.shape:
        step = max(1, n // 48)
        picks.append(slice(((n - 1) % step) // 2, None, step))
    return np.ascontiguousarray(voxels[tuple(picks)]) != 0


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float(np.count_nonzero(a & b)) / (np.count_nonzero(a) + np.count_nonzero(b))


# -------------------------------------------------------------------------------------------------


def _digest(voxels: np.ndarray) -> str:
    """sha256 over shape and values; whole numbers that fit are hashed as int16, so that a copy
    saved as float or in another byte order is still found."""
    if voxels.dtype != np.int16 and voxels.max() <= 32767 and voxels.min() >= -32768:
        whole = voxels.dtype.kind != "f" or bool((voxels == np.rint(voxels)).all())
        voxels = voxels.astype(np.int16) if whole else voxels
    little = voxels.astype(voxels.dtype.newbyteorder("<"), copy=False)
    digest = hashlib.sha256(f"{little.dtype.str} {_x(voxels.shape)}".encode())
    digest.update(np.ascontiguousarray(little.T).data)
    return digest.hexdigest()


def _anisotropy(volume: Volume) -> float:
    edges = voxel_sizes(volume.affine)
    return float(edges.max() / edges.min())


def _more(roles: list[str]) -> str:
    n = len(roles) - 1
    return f" (and so in {n} more of its files)" if n else ""


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
