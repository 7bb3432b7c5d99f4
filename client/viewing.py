"""What the viewer shows: one subject's scans, its true labels, and a model's segmentation of them.

Keeps the scans that were uploaded to the page (in a private folder, until they are segmented) and runs
one segmentation at a time, in the background. How a browser asks for it is `client.viewer`.
"""

from __future__ import annotations

import logging
import re
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np

from client.prediction import Model, save, segment
from common.brats import MODALITIES, STRUCTURES
from common.metrics import confusion_matrix, structure_scores
from sites.checks import Scan, examine
from sites.finding import Finding
from sites.subject import Subject
from sites.volumes import VolumeError, read_volume

LOG = logging.getLogger("fedbrats")
TRUTH, PREDICTION = "truth", "prediction"
UPLOADED = "uploaded scans"
LABELS = ("NCR", "ED", "ET")
GZIP = b"\x1f\x8b"  # what a gzip file begins with
MOST_BYTES = 400 * 10**6  # of one uploaded file, unpacked; BraTS's are 18 MB, and 2 to 4 packed


class Busy(RuntimeError):
    """A segmentation is running; one at a time."""


class Unusable(RuntimeError):
    """Scans that cannot be shown or segmented; `findings` say which, why, and what to do."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("; ".join(finding.what for finding in findings))
        self.findings = tuple(findings)


@dataclass(frozen=True)
class Segmentation:
    """labels: uint8 system labels (X, Y, Z) in RAS; file: gzipped NIfTI in the subject's own space;
    warnings: what makes it doubtful, in words."""

    labels: np.ndarray
    file: bytes
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shown:
    name: str
    scan: Scan
    findings: tuple[Finding, ...]
    segmentation: Segmentation | None = None


@dataclass(frozen=True)
class Job:
    """The segmentation that runs or ran last. `seconds` is how long it took, once it has ended."""

    state: str = "idle"  # running, done, failed
    began: float = 0.0
    seconds: float = 0.0
    problems: tuple[dict[str, str], ...] = ()


class Viewing:
    """The state behind one page. Its methods may be called from several threads."""

    def __init__(self, folder: Path, model: Model | None, model_name: str = "") -> None:
        """`folder` is private to this program; the caller deletes it."""
        self._folder, self._model, self._model_name = folder, model, model_name
        self._lock = threading.Lock()
        self._checking = threading.Lock()  # a file at a time: each is unpacked in memory
        self._shown: Shown | None = None
        self._job = Job()
        self._uploads: dict[str, Path] = {}
        self._version = 0  # counts the subjects shown

    @property
    def needed(self) -> tuple[str, ...]:
        """The modalities that the model reads, none without a model."""
        return self._model.config.modalities if self._model else ()

    @property
    def busy(self) -> bool:
        return self._job.state == "running"

    def show(self, subject: Subject) -> None:
        """Read a subject and make it the one that is shown.

        Raises:
            Unusable: its scans cannot be trusted. True labels that cannot are left out with a note.
        """
        modalities = [m for m in MODALITIES if m in subject.images]
        scan, findings = examine(subject, modalities=modalities, require_labels=False)
        if scan is None and subject.segmentation is not None:
            about_labels = [replace(f, severity="warning") for f in findings]
            scan, findings = examine(
                replace(subject, segmentation=None), modalities=modalities, require_labels=False
            )
            if scan is not None:
                findings = [f for f in about_labels if f not in findings] + findings
        if scan is None:
            raise Unusable([f for f in findings if f.severity == "error"])
        with self._lock:
            self._shown = Shown(subject.id, scan, tuple(findings))
            self._version += 1

    def segment_shown(self) -> None:
        """Begin to segment the subject that is shown. Raises Busy."""
        shown = self._shown
        assert shown is not None
        assert self._model is not None
        self._begin(lambda: self._segment(shown.scan.subject))

    def segment_uploads(self) -> None:
        """Begin to show and segment what was uploaded.

        Raises:
            Busy: another segmentation is running.
            Unusable: a modality that the model reads is missing.
        """
        with self._lock:
            paths = {m: self._uploads[m] for m in self.needed if m in self._uploads}
        missing = [m for m in self.needed if m not in paths]
        if missing or not paths:
            raise Unusable([_missing(modality) for modality in missing])
        subject = Subject(UPLOADED, self._folder, paths, None)

        def work() -> None:
            try:
                self.show(subject)
                self._segment(subject)
            finally:
                with self._lock:
                    self._delete_uploads()

        self._begin(work)

    def new_file(self) -> tuple[IO[bytes], Path]:
        """A private file to write an upload to. Raises Busy."""
        self._refuse_if_busy()
        file = tempfile.NamedTemporaryFile(dir=self._folder, suffix=".part", delete=False)  # noqa: SIM115
        return file, Path(file.name)

    def take(self, modality: str, path: Path) -> dict[str, Any]:
        """Check a file from `new_file` and keep it as `modality`; its shape and spacing.

        The file is deleted if it is refused.

        Raises:
            Busy: a segmentation began meanwhile.
            Unusable: it is no scan.
        """
        try:
            with path.open("rb") as file:
                suffix = ".nii.gz" if file.read(2) == GZIP else ".nii"
            # the name that a browser gives it is never used
            named = path.with_name(f"{UPLOADED.replace(' ', '-')}_{modality}{suffix}")
            checked = path.rename(path.with_suffix(suffix))
            try:
                with self._checking:
                    volume = read_volume(checked, most_bytes=MOST_BYTES)
            except VolumeError as problem:
                raise Unusable([_about(modality, problem)]) from None
            with self._lock:
                self._refuse_if_busy()
                if previous := self._uploads.pop(modality, None):
                    previous.unlink(missing_ok=True)
                self._uploads[modality] = checked.replace(named)
        finally:
            for left in (path, path.with_suffix(".nii"), path.with_suffix(".nii.gz")):
                left.unlink(missing_ok=True)
        spacing = nibabel.affines.voxel_sizes(volume.affine)
        return {"shape": list(volume.file_shape), "spacing": [round(float(s), 3) for s in spacing]}

    def forget_uploads(self) -> None:
        """Raises Busy: they may be what is segmented, which ends with forgetting them."""
        with self._lock:
            self._refuse_if_busy()
            self._delete_uploads()

    def _delete_uploads(self) -> None:
        for path in self._uploads.values():
            path.unlink(missing_ok=True)
        self._uploads = {}

    def state(self) -> dict[str, Any]:
        """Everything the page needs but voxels, as plain JSON types."""
        with self._lock:
            shown, job, uploads, version = self._shown, self._job, [*self._uploads], self._version
        running = job.state == "running"
        document: dict[str, Any] = {
            "version": version,
            "labels": {name: STRUCTURES[name][0] for name in LABELS},
            "structures": {
                n: [LABELS[i - 1] for i in members] for n, members in STRUCTURES.items()
            },
            "model": {"name": self._model_name, "modalities": self.needed} if self._model else None,
            "uploads": uploads,
            "job": {
                "state": job.state,
                "seconds": round(time.monotonic() - job.began if running else job.seconds, 1),
                "problems": job.problems,
            },
            "subject": None,
        }
        if shown is None:
            return document
        truth, own = shown.scan.labels, shown.segmentation
        predicted = own.labels if own else None
        return document | {
            "subject": shown.name,
            "modalities": [*shown.scan.images],
            "shape": shown.scan.file_shape,
            "spacing": [round(edge, 3) for edge in shown.scan.spacing],
            "findings": [in_words(finding) for finding in shown.findings],
            "volumes": {
                name: millilitres(labels, shown.scan.spacing)
                for name, labels in ((TRUTH, truth), (PREDICTION, predicted))
                if labels is not None
            },
            "dice": _dice(predicted, truth),
            "warnings": own.warnings if own else [],
        }

    def volume(self, name: str) -> bytes | None:
        """A modality, `truth` or `prediction` as an uncompressed NIfTI file, None if there is none.

        The header is made here: nothing of the subject's own headers but the geometry is in it.
        """
        shown = self._shown
        if shown is None:
            return None
        if name == TRUTH:
            voxels = shown.scan.labels
        elif name == PREDICTION:
            voxels = shown.segmentation.labels if shown.segmentation else None
        else:
            voxels = shown.scan.images.get(name)
        return None if voxels is None else as_nifti(voxels, shown.scan.affine)

    def segmentation_file(self) -> tuple[str, bytes] | None:
        """A name to save it under, and the gzipped NIfTI with BraTS labels in the subject's space."""
        shown = self._shown
        if shown is None or shown.segmentation is None:
            return None
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", shown.name).strip("-.") or "subject"
        return f"{plain}_segmentation.nii.gz", shown.segmentation.file

    def _refuse_if_busy(self) -> None:
        if self.busy:
            raise Busy

    def _begin(self, work: Callable[[], None]) -> None:
        with self._lock:
            self._refuse_if_busy()
            self._job = Job("running", time.monotonic())
        # not waited for at the end: Ctrl-C must end the program while the network computes
        threading.Thread(target=self._run, args=(work,), daemon=True).start()

    def _run(self, work: Callable[[], None]) -> None:
        problems: Sequence[dict[str, str]] = ()
        try:
            work()
        except Unusable as refused:
            problems = [in_words(finding) for finding in refused.findings]
        except MemoryError:
            problems = [_plain("It needs more memory than there is.", "Check its voxel size.")]
        except OSError as error:
            what = (
                f"A file could not be read or written ({error.strerror or type(error).__name__})."
            )
            problems = [_plain(what, "Check the disk for temporary files.")]
        except Exception as defect:  # the page must not wait for ever
            where = traceback.extract_tb(defect.__traceback__)[-1]
            place = f"{type(defect).__name__} at {Path(where.filename).name}:{where.lineno}"
            LOG.error("segmenting failed: %s", place)
            problems = [_plain(f"The program failed ({place}).", "Please report it.")]
        with self._lock:
            took = time.monotonic() - self._job.began
            state = "failed" if problems else "done"
            self._job = Job(state, self._job.began, took, tuple(problems))

    def _segment(self, subject: Subject) -> None:
        assert self._model is not None
        segmentation, findings = segmentation_of(self._model, subject, self._folder)
        if segmentation is None:
            raise Unusable([f for f in findings if f.severity == "error"])
        with self._lock:
            assert self._shown is not None
            known = set(self._shown.findings)
            notes = (*self._shown.findings, *(f for f in findings if f not in known))
            self._shown = replace(self._shown, segmentation=segmentation, findings=notes)


