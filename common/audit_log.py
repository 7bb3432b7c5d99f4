"""An audit log: a text file of JSON lines, append-only, hash-chained, each line signed.

A line holds its number, time (UTC), kind and details, the sha256 of the whole line before it (with
its signature and line break, so `sha256sum` recomputes the chain), the fingerprint of the key that
signs it, and the signature over the rest of the line. Keys stand in the log itself: entries of kind
`key`. Lines are canonical JSON, and compared byte by byte: every byte counts.

Beside the log lies its anchor: how far it went when the last writing was acknowledged. It tells an
interrupted writing, which is cut off and recorded at the next entry, from a lost or shortened end,
which is refused. Who holds the key and the disk can rewrite log and anchor; that shows only in what
the other side remembers (`common.audit_heads`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from common.files import write_text_atomically
from common.keys import BadKey, fingerprint, load_signing_key, parse_public_key, public_line

KEY, REPAIRED = "key", "repaired"  # kinds of entries that are written by themselves
FIELDS = {"at", "before", "details", "key", "kind", "number", "signature"}
ALGORITHM = ec.ECDSA(hashes.SHA384())


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
class Head:
    """A log's last entry, or an earlier one: its number, from 1, and the sha256 of its line (hex)."""

    number: int
    hash: str


@dataclass(frozen=True)
class Entry:
    """One line. `hash` is its own, as the next entry names it."""

    number: int
    at: str
    kind: str
    details: dict[str, Any]
    before: str
    key: str
    signature: str
    hash: str

    @property
    def head(self) -> Head:
        return Head(self.number, self.hash)


@dataclass(frozen=True)
class Reading:
    """A log that was verified. `unfinished`: so many bytes at its end are no entry and were never
    acknowledged as one."""

    entries: list[Entry]
    unfinished: int = 0

    @property
    def head(self) -> Head:
        return self.entries[-1].head if self.entries else EMPTY

    def keys(self) -> dict[str, int]:
        """Fingerprint of each key -> number of the first entry that it signed; in order."""
        found: dict[str, int] = {}
        for entry in self.entries:
            found.setdefault(entry.key, entry.number)
        return found


EMPTY = Head(0, "0" * 64)


@dataclass(frozen=True)
class _Anchor:
    """The last acknowledged entry: its number and hash, and from which byte to which it stands."""

    number: int
    hash: str
    begin: int
    end: int


START = _Anchor(EMPTY.number, EMPTY.hash, 0, 0)


@dataclass(frozen=True)
class _Signer:
    """The key that the last `key` entry introduced; None if there was none."""

    key: ec.EllipticCurvePublicKey | None = None
    fingerprint: str = ""


NOBODY = _Signer()


class _Broken(ValueError):
    """A line is not the next entry; the text says why."""


def append(log: AuditLog, kind: str, details: dict[str, Any]) -> Entry:
    """Add an entry; it is on the disk when this returns. Several processes may do so at once.

    What an interrupted writing has left at the end is cut off, and that is an entry of its own.

    Args:
        details: plain JSON types, without NaN.

    Raises:
        LogError: it cannot be written, or the end of the log is not what was last written.
        BadKey: the private key cannot be used.
    """
    key = load_signing_key(log.key)
    try:
        with _opened(log, write=True) as file:
            return _append(log, file, key, kind, details)
    except OSError as error:
        raise _unusable(log.path, "written", error) from error


