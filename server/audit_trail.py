"""What the coordinator writes into its audit log while it serves, and what it hears of the sites' logs.

`server.link_grid` shows every message that goes out or comes in to the `Witness`. Why a reply was not
used, though it came whole, is said by the entry about its round.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message

from common.audit_heads import (
    Heads,
    attach_heads,
    attached_heads,
    gone_back,
    heard,
    last_heard,
    round_of,
    weights_in,
)
from common.audit_lines import Entry, Head
from common.audit_log import AuditLog, Follower, LogError, append, head, holds, verified
from common.console import plain
from common.keys import BadKey
from common.records import BadMessage
from common.terms import Terms
from server.history import RoundRecord
from server.roll_call import FederationFailed

LOG = logging.getLogger("fedbrats")


@dataclass
class Witness:
    """Every method raises LogError or BadKey if the log cannot be read or written."""

    log: AuditLog
    _entries: list[Entry] = field(default_factory=list)  # those before this start
    _heard: dict[tuple[str, str], Head] = field(
        default_factory=dict
    )  # by site and its enrolled key
    _round: dict[str, int | None] = field(default_factory=dict)  # that a site was last asked about
    _said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._admitted = Follower(self.log, ("admitted",))

    def begin(self, terms: Terms, rounds: int) -> None:
        """Verify the whole log, once, and note that the server starts."""
        reading = verified(self.log)
        if reading.unfinished:
            LOG.warning("the last entry of the audit log was not finished; it is cut off")
        self._entries = reading.entries
        before = [e.details["terms"] for e in reading.entries if e.kind == "server started"]
        if before and before[-1] != terms.hash():
            self.note("terms changed", before=before[-1], now=terms.hash())
        self.note("server started", terms=terms.hash(), code=terms.code_hash, rounds_done=rounds)

    def note(self, kind: str, **details: Any) -> None:
        append(self.log, kind, details)

    def sending(self, message: Message, site: str) -> None:
        """Put the heads into a message that is about to go out, and note it."""
        heads = Heads(head(self.log), self._last(site))
        self._round[site] = round_of(message.content)
        self.note(
            "task sent",
            site=site,
            task=message.metadata.message_type,
            round=self._round[site],
            **weights_in(message.content),
        )
        attach_heads(message.content, heads)

    def received(self, task: Message, site: str, reply: Message) -> None:
        """Note a reply, and compare what comes with it with this log and with what was heard before."""
        about = {"site": site, "task": task.metadata.message_type, "round": self._round.get(site)}
        if reply.has_error():
            self.note("no answer", **about, why=plain(reply.error.reason or ""))
            return
        heads, problems = None, []
        try:
            heads = attached_heads(reply.content)
        except BadMessage as error:
            problems.append(f"{site}: {plain(str(error))}")
        self.note("reply received", **about, **weights_in(reply.content), **heard(site, heads))
        if heads is not None and not holds(self.log, heads.yours):
            problems.append(
                f"{site} remembers entry {heads.yours.number} of this audit log, which is not in it: "
                "the log was cut off, rewritten or restored from an old backup"
            )
        if words := gone_back(self._last(site), heads):
            problems.append(f"{site} {words}")
        if heads is not None:
            self._heard[site, self._key(site)] = heads.mine
        for problem in problems:
            if problem not in self._said:
                self._said.add(problem)
                LOG.error(problem)
                self.note("problem", site=site, what=problem)

    def _last(self, site: str) -> Head:
        """What was last heard of a site's log; nothing, since it was admitted with another key."""
        known = site, self._key(site)
        if known not in self._heard:
            number = self._entries[-1].number if self._entries else 0
            since = [entry for entry in self._admitted.entries() if entry.number > number]
            self._heard[known] = last_heard([*self._entries, *since], site)
        return self._heard[known]

    def _key(self, site: str) -> str:
        """`fed-server admit` may have been typed since the start."""
        admitted = (e for e in reversed(self._admitted.entries()) if e.details["site"] == site)
        return next((entry.details["key"] for entry in admitted), "")

    def round_done(self, record: RoundRecord) -> None:
        self.note(
            "round recorded",
            round=record.round,
            sha256=record.sha256,
            contributed=[c.site for c in record.contributions if c.trained],
            refused={c.site: c.reason for c in record.contributions if not c.trained},
            unmeasured=dict(record.unmeasured),
        )

    @contextlib.contextmanager
    def until_the_end(self) -> Iterator[None]:
        """Note how the block ends."""
        try:
            yield
        except BaseException as error:
            # what ends the block may be that nothing can be written
            with contextlib.suppress(BadKey, LogError):
                if isinstance(error, FederationFailed):
                    self.note("failed", why=plain(str(error)))
                else:
                    self.note("stopped", by=type(error).__name__)
            raise
        self.note("finished")