def segmentation_of(
    model: Model, subject: Subject, folder: Path
) -> tuple[Segmentation | None, list[Finding]]:
    """One subject's segmentation, None if it cannot be used; `folder` holds a file meanwhile."""
    out = folder / "segmentation.nii.gz"
    try:
        prediction, findings = segment(model, subject)
        if prediction is None:
            return None, findings
        save(prediction, out)
        return Segmentation(prediction.labels, out.read_bytes(), prediction.warnings), findings
    finally:
        with suppress(OSError):
            out.unlink()


def millilitres(labels: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """The volume of every structure in ml, from uint8 system labels and a spacing in mm."""
    counts = np.bincount(labels.ravel(order="K"), minlength=len(LABELS) + 1)
    voxel = float(np.prod(spacing)) / 1000
    return {
        name: float(counts[list(members)].sum()) * voxel for name, members in STRUCTURES.items()
    }


def as_nifti(voxels: np.ndarray, affine: np.ndarray) -> bytes:
    """An uncompressed NIfTI-1 file: uint8, int16 or float32 voxels, whichever holds them all."""
    if voxels.dtype not in (np.uint8, np.int16, np.float32):
        # modalities hold no negative intensities (`sites.checks`)
        voxels = voxels.astype(np.int16 if voxels.max() <= np.iinfo(np.int16).max else np.float32)
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    return bytes(image.to_bytes())


def in_words(finding: Finding) -> dict[str, str]:
    """What the page shows of a finding."""
    return {
        "file": finding.file,
        "severity": finding.severity,
        "what": finding.what,
        "remedy": finding.remedy,
    }


def _dice(predicted: np.ndarray | None, truth: np.ndarray | None) -> Mapping[str, float] | None:
    if predicted is None or truth is None:
        return None
    scores = structure_scores(confusion_matrix(predicted, truth))
    return {name: score["dice"] for name, score in scores.items()}


def _plain(what: str, remedy: str) -> dict[str, str]:
    return {"file": "", "severity": "error", "what": what, "remedy": remedy}


def _missing(modality: str) -> Finding:
    what = f"modality {modality} is missing"
    remedy = "Choose its file; the model reads it."
    return Finding("", UPLOADED, modality, "error", "missing-modality", what, remedy)


def _about(modality: str, problem: VolumeError) -> Finding:
    return Finding("", UPLOADED, modality, "error", problem.code, problem.what, problem.remedy)
