"""What `fed-client join` writes into the site's audit log, and what it hears of the coordinator's.

What leaves is recorded by `client.outbound`. No entry holds a path, a subject's id or a result of a
single subject: the log may be shown to others.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
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
from common.audit_log import EMPTY, AuditLog, Head, append, head, holds, verified
from common.console import plain

LOG = logging.getLogger("fedbrats")
DONE = {MessageType.TRAIN: "trained", MessageType.EVALUATE: "evaluated"}


@dataclass
class Trail:
    """Every method raises LogError or BadKey if the log cannot be read or written."""

    log: AuditLog
    coordinator: Head = EMPTY  # the last that was heard of its log

    def begin(self, **details: Any) -> None:
        """Verify the whole log, once, and note that the site begins to take part."""
        reading = verified(self.log)
        if reading.unfinished:
            LOG.warning("the last entry of the audit log was not finished; it is cut off")
        self.coordinator = last_heard(reading.entries, COORDINATOR)
        self.note("join begun", **details)

    def note(self, kind: str, **details: Any) -> None:
        append(self.log, kind, details)

    def received(self, message: Message) -> str:
        """Note a task and what comes with it; returns what is wrong with *this* log, if anything.

        Raises:
            BadMessage: the heads in it have not the agreed form.
        """
        heads = attached_heads(message.content)
        self.note(
            "task received",
            task=message.metadata.message_type,
            round=round_of(message.content),
            message=str(message.metadata.message_id),
            **weights_in(message.content),
            **heard(COORDINATOR, heads),
        )
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
        self.note(
            "refused",
            task=message.metadata.message_type,
            round=round_of(content),
            message=str(message.metadata.message_id),
            why=plain(why),
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


def _subjects(content: RecordDict) -> int | None:
    """How many subjects an update or a report is about."""
    for record, name in (("about", "n_training"), ("defined", "n")):
        values = content.get(record)
        if values is not None and isinstance(number := values.get(name), int):
            return number
    return None
