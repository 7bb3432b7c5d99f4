"""Find the subjects below a folder by the names of their files; no file is opened.

Understands the BraTS names of 2017 to 2022 (`ID_t1.nii.gz`, also FeTS) and of 2023 onwards
(`ID-t1n.nii.gz`), compressed or not, nested to any depth. Whether the files can be read and belong
together, and whether a modality is missing, is for `sites.checks`.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.brats import MODALITIES
from common.console import printable
from sites.finding import Finding

SEGMENTATION = "seg"

_ROLES = {
    **{f"_{name}": name for name in (*MODALITIES, SEGMENTATION)},
    **{"-t1n": "t1", "-t1c": "t1ce", "-t2w": "t2", "-t2f": "flair", "-seg": SEGMENTATION},
}
_FILE = re.compile(
    rf"(?P<id>.+)(?P<role>{'|'.join(_ROLES)})\.nii(\.gz)?", re.IGNORECASE | re.DOTALL
)

_UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, bytes that are no UTF-8, line breaks
# Kaggle's copy of BraTS 2020 kept the original name of this one segmentation.
_MISNAMED_FOLDER = "BraTS20_Training_355"
_MISNAMED_FILE = re.compile(r"W39_1998\.09\.19_Segm\.nii(\.gz)?")

_SUBJECT_ID = re.compile(
    r"brats(1\d|20)_.+_\d+"  # Brats17_, Brats18_, BraTS19_CBICA_AAB_1, BraTS20_Training_001
    r"|(brats|fets)20\d\d_\d{3,}"  # BraTS2021_00000, FeTS2022_00000
    r"|brats-[a-z]+-\d+-\d+",  # BraTS-GLI-00000-000
    re.IGNORECASE,
)
_GRADES = ("HGG", "LGG")


@dataclass(frozen=True)
class Subject:
    """The files of one subject; `images` holds the modalities asked for that are there, in order.

    `duplicates` names further files that claim the same role (`seg` or a modality), as when both
    `x_t1.nii` and `x_t1.nii.gz` exist: whether they are the same can only be told from the voxels.
    """

    id: str
    folder: Path
    images: Mapping[str, Path]
    segmentation: Path | None
    grade: str | None = None  # "HGG" or "LGG", from a folder of that name
    duplicates: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Discovery:
    """Subjects sorted by id, and what was wrong with the names. A subject that a finding of
    severity error names is not among the subjects."""

    subjects: tuple[Subject, ...]
    findings: tuple[Finding, ...]


def role_of(name: str, folder: str) -> tuple[str, str] | None:
    """(subject id, modality or "seg") that a file's name says, or None for any other file.

    `folder` is the name of the file's folder: the Kaggle misnomer counts only in its own.
    """
    if name.startswith("."):  # also macOS's "._x" beside every x
        return None
    if folder == _MISNAMED_FOLDER and _MISNAMED_FILE.fullmatch(name):
        return folder, SEGMENTATION
    match = _FILE.fullmatch(name)
    return (match["id"], _ROLES[match["role"].lower()]) if match else None


def discover(root: Path, *, modalities: Sequence[str] = MODALITIES, site: str = "") -> Discovery:
    """All subjects below `root`, which may itself be one subject's folder.

    Symbolic links are followed, each real folder is visited once. Never raises for what it finds:
    a missing or unreadable folder, ids that contradict their folder and an id in two folders are
    findings.
    """
    findings: list[Finding] = []

    def error(subject: str, file: str, code: str, what: str, remedy: str) -> None:
        texts = (printable(text).replace("\n", "?") for text in (subject, file, code, what, remedy))
        subject, file, code, what, remedy = texts
        findings.append(Finding(site, subject, file, "error", code, what, remedy))

    def unreadable(folder: Path) -> None:
        remedy = "Give the user who runs this read permission, or move the folder away."
        error("", folder.name, "unreadable-folder", "the folder cannot be listed", remedy)

    found: dict[str, list[Subject]] = defaultdict(list)
    spoiled: set[str] = set()
    for folder, names in _folders(root, unreadable):
        members: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
        unwritable: dict[str, list[str]] = defaultdict(list)
        for name in names:
            clean = writable(name)
            parsed = role_of(name, folder.name) or role_of(clean, folder.name)
            if parsed and clean != name:
                unwritable[printable(parsed[0]).replace("\n", "?")].append(name)
            elif parsed:
                subject_id, role = parsed
                if subject_id.casefold() == folder.name.casefold():
                    subject_id = folder.name
                members[subject_id][role].append(folder / name)
        for subject_id, files in unwritable.items():
            error(
                subject_id,
                files[0],
                "unwritable-name",
                f"the names of {_count(len(files), 'file')} hold a line break, another control character "
                "or bytes that are no UTF-8",
                "Rename the files.",
            )
        spoiled |= unwritable.keys()
        strangers = [i for i in members if _contradicts(folder.name, i)]
        for other in strangers:
            files = sorted(p.name for paths in members[other].values() for p in paths)
            error(
                folder.name,
                files[0],
                "id-mismatch",
                f"{_count(len(files), 'file')} named for subject {other} in the folder of "
                f"{folder.name}",
                "Find out whose scan it is; rename the file or move it to its own folder.",
            )
        if strangers:
            spoiled.add(folder.name)
            continue
        for subject_id, files_of in members.items():
            found[subject_id].append(_subject(subject_id, folder, files_of, modalities))

    subjects = []
    for subject_id, places in sorted(found.items()):
        if len(places) > 1:
            where = " and ".join(sorted(_relative(s.folder, root) for s in places))
            error(
                subject_id,
                "",
                "subject-in-two-folders",
                f"files of this subject are in {len(places)} folders: {where}",
                "Keep one folder per subject, with all of its files in it.",
            )
        elif subject_id not in spoiled:
            subjects.append(places[0])
    if not found and not spoiled:
        state = "holds no file with a BraTS name" if root.is_dir() else "is not a folder"
        error(
            "",
            "",
            "empty-site",
            f"no subject found: {root.name or root} {state}",
            "Point to the folder that holds the subjects' folders; files are named like "
            "BraTS20_Training_001_t1.nii.gz or BraTS-GLI-00000-000-t1n.nii.gz.",
        )
    return Discovery(tuple(subjects), tuple(sorted(findings, key=lambda f: (f.subject, f.file))))


def _folders(root: Path, unreadable: Callable[[Path], None]) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below `root` once, links followed, with the sorted names of its files."""
    seen: set[tuple[int, int]] = set()

    def failed(problem: OSError) -> None:
        if not isinstance(problem, FileNotFoundError | NotADirectoryError):
            unreadable(Path(problem.filename))

    for folder, below, names in os.walk(root, followlinks=True, onerror=failed):
        try:
            status = os.stat(folder)
        except OSError as problem:
            failed(problem)
            continue
        if (status.st_dev, status.st_ino) in seen:  # a link back up, or a second link to one folder
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = sorted(b for b in below if not b.startswith(".") and b != "__MACOSX")
        yield Path(folder), sorted(names)


