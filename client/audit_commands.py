"""The commands on this hospital's audit log: `fed-client audit verify`, `show`, `export`.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
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
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="This hospital's folder.")]


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
    from client.hospital import HospitalError, HospitalFolder

    hospital = HospitalFolder(folder)
    if not hospital.config.exists():
        raise HospitalError(f"{folder} is no hospital's folder.")
    return hospital.audit


def _present(folder: Path) -> str | None:
    """The fingerprint of the key in use; None if there is none, with which old entries can be verified."""
    from client.hospital import HospitalFolder
    from common.keys import BadKey, fingerprint, load_private_key, read_public_key

    hospital = HospitalFolder(folder)
    with suppress(BadKey):  # first: who cannot sign can replace the public one
        return fingerprint(load_private_key(hospital.private_key).public_key())
    with suppress(BadKey):
        return fingerprint(read_public_key(hospital.public_key).key)
    return None


def _failing() -> AbstractContextManager[None]:
    return failing_in_words("fed-client", _foreseen)


def _foreseen() -> tuple[type[Exception], ...]:
    from client.hospital import HospitalError
    from common.audit_log import LogError

    return (HospitalError, LogError)
