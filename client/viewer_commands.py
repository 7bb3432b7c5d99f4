"""`fed-client view`: a subject's scans and segmentations in a browser on this machine.

Nothing is sent anywhere. Heavy imports happen inside the command, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.console import FAILED, RESEARCH_ONLY, USAGE, complain, failing_in_words, start_logging

if TYPE_CHECKING:
    from sites.subject import Subject


def view(
    subject: Annotated[
        Path | None, typer.Argument(help="One subject's folder; none: only the page to upload to.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A run's model.safetensors: segments, too.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 0,
    open_page: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in this machine's browser.")
    ] = True,
) -> None:
    """Look at a subject in a browser: scans, true labels, a model's segmentation, volumes.

    Only this machine can reach the page, and only who has its address with the token. For research;
    not a medical device. Ctrl-C ends it. Exit code 0: ended. 1: the subject or the model cannot be
    used. 2: wrong usage.
    """
    start_logging()
    if subject is None and model is None:
        raise typer.BadParameter("give SUBJECT, --model, or both.")
    if subject is not None and not subject.is_dir():
        raise typer.BadParameter(f"{subject} is no folder.", param_hint="SUBJECT")
    if model is not None and not model.is_file():
        raise typer.BadParameter(f"{model} is no file.", param_hint="--model")

    with failing_in_words("fed-client", _foreseen), _asked_to_stop() as stop:
        from client.prediction import load_model
        from client.viewer import viewer_app
        from client.viewing import Unusable, Viewing
        from common.local_page import Place, open_in_browser, serving

        found = None if subject is None else _only_subject(subject)
        loaded = None if model is None else load_model(model)
        with tempfile.TemporaryDirectory(
            prefix="fedbrats-view-", ignore_cleanup_errors=True
        ) as private:
            viewing = Viewing(Path(private), loaded, "" if model is None else model.name)
            if found is not None:
                try:
                    viewing.show(found)
                except Unusable as refused:
                    for finding in refused.findings:
                        complain("fed-client", f"{finding.file}: {finding.what}. {finding.remedy}")
                    raise typer.Exit(FAILED) from None
                if loaded is not None:
                    viewing.segment_shown()
            with serving(viewer_app(viewing), Place(port=port)) as address:
                print(address)
                print(f"Only this machine can open it. Ctrl-C ends it. {RESEARCH_ONLY}", flush=True)
                if open_page:
                    open_in_browser(address, Path(private))
                stop.wait()
        print("Ended; uploaded scans are deleted.", flush=True)
        if viewing.busy:  # torch in a thread would crash an orderly end
            os._exit(0)


def _foreseen() -> tuple[type[Exception], ...]:
    from common.local_page import NotServed
    from common.weights import BadWeights

    return BadWeights, NotServed


def _only_subject(folder: Path) -> Subject:
    from sites.subject import discover

    discovery = discover(folder)
    if len(discovery.subjects) == 1 and discovery.subjects[0].images:
        return discovery.subjects[0]
    if len(discovery.subjects) > 1:
        number = len(discovery.subjects)
        complain("fed-client", f"{folder} holds {number} subjects; give one subject's folder.")
        raise typer.Exit(USAGE)
    for finding in discovery.findings:
        complain("fed-client", f"{finding.what}. {finding.remedy}")
    if not discovery.findings:
        complain("fed-client", f"{folder} holds no scan, only a segmentation.")
    raise typer.Exit(FAILED)


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM or a closed terminal sets, so that private files are deleted."""
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
