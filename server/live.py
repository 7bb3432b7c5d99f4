"""What `fed-server start` shows while it runs: who does what, a table, and `status.json`.

On a terminal the table is redrawn every second; piped, there is a log line for every change and the
table of each round. The status file is for `fed-server status`, `sites` and for monitoring.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape

from common.console import printable, standard_output
from common.files import write_text_atomically
from common.metrics import mean_dice, mean_over_regions
from server.attendance import Waiting
from server.background import every
from server.history import RoundRecord
from server.link_grid import Contact
from server.tables import dice_text, number, round_table, site_table

LOG = logging.getLogger("fedbrats")
SECONDS_BETWEEN_LINES = 15.0


class Board:
    """The facts that are shown; filled by the rounds, read once a second by `showing`."""

    def __init__(
        self,
        path: Path,
        enrolled: Callable[[], Sequence[str]],
        contacts: Callable[[], Mapping[str, Contact]],
        doing: Callable[[], Mapping[str, str]],
        *,
        rounds: int,
        **facts: Any,
    ) -> None:
        self._path = path
        self._enrolled, self._contacts, self._doing = enrolled, contacts, doing
        self._rounds = rounds
        self._facts = {"pid": os.getpid(), "started": _now(), **facts}
        self._last: RoundRecord | None = None
        self._bytes: dict[str, int] = {}
        self._waiting: Waiting | None = None
        self._said: dict[str, str] = {}
        self._line_at = 0.0
        self.live = sys.stdout.isatty()

    def round_done(self, record: RoundRecord) -> None:
        self._waiting = None
        self._last = record
        for contribution in record.contributions:
            if contribution.bytes is not None:
                so_far = self._bytes.get(contribution.site, 0)
                self._bytes[contribution.site] = so_far + contribution.bytes
        if not self.live:
            standard_output().print(round_table(record))

    def waiting(self, waiting: Waiting | None) -> None:
        self._waiting = waiting

    def document(self) -> dict[str, Any]:
        """Everything that is known now, as plain JSON types."""
        contacts, doing = self._contacts(), self._doing()
        last, waiting = self._last, self._waiting
        trained = {c.site: c for c in last.contributions} if last else {}
        sites = {}
        for site in self._enrolled():
            contact, metrics = contacts.get(site), last.metrics.get(site) if last else None
            contribution = trained.get(site)
            sites[site] = {
                "state": _state(contact, doing.get(site)),
                "last_contact": _text(contact.last) if contact else None,
                "round": last.round if last and contribution and contribution.trained else None,
                "loss": contribution.train_loss if contribution else None,
                "dice": mean_dice(metrics) if metrics else None,
                "iou": _finite(mean_over_regions(metrics, "iou")) if metrics else None,
                "seconds": contribution.seconds if contribution else None,
                "bytes": self._bytes.get(site, 0),
                "absent": waiting.absent.get(site) if waiting else None,
            }
        return {
            **self._facts,
            "written": _now(),
            "state": "waiting for sites" if waiting else "training",
            "rounds_done": last.round if last else self._facts.get("rounds_before", 0),
            "rounds": self._rounds,
            "waiting": vars(waiting) if waiting else None,
            "sites": sites,
        }

    def write(self, document: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a full disk shows where it matters
            write_text_atomically(self._path, json.dumps(document, indent=1) + "\n")

    def lines(self, document: dict[str, Any]) -> None:
        """Log what changed since the last time."""
        for site, about in document["sites"].items():
            if self._said.get(site, "offline") != about["state"]:
                LOG.info(f"{site}: {about['state']}")
            self._said[site] = about["state"]
        waiting = self._waiting
        if waiting is not None:
            now = datetime.now(UTC).timestamp()
            if now - self._line_at > SECONDS_BETWEEN_LINES:
                self._line_at = now
                LOG.info(_wait_text(waiting))

    def table(self, document: dict[str, Any]) -> Group:
        table = site_table(["state", "round", "loss", "Dice", "IoU", "s", "MB"])
        for site, about in document["sites"].items():
            table.add_row(
                escape(site),
                escape(about["absent"] or about["state"]),
                str(about["round"] or "-"),
                number(about["loss"]),
                number(about["dice"]),
                number(about["iou"]),
                number(about["seconds"], 1),
                number(about["bytes"] / 1e6, 1),
            )
        done = f"{document['rounds_done']} of {self._rounds} rounds done"
        if self._last is not None:
            done += f"; {dice_text(self._last)}"
        return Group(done, table, escape(_wait_text(self._waiting) if self._waiting else ""))


@contextmanager
def showing(board: Board) -> Iterator[None]:
    """Show the board while the block runs, and leave a last status file."""
    console = Console()
    live = Live(console=console, auto_refresh=False, transient=True) if board.live else None

    def show() -> None:
        document = board.document()
        board.write(document)
        if live is not None:
            live.update(board.table(document), refresh=True)
        else:
            board.lines(document)

    with _lines_above(console) if live is not None else contextlib.nullcontext():
        try:
            with live or contextlib.nullcontext(), every(1.0, show):
                yield
        finally:
            with contextlib.suppress(Exception):  # it must not hide how the run ended
                board.write({**board.document(), "state": "not running", "waiting": None})


@contextmanager
def _lines_above(console: Console) -> Iterator[None]:
    """Log lines go above the live table instead of through it."""

    class Above(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = printable(f"{datetime.now():%H:%M:%S} {self.format(record)}")
            console.print(escape(line))

    before = LOG.handlers
    LOG.handlers = [Above()]
    try:
        yield
    finally:
        LOG.handlers = before


def _state(contact: Contact | None, doing: str | None) -> str:
    if contact is None or contact.last is None:
        return "never connected"
    if not contact.online:
        return "offline"
    return doing or "connected"


def _wait_text(waiting: Waiting) -> str:
    lacking = "train" if waiting.training < waiting.needed else "hold out subjects"
    names = ", ".join(waiting.absent) or f"sites that {lacking}"
    minutes, seconds = divmod(int(waiting.seconds_left), 60)
    rests = "".join(f"; {site} rests: {why}" for site, why in waiting.resting.items())
    if waiting.training < waiting.needed and waiting.not_training:
        others = ", ".join(waiting.not_training)
        rests += f"; here, but not training (too few subjects, or its own policy): {others}"
    return (
        f"round {waiting.round}: {waiting.training} sites that train are here, {waiting.needed} needed; "
        f"waiting for {names} ({minutes}:{seconds:02d} left){rests}"
    )


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _text(moment: datetime | None) -> str | None:
    return moment.isoformat(timespec="seconds") if moment else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
