"""`fed-server report`: the federation so far as one HTML page, with its figures as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.console import failing_in_words, printable, start_logging

if TYPE_CHECKING:
    from server.report import Report


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html|FOLDER",
            help="Where to write the page; default DIR/report/report.html.",
        ),
    ] = None,
    publishable: Annotated[
        bool,
        typer.Option(
            "--publishable",
            help="Number the sites that hide their names; default DIR/report-publishable.",
        ),
    ] = False,
) -> None:
    """Write one page: curves, times, who took part, cohort, privacy, configuration. Read only.

    Also while the federation runs. Exit code 0: written. 1: there is nothing to report, or it cannot
    be written. 2: wrong usage.
    """
    start_logging()
    with failing_in_words("fed-server", _foreseen):
        from common.files import lock_holder, require_writable
        from server.checkpoint import RunFolder
        from server.coordinator import CoordinatorError, federation_id, load_coordinator
        from server.enrolment import keys_of_all
        from server.recorded import published, read_recorded
        from server.report import page_path
        from server.report_sections import agreed_config, coordinators_report

        coordinator = load_coordinator(folder)
        default = folder / ("report-publishable" if publishable else "report")
        page = page_path(out or default)
        require_writable(page.parent)
        run = RunFolder(coordinator.run)
        if not run.history.exists():
            raise CoordinatorError(f"{folder}: no run has begun, so there is nothing to report.")
        identity = federation_id(coordinator)
        recorded = read_recorded(run.history, keys_of_all(coordinator.enrolled), identity)
        hidden = len(recorded.hidden)
        if publishable:
            recorded = published(recorded)
        made = coordinators_report(
            recorded,
            agreed_config(recorded),
            identity,
            hidden=hidden,
            publishable=publishable,
            running=lock_holder(coordinator.lock) is not None,
        )
        write_and_tell(made, page)


def write_and_tell(report: Report, page: Path) -> None:
    """Write the report and print where it is. Raises OSError."""
    from server.report import write_report

    figures = write_report(report, page)
    print(f"Page: {printable(str(page))}")
    if figures:
        print(f"Figures: {printable(str(figures[0].parent))} ({len(figures)} files)")
    print(printable(report.state))  # it names sites


def _foreseen() -> tuple[type[Exception], ...]:
    from server.coordinator import CoordinatorError
    from server.enrolment import EnrolmentError
    from server.history import HistoryError
    from server.report import ReportError

    return CoordinatorError, EnrolmentError, HistoryError, ReportError