def _append(
    log: AuditLog,
    file: BinaryIO,
    key: ec.EllipticCurvePrivateKey,
    kind: str,
    details: dict[str, Any],
) -> Entry:
    anchor = _read_anchor(log)
    content_size = os.fstat(file.fileno()).st_size
    if anchor is None:
        if content_size:
            raise _anchor_missing(log)
        anchor = START
        _write_anchor(log, anchor)  # first, so that no entry is ever without
    _require_end(log, file, anchor, content_size)
    signer = _signer(file, anchor)
    ours = fingerprint(key.public_key())
    rest = _between(file, anchor.end, content_size)
    known = _Signer(key.public_key(), ours) if signer == ours else NOBODY
    whole = list(_whole_entries(rest, Head(anchor.number, anchor.hash), known))
    for entry, line in whole:  # written, and interrupted before the anchor was
        anchor = _Anchor(entry.number, entry.hash, anchor.end, anchor.end + len(line))
        signer = entry.key
    torn = rest[sum(len(line) for _, line in whole) :]
    new: list[tuple[str, dict[str, Any]]] = []
    if signer != ours:
        new.append((KEY, {"public_key": public_line(key.public_key(), ""), "fingerprint": ours}))
    if torn:
        cut = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
        new.append((REPAIRED, {"what": "an interrupted writing was cut off", **cut}))
    new.append((kind, details))
    return _write(log, file, anchor, new, key)


def _write(
    log: AuditLog,
    file: BinaryIO,
    anchor: _Anchor,
    new: list[tuple[str, dict[str, Any]]],
    key: ec.EllipticCurvePrivateKey,
) -> Entry:
    """Put new entries in place of what stands behind the anchor; the last of them is returned."""
    before, lines = Head(anchor.number, anchor.hash), list[bytes]()
    for kind, details in new:
        entry, line = _signed(before, kind, details, key)
        before = entry.head
        lines.append(line)
    written = b"".join(lines)
    end = anchor.end + len(written)
    try:
        file.truncate(anchor.end)
        file.seek(anchor.end)
        file.write(written)
        file.flush()
        os.fsync(file.fileno())
        _write_anchor(log, _Anchor(entry.number, entry.hash, end - len(lines[-1]), end))
    except OSError:
        with contextlib.suppress(OSError):  # if this fails too, the next writing sees to it
            os.ftruncate(file.fileno(), anchor.end)
        raise
    return entry


def _signed(
    before: Head, kind: str, details: dict[str, Any], key: ec.EllipticCurvePrivateKey
) -> tuple[Entry, bytes]:
    document = {
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "before": before.hash,
        "details": details,
        "key": fingerprint(key.public_key()),
        "kind": kind,
        "number": before.number + 1,
    }
    try:
        signature = key.sign(_canonical(document), ALGORITHM).hex()
    except (TypeError, ValueError) as error:  # NaN, or no JSON type
        raise LogError(f"an entry of kind {kind} cannot be told as JSON ({error}).") from error
    line = _canonical({**document, "signature": signature}) + b"\n"
    return Entry(**document, signature=signature, hash=_hash(line)), line  # type: ignore[arg-type]


def head(log: AuditLog) -> Head:
    """The last entry. Reads the end only. Raises LogError, as `append`."""
    try:
        if not log.path.exists() and not log.anchor.exists():
            return EMPTY
        with _opened(log) as file:
            anchor = _read_anchor(log)
            size = os.fstat(file.fileno()).st_size
            if anchor is None and size == 0:  # interrupted before its first entry
                return EMPTY
            if anchor is None:
                raise _anchor_missing(log)
            _require_end(log, file, anchor, size)
            return Head(anchor.number, anchor.hash)
    except OSError as error:
        raise _unusable(log.path, "read", error) from error


def holds(log: AuditLog, known: Head) -> bool:
    """Is this one of the log's entries? Looks at lines, without verifying them. Raises LogError."""
    if known.number == 0:
        return known == EMPTY
    for number, line in enumerate(_lines(log), start=1):
        if number == known.number:
            return _hash(line) == known.hash
    return False


def told(log: AuditLog, *kinds: str) -> Iterator[Entry]:
    """The entries of these kinds, in order; by default all. Does not verify them.

    Raises:
        LogError: a line is no entry, or the log cannot be read.
    """
    marks = [f'"kind":{json.dumps(kind)}'.encode() for kind in kinds]
    for number, line in enumerate(_lines(log), start=1):
        other = marks and not any(mark in line for mark in marks)
        if other and line.startswith(b'{"at":"') and line.endswith(b'"}\n'):
            continue
        try:
            entry = _parsed(line)
        except _Broken as error:
            raise _tampered(log.path, f"entry {number} {error}") from error
        if not kinds or entry.kind in kinds:
            yield entry


