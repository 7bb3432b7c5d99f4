"""How the command-line programs speak: tables on standard output, log lines on standard error."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 200  # a pipe has no width, and a table cut to 80 columns is no use in a log


def standard_output() -> Console:
    """A rich console that does not cut tables when piped."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


def start_logging() -> None:
    """fedbrats' own log lines to standard error; Flower's below errors are not for users."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("fedbrats")
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("flwr").setLevel(logging.ERROR)
