"""What hospital and coordinator tell each other of their audit logs, in every message with a content.

Each tells its log's head and the last head that it has heard of the other; each writes down what it
hears, in the entry about the message. A log that was shortened or written anew then lacks an entry
that the other side remembers, even if every signature in it is good.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from common.audit_lines import EMPTY, Entry, Head
from common.records import BadMessage, value_of

RECORD = "audit"  # its name in a message
COORDINATOR = "coordinator"  # as the hospitals' logs call it; the coordinator's calls sites by name


@dataclass(frozen=True)
class Heads:
    """`mine` is the sender's last entry, `yours` the receiver's last that the sender has heard of."""

    mine: Head
    yours: Head


def attach_heads(content: RecordDict, heads: Heads) -> None:
    """Put them into a message, in place of those that are there."""
    content[RECORD] = ConfigRecord(
        {
            "number": heads.mine.number,
            "hash": heads.mine.hash,
            "heard_number": heads.yours.number,
            "heard_hash": heads.yours.hash,
        }
    )


def attached_heads(content: RecordDict) -> Heads | None:
    """The heads in a message, if there are any.

    Raises:
        BadMessage: they have not the agreed form.
    """
    record = content.get(RECORD)
    if record is None:
        return None
    if not isinstance(record, ConfigRecord):
        raise BadMessage(f"the message's {RECORD!r} is no ConfigRecord.")
    return Heads(_head(record, ""), _head(record, "heard_"))


def _head(record: ConfigRecord, prefix: str) -> Head:
    head = Head(value_of(record, f"{prefix}number", int), value_of(record, f"{prefix}hash", str))
    if head.number < 0 or len(head.hash) != 64 or set(head.hash) - set("0123456789abcdef"):
        raise BadMessage("the head of an audit log has an impossible value.")
    return head


def heard(whom: str, heads: Heads | None) -> dict[str, Any]:
    """For the details of an entry: what was heard of somebody's log."""
    if heads is None:
        return {}
    return {"heard": {"of": whom, "number": heads.mine.number, "hash": heads.mine.hash}}


def all_heard(entries: Iterable[Entry], whom: str) -> list[tuple[Entry, Head]]:
    """Each entry that tells of somebody's log, and the head that it tells."""
    found = []
    for entry in entries:
        told = entry.details.get("heard")
        if isinstance(told, dict) and told.get("of") == whom:
            found.append((entry, Head(told["number"], told["hash"])))
    return found


def last_heard(entries: Sequence[Entry], whom: str) -> Head:
    """What is remembered of somebody's log. A new key may come with a new log: it is not held
    against what was heard before."""
    latest, key = EMPTY, ""
    for entry in entries:
        if entry.kind == "admitted" and entry.details["site"] == whom:
            latest = latest if entry.details["key"] == key else EMPTY
            key = entry.details["key"]
        for _, head in all_heard([entry], whom):
            latest = head
    return latest


def gone_back(before: Head, heads: Heads | None) -> str:
    """What is wrong with a log whose head was `before`; empty if it has grown or is as it was."""
    if heads is None:
        return "" if before == EMPTY else "told nothing of its audit log, of which it told before"
    now = heads.mine
    if now.number < before.number:
        return (
            f"has an audit log of {now.number} entries, and it had {before.number}: its end was "
            "cut off, or it was restored from an old backup"
        )
    if now.number == before.number and now.hash != before.hash:
        return f"has another entry {now.number} in its audit log than before: it was rewritten"
    return ""


def weights_in(content: RecordDict) -> dict[str, Any]:
    """Number of bytes of the arrays in a message, and their sha256 ("" if there are none)."""
    digest, size, count = hashlib.sha256(), 0, 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            for array in record.values():
                digest.update(array.data)
                size, count = size + len(array.data), count + 1
    return {"bytes": size, "sha256": digest.hexdigest() if count else ""}


def round_of(content: RecordDict) -> int | None:
    about = content.get("about")
    number = about.get("round") if isinstance(about, ConfigRecord) else None
    return number if isinstance(number, int) else None
