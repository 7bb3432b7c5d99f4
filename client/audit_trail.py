"""What `fed-client join` writes into the site's audit log, and what it hears of the coordinator's.

What leaves is recorded by `client.outbound`. No entry holds a path, a subject's id or a result of a
single subject: the log may be shown to others.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from flwr.app import Message, MessageType, RecordDict

from common.audit_heads import (
    COORDINATOR,
    Heads,
    attach_heads,
    attached_heads,
    gone_back,
    heard,
    last_heard,
    round_of,
    weights_in,
)
from common.audit_lines import EMPTY, Entry, Head
from common.audit_log import AuditLog, append, head, holds, last_entry, verified
from common.console import plain

LOG = logging.getLogger("fedbrats")
SECONDS_UNTOLD = 3600.0  # the longest that a repeated refusal is counted and not written
DONE = {MessageType.TRAIN: "trained", MessageType.EVALUATE: "evaluated"}


@dataclass
class _Refusal:
    """Of a roll call, which comes again and again: the first is an entry, the next are counted."""

    details: dict[str, Any]
    number: int  # of its entry
    written: float  # when, by this process's clock
    times: int = 0  # that it was repeated since
    last: str = ""
    heard: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trail:
    """Every method raises LogError or BadKey if the log cannot be read or written."""

    log: AuditLog
    coordinator: Head = EMPTY  # the last that was heard of its log
    _refusal: _Refusal | None = None  # the last thing that happened, if it was one
    _untold: dict[str, Any] | None = None  # a roll call, until it is known what comes of it

    def begin(self, **details: Any) -> None:
        """Verify the whole log, once, and note that the site begins to take part."""
        reading = verified(self.log)
        if reading.unfinished:
            LOG.warning("the last entry of the audit log was not finished; it is cut off")
        self.coordinator = last_heard(reading.entries, COORDINATOR)
        self.note("join begun", **details)

    def note(self, kind: str, **details: Any) -> Entry:
        """Add an entry, after what was held back until now."""
        refusal, self._refusal = self._refusal, None
        untold, self._untold = self._untold, None
        if refusal is not None and refusal.times:
            again = {"times": refusal.times, "last": refusal.last, **refusal.heard}
            append(self.log, "refused again", {**refusal.details, **again})
        if untold is not None:
            append(self.log, "task received", untold)
        return append(self.log, kind, details)

    def received(self, message: Message) -> str:
        """Note a task and what comes with it; returns what is wrong with *this* log, if anything.

        Raises:
            BadMessage: the heads in it have not the agreed form.
        """
        heads = attached_heads(message.content)
        details = {
            "task": message.metadata.message_type,
            "round": round_of(message.content),
            "message": str(message.metadata.message_id),
            **weights_in(message.content),
            **heard(COORDINATOR, heads),
        }
        if _is_call(message) and not details["bytes"] and self._refused_last():
            self._untold = details
        else:
            self.note("task received", **details)
        if heads is not None and not holds(self.log, heads.yours):
            text = (
                f"the coordinator remembers entry {heads.yours.number} of this site's audit log, "
                "which is not in it: the log was cut off, rewritten or restored from an old backup."
            )
            self.note("problem", what=text)
            return text
        if words := gone_back(self.coordinator, heads):
            LOG.warning(f"the coordinator {words}")
            self.note("problem", what=f"the coordinator {words}")
        if heads is not None:
            self.coordinator = heads.mine
        return ""

    def refused(self, message: Message, why: str) -> None:
        """A message of which only the head may be known."""
        content = message.content if message.has_content() else RecordDict()
        kind, round_ = message.metadata.message_type, round_of(content)
        details = {"task": kind, "round": round_, "why": plain(why)}
        last, untold = self._refusal, self._untold
        if untold is not None and last is not None and last.details == details:
            self._untold, last.times, last.last = None, last.times + 1, _now()
            last.heard = {name: untold[name] for name in ("heard",) if name in untold}
            return
        entry = self.note("refused", message=str(message.metadata.message_id), **details)
        if _is_call(message):
            self._refusal = _Refusal(details, entry.number, time.monotonic())

    def _refused_last(self) -> bool:
        """Has nothing happened, in any program, since a roll call was refused, within the hour?"""
        refusal = self._refusal
        if refusal is None or time.monotonic() - refusal.written > SECONDS_UNTOLD:
            return False
        last = last_entry(self.log)
        return last is not None and (
            last.number == refusal.number
            or (last.number == refusal.number + 1 and last.kind == "sent")
        )

    def done(self, task: Message, reply: Message, seconds: float) -> None:
        """A task came to its end; `reply` is about to leave."""
        about = {"round": round_of(task.content), "seconds": round(seconds, 1)}
        if reply.has_error():
            self.note("failed", **about, why=plain(reply.error.reason or ""))
            return
        kind = DONE.get(task.metadata.message_type, "answered")
        self.note(kind, **about, n=_subjects(reply.content))

    def tell(self, reply: Message) -> None:
        """Put the heads into what is about to leave; an error text has no room for them."""
        if reply.has_content():
            attach_heads(reply.content, Heads(head(self.log), self.coordinator))


def _is_call(message: Message) -> bool:
    return bool(message.metadata.message_type == MessageType.QUERY)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _subjects(content: RecordDict) -> int | None:
    """How many subjects an update or a report is about."""
    for record, name in (("about", "n_training"), ("defined", "n")):
        values = content.get(record)
        if values is not None and isinstance(number := values.get(name), int):
            return number
    return None
