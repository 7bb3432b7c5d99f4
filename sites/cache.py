"""A site's preprocessed subjects on disk: fp16 images and uint8 labels, memory-mapped.

An entry's name is a hash of the subject's files (their bytes) and of the recipe, so a changed file
or recipe makes a new entry and touches no other. An entry appears by one rename, so a kill leaves
whole entries only and the next run continues; several processes of one machine may share one cache folder.
Entries of files or recipes no longer used stay until the folder is deleted by its owner.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import sync_folder
from common.full_memory import is_full_memory
from common.weights import file_sha256
from sites.checks import examine, same_patient_twice
from sites.each_subject import each_subject
from sites.finding import Finding
from sites.preprocess import Geometry, Prepared, Recipe, prepare
from sites.subject import SEGMENTATION, Subject

SETTLED_SECONDS = 2.0  # a file changed later than this before hashing may change again unseen
_ONE_ASKS = threading.Lock()  # of the hashes, where several threads share a connection


@dataclass(frozen=True)
class CachedSubject:
    """A prepared subject on disk; arrays are opened on demand, so a list of these costs no memory."""

    id: str
    folder: Path
    geometry: Geometry
    digest: str  # of the voxels: equal for the same patient under two ids
    fingerprints: tuple[str, ...] = ()  # of each modality's voxels, see `sites.checks.Scan`

    def image(self) -> np.ndarray:
        """float16 (C, X, Y, Z), memory-mapped, on the working grid."""
        return np.load(self.folder / "image.npy", mmap_mode="r")

    def labels(self) -> np.ndarray:
        """uint8 (X, Y, Z), memory-mapped, on the working grid."""
        return np.load(self.folder / "labels.npy", mmap_mode="r")

    def truth(self) -> np.ndarray:
        """uint8, memory-mapped, the subject's own voxels inside `geometry.truth_box`."""
        return np.load(self.folder / "truth.npy", mmap_mode="r")


@dataclass(frozen=True)
class Preparation:
    """What became of a site's subjects: those ready, and every finding about all of them.

    `twins` maps a subject that was left out, for it holds the very same scan as another, to that one.
    """

    ready: tuple[CachedSubject, ...]
    findings: tuple[Finding, ...]
    twins: dict[str, str]


class CacheError(RuntimeError):
    """The cache folder cannot be written; the text says where and why."""


def prepare_subjects(
    subjects: Sequence[Subject],
    recipe: Recipe,
    folder: Path,
    *,
    site: str,
    require_labels: bool = True,
) -> Preparation:
    """Check and preprocess every subject that the cache does not hold yet, a few at a time.

    A subject with an error finding is not among those ready; bad data never raises.

    Raises:
        CacheError: the cache cannot be written (disk full, no permission).
    """
    ready: list[CachedSubject] = []
    findings: list[Finding] = []
    with _open_cache(folder) as hashes:

        def one(subject: Subject) -> tuple[CachedSubject | None, list[Finding]]:
            return _one(subject, recipe, folder, hashes, site, require_labels)

        made = each_subject(one, subjects, f"{site}: preparing")
    for entry, found in made:
        findings += found
        if entry is not None:
            ready.append(entry)
    findings += same_patient_twice((site, entry.id, entry.digest) for entry in ready)
    bad = {f.subject for f in findings if f.severity == "error"}
    first: dict[str, str] = {}
    twins = {e.id: first.setdefault(e.digest, e.id) for e in ready}
    twins = {left_out: kept for left_out, kept in twins.items() if left_out != kept}
    return Preparation(tuple(e for e in ready if e.id not in bad), tuple(findings), twins)


def prepare_subject(
    subject: Subject, recipe: Recipe, folder: Path, *, site: str, require_labels: bool = True
) -> tuple[CachedSubject | None, list[Finding]]:
    """The same for one subject, whom nobody compares with others; None if it cannot be used.

    Raises:
        CacheError: the cache cannot be written.
    """
    with _open_cache(folder) as hashes:
        return _one(subject, recipe, folder, hashes, site, require_labels)


