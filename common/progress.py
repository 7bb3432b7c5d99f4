"""Progress of long work: a bar with rate and time left on a terminal, plain log lines when piped.

A process that works for another one hands its progress over instead (`hand_over`).
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
LOG = logging.getLogger("fedbrats")
SECONDS_BETWEEN_LINES = 15.0


@dataclass(frozen=True)
class Progress:
    """`remark` is what the work last said about itself, such as its loss."""

    what: str
    done: int
    total: int
    unit: str
    seconds: float
    remark: str = ""

    @property
    def rate(self) -> float:
        """Units a second."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate else None


_remark = ""
_receiver: Callable[[Progress], None] | None = None


def hand_over(receiver: Callable[[Progress], None]) -> None:
    """From now on give this process's progress to `receiver`, at every step, and show nothing."""
    global _receiver
    _receiver = receiver


def remark(text: str) -> None:
    """Say something about the work in progress, shown beside it."""
    global _remark
    _remark = text


def track(items: Iterable[Item], what: str, total: int, unit: str) -> Iterator[Item]:
    """Yield the items while showing how many of `total` are done, on standard error."""
    with stepping(what, total, unit) as step:
        for item in items:
            yield item
            step()


@contextmanager
def stepping(what: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each piece of work, for work that is not a loop of ours."""
    remark("")
    shown = _handed_over if _receiver is not None else _bar if sys.stderr.isatty() else _lines
    with shown(what, total, unit) as step:
        yield step


@contextmanager
def _handed_over(what: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    receiver = _receiver
    assert receiver is not None
    begin = time.monotonic()
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        receiver(Progress(what, done, total, unit, time.monotonic() - begin, _remark))

    receiver(Progress(what, 0, total, unit, 0.0))
    yield step


@contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} {unit}/s" if task.speed else "", style="dim")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, remark="")
        yield lambda: bar.update(task, advance=1, remark=_remark)


@contextmanager
def _lines(what: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    begin = last = time.monotonic()
    done = 0

    def step() -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_LINES and done < total:
            last = now
            LOG.info(line(Progress(what, done, total, unit, now - begin, _remark)))

    yield step


def line(progress: Progress) -> str:
    """One log line of it."""
    p = progress
    left = "" if p.seconds_left is None else f", {p.seconds_left:.0f} s left"
    said = f", {p.remark}" if p.remark else ""
    return f"{p.what}: {p.done}/{p.total}, {p.rate:.1f} {p.unit}/s{left}{said}"
