"""The commands on this coordinator's audit log: `fed-server audit verify`, `show`, `export`.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common import audit_display
from common.console import failing_in_words, start_logging

if TYPE_CHECKING:
    from common.audit_log import AuditLog

app = typer.Typer(
    help="What has happened here: verify, show or export the signed log.", no_args_is_help=True
)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="This coordinator's folder.")]


@app.command()
def verify(
    folder: Folder,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A copy of the other side's audit.log, to compare."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
) -> None:
    """Verify every byte of the log: chain, signatures, and that its end is there.

    Exit code 0: nothing was changed. 1: something was, or is missing. 2: wrong usage.
    """
    start_logging()
    with _failing():
        log = _log(folder)
        audit_display.verify(log, against, as_json, _present(folder))


@app.command()
def show(
    folder: Folder,
    last: Annotated[int | None, typer.Option(min=1, help="Only so many, the newest.")] = None,
) -> None:
    """Show what happened, newest last.

    Exit code 0: shown. 1: it cannot be read. 2: wrong usage.
    """
    start_logging()
    with _failing():
        audit_display.show(_log(folder), last)


@app.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Argument(metavar="FILE", help="Ends in .csv or .json.")],
) -> None:
    """Write the verified log, with every number, as CSV or JSON.

    Exit code 0: written. 1: the log was changed, or FILE cannot be written. 2: wrong usage.
    """
    start_logging()
    with _failing():
        audit_display.export(_log(folder), out)


def _log(folder: Path) -> AuditLog:
    from server.coordinator import CoordinatorError, CoordinatorFolder

    coordinator = CoordinatorFolder(folder)
    if not coordinator.config.exists():
        raise CoordinatorError(f"{folder} is no coordinator's folder.")
    return coordinator.audit


def _present(folder: Path) -> str | None:
    """The fingerprint of the key in use; None if there is none, with which old entries can be verified."""
    from common.keys import BadKey, fingerprint, load_signing_key
    from server.coordinator import CoordinatorFolder

    try:
        return fingerprint(load_signing_key(CoordinatorFolder(folder).server_key).public_key())
    except BadKey:
        return None


def _failing() -> AbstractContextManager[None]:
    return failing_in_words("fed-server", _foreseen)


def _foreseen() -> tuple[type[Exception], ...]:
    from common.audit_log import LogError
    from server.coordinator import CoordinatorError

    return (CoordinatorError, LogError)
