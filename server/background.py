"""Small work beside the rounds, again and again while a block runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOG = logging.getLogger("fedbrats")


@contextmanager
def every(seconds: float, action: Callable[[], object], *, at_once: bool = False) -> Iterator[None]:
    """Call `action` in a thread of its own, after pauses or `at_once`, too; what it raises does not
    matter to the run."""
    over = threading.Event()

    def repeat() -> None:
        failing, first = "", True
        while not over.wait(0 if at_once and first else seconds):
            first = False
            try:
                action()
                failing = ""
            except Exception as error:  # a busy file, say: the next time will do
                if failing != (failing := f"{type(error).__name__}: {error}"):
                    LOG.warning(f"{failing} (tried again in {seconds:g} s)")

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5)