def verified(log: AuditLog) -> Reading:
    """All entries, after every byte was verified: chain, signatures, anchor.

    Raises:
        LogError: it was changed, shortened or damaged; the text names the entry.
    """
    try:
        if not log.path.exists() and not log.anchor.exists():
            return Reading([])
        with _opened(log) as file:
            content, anchor = file.read(), _read_anchor(log)
    except OSError as error:
        raise _unusable(log.path, "read", error) from error
    if anchor is None:
        if not content:
            return Reading([])
        verified_copy(log.path)  # a change is worth more words than a missing file
        raise _anchor_missing(log)
    entries = _all_entries(log.path, content[: anchor.end])
    if len(entries) < anchor.number or len(content) < anchor.end:
        raise _shortened(log.path, len(entries), anchor.number)
    last = entries[-1].head if entries else EMPTY
    if last != Head(anchor.number, anchor.hash):
        raise _tampered(log.path, f"entry {last.number} is not the one that was last written")
    rest = content[anchor.end :]
    more = list(_whole_entries(rest, last, _last_signer(entries)))
    unfinished = len(rest) - sum(len(line) for _, line in more)
    return Reading([*entries, *(entry for entry, _ in more)], unfinished)


def verified_copy(path: Path) -> Reading:
    """All entries of a log without anchor: whether its end is missing cannot be told.

    Raises:
        LogError: it was changed or damaged; the text names the entry.
    """
    try:
        return Reading(_all_entries(path, path.read_bytes()))
    except OSError as error:
        raise _unusable(path, "read", error) from error


# ------------------------------------------------------------------------------------- single lines


def _all_entries(path: Path, content: bytes) -> list[Entry]:
    entries: list[Entry] = []
    before, key = EMPTY, NOBODY
    for line in _split(content):
        try:
            entry, key = _next(line, before, key)
        except _Broken as error:
            raise _tampered(path, f"entry {before.number + 1} {error}") from error
        entries.append(entry)
        before = entry.head
    return entries


def _split(content: bytes) -> list[bytes]:
    lines = content.split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + [lines[-1]] * bool(lines[-1])


def _whole_entries(rest: bytes, before: Head, signer: _Signer) -> Iterator[tuple[Entry, bytes]]:
    """As many entries as are whole and good, each with its line."""
    for line in _split(rest):
        try:
            entry, signer = _next(line, before, signer)
        except _Broken:
            return
        yield entry, line
        before = entry.head


def _next(line: bytes, before: Head, signer: _Signer) -> tuple[Entry, _Signer]:
    """The entry after `before`, signed by `signer` or by the key that it introduces."""
    entry = _parsed(line)
    if entry.number != before.number + 1:
        raise _Broken(f"is missing or not in its place (number {entry.number} stands there).")
    if entry.before != before.hash:
        raise _Broken("does not follow the one before it, which was changed.")
    if entry.kind == KEY:
        signer = _introduced(entry)
    if signer.key is None or entry.key != signer.fingerprint:
        raise _Broken("is signed by a key that the log has not introduced.")
    signed = line.rpartition(b',"signature":')[0] + b"}"  # the last of the sorted names
    try:
        signer.key.verify(bytes.fromhex(entry.signature), signed, ALGORITHM)
    except (InvalidSignature, ValueError) as error:
        raise _Broken("was changed: its signature is not good.") from error
    return entry, signer


def _introduced(entry: Entry) -> _Signer:
    try:
        key = parse_public_key(str(entry.details.get("public_key"))).key
    except BadKey as error:
        raise _Broken("holds no public key.") from error
    signer = _Signer(key, fingerprint(key))
    if entry.details.get("fingerprint") != signer.fingerprint:
        raise _Broken("holds another key than it says.")
    return signer


