"""An audit log: a text file of signed, chained lines (`common.audit_lines`), append-only.

Beside the log lies its anchor: how far it went when the last writing was acknowledged. It tells an
interrupted writing, which is cut off and recorded at the next entry, from a lost or shortened end,
which is refused. Who holds the key and the disk can rewrite log and anchor; that shows only in what
the other side remembers (`common.audit_heads`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.hazmat.primitives.asymmetric import ec

from common.audit_file import (
    START,
    Anchor,
    AuditLog,
    LogError,
    anchor_damaged,
    anchor_missing,
    at_its_end,
    between,
    not_ours,
    opened,
    read_anchor,
    require_end,
    shortened,
    tampered,
    unusable,
    write_anchor,
)
from common.audit_lines import (
    EMPTY,
    KEY,
    NOBODY,
    REPAIRED,
    VOUCHED,
    Broken,
    Entry,
    Head,
    Signer,
    introduction,
    last_signer,
    line_hash,
    next_entry,
    parsed,
    signed,
    split,
    whole_entries,
)
from common.keys import BadKey, fingerprint, load_signing_key

BLOCK = 1 << 16  # bytes read at a time, from the end


@dataclass(frozen=True)
class Reading:
    """A log that was verified. `unfinished`: so many bytes at its end are no entry and were never
    acknowledged as one."""

    entries: list[Entry]
    unfinished: int = 0

    @property
    def head(self) -> Head:
        return self.entries[-1].head if self.entries else EMPTY

    def signers(self) -> list[tuple[str, int]]:
        """Which key signed from which entry on, in order; a key may come again."""
        found: list[tuple[str, int]] = []
        for entry in self.entries:
            if not found or found[-1][0] != entry.key:
                found.append((entry.key, entry.number))
        return found

    def unvouched(self) -> list[tuple[Entry, str]]:
        """Each entry that puts a key in the place of another without that one's word, and the
        fingerprint of the other."""
        return [
            (entry, before.key)
            for before, entry in zip(self.entries, self.entries[1:], strict=False)
            if entry.key != before.key and VOUCHED not in entry.details
        ]


def append(log: AuditLog, kind: str, details: dict[str, Any], *, lost: bool = False) -> Entry:
    """Add an entry; it is on the disk when this returns. Several processes may do so at once.

    What an interrupted writing has left at the end is cut off, and that is an entry of its own. A new
    private key is introduced with the word of the one before it, which is looked for beside it
    (`*.old*`).

    Args:
        details: plain JSON types, without NaN.
        lost: if the key before is not there, the new one is introduced without its word, for all to
            see. Who makes a new key says so; nobody else, or a stranger's entries would be taken on.

    Raises:
        LogError: it cannot be written, or the end of the log is not what was last written.
        BadKey: the private key cannot be used.
    """
    key = load_signing_key(log.key)
    try:
        with opened(log, write=True) as file:
            return _append(log, file, key, kind, details, lost)
    except OSError as error:
        raise unusable(log.path, "written", error) from error


def _append(
    log: AuditLog,
    file: BinaryIO,
    key: ec.EllipticCurvePrivateKey,
    kind: str,
    details: dict[str, Any],
    lost: bool,
) -> Entry:
    anchor = read_anchor(log)
    content_size = os.fstat(file.fileno()).st_size
    if anchor is None:
        if content_size:
            raise anchor_missing(log)
        anchor = START
        write_anchor(log, anchor)  # first, so that no entry is ever without
    require_end(log, file, anchor, content_size)
    ours = fingerprint(key.public_key())
    signer = _signer(file, anchor)
    known = Signer(key.public_key(), ours)
    if signer != ours:  # seldom, so that the whole log may be read
        known = last_signer(_all_entries(log.path, between(file, 0, anchor.end)))
    rest = between(file, anchor.end, content_size)
    for entry, line in whole_entries(rest, Head(anchor.number, anchor.hash), known, ours):
        # written, and interrupted before the anchor was
        anchor = Anchor(entry.number, entry.hash, anchor.end, anchor.end + len(line))
        signer = entry.key
    torn = rest[len(rest) - (content_size - anchor.end) :]
    _require_no_entry(log, torn, anchor)
    before = Head(anchor.number, anchor.hash)
    new: list[tuple[str, dict[str, Any]]] = []
    if signer != ours:
        former = _former_key(log, signer)
        if signer and former is None and not lost:
            raise not_ours(log, signer, ours)
        new.append((KEY, introduction(before, key.public_key(), former)))
    if torn:
        cut = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
        new.append((REPAIRED, {"what": "an interrupted writing was cut off", **cut}))
    new.append((kind, details))
    return _write(log, file, anchor, new, key)


def _former_key(log: AuditLog, signer: str) -> ec.EllipticCurvePrivateKey | None:
    """The private key of this fingerprint, if whoever replaced it has kept it beside the new one."""
    for path in sorted(log.key.parent.glob(f"{log.key.name}.old*")):
        with contextlib.suppress(BadKey):  # that one cannot vouch for anything
            key = load_signing_key(path)
            if fingerprint(key.public_key()) == signer:
                return key
    return None


def _require_no_entry(log: AuditLog, torn: bytes, anchor: Anchor) -> None:
    """What is cut off was no entry yet; a whole one, which this key did not write, is no accident."""
    for line in split(torn):
        with contextlib.suppress(Broken):
            parsed(line)
            raise tampered(
                log.path,
                f"behind entry {anchor.number}, the last that was acknowledged, stands a whole one "
                "that this log's key has not signed there",
            )


def _write(
    log: AuditLog,
    file: BinaryIO,
    anchor: Anchor,
    new: list[tuple[str, dict[str, Any]]],
    key: ec.EllipticCurvePrivateKey,
) -> Entry:
    """Put new entries in place of what stands behind the anchor; the last of them is returned."""
    before, lines = Head(anchor.number, anchor.hash), list[bytes]()
    for kind, details in new:
        try:
            entry, line = signed(before, kind, details, key)
        except ValueError as error:  # NaN, or no JSON type
            raise LogError(f"an entry of kind {kind} cannot be told as JSON ({error}).") from error
        before = entry.head
        lines.append(line)
    written = b"".join(lines)
    end = anchor.end + len(written)
    acknowledged = read_anchor(log)
    try:
        file.truncate(anchor.end)
        file.seek(anchor.end)
        file.write(written)
        file.flush()
        os.fsync(file.fileno())
        write_anchor(log, Anchor(entry.number, entry.hash, end - len(lines[-1]), end))
    except OSError:
        # if this fails too, the next writing sees to it
        with contextlib.suppress(OSError, LogError):
            if read_anchor(log) == acknowledged:  # else the entry counts: the anchor is the new one
                os.ftruncate(file.fileno(), anchor.end)
        raise
    return entry


def head(log: AuditLog) -> Head:
    """The last entry. Reads the end only. Raises LogError, as `append`."""
    with at_its_end(log) as (_, anchor):
        return Head(anchor.number, anchor.hash)


def last_entry(log: AuditLog) -> Entry | None:
    """The last entry, if there is any. Reads the end only. Raises LogError, as `append`."""
    with at_its_end(log) as (file, anchor):
        if file is None or anchor.number == 0:
            return None
        return parsed(between(file, anchor.begin, anchor.end))


def holds(log: AuditLog, known: Head) -> bool:
    """Is this one of the log's entries? Looks at lines from the end on, without verifying them.

    Raises:
        LogError: as `append`.
    """
    if known.number == 0:
        return known == EMPTY
    with at_its_end(log) as (file, anchor):
        if file is None or known.number > anchor.number:
            return False
        for number, line in enumerate(_backwards(file, anchor.end)):
            if anchor.number - number == known.number:
                return line_hash(line) == known.hash
    return False


def _backwards(file: BinaryIO, end: int) -> Iterator[bytes]:
    """Lines with their line breaks, the last first, of what stands before byte `end`."""
    tail = b""
    while end > 0:
        begin = max(0, end - BLOCK)
        tail = between(file, begin, end) + tail
        end = begin
        first, *lines = tail.splitlines(keepends=True)
        yield from reversed(lines)
        tail = first  # its beginning may stand before
    if tail:
        yield tail


def told(log: AuditLog, *kinds: str) -> Iterator[Entry]:
    """The entries of these kinds, in order; by default all. Does not verify them.

    Raises:
        LogError: a line is no entry, or the log cannot be read.
    """
    yield from Follower(log, kinds).entries()


@dataclass
class Follower:
    """A log's entries of some kinds (none named: all), kept: to look again only reads what is new."""

    log: AuditLog
    kinds: tuple[str, ...] = ()
    _found: list[Entry] = field(default_factory=list)
    _number: int = 0  # lines that were read
    _end: int = 0  # where they end
    _last: bytes = b""  # the last of them

    def entries(self) -> list[Entry]:
        """As `told`, which see. Raises LogError."""
        try:
            if not self.log.path.exists():
                self._forget()
                return []
            with opened(self.log) as file:
                if between(file, self._end - len(self._last), self._end) != self._last:
                    self._forget()  # another log is there
                content = between(file, self._end, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise unusable(self.log.path, "read", error) from error
        for line in split(content):
            if line.endswith(b"\n"):  # else its writing was interrupted
                self._add(line)
        return self._found.copy()

    def _forget(self) -> None:
        self._found, self._number, self._end, self._last = [], 0, 0, b""

    def _add(self, line: bytes) -> None:
        marks = [f'"kind":{json.dumps(kind)}'.encode() for kind in self.kinds]
        other = marks and not any(mark in line for mark in marks)
        if not (other and line.startswith(b'{"at":"') and line.endswith(b'"}\n')):
            try:
                entry = parsed(line)
            except Broken as error:
                raise tampered(self.log.path, f"entry {self._number + 1} {error}") from error
            if not self.kinds or entry.kind in self.kinds:
                self._found.append(entry)
        self._number, self._end, self._last = self._number + 1, self._end + len(line), line


def verified(log: AuditLog) -> Reading:
    """All entries, after every byte was verified: chain, signatures, anchor.

    Raises:
        LogError: it was changed, shortened or damaged; the text names the entry.
    """
    try:
        if not log.path.exists() and not log.anchor.exists():
            return Reading([])
        with opened(log) as file:
            content, anchor = file.read(), read_anchor(log)
    except OSError as error:
        raise unusable(log.path, "read", error) from error
    if anchor is None:
        if not content:
            return Reading([])
        verified_copy(log.path)  # a change is worth more words than a missing file
        raise anchor_missing(log)
    acknowledged = content[: anchor.end]
    entries = _all_entries(log.path, acknowledged)
    if len(entries) < anchor.number or len(content) < anchor.end:
        raise shortened(log.path, len(entries), anchor.number)
    last = entries[-1].head if entries else EMPTY
    if last != Head(anchor.number, anchor.hash):
        raise tampered(log.path, f"entry {last.number} is not the one that was last written")
    if anchor.begin != acknowledged.rfind(b"\n", 0, -1) + 1:
        raise anchor_damaged(log)
    rest = content[anchor.end :]
    more = list(whole_entries(rest, last, last_signer(entries)))
    unfinished = len(rest) - sum(len(line) for _, line in more)
    return Reading([*entries, *(entry for entry, _ in more)], unfinished)


def verified_copy(path: Path) -> Reading:
    """All entries of a log without anchor: whether its end is missing cannot be told.

    Raises:
        LogError: it was changed or damaged; the text names the entry.
    """
    try:
        if path.exists() and not path.is_file():
            raise LogError(f"{path} is no file; give a copy of the other side's audit.log.")
        return Reading(_all_entries(path, path.read_bytes()))
    except OSError as error:
        raise unusable(path, "read", error) from error


def _all_entries(path: Path, content: bytes) -> list[Entry]:
    entries: list[Entry] = []
    before, key = EMPTY, NOBODY
    for line in split(content):
        try:
            entry, key = next_entry(line, before, key)
        except Broken as error:
            raise tampered(path, f"entry {before.number + 1} {error}") from error
        entries.append(entry)
        before = entry.head
    return entries


def _signer(file: BinaryIO, anchor: Anchor) -> str:
    if anchor.number == 0:
        return ""
    return parsed(between(file, anchor.begin, anchor.end)).key
