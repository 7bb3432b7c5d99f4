"""The `audit` commands that both programs have: `audit verify`, `show`, `export`.

What differs is given by each program: its folder, its key, its errors. Annotations are evaluated here
(no `from __future__ import annotations`), for typer reads them, and the help of DIR differs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common import audit_display
from common.console import failing_in_words, start_logging

if TYPE_CHECKING:
    from common.audit_log import AuditLog


def audit_app(
    program: str,
    whose: str,
    log_of: "Callable[[Path], AuditLog]",
    present: Callable[[Path], str | None],
    foreseen: Callable[[], tuple[type[Exception], ...]],
) -> typer.Typer:
    """The commands of one program.

    Args:
        whose: the owner of DIR, for its help.
        log_of: the log in a folder; raises what `foreseen` names if the folder is not one.
        present: the fingerprint of the key in use; None if there is none, with which old entries can
            be verified.
        foreseen: errors that are said in words.
    """
    app = typer.Typer(
        help="What has happened here: verify, show or export the signed log.", no_args_is_help=True
    )
    Folder = Annotated[Path, typer.Argument(metavar="DIR", help=f"This {whose}'s folder.")]

    def failing() -> AbstractContextManager[None]:
        return failing_in_words(program, foreseen)

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
        with failing():
            log = log_of(folder)
            audit_display.verify(log, against, as_json, present(folder))

    @app.command()
    def show(
        folder: Folder,
        last: Annotated[int | None, typer.Option(min=1, help="Only so many, the newest.")] = None,
    ) -> None:
        """Show what happened, newest last.

        Exit code 0: shown. 1: it cannot be read, or was changed. 2: wrong usage.
        """
        start_logging()
        with failing():
            audit_display.show(log_of(folder), last)

    @app.command()
    def export(
        folder: Folder,
        out: Annotated[Path, typer.Argument(metavar="FILE", help="Ends in .csv or .json.")],
    ) -> None:
        """Write the verified log, with every number, as CSV or JSON.

        Exit code 0: written. 1: the log was changed, or FILE cannot be written. 2: wrong usage.
        """
        start_logging()
        with failing():
            audit_display.export(log_of(folder), out)

    return app
