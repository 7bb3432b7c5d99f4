"""The hospital's command line, `fed-client`.

`check` examines a folder of subjects and says what is wrong with which file; `predict` segments one
subject with a trained model; `client.enrol` has `init` and `rotate-key`, `client.membership` has
`join`, `review`, `status` and `leave`, `client.privacy_commands` has `privacy-plan`,
`privacy-report` and `privacy-ledger`, `client.audit_commands` has `audit`, `client.policy_commands`
has `policy explain`, `client.viewer_commands` has `view`. Heavy imports happen inside the commands, so
that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from client import (
    audit_commands,
    enrol,
    membership,
    policy_commands,
    privacy_commands,
    viewer_commands,
)
from common.brats import CODINGS, MODALITIES, STRUCTURES
from common.console import complain, printable, run_program, standard_output, start_logging
from sites.finding import Finding

app = typer.Typer(
    help="What a hospital runs: enrol, join, look at its own scans. No scan ever leaves the machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

UNUSABLE, USAGE = 1, 2  # exit codes


@app.callback()
def _several_commands() -> None:
    """Makes typer expect the name of a command even while there is only one."""


for command in (
    enrol.init,
    membership.join,
    membership.review,
    membership.status,
    membership.leave,
    enrol.rotate_key,
    privacy_commands.privacy_plan,
    privacy_commands.privacy_report,
    privacy_commands.privacy_ledger,
    viewer_commands.view,
):
    app.command()(command)
app.add_typer(audit_commands.app, name="audit")
app.add_typer(policy_commands.policy, name="policy")


@app.command()
def check(
    data: Annotated[
        Path, typer.Argument(help="Folder with the subjects, or one subject's folder.")
    ],
    site: Annotated[str, typer.Option(help="Name to report; the folder's by default.")] = "",
    modalities: Annotated[
        str, typer.Option(help="Comma-separated, those the federation agreed on.")
    ] = ",".join(MODALITIES),
    label_coding: Annotated[
        str, typer.Option(help=f"What labels mean: auto, {', '.join(CODINGS)}.")
    ] = "auto",
    no_labels: Annotated[
        bool, typer.Option("--no-labels", help="Segmentations may be missing (prediction).")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
) -> None:
    """Read every file of every subject and list what is wrong with it.

    Exit code 0: every subject is usable. 1: some are not, or there is none. 2: wrong usage.
    """
    start_logging()
    wanted = _modalities(modalities)
    if label_coding != "auto" and label_coding not in CODINGS:
        raise typer.BadParameter(
            f"{label_coding!r} is not one of auto, {', '.join(CODINGS)}.",
            param_hint="--label-coding",
        )
    if problem := _not_a_folder(data):
        complain("fed-client", f"{data} {problem}; give the folder that holds the subjects.")
        raise typer.Exit(USAGE)

    from common.progress import track
    from sites.checks import examine, same_patient_twice
    from sites.patients import PatientsError, patients_of, unknown_in_list
    from sites.subject import discover

    name = site or data.resolve().name
    discovery = discover(data, modalities=wanted, site=name)
    findings = list(discovery.findings)
    digests = []
    subjects = track(discovery.subjects, "checking", len(discovery.subjects), "subjects")
    for subject in subjects:
        scan, found = examine(
            subject,
            modalities=wanted,
            coding=label_coding,
            require_labels=not no_labels,
            site=name,
        )
        findings += found
        if scan is not None:
            digests.append((name, subject.id, scan.digest))
        del scan
    findings += same_patient_twice(digests)
    try:
        patients_of(discovery.subjects, data)
        findings += unknown_in_list(discovery.subjects, data, site=name)
    except PatientsError as error:
        remedy = "Correct patients.csv; nothing is trained before."
        findings.append(Finding(name, "", "patients.csv", "error", "patients", str(error), remedy))

    unusable = sorted({f.subject for f in findings if f.severity == "error" and f.subject})
    n_subjects = len({s.id for s in discovery.subjects} | set(unusable))
    summary = {
        "site": name,
        "subjects": n_subjects,
        "usable": n_subjects - len(unusable),
        "unusable": unusable,
        "errors": sum(f.severity == "error" for f in findings),
        "warnings": sum(f.severity == "warning" for f in findings),
    }
    if as_json:
        document = summary | {"findings": [f.as_dict() for f in findings]}
        print(json.dumps(document, indent=2))
    else:
        print_findings(findings)
        print(
            f"{printable(name)}: {n_subjects} subjects, {summary['usable']} usable, "
            f"{summary['errors']} errors, {summary['warnings']} warnings"
        )
    if summary["errors"] or n_subjects == 0:
        raise typer.Exit(UNUSABLE)


def _not_a_folder(path: Path) -> str:
    try:
        if path.is_dir():
            return ""
        return "is not a folder" if path.exists() else "does not exist"
    except OSError as error:
        return f"cannot be opened ({error.strerror})"


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A run's model.safetensors.")],
    subject: Annotated[Path, typer.Argument(help="One subject's folder; no labels needed.")],
    out: Annotated[Path, typer.Argument(help="Segmentation to write, .nii or .nii.gz.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
) -> None:
    """Segment one patient, in the grid and orientation of the patient's own files.

    For research; not a medical device. Exit code 0: written. 1: the subject or the model cannot be
    used. 2: wrong usage.
    """
    start_logging()
    if not out.name.endswith((".nii", ".nii.gz")):
        raise typer.BadParameter(f"{out} must end in .nii or .nii.gz.", param_hint="OUT")
    if not subject.is_dir():
        raise typer.BadParameter(f"{subject} is no folder.", param_hint="SUBJECT")

    if not model.is_file():
        raise typer.BadParameter(f"{model} is no file.", param_hint="MODEL")

    from client.prediction import load_model, segment_subject
    from common.weights import BadWeights
    from sites.subject import discover

    try:
        loaded = load_model(model)
    except BadWeights as error:
        complain("fed-client", str(error))
        raise typer.Exit(UNUSABLE) from None
    discovery = discover(subject, modalities=loaded.config.modalities)
    findings = list(discovery.findings)
    volumes = None
    if len(discovery.subjects) == 1:
        try:
            volumes, found = segment_subject(loaded, discovery.subjects[0], out)
        except OSError as error:
            complain("fed-client", f"{out} cannot be written: {error.strerror}.")
            raise typer.Exit(UNUSABLE) from None
        except MemoryError:
            complain(
                "fed-client", f"{subject} needs more memory than there is; check its voxel size."
            )
            raise typer.Exit(UNUSABLE) from None
        findings += found
    elif discovery.subjects:
        complain(
            "fed-client",
            f"{subject} holds {len(discovery.subjects)} subjects; give one subject's folder.",
        )
        raise typer.Exit(USAGE)
    if as_json:
        document = {
            "written": str(out) if volumes else None,
            "millilitres": volumes,
            "findings": [f.as_dict() for f in findings],
        }
        print(json.dumps(document, indent=2))
    else:
        print_findings(findings)
    if volumes is None:
        complain("fed-client", f"{subject} cannot be segmented; nothing was written.")
        raise typer.Exit(UNUSABLE)
    if not as_json:
        amounts = ", ".join(f"{name} {volumes[name]:.1f} ml" for name in STRUCTURES)
        print(f"{out}: {amounts}. For research; not a medical device.")


def _modalities(text: str) -> tuple[str, ...]:
    """The modalities named in `text`, in the system's order."""
    names = {part.strip().lower() for part in text.split(",") if part.strip()}
    for name in sorted(names - set(MODALITIES)):
        near = get_close_matches(name, MODALITIES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        message = f"{name!r} is not one of {', '.join(MODALITIES)}{hint}"
        raise typer.BadParameter(message, param_hint="--modalities")
    if not names:
        raise typer.BadParameter("name at least one modality.", param_hint="--modalities")
    return tuple(m for m in MODALITIES if m in names)


def print_findings(findings: Sequence[Finding]) -> None:
    """A table on standard output; nothing is cut, and without a terminal nothing is wrapped."""
    if not findings:
        return
    from rich.box import ASCII2, ROUNDED
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    table = Table(box=ROUNDED if terminal else ASCII2, show_lines=terminal)
    for heading in ("site", "subject", "file", "severity", "what", "what to do"):
        table.add_column(heading, overflow="fold", no_wrap=not terminal)
    for finding in sorted(findings, key=lambda f: (f.severity, f.subject, f.file)):
        colour = "red" if finding.severity == "error" else "yellow"
        table.add_row(
            *(Text(_cell(t)) for t in (finding.site, finding.subject, finding.file)),
            Text(finding.severity, style=colour),
            *(Text(_cell(t)) for t in (finding.what, finding.remedy)),
        )
    standard_output().print(table)


def _cell(text: str) -> str:
    """A file's name may hold a line break, which would break the table."""
    return printable(text).replace("\n", "?")


def main() -> None:
    """Entry point of `fed-client`."""
    run_program("fed-client", app)
