"""The one way out: every reply passes `release`, which lets through what the site's policy permits
(`client.permitted`) and records what that holds before it is sent.

The record is the site's audit log (`common.audit_log`), in entries of kind `sent`: when, for which
round, which tensors, how many numbers and bytes, the hash of the weights, and every number that is not
a weight. It is read from the reply itself, not from what the training says it sent.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from flwr.app import Array, ArrayRecord, Message, MessageType
from flwr.app.error import Error
from flwr.common.constant import ErrorCode

from client.permitted import NotPermitted, Own, permitted
from client.policy import Policy
from common.audit_log import AuditLog, Follower, LogError, append, last_entry
from common.console import many, plain
from common.keys import BadKey
from common.message_words import BUDGET_SPENT, POLICY_REFUSED, WITHHELD
from common.secure_messages import AGREE, MASKED, SESSION, SHARES, UNMASK, VECTOR
from common.statement import Signed, attach, attached

SENT = "sent"  # the kind of their entries
ACCEPTED = "terms accepted"  # the kind of the entry that `client.consent` makes of a yes
CARD, UPDATE, METRICS, ERROR, OTHER = "card", "update", "metrics", "error", "other"
# of secure aggregation, beside the update
KEYS, SEALED, AGREED, REVEALED = "keys", "sealed", "agreed", "revealed"
CODES = ErrorCode.CLIENT_APP_RAISED_EXCEPTION, BUDGET_SPENT, POLICY_REFUSED  # of an error
SECURE = {
    KEYS: "keys for secure aggregation",
    SEALED: "sealed shares of secrets",
    AGREED: "signatures under lists of sites",
    REVEALED: "shares that unmask a sum",
}


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
        if self.names == [VECTOR]:
            return f"masked update of {self.weights:,} numbers, {_size(self.bytes)}"
        if self.kind in SECURE:
            return f"{SECURE[self.kind]}, {_size(self.bytes)}"
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
    """What `release` needs: the audit log, this site's policy, what it knows of itself, its signature."""

    record: AuditLog
    policy: Policy
    own: Own
    sign: Callable[[str], bytes]


@dataclass(frozen=True)
class Released:
    """What may be sent: the reply as the policy permits it, and the account of it."""

    reply: Message
    departure: Departure


def release(reply: Message, task: Message, gate: Gate) -> Released:
    """Make of `reply` what the policy permits, and record it; only that may be sent.

    It answers `task`; what `reply` says of its own sender, receiver, time or group does not leave.
    Where nothing of it is permitted, that is an error reply, which says why.

    Raises:
        OutboundError: the record cannot be written, or the reply not be accounted for.
    """
    allowed = _allowed(reply, task, gate)
    return Released(allowed, _record(allowed, gate.record))


def _allowed(reply: Message, task: Message, gate: Gate) -> Message:
    if reply.has_error():
        return _error(task, reply.error.code, plain(str(reply.error.reason or "")))
    try:
        content = permitted(reply.content, gate.policy, gate.own)
    except NotPermitted as no:
        code = POLICY_REFUSED if no.by_policy else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        return _error(task, code, str(no))
    stated = attached(content)
    if stated is not None:  # signed here, so that the key vouches for what leaves and nothing else
        attach(content, Signed(stated.text, gate.sign(stated.text)))
    return Message(content, reply_to=task)


def _error(task: Message, code: int, reason: str) -> Message:
    known = code if code in CODES else int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
    return Message(Error(known, reason), reply_to=task)


def _record(reply: Message, record: AuditLog) -> Departure:
    departure = inspect(reply)
    with _usable(record):
        if not (reply.metadata.message_type == MessageType.QUERY and _said(departure, record)):
            append(record, SENT, asdict(departure))
    return departure


def _said(departure: Departure, record: AuditLog) -> bool:
    """Is it an error text, and the last that happened the same? A coordinator calls again and again
    while it waits; how often it was refused is counted in an entry of its own (`client.audit_trail`)."""
    last = last_entry(record) if departure.kind == ERROR else None
    return last is not None and last.kind == SENT and last.details == asdict(departure)


def inspect(reply: Message) -> Departure:
    """What a reply holds, read from the reply itself. Raises OutboundError: that is not possible."""
    if reply.has_error():
        reason = reply.error.reason or ""
        said = {"code": reply.error.code, "reason": reason}
        return Departure(ERROR, None, 0, 0, 1, len(reason.encode()), "", said, [])
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
            if name in (SEALED, REVEALED):  # long, and of use to nobody later
                text = str(record["json"])
                digest_of = hashlib.sha256(text.encode()).hexdigest()
                details[name] = {"json": f"{len(text)} characters, sha256 {digest_of}"}
    numbers = sum(_numbers(value) for values in details.values() for value in values.values())
    size += len(json.dumps(details).encode())
    kind = OTHER
    if names:
        kind = UPDATE
    elif "means" in details:
        kind = METRICS
    elif "card" in details:
        kind = CARD
    else:
        kind = next((name for name in (KEYS, SEALED, AGREED, REVEALED) if name in details), OTHER)
    round_ = details.get("about", {}).get("round")
    hash_ = digest.hexdigest() if names else ""
    return Departure(kind, round_, len(names), weights, numbers, size, hash_, details, names)


def answer_to(task: Message) -> str:
    """Of which kind the answer to a task is."""
    kind = task.metadata.message_type
    if kind == MessageType.TRAIN:
        return KEYS if SESSION in task.content else UPDATE
    return {SHARES: SEALED, MASKED: UPDATE, AGREE: AGREED, UNMASK: REVEALED}.get(kind, METRICS)


def answered(record: AuditLog, kind: str) -> dict[int, int]:
    """Round -> how many replies of this kind were released since the last yes to terms.

    By the order of the entries and not by their times: a clock that was ahead would hide some.
    """
    found: Counter[int] = Counter()
    with _usable(record):
        for entry in _followed(record).entries():
            if entry.kind == ACCEPTED:
                found.clear()
            elif entry.details["kind"] == kind and entry.details["round"] is not None:
                found[entry.details["round"]] += 1
    return found


def departures(record: AuditLog) -> list[dict[str, Any]]:
    """Everything recorded, in order, as plain JSON types; `id` is the number of the log's entry."""
    with _usable(record):
        entries = _followed(record).entries()
    return [
        {"id": entry.number, "at": entry.at, **entry.details}
        for entry in entries
        if entry.kind == SENT
    ]


@cache
def _followed(record: AuditLog) -> Follower:
    """`join` looks for each message, and the log grows for years: only what is new is read."""
    return Follower(record, (SENT, ACCEPTED))


def in_words(record: AuditLog) -> list[str]:
    """What has left this building so far, a line for each kind."""
    found: dict[str, tuple[int, int, int, int, int]] = {}
    for row in departures(record):
        withheld = row["details"].get("about", {}).get("released") == WITHHELD
        kind = WITHHELD if withheld else row["kind"]
        if row["names"] == [VECTOR]:
            kind = VECTOR
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
    if VECTOR in found:
        n, _, weights, _, size = found[VECTOR]
        lines.append(
            f"{many(n, 'masked model update')} ({weights:,} numbers each time, of which only the sum "
            f"over all sites can be read; {_size(size)} in all)"
        )
    lines += [
        f"{many(found[kind][0], 'time')} {words} ({_size(found[kind][-1])} in all)"
        for kind, words in SECURE.items()
        if kind in found
    ]
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
