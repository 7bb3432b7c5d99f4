"""`fed-client predict`: one patient, or a folder of them, segmented with a trained model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.finding_table import print_findings
from client.options import chosen_steps
from common.console import (
    FAILED,
    RESEARCH_ONLY,
    USAGE,
    complain,
    ending_in_order,
    failing_in_words,
    many,
    printable,
    start_logging,
)

if TYPE_CHECKING:
    from client.dicom_files import Series
    from client.prediction_folder import Job
    from client.prediction_summary import Summary
    from sites.finding import Finding
    from sites.subject import Discovery, Subject

NAME = "fed-client"
SUFFIXES = (".nii", ".nii.gz")
DICOM_SEG = ".dcm"
STEPS = "Post-processing, one step"
MAPS = "Maps, and how far to trust them"


def predict(
    model: Annotated[Path, typer.Argument(help="A run's model.safetensors.")],
    subjects: Annotated[
        Path,
        typer.Argument(
            metavar="SUBJECT_OR_FOLDER",
            help="One subject's folder, or a folder of several; no labels needed. Or one DICOM study.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            help="One subject's segmentation (.nii, .nii.gz, or .dcm from DICOM), or a folder for all."
        ),
    ],
    flips: Annotated[
        bool,
        typer.Option(help="Average over the 8 mirror images: steadier, and 8 times the time."),
    ] = False,
    postprocess: Annotated[
        str, typer.Option(help="none, reference (the published study's steps) or recommended.")
    ] = "recommended",
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=0.99, help="Probability of tumour a voxel needs.", rich_help_panel=STEPS
        ),
    ] = None,
    opening_mm: Annotated[
        float | None,
        typer.Option(min=0, max=20, help="Radius; 0 is off.", rich_help_panel=STEPS),
    ] = None,
    closing_mm: Annotated[
        float | None,
        typer.Option(min=0, max=20, help="Radius; 0 is off.", rich_help_panel=STEPS),
    ] = None,
    fill_holes: Annotated[
        bool | None,
        typer.Option(
            "--fill-holes/--no-fill-holes",
            help="What the tumour encloses is tumour.",
            rich_help_panel=STEPS,
        ),
    ] = None,
    smallest_mm3: Annotated[
        float | None,
        typer.Option(
            min=0, help="Smaller pieces of a region are removed; 0 is off.", rich_help_panel=STEPS
        ),
    ] = None,
    tiny_et_mm3: Annotated[
        float | None,
        typer.Option(
            min=0, help="Less ET than this in all becomes NCR; 0 is off.", rich_help_panel=STEPS
        ),
    ] = None,
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities", help="Write the four classes' probabilities.", rich_help_panel=MAPS
        ),
    ] = False,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty", help="Write the entropy of every voxel.", rich_help_panel=MAPS
        ),
    ] = False,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Warn of a subject that is unlike those of this file.", rich_help_panel=MAPS
        ),
    ] = None,
    write_reference: Annotated[
        Path | None,
        typer.Option(
            help="Write such a file from these subjects; it stays with you.", rich_help_panel=MAPS
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
) -> None:
    """Segment patients, in the grid and orientation of their own files.

    For research; not a medical device. A folder that was begun is continued by the same command.
    Exit code 0: written. 1: a subject or the model cannot be used. 2: wrong usage.
    """
    start_logging()
    single = _is_one_file(out)
    if not subjects.is_dir():
        raise typer.BadParameter(f"{subjects} is no folder.", param_hint="SUBJECT_OR_FOLDER")
    if not model.is_file():
        raise typer.BadParameter(f"{model} is no file.", param_hint="MODEL")
    if single and not out.absolute().parent.is_dir():
        raise typer.BadParameter(f"{out.parent} is no folder.", param_hint="OUT")
    if single and write_reference is not None:
        raise typer.BadParameter(
            "goes with a folder of subjects and a folder OUT.", param_hint="--write-reference"
        )
    if write_reference is not None:
        _check_place_of_reference(write_reference)
    if out.name.endswith(DICOM_SEG) and (probabilities or uncertainty):
        raise typer.BadParameter(
            "maps are NIfTI files beside OUT; give OUT as .nii.gz.", param_hint="OUT"
        )
    steps = chosen_steps(
        postprocess,
        {
            "threshold": threshold,
            "opening_mm": opening_mm,
            "closing_mm": closing_mm,
            "fill_holes": fill_holes,
            "smallest_mm3": smallest_mm3,
            "tiny_et_mm3": tiny_et_mm3,
        },
    )
    with failing_in_words(NAME, _foreseen, interrupted="; type the same to continue"):
        from client.familiarity import load_reference
        from client.prediction import Options, load_model
        from client.prediction_folder import Job
        from common.files import require_writable
        from common.weights import file_sha256
        from sites.subject import discover

        require_writable(out.parent if single else out)
        if write_reference is not None:
            require_writable(write_reference.parent)
        loaded = load_model(model)
        digest = file_sha256(model)
        usual = None if reference is None else load_reference(reference, model=digest, flips=flips)
        job = Job(loaded, digest, Options(flips, steps, probabilities, uncertainty), usual)
        discovery = discover(subjects, modalities=loaded.config.modalities)
        with _dicom_as_nifti(job, discovery, subjects, out) as (discovery, source):
            if single:
                _one(job, discovery, subjects, out, as_json, source)
            else:
                _all(job, discovery, subjects, out, write_reference, as_json)


@contextmanager
def _dicom_as_nifti(
    job: Job, discovery: Discovery, folder: Path, out: Path
) -> Iterator[tuple[Discovery, Series | None]]:
    """The subjects, and the series that a DICOM-SEG refers to.

    A DICOM study becomes a subject in a private folder while the block runs.
    """
    from client.dicom_files import holds_dicom

    if discovery.subjects or not holds_dicom(folder):
        if out.name.endswith(DICOM_SEG):
            raise typer.BadParameter(
                f"{folder} holds no DICOM; OUT must end in .nii or .nii.gz, or be a folder.",
                param_hint="OUT",
            )
        yield discovery, None
        return
    if not out.name.endswith((*SUFFIXES, DICOM_SEG)) or out.is_dir():
        raise typer.BadParameter(
            f"{folder} is one DICOM study: OUT must end in .nii, .nii.gz or .dcm.", param_hint="OUT"
        )
    if out.resolve().is_relative_to(folder.resolve()):
        raise typer.BadParameter(
            f"{out} would lie among the scans; choose a place outside of {folder}.",
            param_hint="OUT",
        )
    from tempfile import TemporaryDirectory

    from client.dicom_series import find_series, subject_of
    from sites.subject import Discovery

    with ending_in_order(), TemporaryDirectory(prefix="fedbrats-") as private:
        series = find_series(folder, job.model.config.modalities)
        subject = subject_of(series, Path(private))
        yield Discovery((subject,), ()), series.get("flair") or next(iter(series.values()))


def _foreseen() -> tuple[type[Exception], ...]:
    from client.dicom_files import DicomError
    from client.familiarity import BadReference
    from client.prediction_folder import Clash
    from common.files import AlreadyInUse
    from common.weights import BadWeights

    return AlreadyInUse, BadReference, BadWeights, Clash, DicomError


def _is_one_file(out: Path) -> bool:
    if out.is_dir():
        return False
    if out.name.endswith((*SUFFIXES, DICOM_SEG)):
        return True
    if out.exists() or out.suffix:  # a new folder's name has no dot: that would be a typing error
        raise typer.BadParameter(
            f"{out} must end in .nii or .nii.gz (from DICOM also .dcm), or be a folder.",
            param_hint="OUT",
        )
    return False


def _check_place_of_reference(path: Path) -> None:
    """Before the work rather than after it."""
    from client.familiarity import is_reference

    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path.parent} is no folder.", param_hint="--write-reference")
    if path.exists() and not is_reference(path):
        raise typer.BadParameter(
            f"{path} is there and no reference; choose another name.",
            param_hint="--write-reference",
        )


def _one(
    job: Job,
    discovery: Discovery,
    folder: Path,
    out: Path,
    as_json: bool,
    source: Series | None,
) -> None:
    from client.dicom_seg import write_dicom_seg
    from client.prediction import save, segment
    from client.prediction_folder import model_words, refuse_clashes, too_large
    from client.prediction_summary import in_words, summary_of
    from common.files import remove_leftovers

    if len(discovery.subjects) > 1:
        complain(
            NAME,
            f"{folder} holds {len(discovery.subjects)} subjects; give one subject's folder, "
            "or a folder as OUT.",
        )
        raise typer.Exit(USAGE)
    findings = list(discovery.findings)
    prediction = None
    written: list[Path] = []
    if discovery.subjects:
        subject = discovery.subjects[0]
        refuse_clashes([subject], [out])
        for path in _outputs_to_replace(job, subject, out):
            remove_leftovers(path)
        try:
            prediction, found = segment(job.model, subject, job.options, job.reference)
        except MemoryError:
            found = [too_large(subject)]
        findings += found
        if prediction is not None:
            try:
                if source is not None and out.name.endswith(DICOM_SEG):
                    where = prediction.labels, prediction.affine
                    write_dicom_seg(*where, source, out, model=job.model_sha256[:12])
                    written = [out]
                else:
                    written = save(prediction, out)
            except OSError as error:
                complain(NAME, f"{error.filename or out} cannot be written: {error.strerror}.")
                raise typer.Exit(FAILED) from None
    summary = None if prediction is None else summary_of(prediction)
    if as_json:
        document = {
            "note": RESEARCH_ONLY,
            "written": str(out) if written else None,
            "files": [str(path) for path in written],
            "model": model_words(job),
            "millilitres": None,
            **(summary or {}),
            "findings": [finding.as_dict() for finding in findings],
        }
        print(json.dumps(document, indent=2, allow_nan=False))
    else:
        print_findings(findings)
    if summary is None:
        there = f" {out}, which is there, is of an earlier call." if out.exists() else ""
        complain(NAME, f"{folder} cannot be segmented; nothing was written.{there}")
        raise typer.Exit(FAILED)
    if not as_json:
        for warning in summary["warnings"]:
            print(f"warning: {printable(warning)}.")
        print(f"{printable(str(out))}: {in_words(summary)}. {RESEARCH_ONLY}")


def _outputs_to_replace(job: Job, subject: Subject, out: Path) -> list[Path]:
    """The files that will be written. Raises Clash: one is there and is not ours to replace."""
    from client.dicom_seg import is_own
    from client.prediction import written_by
    from client.prediction_folder import Clash, not_to_replace

    if out.name.endswith(DICOM_SEG):
        if out.exists() and not is_own(out):
            raise Clash(f"{out} is there and no DICOM-SEG of fedbrats; choose another OUT.")
        return [out]
    outputs = written_by(job.options, out)
    for finding in not_to_replace(subject, outputs):
        raise Clash(f"{out.with_name(finding.file)} {finding.what}. {finding.remedy}")
    return outputs


def _all(
    job: Job,
    discovery: Discovery,
    folder: Path,
    out: Path,
    write_reference: Path | None,
    as_json: bool,
) -> None:
    from client.familiarity import BadReference, reference_of, save_reference
    from client.prediction_folder import segment_all

    known = {subject.id for subject in discovery.subjects}
    errors = [f for f in discovery.findings if f.severity == "error"]
    unusable = [f for f in errors if f.subject and f.subject not in known]
    of_no_subject = [f for f in discovery.findings if f not in unusable]
    if not known and not unusable:
        print_findings(discovery.findings)
        complain(NAME, f"{folder} cannot be segmented; nothing was written.")
        raise typer.Exit(FAILED)
    summaries = segment_all(job, discovery.subjects, unusable, out)
    done = [summary for summary in summaries if summary["files"]]
    no_reference = ""
    if write_reference is not None:
        features = [summary["features"] for summary in done]
        try:
            made = reference_of(features, model=job.model_sha256, flips=job.options.flips)
            save_reference(write_reference, made)
        except BadReference as error:
            no_reference = f"{write_reference} was not written: {error}"
        except OSError as error:
            no_reference = f"{write_reference} cannot be written: {error.strerror}."
    if as_json:
        document = {
            "note": RESEARCH_ONLY,
            "folder": str(out),
            "subjects": summaries,
            "findings": [finding.as_dict() for finding in of_no_subject],
        }
        print(json.dumps(document, indent=2, allow_nan=False))
    else:
        _print_findings(of_no_subject, summaries)
        _print_table(summaries)
        warned = sum(bool(summary["warnings"]) for summary in done)
        print(
            f"{printable(str(out))}: {many(len(done), 'subject')} segmented, "
            f"{len(summaries) - len(done)} not, {warned} with warnings. {RESEARCH_ONLY}"
        )
    if no_reference:
        complain(NAME, no_reference)
    errors = [f for f in of_no_subject if f.severity == "error"]
    if no_reference or errors or len(done) < len(summaries):
        raise typer.Exit(FAILED)


def _print_findings(findings: Sequence[Finding], summaries: Sequence[Summary]) -> None:
    from sites.finding import Finding as Record

    listed = [Record(**finding) for summary in summaries for finding in summary["findings"]]
    print_findings([*findings, *listed])


def _print_table(summaries: Sequence[Summary]) -> None:
    from rich.box import ASCII2, ROUNDED
    from rich.table import Table
    from rich.text import Text

    from client.familiarity import millilitres
    from common.brats import STRUCTURES
    from common.console import standard_output

    console = standard_output()
    table = Table(box=ROUNDED if console.is_terminal else ASCII2, show_lines=console.is_terminal)
    table.add_column("subject", overflow="fold")
    for structure in STRUCTURES:
        table.add_column(f"{structure} ml", justify="right", no_wrap=True)
    table.add_column("entropy", justify="right", no_wrap=True)
    for heading in ("location", "warnings"):
        table.add_column(heading, overflow="fold")
    for summary in summaries:
        volumes = summary["millilitres"] or {}
        entropy = summary.get("tumour_entropy")
        location = (summary.get("location") or {}).get("text", "")
        remark = "; ".join(summary["warnings"]) if summary["files"] else "not segmented"
        table.add_row(
            Text(printable(summary["subject"]).replace("\n", "?")),
            *(millilitres(volumes[name]) if name in volumes else "" for name in STRUCTURES),
            "" if entropy is None else f"{entropy:.2f}",
            Text(printable(str(location))),
            Text(printable(remark)),
        )
    console.print(table)
