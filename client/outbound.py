"""The one way out: every reply passes `release`, which records what it holds before it is sent.

The record is the site's audit log (`common.audit_log`), in entries of kind `sent`: when, for which
round, which tensors, how many numbers and bytes, the hash of the weights, and every number that is not
a weight. It is read from the reply itself, not from what the training says it sent.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, Message

from common.audit_log import AuditLog, LogError, append, told
from common.console import many
from common.keys import BadKey
from common.messages import WITHHELD

SENT = "sent"  # the kind of their entries
CARD, UPDATE, METRICS, ERROR, OTHER = "card", "update", "metrics", "error", "other"


@dataclass(frozen=True)
class Departure:
    """What one reply holds. `weights` counts values in tensors, whose `names` these are, `numbers`
    all others."""

    kind: str
    round: int | None
    tensors: int
    weights: int
    numbers: int
    bytes: int
    sha256: str
    details: dict[str, Any]
    names: list[str]

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


def release(reply: Message, record: AuditLog) -> Departure:
    """Record what `reply` holds; only then may it be sent.

    Raises:
        OutboundError: the record cannot be written, or the reply not be accounted for.
    """
    departure = inspect(reply)
    _record(departure, record)
    return departure


def _record(departure: Departure, record: AuditLog) -> None:
    with _usable(record):
        append(record, SENT, asdict(departure))


def inspect(reply: Message) -> Departure:
    """What a reply holds, read from the reply itself. Raises OutboundError: that is not possible."""
    if reply.has_error():
        reason = reply.error.reason or ""
        return Departure(ERROR, None, 0, 0, 0, len(reason.encode()), "", {"reason": reason}, [])
    weights = size = 0
    names: list[str] = []
    digest = hashlib.sha256()
    details: dict[str, Any] = {}
    for name, record in reply.content.items():
        if isinstance(record, ArrayRecord):
            for array in record.values():
                digest.update(array.data)
                size += len(array.data)
                sizes = _sizes(array)
                names += sizes
                weights += sum(sizes.values())
        else:
            details[name] = {key: _plain(value) for key, value in record.items()}
    numbers = sum(_numbers(value) for values in details.values() for value in values.values())
    size += len(json.dumps(details).encode())
    kind = OTHER
    if names:
        kind = UPDATE
    elif "means" in details:
        kind = METRICS
    elif "card" in details:
        kind = CARD
    round_ = details.get("about", {}).get("round")
    hash_ = digest.hexdigest() if names else ""
    return Departure(kind, round_, len(names), weights, numbers, size, hash_, details, names)


def answered(record: AuditLog, kind: str, since: str) -> dict[int, int]:
    """Round -> how many replies of this kind were released since then (ISO time, UTC)."""
    return Counter(
        row["round"]
        for row in departures(record)
        if row["kind"] == kind and row["at"] >= since and row["round"] is not None
    )


def departures(record: AuditLog) -> list[dict[str, Any]]:
    """Everything recorded, in order, as plain JSON types; `id` is the number of the log's entry."""
    with _usable(record):
        return [
            {"id": entry.number, "at": entry.at, **entry.details} for entry in told(record, SENT)
        ]


def in_words(record: AuditLog) -> list[str]:
    """What has left this building so far, a line for each kind."""
    found: dict[str, tuple[int, int, int, int, int]] = {}
    for row in departures(record):
        withheld = row["details"].get("about", {}).get("released") == WITHHELD
        kind = WITHHELD if withheld else row["kind"]
        n, tensors, weights, numbers, size = found.get(kind, (0, 0, 0, 0, 0))
        most = max(tensors, row["tensors"]), max(weights, row["weights"])
        found[kind] = n + 1, *most, numbers + row["numbers"], size + row["bytes"]
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


def _sizes(array: Array) -> dict[str, int]:
    """Number of values of each tensor in a block of safetensors, by name."""
    data = array.data
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        return {
            name: math.prod(tensor["shape"])
            for name, tensor in header.items()
            if name != "__metadata__"
        }
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise OutboundError(
            "the reply holds a block that cannot be accounted for, so it is not sent. Please report it."
        ) from error


def _numbers(value: Any) -> int:
    """How many numbers a value is; lists count one by one."""
    return sum(map(_numbers, value)) if isinstance(value, list) else isinstance(value, (int, float))


def _plain(value: Any) -> Any:
    """JSON has no NaN, no infinity and no bytes."""
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value.hex() if isinstance(value, bytes) else value


@contextmanager
def _usable(record: AuditLog) -> Iterator[None]:
    try:
        yield
    except (BadKey, LogError) as error:
        raise OutboundError(
            f"The record of what leaves cannot be used, so nothing is sent. {error}"
        ) from error
