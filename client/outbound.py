"""The one way out: every reply passes `release`, which lets through what the site's policy permits
(`client.permitted`) and records what that holds before it is sent.

The record (SQLite, in the site's folder) is this site's own account of what has left the building:
when, for which round, how many tensors, numbers and bytes, the hash of the weights, and every number
that is not a weight. It is read from the reply itself, not from what the training says it sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode

from client.permitted import NotPermitted, permitted
from client.policy import Policy
from common.console import many, plain
from common.messages import WITHHELD
from common.statement import Signed, attach, attached

SCHEMA = """
CREATE TABLE IF NOT EXISTS sent (
    id INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL, round INTEGER, tensors INTEGER,
    weights INTEGER, numbers INTEGER, bytes INTEGER NOT NULL, sha256 TEXT, details TEXT NOT NULL
)
"""
CARD, UPDATE, METRICS, ERROR, OTHER = "card", "update", "metrics", "error", "other"


@dataclass(frozen=True)
class Departure:
    """What one reply holds. `weights` counts values in tensors, `numbers` all others."""

    kind: str
    round: int | None
    tensors: int
    weights: int
    numbers: int
    bytes: int
    sha256: str
    details: dict[str, Any]

    def in_words(self) -> str:
        if self.kind == UPDATE:
            return (
                f"update of {self.tensors} tensors, {self.weights:,} numbers, {_size(self.bytes)}"
            )
        kind = self.kind
        if self.details.get("about", {}).get("released") == WITHHELD:
            kind = "number of subjects and privacy statement, metrics withheld"
        return f"{kind}: {self.numbers} numbers, {_size(self.bytes)}"


class OutboundError(RuntimeError):
    """The record cannot be written, so nothing may leave; the text says what to do."""


@dataclass(frozen=True)
class Gate:
    """What `release` needs: the record's file, this site's policy and name, and its signature."""

    record: Path
    policy: Policy
    site: str
    sign: Callable[[str], bytes]


@dataclass(frozen=True)
class Released:
    """What may be sent: the reply as the policy permits it, and the account of it."""

    reply: Message
    departure: Departure


def release(reply: Message, gate: Gate) -> Released:
    """Make of `reply` what the policy permits, and record it; only that may be sent.

    Where nothing of it is permitted, that is an error reply, which says why.

    Raises:
        OutboundError: the record cannot be written, or the reply not be accounted for.
    """
    allowed = _allowed(reply, gate)
    return Released(allowed, _record(allowed, gate.record))


def _allowed(reply: Message, gate: Gate) -> Message:
    if reply.has_error():
        code, reason = reply.error.code, reply.error.reason or ""
        return Message(metadata=reply.metadata, error=Error(code, plain(reason)))
    try:
        content = permitted(reply.content, gate.policy, gate.site)
    except NotPermitted as no:
        error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(no))
        return Message(metadata=reply.metadata, error=error)
    stated = attached(content)
    if stated is not None:  # signed here, so that the key vouches for what leaves and nothing else
        attach(content, Signed(stated.text, gate.sign(stated.text)))
    return Message(metadata=reply.metadata, content=content)


def _record(reply: Message, record: Path) -> Departure:
    departure = inspect(reply)
    d = departure
    with _open(record) as database:
        database.execute(
            "INSERT INTO sent (at, kind, round, tensors, weights, numbers, bytes, sha256, details)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                datetime.now(UTC).isoformat(timespec="seconds"),
                d.kind,
                d.round,
                d.tensors,
                d.weights,
                d.numbers,
                d.bytes,
                d.sha256,
                json.dumps(d.details),
            ),
        )
    return departure


def inspect(reply: Message) -> Departure:
    """What a reply holds, read from the reply itself. Raises OutboundError: that is not possible."""
    if reply.has_error():
        reason = reply.error.reason or ""
        return Departure(ERROR, None, 0, 0, 0, len(reason.encode()), "", {"reason": reason})
    tensors = weights = size = 0
    digest = hashlib.sha256()
    details: dict[str, Any] = {}
    for name, record in reply.content.items():
        if isinstance(record, ArrayRecord):
            for array in record.values():
                digest.update(array.data)
                size += len(array.data)
                shapes = _shapes(array)
                tensors, weights = tensors + len(shapes), weights + sum(shapes)
        else:
            details[name] = {key: _plain(value) for key, value in record.items()}
    numbers = sum(_numbers(value) for values in details.values() for value in values.values())
    size += len(json.dumps(details).encode())
    kind = OTHER
    if tensors:
        kind = UPDATE
    elif "means" in details:
        kind = METRICS
    elif "card" in details:
        kind = CARD
    round_ = details.get("about", {}).get("round")
    hash_ = digest.hexdigest() if tensors else ""
    return Departure(kind, round_, tensors, weights, numbers, size, hash_, details)


def answered(record: Path, kind: str, since: str) -> dict[int, int]:
    """Round -> how many replies of this kind were released since then (ISO time, UTC)."""
    if not record.exists():
        return {}
    with _open(record) as database:
        rows = database.execute(
            "SELECT round, count(*) FROM sent WHERE kind = ? AND at >= ? AND round IS NOT NULL"
            " GROUP BY round",
            (kind, since),
        ).fetchall()
    return dict(rows)


def departures(record: Path) -> list[dict[str, Any]]:
    """Everything recorded, in order, as plain JSON types."""
    if not record.exists():
        return []
    with _open(record) as database:
        database.row_factory = sqlite3.Row
        rows = database.execute("SELECT * FROM sent ORDER BY id").fetchall()
    return [{**dict(row), "details": json.loads(row["details"])} for row in rows]


def in_words(record: Path) -> list[str]:
    """What has left this building so far, a line for each kind."""
    if not record.exists():
        return ["nothing"]
    with _open(record) as database:
        rows = database.execute(
            "SELECT CASE WHEN json_extract(details, '$.about.released') = ? THEN ? ELSE kind END AS k,"
            " count(*), max(tensors), max(weights), sum(numbers), sum(bytes) FROM sent GROUP BY k",
            (WITHHELD, WITHHELD),
        ).fetchall()
    found = {row[0]: row[1:] for row in rows}
    lines = []
    if CARD in found:
        n, _, _, numbers, size = found[CARD]
        lines.append(f"{many(n, 'site card')} (name and numbers of subjects; {numbers} numbers)")
    if UPDATE in found:
        n, tensors, weights, numbers, size = found[UPDATE]
        lines.append(
            f"{many(n, 'model update')} ({tensors} tensors of {weights:,} numbers each time, "
            f"{numbers} other numbers, {_size(size)} in all)"
        )
    if METRICS in found:
        n, _, _, numbers, size = found[METRICS]
        lines.append(f"{many(n, 'set')} of mean metrics ({numbers} numbers, {_size(size)} in all)")
    if WITHHELD in found:
        n, _, _, numbers, size = found[WITHHELD]
        lines.append(
            f"{many(n, 'privacy statement')} with the number of held-out subjects, metrics withheld "
            f"({numbers} numbers, {_size(size)} in all)"
        )
    if ERROR in found:
        lines.append(f"{many(found[ERROR][0], 'error text')}")
    if OTHER in found:
        lines.append(f"{many(found[OTHER][0], 'acknowledgement')}")
    return lines or ["nothing"]


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _shapes(array: Array) -> list[int]:
    """Number of values of each tensor in a block of safetensors."""
    data = array.data
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        return [
            math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"
        ]
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise OutboundError(
            "the reply holds a block that cannot be accounted for, so it is not sent. Please report it."
        ) from error


def _numbers(value: Any) -> int:
    """How many numbers a value is; lists count one by one."""
    return sum(map(_numbers, value)) if isinstance(value, list) else isinstance(value, (int, float))


def _plain(value: Any) -> Any:
    """JSON has no NaN and no bytes."""
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and value != value:
        return None
    return value.hex() if isinstance(value, bytes) else value


@contextlib.contextmanager
def _open(record: Path) -> Iterator[sqlite3.Connection]:
    try:
        with contextlib.closing(sqlite3.connect(record, timeout=60)) as database, database:
            database.execute("PRAGMA synchronous = FULL")
            database.execute(SCHEMA)
            yield database
    except sqlite3.Error as error:
        raise OutboundError(
            f"{record}: the record of what leaves cannot be used ({error}), so nothing is sent. "
            "Free disk space, or restore the file."
        ) from error
