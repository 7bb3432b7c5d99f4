"""A roll call that is refused again and again: written once, then counted, and nothing is untold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.app.error import Error
from flwr.supercore.task_identity import TaskIdentity

import client.audit_trail as module
from client import outbound
from client.audit_trail import Trail
from client.permitted import Own
from client.policy import Policy
from common.audit_heads import Heads, attach_heads
from common.audit_log import EMPTY, AuditLog, Head, append, told, verified
from common.keys import new_private_key, save_private_key

CYCLE = ["task received", "refused", "sent"]


class Site:
    """What `join` does with a message that it refuses."""

    def __init__(self, folder: Path) -> None:
        save_private_key(folder / "site.key", new_private_key())
        self.log = AuditLog(folder / "audit.log", folder / "site.key")
        self.trail = Trail(self.log)
        self.gate = outbound.Gate(self.log, Policy(), Own("Oslo"), str.encode)
        self.trail.begin()

    def asked(self, head: int = 0, kind: str = MessageType.QUERY) -> Message:
        content = RecordDict({"about": ConfigRecord({"round": 1})})
        if head:
            attach_heads(content, Heads(Head(head, f"{head:064x}"), EMPTY))
        message = Message(content, 2, kind)
        assert self.trail.received(message) == ""
        return message

    def refuse(self, why: str = "Oslo: not now.", **asked: Any) -> outbound.Released:
        message = self.asked(**asked)
        self.trail.refused(message, why)
        return outbound.release(Message(Error(2, why), reply_to=message), message, self.gate)

    def entries(self) -> list[Any]:
        verified(self.log)
        return list(told(self.log))[2:]

    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.entries()]


@pytest.fixture
def site(tmp_path):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return Site(tmp_path)


def test_the_same_refusal_is_written_once_and_then_counted(site):
    for number in range(1, 8):
        released = site.refuse(head=number)
        assert released.reply.error.reason == "Oslo: not now.", "it is answered every time"
    assert site.kinds() == CYCLE
    site.trail.note("join ended", how="stopped")
    assert site.kinds() == [*CYCLE, "refused again", "join ended"]
    again = site.entries()[3].details
    assert (again["times"], again["why"], again["task"]) == (6, "Oslo: not now.", "query")
    assert again["heard"]["number"] == 7, "what was heard last is remembered"
    assert again["last"] >= site.entries()[1].at


def test_what_comes_of_a_later_call_is_told_in_order(site):
    for _ in range(3):
        site.refuse()
    task = site.asked()
    site.trail.done(task, Message(RecordDict(), reply_to=task), 1.0)
    assert site.kinds() == [*CYCLE, "refused again", "task received", "answered"]
    assert site.entries()[3].details["times"] == 2
    site.refuse()
    assert site.kinds()[6:] == CYCLE, "since then something else has happened"


def test_another_reason_is_an_entry(site):
    site.refuse()
    site.refuse("Oslo: other terms.")
    site.refuse("Oslo: other terms.")
    site.refuse()
    assert site.kinds() == [*CYCLE, *CYCLE, "refused again", *CYCLE]


def test_what_another_program_wrote_meanwhile_ends_the_counting(site):
    site.refuse()
    append(site.log, "terms accepted", {})
    site.refuse()
    assert site.kinds() == [*CYCLE, "terms accepted", *CYCLE]


def test_at_least_every_hour_there_is_an_entry(site, monkeypatch):
    site.refuse()
    site.refuse()
    monkeypatch.setattr(module, "SECONDS_UNTOLD", -1.0)
    site.refuse()
    assert site.kinds() == [*CYCLE, "refused again", *CYCLE]


def test_refused_training_is_always_an_entry(site):
    for _ in range(3):
        site.refuse(kind=MessageType.TRAIN)
    assert site.kinds() == CYCLE * 3
