"""What `fed-client join` shows: a bar on a terminal, log lines when piped, and `status.json`.

The status file is for `fed-client status` and for monitoring; it is rewritten at most once a second.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.files import write_text_atomically
from common.progress import SECONDS_BETWEEN_LINES, Progress, line

LOG = logging.getLogger("fedbrats")
SECONDS_BETWEEN_WRITES = 1.0
SECONDS_BETWEEN_FACTS = 5.0


class Display:
    """Shows where the client is; `details` are further keys of the status file."""

    def __init__(self, status: Path, **details: Any) -> None:
        self._path = status
        self._details: dict[str, Any] = {"pid": os.getpid(), **details}
        self._written = self._lined = 0.0
        self._bar: Any = None
        self._task: Any = None

    def state(self, name: str, text: str = "", **details: Any) -> None:
        """The client is now doing something else; `text` goes to the log if it says something new."""
        if text and text != self._details.get("text"):
            LOG.info(text)
        self._details |= {"state": name, "text": text, "since": _now(), "progress": None, **details}
        self._end_bar()
        self.write()

    def progress(self, progress: Progress) -> None:
        """How far the present work is."""
        shown = {**vars(progress), "seconds_left": progress.seconds_left}
        self._details["progress"] = shown
        now = time.monotonic()
        if now - self._written > SECONDS_BETWEEN_WRITES:
            self.write()
        if sys.stderr.isatty():
            self._show_bar(progress)
        elif progress.done == 0 or now - self._lined > SECONDS_BETWEEN_LINES:
            self._lined = now
            if 0 < progress.done < progress.total:
                LOG.info(line(progress))

    def set(self, **details: Any) -> None:
        """Further facts for the status file, written within some seconds."""
        self._details |= details
        if time.monotonic() - self._written > SECONDS_BETWEEN_FACTS:
            self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        text = json.dumps({**self._details, "written": _now()}, indent=1)
        with contextlib.suppress(OSError):  # a full disk must not end the training
            write_text_atomically(self._path, text + "\n")

    def _show_bar(self, progress: Progress) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        if self._bar is None:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[remark]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(progress.what, total=progress.total, remark="")
        self._bar.update(
            self._task,
            description=progress.what,
            total=progress.total,
            completed=progress.done,
            remark=progress.remark,
        )
        if progress.done >= progress.total:
            self._end_bar()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def display(status: Path, **details: Any) -> Iterator[Display]:
    """A display that leaves the terminal and the status file tidy."""
    shown = Display(status, **details)
    try:
        yield shown
    finally:
        shown.state("stopped")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