def _parsed(line: bytes) -> Entry:
    try:
        document = json.loads(line.decode("ascii"))
        good = isinstance(document, dict) and document.keys() == FIELDS
        if not good or _canonical(document) + b"\n" != line:
            raise ValueError("not as it was written")
    except (ValueError, RecursionError) as error:
        raise _Broken("was changed: it is not as an entry is written.") from error
    texts = "at", "before", "key", "kind", "signature"
    if (
        not all(isinstance(document[name], str) for name in texts)
        or not isinstance(document["details"], dict)
        or type(document["number"]) is not int
    ):
        raise _Broken("was changed: a value is of another type.")
    return Entry(**document, hash=_hash(line))


def _last_signer(entries: list[Entry]) -> _Signer:
    return next((_introduced(e) for e in reversed(entries) if e.kind == KEY), NOBODY)


def _canonical(document: dict[str, Any]) -> bytes:
    text = json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


# -------------------------------------------------------------------------------- file and anchor


@contextmanager
def _opened(log: AuditLog, *, write: bool = False) -> Iterator[BinaryIO]:
    flags = os.O_RDWR | os.O_CREAT if write else os.O_RDONLY
    with os.fdopen(os.open(log.path, flags, 0o600), "r+b" if write else "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX if write else fcntl.LOCK_SH)
        yield file


def _lines(log: AuditLog) -> Iterator[bytes]:
    """Whole lines; a last one without line break is an interrupted writing."""
    try:
        if not log.path.exists():
            return
        with _opened(log) as file:
            content = file.read()
    except OSError as error:
        raise _unusable(log.path, "read", error) from error
    yield from (line for line in _split(content) if line.endswith(b"\n"))


def _signer(file: BinaryIO, anchor: _Anchor) -> str:
    if anchor.number == 0:
        return ""
    return _parsed(_between(file, anchor.begin, anchor.end)).key


def _between(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)


def _require_end(log: AuditLog, file: BinaryIO, anchor: _Anchor, size: int) -> None:
    """The last acknowledged entry stands where it stood."""
    if size < anchor.end:
        raise _shortened(log.path, None, anchor.number)
    if anchor.number and _hash(_between(file, anchor.begin, anchor.end)) != anchor.hash:
        raise _tampered(log.path, f"entry {anchor.number}, the last, was changed or moved")


def _read_anchor(log: AuditLog) -> _Anchor | None:
    try:
        stored = json.loads(log.anchor.read_text(encoding="ascii"))
        anchor = _Anchor(**stored)
        numbers = anchor.number, anchor.begin, anchor.end
        if not all(type(n) is int for n in numbers) or not 0 <= anchor.begin <= anchor.end:
            raise ValueError("impossible values")
        return anchor
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise LogError(f"{log.anchor} is damaged. {_remedy(log.path)}") from error


def _write_anchor(log: AuditLog, anchor: _Anchor) -> None:
    write_text_atomically(log.anchor, json.dumps(asdict(anchor)) + "\n")


def _remedy(path: Path) -> str:
    return (
        f"Keep both files as evidence, find out who changed them, and restore {path.name} and "
        f"{path.with_suffix('.head').name} from a backup."
    )


def _anchor_missing(log: AuditLog) -> LogError:
    return LogError(
        f"{log.anchor} is missing, so entries may be missing at the end of {log.path}. "
        f"{_remedy(log.path)}"
    )


def _shortened(path: Path, found: int | None, written: int) -> LogError:
    holds_ = "is shorter than it was" if found is None else f"holds {found} whole entries"
    return LogError(
        f"{path}: the audit log {holds_}, and {written} were written: its end is missing. "
        f"{_remedy(path)}"
    )


def _tampered(path: Path, what: str) -> LogError:
    return LogError(
        f"{path}: the audit log was tampered with or damaged: {what.rstrip('.')}. {_remedy(path)}"
    )


def _unusable(path: Path, what: str, error: OSError) -> LogError:
    return LogError(
        f"{path}: the audit log cannot be {what} ({error.strerror or error}). Free disk space, or "
        "check who may write there."
    )
