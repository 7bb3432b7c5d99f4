"""How the command-line programs speak: tables on standard output, log lines on standard error."""

from __future__ import annotations

import errno
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common.environment import prepare_environment

if TYPE_CHECKING:
    from rich.console import Console

FAILED, USAGE, INTERRUPTED = 1, 2, 130  # exit codes
DISK_FULL = errno.ENOSPC, errno.EDQUOT
DEFECT = 70  # exit code of a fault in the program itself, sysexits' EX_SOFTWARE
RESEARCH_ONLY = "For research; not a medical device."  # wherever a prediction is shown
PIPED_WIDTH = 10_000  # characters; without a terminal nothing is wrapped or cut


def standard_output() -> Console:
    """A rich console that does not cut or wrap tables when piped."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


def start_logging() -> None:
    """fedbrats' own log lines to standard error; Flower's below errors are not for users."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
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


@contextmanager
def failing_in_words(
    name: str, foreseen: Callable[[], tuple[type[Exception], ...]], *, interrupted: str = ""
) -> Iterator[None]:
    """Foreseen failures become one clear text and the right exit code, never a traceback.

    Args:
        name: the program's.
        foreseen: the errors whose texts are written for the user, OSError and a wrong configuration
            always among them. Called only after a failure, as their modules may be heavy.
        interrupted: what to say after Ctrl-C beside "interrupted".
    """
    try:
        yield
    except KeyboardInterrupt:
        complain(name, f"interrupted{interrupted}.")
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        remedy = " Free disk space, then type the same again." if error.errno in DISK_FULL else ""
        complain(name, f"{place}{str(error.strerror or error).removesuffix('.')}.{remedy}")
        raise SystemExit(FAILED) from None
    except Exception as error:
        from common.config_file import ConfigError

        wrong_usage = isinstance(error, ConfigError)
        if not wrong_usage and not isinstance(error, foreseen()):
            raise
        complain(name, str(error))
        raise SystemExit(USAGE if wrong_usage else FAILED) from None


@contextmanager
def ending_in_order() -> Iterator[None]:
    """SIGTERM and a closed terminal end the block by SystemExit, so that its private files are deleted.

    For the main thread. A SIGKILL leaves them.
    """

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {s: signal.signal(s, end) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def complain(name: str, message: str) -> None:
    print(f"{name}: {printable(message)}", file=sys.stderr)


def many(count: int, what: str, plural: str = "s") -> str:
    """`1 round`, `2 rounds`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}{plural}"


def plain(text: str, most: int = 500) -> str:
    """One line of at most so many characters, for a text that another machine sent."""
    line = printable(text).replace("\n", " ")
    return line if len(line) <= most else line[: most - 3] + "..."


class PlainFormatter(logging.Formatter):
    """Nothing in a log line can draw over the terminal that shows it."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def printable(text: str) -> str:
    """`text` without control characters and half-decoded bytes, which names from outside may hold."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
