"""How the command-line programs speak: tables on standard output, log lines on standard error."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common.environment import prepare_environment

if TYPE_CHECKING:
    from rich.console import Console

DEFECT = 70  # exit code of a fault in the program itself, sysexits' EX_SOFTWARE
PIPED_WIDTH = 10_000  # characters; without a terminal nothing is wrapped or cut


def standard_output() -> Console:
    """A rich console that does not cut or wrap tables when piped."""
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


def run_program(name: str, app: Callable[[], object]) -> None:
    """Run a command line. A defect in the program is one line, without data, and exit code 70."""
    prepare_environment()
    try:
        app()
    except Exception as defect:
        where = traceback.extract_tb(defect.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        kind = type(defect).__name__
        print(f"{name}: internal error ({kind} at {place}); please report it.", file=sys.stderr)
        sys.exit(DEFECT)
