"""The commands of a running federation: `fed-server start`, `status`, `stop`, `export`.

There is no control port: `stop` signals the process that holds the folder's lock, which the
operating system allows to its owner only, and `status` reads what that process writes. Heavy imports
happen inside the commands.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from common.console import FAILED, failing_in_words, standard_output, start_logging
from server.dashboard_commands import PORT, dashboard_beside

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
SHOWN = "state", "absent", "round", "loss", "dice", "iou", "seconds", "last_contact"  # of a site
STOP_SECONDS = 20.0


def start(
    folder: Folder,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Also serve a page of it, to this machine only.")
    ] = False,
    dashboard_port: Annotated[
        int, typer.Option(min=0, max=65535, help="TCP port of that page; 0 takes a free one.")
    ] = PORT,
) -> None:
    """Wait for the hospitals and train until every round is done; the same again continues.

    Exit code 0: complete, every round had the sites it needs. 1: it failed or was stopped; nothing
    is lost. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from server.checkpoint import RunFolder
        from server.coordinator import load_coordinator
        from server.history import History
        from server.start import Stopped
        from server.start import start as serve
        from server.tables import final_table

        coordinator = load_coordinator(folder)
        try:
            with dashboard_beside(folder, dashboard_port) if dashboard else nullcontext():
                judged = serve(coordinator)
        except Stopped as stopped:
            print(f"fed-server: {stopped}", file=sys.stderr)
            raise typer.Exit(FAILED) from None
        finally:
            _print_verdict(coordinator.run)
        with History(RunFolder(coordinator.run).history) as history:
            final, released = history.final(), history.final_released()
        if final is not None:
            standard_output().print(final_table(*final, released))
        print(f"Export the model: fed-server export {folder} OUT")
        if not judged.complete:
            raise typer.Exit(FAILED)


def status(folder: Folder, as_json: AsJson = False) -> None:
    """Show whether the server runs, the sites' states, and who contributed to which round.

    Exit code 0: it runs, or the federation is complete. 1: neither. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from common.files import lock_holder
        from server.checkpoint import RunFolder
        from server.coordinator import load_coordinator
        from server.history import History
        from server.tables import results_document

        coordinator = load_coordinator(folder)
        running = lock_holder(coordinator.lock) is not None
        told = _told(coordinator.status)
        run = RunFolder(coordinator.run)
        results: dict[str, Any] | None = None
        if run.history.exists():
            with History(run.history) as history:
                results = results_document(history)
        complete = bool(results and results["verdict"]["complete"])
        state = told.get("state", "starting") if running else "complete" if complete else "stopped"
        document = {**told, "running": running, "state": state}
        if as_json:
            print(json.dumps({**document, "results": results}, indent=1))
        else:
            _print_status(document)
            _print_verdict(coordinator.run)
    if not running and not complete:
        raise typer.Exit(FAILED)


def stop(folder: Folder) -> None:
    """Stop the server; `start` continues after the last complete round.

    Exit code 0: it does not run (any more). 1: it could not be stopped. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from common.files import ask_to_stop, lock_holder
        from server.coordinator import CoordinatorError, load_coordinator

        coordinator = load_coordinator(folder)
        if lock_holder(coordinator.lock) is None:
            print("The server does not run.")
            return
        if not ask_to_stop(coordinator.lock, STOP_SECONDS):
            raise CoordinatorError(f"The server did not stop within {STOP_SECONDS:.0f} s.")
        print("Stopped. `fed-server start` continues after the last complete round.")


def export(
    folder: Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for model and card.")],
    worst_site: Annotated[
        bool, typer.Option("--worst-site", help="The model whose worst site is best.")
    ] = False,
) -> None:
    """Write the best model as safetensors with a model card: what it is, from whom, how good.

    Exit code 0: written. 1: there is no finished model, or OUT cannot be written. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from server.coordinator import load_coordinator
        from server.export import export_model

        model, card = export_model(load_coordinator(folder), out, worst_site=worst_site)
        print(f"Model: {model}")
        print(f"Card: {card}")


def _told(status: Path) -> dict[str, Any]:
    """What the server last wrote of itself; what cannot be read, or is of another version, is none."""
    try:
        told = json.loads(status.read_text(encoding="utf-8"))
        sites = {site: dict.fromkeys(SHOWN) | about for site, about in told["sites"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {**told, "sites": sites}


def _print_status(document: dict[str, Any]) -> None:
    print(f"Federation {document.get('name', '-')}: {document['state']}", end="")
    if document.get("rounds"):
        print(f", {document['rounds_done']} of {document['rounds']} rounds done", end="")
    print()
    if not document.get("sites"):
        return
    from rich.markup import escape

    from server.tables import number, site_table

    table = site_table(["state", "round", "loss", "Dice", "IoU", "s", "last contact"])
    for site, about in document["sites"].items():
        state = about["state"] if document["running"] else "-"
        table.add_row(
            escape(site),
            escape(about["absent"] or state or "-"),
            str(about["round"] or "-"),
            number(about["loss"]),
            number(about["dice"]),
            number(about["iou"]),
            number(about["seconds"], 1),
            about["last_contact"] or "-",
        )
    standard_output().print(table)


def _print_verdict(run: Path) -> None:
    from server.checkpoint import RunFolder
    from server.history import History
    from server.tables import verdict

    history = RunFolder(run).history
    if history.exists():
        with History(history) as opened:
            print("\n".join(verdict(opened).lines()))


def _failing() -> AbstractContextManager[None]:
    return failing_in_words("fed-server", _foreseen)


def _foreseen() -> tuple[type[Exception], ...]:
    from common.audit_log import LogError
    from common.files import AlreadyInUse
    from common.flower import WrongFlower
    from common.keys import BadKey
    from common.weights import BadWeights
    from server.certificates import CertificateError
    from server.coordinator import CoordinatorError
    from server.enrolment import EnrolmentError
    from server.history import HistoryError
    from server.roll_call import FederationFailed
    from server.superlink import CannotListen

    return (
        AlreadyInUse,
        BadKey,
        BadWeights,
        CannotListen,
        CertificateError,
        CoordinatorError,
        EnrolmentError,
        FederationFailed,
        HistoryError,
        LogError,
        WrongFlower,
    )
