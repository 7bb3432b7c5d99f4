"""The `dashboard` command of `fed-server` and of `fed-sim`, and the dashboard beside `fed-server start`.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from common.console import failing_in_words, printable, start_logging

LOG = logging.getLogger("fedbrats")
PORT = 8050

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder.")]
Run = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Folder of a run, or a coordinator's; finished or not."),
]
Host = Annotated[str, typer.Option(help="Local address to serve on; others need TLS.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free one.")]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="With --host: without TLS, so that others can read along."),
]
Open = Annotated[bool, typer.Option("--open", help="Show it in this machine's browser.")]


def dashboard_of_coordinator(
    folder: Folder,
    host: Host = "127.0.0.1",
    port: Port = PORT,
    insecure: Insecure = False,
    open_browser: Open = False,
) -> None:
    """Serve a page that shows the federation live: rounds, sites, Dice, loss, epsilon, alerts.

    On this machine only, unless --host says otherwise. It changes nothing; Ctrl-C ends it.

    Exit code 0: ended. 1: it cannot be served. 2: wrong usage.
    """
    start_logging()
    with failing_in_words("fed-server", _foreseen):
        from server.coordinator import load_coordinator

        load_coordinator(folder)
        _serve(folder, host, port, insecure, open_browser)


def dashboard_of_run(
    run: Run,
    host: Host = "127.0.0.1",
    port: Port = PORT,
    insecure: Insecure = False,
    open_browser: Open = False,
) -> None:
    """Serve a page that shows a run live, or as it ended: rounds, sites, Dice, loss, epsilon, alerts.

    On this machine only, unless --host says otherwise. It changes nothing; Ctrl-C ends it.

    Exit code 0: ended. 1: it cannot be served. 2: wrong usage.
    """
    start_logging()
    with failing_in_words("fed-sim", _foreseen):
        from server.source import Source

        if not Source(run).holds_a_run():
            raise typer.BadParameter(f"{run} holds no run.", param_hint="RUN")
        _serve(run, host, port, insecure, open_browser)


def _serve(path: Path, host: str, port: int, insecure: bool, open_browser: bool) -> None:
    from common.local_page import Place, open_in_browser, require_safe
    from server.dashboard import serving_dashboard
    from server.source import Source

    place = Place(host, port)
    source = Source(path)
    if not place.is_loopback and source.is_coordinators and not insecure:
        from server.certificates import read_certificate

        files = source.coordinator.server_certificate, source.coordinator.server_key
        place = Place(host, port, place.token, *files, read_certificate(files[0]).hosts[0])
    require_safe(place, insecure=insecure)
    with (
        contextlib.suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory(prefix="fedbrats-page-", ignore_cleanup_errors=True) as private,
        serving_dashboard(path, place) as address,
    ):
        print(f"Dashboard of {printable(str(path))}: {address}", flush=True)
        print("Whoever knows this whole address can look; it changes with every start.")
        print("Ctrl-C ends the page, and nothing else.", flush=True)
        if open_browser:
            open_in_browser(address, Path(private))
        _wait_for_ever()


def _wait_for_ever() -> None:
    while True:
        time.sleep(3600)


@contextlib.contextmanager
def dashboard_beside(path: Path, port: int) -> Iterator[None]:
    """The dashboard on this machine while the block runs. That it cannot be served is a warning only:
    a federation is worth more than its picture."""
    from common.local_page import NotServed, Place
    from server.dashboard import serving_dashboard

    with contextlib.ExitStack() as stack:
        try:
            address = stack.enter_context(serving_dashboard(path, Place(port=port)))
            LOG.info(f"dashboard: {address}")
        except (NotServed, OSError) as error:
            LOG.warning(f"there is no dashboard: {error} The federation goes on without.")
        yield


def _foreseen() -> tuple[type[Exception], ...]:
    from common.local_page import NotServed
    from server.certificates import CertificateError
    from server.coordinator import CoordinatorError

    return (CertificateError, CoordinatorError, NotServed)