@contextlib.contextmanager
def _open_cache(folder: Path) -> Iterator[sqlite3.Connection]:
    """The hashes of the cache in `folder`, made if need be; failing to write there is a CacheError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        with contextlib.closing(_open_hashes(folder)) as hashes:
            yield hashes
    except (OSError, sqlite3.Error) as error:
        # numpy gives no reason for a write that stopped halfway
        reason = getattr(error, "strerror", "") or "the disk may be full"
        if isinstance(error, sqlite3.Error):
            reason = str(error)
        raise CacheError(
            f"cache {folder}: cannot be written ({reason}). Free space there, or choose another "
            "folder for the cache."
        ) from error


def load_entry(folder: Path) -> CachedSubject:
    """A cached subject by its folder, as listed in a site's manifest.

    Raises:
        CacheError: it is not there any more or damaged; the remedy is to prepare again.
    """
    about = _read_about(folder)
    if about is None:
        raise CacheError(f"cache entry {folder} is missing or damaged; start the run again.")
    return CachedSubject(
        about["subject"],
        folder,
        _geometry(about["geometry"]),
        about["digest"],
        tuple(about["fingerprints"]),
    )


def _one(
    subject: Subject,
    recipe: Recipe,
    folder: Path,
    hashes: sqlite3.Connection,
    site: str,
    require_labels: bool,
) -> tuple[CachedSubject | None, list[Finding]]:
    entry = folder / _key(subject, recipe, hashes)
    about = _read_about(entry)
    if about is not None and (about["labelled"] or not require_labels):
        found = [Finding(**{**stored, "site": site}) for stored in about["findings"]]
        return load_entry(entry), found
    scan, found = examine(
        subject,
        modalities=recipe.modalities,
        coding=recipe.label_coding,
        require_labels=require_labels,
        site=site,
    )
    if scan is None:
        return None, found
    try:
        prepared = prepare(scan, recipe)
    except (MemoryError, RuntimeError) as error:
        if not is_full_memory(error):
            raise
        what = f"there is not enough memory to prepare it ({error or 'out of memory'})"
        remedy = "Correct the voxel size in the headers if it is wrong; otherwise free memory."
        return None, [*found, Finding(site, subject.id, "", "error", "no-memory", what, remedy)]
    about = {
        "subject": subject.id,
        "recipe": asdict(recipe),
        "digest": scan.digest,
        "fingerprints": scan.fingerprints,
        "labelled": prepared.labels is not None,
        "geometry": asdict(prepared.geometry),
        "findings": [finding.as_dict() for finding in found],
    }
    _write(entry, prepared, about)
    ready = CachedSubject(subject.id, entry, prepared.geometry, scan.digest, scan.fingerprints)
    return ready, found


def _key(subject: Subject, recipe: Recipe, hashes: sqlite3.Connection) -> str:
    """`SUBJECT-<hash of file contents and recipe>`; file names and folders do not matter."""
    files = {m: [subject.images[m]] for m in recipe.modalities if m in subject.images}
    if subject.segmentation is not None:
        files[SEGMENTATION] = [subject.segmentation]
    settled: list[tuple[Any, ...]] = []
    parts = {
        role: [
            _content_hash(path, hashes, settled)
            for path in (*paths, *subject.duplicates.get(role, ()))
        ]
        for role, paths in files.items()
    }
    if settled:
        # one commit, thus one wait for the disk, for all files of a subject
        with _ONE_ASKS, hashes:
            hashes.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?, ?)", settled)
    text = json.dumps({"id": subject.id, "files": parts, "recipe": asdict(recipe)}, sort_keys=True)
    return f"{subject.id}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def _content_hash(path: Path, hashes: sqlite3.Connection, settled: list[tuple[Any, ...]]) -> str:
    """sha256 of the file; not read again while its size and both of its times stay the same.

    The change time too, because it alone tells when two files of one size and age swap names. What
    `hashes` does not hold yet is appended to `settled`.
    """
    try:
        status = path.stat()
        # bytes, for sqlite takes no text that is not UTF-8
        stamp = (
            os.fsencode(path.resolve()),
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
        with _ONE_ASKS:
            row = hashes.execute(
                "SELECT sha256 FROM hashes"
                " WHERE path = ? AND size = ? AND mtime_ns = ? AND ctime_ns = ?",
                stamp,
            ).fetchone()
        if row:
            return str(row[0])
        digest = file_sha256(path)
    except OSError:
        return "unreadable"  # the check names the file and the reason
    if time.time() - status.st_ctime > SETTLED_SECONDS:
        settled.append((*stamp, digest))
    return digest


def _open_hashes(folder: Path) -> sqlite3.Connection:
    # used by one thread at a time, but not always the same
    hashes = sqlite3.connect(folder / "files.sqlite", timeout=60, check_same_thread=False)
    with hashes:
        hashes.execute(
            "CREATE TABLE IF NOT EXISTS hashes (path TEXT PRIMARY KEY, size INTEGER,"
            " mtime_ns INTEGER, ctime_ns INTEGER, sha256 TEXT)"
        )
    return hashes


def _write(entry: Path, prepared: Prepared, about: dict[str, Any]) -> None:
    # a short name, whatever the subject's; its last word but one is the process (`_remove_leftovers`)
    who = f"{threading.get_ident()}.{os.getpid()}"
    temporary = entry.with_name(f".{entry.name[-20:]}.{who}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        arrays = {"image": prepared.image, "labels": prepared.labels, "truth": prepared.truth}
        sizes = {}
        for name, array in arrays.items():
            if array is not None:
                path = temporary / f"{name}.npy"
                np.save(path, array, allow_pickle=False)
                sizes[path.name] = path.stat().st_size
        text = json.dumps({**about, "sizes": sizes})
        (temporary / "about.json").write_text(text, encoding="utf-8")
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if entry.exists() and _read_about(entry) is None:
            shutil.rmtree(entry, ignore_errors=True)  # damaged, or of an earlier version
        try:
            temporary.rename(entry)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise  # else another process was faster: the same bytes
        sync_folder(entry.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_about(entry: Path) -> dict[str, Any] | None:
    """The entry's description, or None where there is no whole entry of this version."""
    try:
        about: dict[str, Any] = json.loads((entry / "about.json").read_text(encoding="utf-8"))
        for name, size in about["sizes"].items():
            if (entry / name).stat().st_size != size:
                return None
        keys = {"subject", "digest", "fingerprints", "labelled", "geometry", "findings"}
        if not keys <= about.keys():
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return about


def _geometry(stored: dict[str, Any]) -> Geometry:
    def triple(values: Sequence[Any]) -> Any:
        return tuple(values)

    return Geometry(
        shape=triple(stored["shape"]),
        spacing=triple(stored["spacing"]),
        box=(triple(stored["box"][0]), triple(stored["box"][1])),
        truth_box=(triple(stored["truth_box"][0]), triple(stored["truth_box"][1])),
    )


def _remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left behind; a live process's temporary folders are spared."""
    for leftover in folder.glob(".*.tmp"):
        owner = leftover.name.split(".")[-2]
        try:
            os.kill(int(owner), 0)
        except (ValueError, OverflowError, ProcessLookupError):
            shutil.rmtree(leftover, ignore_errors=True)
        except PermissionError:
            pass  # alive, another user's
