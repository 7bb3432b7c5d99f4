"""What a hospital asks about its patients' privacy: `fed-client privacy-report`, `privacy-plan`,
`privacy-ledger`.

Nothing is sent. Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.console import failing_in_words, standard_output, start_logging

if TYPE_CHECKING:
    from client.hospital import HospitalFolder

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="This hospital's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
PAGE, DOCUMENT = "privacy-report.html", "privacy-report.json"
PLOTS = (".svg", ".png")


def privacy_report(
    folder: Folder,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where to write it; DIR/privacy-report by default."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write what this site's patients have lost of their privacy, for a data-protection officer.

    One HTML page and the same as JSON. Exit code 0: written, also if nothing is protected; the
    report says so. 1: the ledger is missing or was tampered with, and nothing is written; or FOLDER
    cannot be written. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from client.hospital import load_hospital
        from client.privacy_page import report_page, report_table
        from client.privacy_report import privacy_document
        from common.files import write_text_atomically

        hospital = load_hospital(folder)
        document = privacy_document(hospital)
        page = report_page(document)
        text = json.dumps(document, indent=1, allow_nan=False)
        target = hospital.path / "privacy-report" if out is None else out
        target.mkdir(parents=True, exist_ok=True)
        write_text_atomically(target / PAGE, page)
        write_text_atomically(target / DOCUMENT, text + "\n")
    if as_json:
        print(text)
        return
    standard_output().print(report_table(document, terminal=sys.stdout.isatty()))
    print(f"Page: {target / PAGE}")
    print(f"JSON: {target / DOCUMENT}")


def privacy_plan(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="This hospital's folder.")
    ] = None,
    patients: Annotated[
        int | None, typer.Option(min=1, help="Training patients, instead of counting DIR's.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Instead of rounds.number.")] = None,
    epsilon: Annotated[
        list[float] | None, typer.Option(help="A budget to plan for; may be given several times.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="1/(10 N) for N patients by default.")] = None,
    expected_batch: Annotated[
        float | None, typer.Option(help="Patients of a step on average; all of them by default.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Noisy steps a round.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The federation.yaml to plan for.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Or a preset; private if nothing else is known.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw it, as .svg or .png.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Before joining: the noise that a privacy budget asks for here, and what can then be learned.

    Names of files and the ledger are read, and nothing is written but the plot. Small batches take up to a
    minute. Exit code 0: planned. 1: DIR or its data cannot be used. 2: wrong usage.
    """
    start_logging()
    if any(not 0 < value < float("inf") for value in epsilon or ()):
        raise typer.BadParameter("must be a number above 0.", param_hint="--epsilon")
    if expected_batch is not None and not 1 <= expected_batch < float("inf"):
        raise typer.BadParameter("must be a number from 1.", param_hint="--expected-batch")
    if delta is not None and not 0 < delta < 1:
        raise typer.BadParameter("must be between 0 and 1.", param_hint="--delta")
    if plot is not None and plot.suffix.lower() not in PLOTS:
        raise typer.BadParameter(f"{plot} must end in .svg or .png.", param_hint="--plot")
    if plot is not None and not plot.absolute().parent.is_dir():
        raise typer.BadParameter(f"{plot.parent} is no folder.", param_hint="--plot")
    if folder is None and patients is None:
        raise typer.BadParameter("give DIR, or --patients.", param_hint="DIR")
    with _failing():
        from client.budget import default_delta
        from client.hospital import load_hospital
        from client.plan_display import plan_table, write_plot
        from client.privacy_plan import (
            EPSILONS,
            Cohort,
            Recipe,
            budget_of,
            cohort_of,
            config_of,
            parameters_of,
            plan_document,
            spent_before,
        )
        from common.config_file import load_config

        hospital = load_hospital(folder) if folder is not None else None
        agreed = config_of(hospital) if hospital else None
        if config is not None or preset is not None:
            agreed = load_config(config, preset=preset)
        budget = budget_of(hospital) if hospital else None
        if patients is not None:
            cohort = Cohort(patients, None, "as given")
        else:
            assert hospital is not None
            cohort = cohort_of(hospital, agreed)
        settings = agreed or load_config(preset="private")
        recipe = Recipe(
            "this plan",
            rounds or settings.rounds.number,
            steps or settings.privacy.steps,
            expected_batch or settings.privacy.expected_batch,
            parameters_of(settings),
        )
        if delta is None and budget is not None:
            delta = budget.delta
        own = (budget.epsilon,) if budget else ()
        wanted = sorted({*(epsilon or (*EPSILONS, *own))}, reverse=True)
        compared_at = own[0] if own and not epsilon else wanted[len(wanted) // 2]
        if delta is None:
            delta = default_delta(cohort.training)
        spent = spent_before(hospital, delta) if hospital else 0.0
        document = plan_document(cohort, settings, recipe, wanted, delta, compared_at, spent)
        if plot is not None:
            write_plot(document, plot)
    if as_json:
        print(json.dumps(document, indent=1, allow_nan=False))
        return
    standard_output().print(plan_table(document, terminal=sys.stdout.isatty()))
    if plot is not None:
        print(f"Plot: {plot}")


def privacy_ledger(
    folder: Folder,
    create: Annotated[
        bool,
        typer.Option("--create", help="Make a new, empty ledger where site.yaml says."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Verify this site's privacy ledger from its first entry to its last, and list it.

    Exit code 0: it is whole, or was made. 1: it is missing, damaged or was tampered with, or one
    exists that --create would replace. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from dataclasses import asdict

        from client.hospital import load_hospital
        from client.ledger import anchor_in, open_ledger
        from client.privacy_page import ledger_table
        from client.site_config import load_site_config

        hospital = load_hospital(folder)
        path = load_site_config(hospital.config).privacy_ledger
        if create:
            _create(hospital, path)
        anchor = anchor_in(hospital.state)
        with open_ledger(path, anchor if anchor.exists() else None, write=False) as ledger:
            pass
        document = {
            "path": str(path.resolve()),
            "id": ledger.id,
            "verified": True,
            "anchored": anchor.exists(),
            "head": ledger.head,
            "entries": [
                {**asdict(entry), "size": len(ledger.groups[entry.patients])}
                for entry in ledger.entries
            ],
        }
    if as_json:
        print(json.dumps(document, indent=1, allow_nan=False))
        return
    standard_output().print(ledger_table(document, terminal=sys.stdout.isatty()))


def _create(hospital: HospitalFolder, path: Path) -> None:
    """Raises:
    LedgerError: there is one, or this folder or one beside it has known one.
    """
    from client.hospital import anchors_beside
    from client.ledger import LedgerError, anchor_in, create_ledger

    own = anchor_in(hospital.state.resolve())
    known = {anchor for anchor in (own, *anchors_beside(path)) if anchor.exists()}
    if known and not path.exists():
        anchors = " and ".join(str(anchor) for anchor in sorted(known))
        raise LedgerError(
            f"{anchors}: a ledger is remembered there from which this site's patients were paid "
            f"for, so a new one would forget what they have spent. Restore {path} from a backup, or "
            "correct `privacy_ledger` in site.yaml. Only if it is lost for good and the hospital "
            f"answers for beginning anew: delete {anchors} by hand and type the command again."
        )
    create_ledger(path)
    print(
        f"{path}: made, empty. Spending begins anew: whatever this site's patients spent before is "
        "not in it. The coordinator sees in the next statement that it is another ledger. Folders "
        "of this hospital that remember the old one do not train until it is restored.",
        file=sys.stderr,
    )


def _failing() -> AbstractContextManager[None]:
    return failing_in_words("fed-client", _foreseen)


def _foreseen() -> tuple[type[Exception], ...]:
    from client.consent import NotAccepted
    from client.hospital import HospitalError
    from client.ledger import LedgerError
    from client.outbound import OutboundError
    from client.privacy_plan import NothingToPlan
    from common.invitation import BadInvitation
    from common.keys import BadKey
    from common.terms import BadTerms
    from sites.institutions import SplitError
    from sites.patients import PatientsError

    return (
        BadInvitation,
        BadKey,
        BadTerms,
        HospitalError,
        LedgerError,
        NotAccepted,
        NothingToPlan,
        OutboundError,
        PatientsError,
        SplitError,
    )
