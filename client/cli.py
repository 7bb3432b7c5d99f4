"""The hospital's command line, `fed-client`.

`check` examines a folder of subjects and says what is wrong with which file; `client.enrol` has
`init` and `rotate-key`, `client.membership` has `join`, `review`, `status` and `leave`,
`client.privacy_commands` has `privacy-plan`, `privacy-report` and `privacy-ledger`,
`client.audit_commands` has `audit`, `client.policy_commands` has `policy explain`,
`client.prediction_commands` has `predict`, `client.evaluation_commands` has `evaluate`,
`client.viewer_commands` has `view`. Heavy imports happen inside the commands, so that `--help`
answers at once.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from client import (
    audit_commands,
    enrol,
    evaluation_commands,
    membership,
    policy_commands,
    prediction_commands,
    privacy_commands,
    viewer_commands,
)
from client.finding_table import print_findings
from client.options import LabelCoding, require_coding
from common.brats import MODALITIES
from common.console import complain, printable, run_program, start_logging
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
    evaluation_commands.evaluate,
    prediction_commands.predict,
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
    label_coding: LabelCoding = "auto",
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
    require_coding(label_coding)
    if problem := _not_a_folder(data):
        complain("fed-client", f"{data} {problem}; give the folder that holds the subjects.")
        raise typer.Exit(USAGE)

    from sites.checks import examine, same_patient_twice
    from sites.each_subject import each_subject
    from sites.patients import PatientsError, patients_of, unknown_in_list
    from sites.subject import Subject, discover

    name = site or data.resolve().name
    discovery = discover(data, modalities=wanted, site=name)
    findings = list(discovery.findings)

    def digest_of(subject: Subject) -> tuple[str | None, list[Finding]]:
        scan, found = examine(
            subject,
            modalities=wanted,
            coding=label_coding,
            require_labels=not no_labels,
            site=name,
        )
        return (None if scan is None else scan.digest), found

    digests = []
    checked = each_subject(digest_of, discovery.subjects, "checking")
    for subject, (digest, found) in zip(discovery.subjects, checked, strict=True):
        findings += found
        if digest is not None:
            digests.append((name, subject.id, digest))
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


def main() -> None:
    """Entry point of `fed-client`."""
    run_program("fed-client", app)
