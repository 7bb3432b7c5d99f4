"""Progress of long work: a bar with rate and time left on a terminal, plain log lines when piped."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
LOG = logging.getLogger("fedbrats")
SECONDS_BETWEEN_LINES = 15.0


def track(items: Iterable[Item], what: str, total: int, unit: str) -> Iterator[Item]:
    """Yield the items while showing how many of `total` are done, on standard error."""
    with stepping(what, total, unit) as step:
        for item in items:
            yield item
            step()


@contextmanager
def stepping(what: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each piece of work, for work that is not a loop of ours."""
    with (_bar if sys.stderr.isatty() else _lines)(what, total, unit) as step:
        yield step


@contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
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
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


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
            rate = done / (now - begin)
            left = (total - done) / rate
            LOG.info(f"{what}: {done}/{total}, {rate:.1f} {unit}/s, {left:.0f} s left")

    yield step
