"""The file of an audit log and its anchor: opening, locking, reading parts, and what is said of damage.

The anchor tells how far the log went when the last writing was acknowledged (`common.audit_log`, which
is who writes).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from common.audit_lines import EMPTY, line_hash
from common.files import write_text_atomically


class LogError(RuntimeError):
    """The log was changed or damaged, or cannot be written; the text says what and what to do."""


@dataclass(frozen=True)
class AuditLog:
    """Where a log is, and the private key that signs its entries."""

    path: Path
    key: Path

    @property
    def anchor(self) -> Path:
        return self.path.with_suffix(".head")


@dataclass(frozen=True)
class Anchor:
    """The last acknowledged entry: its number and hash, and from which byte to which it stands."""

    number: int
    hash: str
    begin: int
    end: int


START = Anchor(EMPTY.number, EMPTY.hash, 0, 0)


# -------------------------------------------------------------------------------- file and anchor


@contextmanager
def opened(log: AuditLog, *, write: bool = False) -> Iterator[BinaryIO]:
    flags = os.O_RDWR | os.O_CREAT if write else os.O_RDONLY
    with os.fdopen(os.open(log.path, flags, 0o600), "r+b" if write else "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX if write else fcntl.LOCK_SH)
        yield file


def between(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)


def require_end(log: AuditLog, file: BinaryIO, anchor: Anchor, size: int) -> None:
    """The last acknowledged entry stands where it stood."""
    if size < anchor.end:
        raise shortened(log.path, None, anchor.number)
    if anchor.number == 0 and anchor != START:
        raise anchor_damaged(log)
    if anchor.number and line_hash(between(file, anchor.begin, anchor.end)) != anchor.hash:
        raise tampered(log.path, f"entry {anchor.number}, the last, was changed or moved")


def read_anchor(log: AuditLog) -> Anchor | None:
    try:
        text = log.anchor.read_bytes().decode("ascii")
        anchor = Anchor(**json.loads(text))
        numbers = anchor.number, anchor.begin, anchor.end
        if not all(type(n) is int for n in numbers) or not 0 <= anchor.begin <= anchor.end:
            raise ValueError("impossible values")
        if _anchor_text(anchor) != text:
            raise ValueError("not as it was written")
        return anchor
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise anchor_damaged(log) from error


def write_anchor(log: AuditLog, anchor: Anchor) -> None:
    write_text_atomically(log.anchor, _anchor_text(anchor))


def _anchor_text(anchor: Anchor) -> str:
    return json.dumps(asdict(anchor)) + "\n"


def _remedy(path: Path) -> str:
    return (
        f"Keep both files as evidence, find out who changed them, and restore {path.name} and "
        f"{path.with_suffix('.head').name} from a backup."
    )


def anchor_damaged(log: AuditLog) -> LogError:
    return LogError(f"{log.anchor} is damaged. {_remedy(log.path)}")


def anchor_missing(log: AuditLog) -> LogError:
    return LogError(
        f"{log.anchor} is missing, so entries may be missing at the end of {log.path}. "
        f"{_remedy(log.path)}"
    )


def shortened(path: Path, found: int | None, written: int) -> LogError:
    holds_ = "is shorter than it was" if found is None else f"holds {found} whole entries"
    return LogError(
        f"{path}: the audit log {holds_}, and {written} were written: its end is missing. "
        f"{_remedy(path)}"
    )


def tampered(path: Path, what: str) -> LogError:
    return LogError(
        f"{path}: the audit log was tampered with or damaged: {what.rstrip('.')}. {_remedy(path)}"
    )


def not_ours(log: AuditLog, signer: str, ours: str) -> LogError:
    return LogError(
        f"{log.path}: the last entry is signed by {signer}, and the present key is {ours}, which that "
        f"one does not vouch for: somebody else wrote it, or {log.key.name} was replaced by hand. "
        f"{_remedy(log.path)} If that key was yours and is lost, make a new one (fed-client rotate-key; "
        "on a server fed-server renew-certificate), which is then recorded as not vouched for."
    )


def unusable(path: Path, what: str, error: OSError) -> LogError:
    remedy = "Free disk space, or check who may write there."
    if what == "read":
        remedy = "Check that it is there, and who may read it."
    return LogError(f"{path}: the audit log cannot be {what} ({error.strerror or error}). {remedy}")


@contextmanager
def at_its_end(log: AuditLog) -> Iterator[tuple[BinaryIO | None, Anchor]]:
    """The file, and its anchor, which fits; None if there is no log yet."""
    try:
        if not log.path.exists() and not log.anchor.exists():
            yield None, START
            return
        with opened(log) as file:
            anchor = read_anchor(log)
            size = os.fstat(file.fileno()).st_size
            if anchor is None and size:
                raise anchor_missing(log)
            anchor = anchor or START  # interrupted before its first entry
            require_end(log, file, anchor, size)
            yield file, anchor
    except OSError as error:
        raise unusable(log.path, "read", error) from error