def writable(name: str) -> str:
    """`name` without the characters that stop it from being written in a list, a table or a database."""
    return "".join(c for c in name if unicodedata.category(c) not in _UNWRITABLE)


def _subject(
    subject_id: str, folder: Path, files: Mapping[str, list[Path]], modalities: Sequence[str]
) -> Subject:
    # .nii.gz before .nii: the form BraTS itself is published in
    ordered = {
        role: sorted(paths, key=lambda path: (path.suffix != ".gz", path.name))
        for role, paths in files.items()
    }
    grade = next((part.upper() for part in reversed(folder.parts) if part.upper() in _GRADES), None)
    wanted = (*modalities, SEGMENTATION)
    return Subject(
        id=subject_id,
        folder=folder,
        images={m: ordered[m][0] for m in modalities if m in ordered},
        segmentation=ordered[SEGMENTATION][0] if SEGMENTATION in ordered else None,
        grade=grade,
        duplicates={r: tuple(ordered[r][1:]) for r in wanted if len(ordered.get(r, ())) > 1},
    )


def _contradicts(folder: str, subject_id: str) -> bool:
    """Whether the folder's name is a subject id too, but another one. A folder called `HGG` or
    `site 3` may hold any number of subjects."""
    if folder == subject_id:
        return False
    same_scheme = re.sub(r"\d", "#", folder) == re.sub(r"\d", "#", subject_id)
    return same_scheme or bool(_SUBJECT_ID.fullmatch(folder))


def _relative(folder: Path, root: Path) -> str:
    return str(folder.relative_to(root)) if folder != root else root.name


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
