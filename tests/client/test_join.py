"""Taking part, with a scripted coordinator and a scripted worker: what is refused, what survives what.

Whatever the script does, every reply must have passed the record of what leaves before it is sent;
the scripted connection looks.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    RecordDict,
)
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

import client.join as module
from client import consent, outbound, refusals
from client.connection import (
    AlreadyConnected,
    Refused,
    RunOver,
    TooLarge,
    Unreachable,
)
from client.display import Display
from client.join import JoinFailed, Membership, Stopped, stopping
from client.parcel import pack, unpack
from client.policy import Policy
from client.site_config import load_site_config
from client.worker_process import Event
from common.audit_heads import Heads, attach_heads, attached_heads
from common.audit_log import EMPTY, Head, append, told, verified
from common.message_words import POLICY_REFUSED, STYPE
from common.messages import SiteReport, SiteUpdate, pack_site_report, pack_site_update
from common.metrics import SiteMetrics
from common.notices import Farewell, pack_farewell, pack_roll_call
from common.terms import Terms

ROOT = Path(__file__).parents[2]
NODE, RUN, FOREIGN = 77, 5, 6
MODEL_BYTES = 123_456
RELEASES = {f"outbound.release(reply, {task}, self._gate)" for task in ("task", "message")}


@dataclass
class Coordinator:
    """What the other side does: `script` is taken one by one with every `receive`.

    An entry is a message, None (nothing there), an error to raise, or a function to call first.
    """

    folder: Any
    script: list[Any]
    states: tuple[str, str]
    foreign: tuple[str, str] = ("", "")
    open_errors: list[Exception] = field(default_factory=list)
    send_errors: list[Exception] = field(default_factory=list)
    fetch_errors: list[Exception] = field(default_factory=list)
    waits: bool = True
    did: list[str] = field(default_factory=list)
    sent: list[Message] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    node_id: int = NODE
    last_contact: None = None
    latest: float = field(default_factory=lambda: time.monotonic() + 30)

    def open(self) -> None:
        self.did.append("open")
        if self.open_errors:
            raise self.open_errors.pop(0)

    def receive(self, wait: int = 0) -> tuple[Message, Any] | None:
        self.did.append("receive")
        assert time.monotonic() < self.latest, "what the script waits for does not come"
        entry = self.script.pop(0) if self.script else None
        while callable(entry):
            entry = entry()
        if isinstance(entry, Exception):
            raise entry
        if entry is None:
            return None
        head = Message(RecordDict(), NODE, entry.metadata.message_type)
        head.__dict__["_metadata"] = entry.metadata
        return head, SimpleNamespace(object_id=entry.metadata.message_id, whole=entry)

    def fetch(self, head: Message, tree: Any, largest: int) -> Message:
        self.asked.append(largest)
        if self.fetch_errors:
            raise self.fetch_errors.pop(0)
        return tree.whole

    def run(self, run_id: int) -> tuple[str, str]:
        self.did.append("run")
        return self.states if run_id == RUN else self.foreign

    def send(self, reply: Message) -> bool:
        """Looks first whether exactly this has been recorded."""
        recorded = outbound.departures(self.folder.audit)[-1]
        expected = vars(outbound.inspect(reply))
        assert {key: recorded[key] for key in expected} == expected
        if self.send_errors:
            raise self.send_errors.pop(0)
        self.sent.append(reply)
        return self.waits

    def hurry(self) -> None:
        self.did.append("hurry")

    def close(self) -> None:
        self.did.append("close")

    @property
    def reasons(self) -> list[str]:
        return [reply.error.reason for reply in self.sent if reply.has_error()]


@dataclass
class Workers:
    """Makes scripted workers. `answer` says what one does with a message: a list of events."""

    answer: Callable[[Message], list[Event]]
    preparing: list[Event]
    made: list[Any] = field(default_factory=list)
    asked: list[Message] = field(default_factory=list)
    living: int = 0

    def __call__(self, folder: Path, device: str) -> Any:
        worker = Scripted(self)
        self.made.append(worker)
        self.living += 1
        assert device == "cpu"
        return worker


class Scripted:
    def __init__(self, workers: Workers) -> None:
        self._workers, self._events = workers, list[Event]()
        self.killed = False

    def order(self, do: str, payload: bytes | None = None, **details: Any) -> None:
        assert not self.killed
        if do == "prepare":
            assert details["name"] == "Oslo"
            self._events += self._workers.preparing
        else:
            message = unpack(payload)
            self._workers.asked.append(message)
            self._events += self._workers.answer(message)

    def event(self, seconds: float) -> Event | None:
        assert not self.killed
        if self._events:
            return self._events.pop(0)
        time.sleep(min(seconds, 0.005))
        return None

    def kill(self) -> None:
        self._workers.living -= not self.killed
        self.killed = True


PREPARED = Event(
    "prepared",
    {
        "n_training": 12,
        "n_held_out": 5,
        "n_left_out": 1,
        "warnings": 0,
        "training_patients": 12,
        "held_out_patients": 5,
        "model_bytes": MODEL_BYTES,
    },
)


def answered(message: Message) -> list[Event]:
    """A good worker: says something, reports progress, answers."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = RUN, RUN, NODE
    told = {"site": "Oslo", "trains": False, "config_fingerprint": str(message.metadata.message_id)}
    content = RecordDict({"card": ConfigRecord(told)})
    step = {"what": "x", "done": 1, "total": 2, "unit": "s", "seconds": 1.0, "remark": "loss 0.5"}
    reply = pack(Message(content, reply_to=message))
    return [
        Event("log", {"level": 20, "text": "at work"}),
        Event("progress", {"progress": step, "left": 1.0}),
        Event("reply", {}, reply),
    ]


def silent(message: Message) -> list[Event]:
    return []


@dataclass
class Stage:
    coordinator: Coordinator
    workers: Workers
    membership: Membership
    folder: Any
    terms: Terms
    status: Path
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(10**6)))

    def message(
        self,
        content: RecordDict | None = None,
        kind: str = MessageType.QUERY,
        *,
        ttl: float = 600.0,
        round_: int | None = None,
        run: int = RUN,
    ) -> Message:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = run, run, 1
        if content is None and kind == MessageType.QUERY:
            content = pack_roll_call(self.terms)
        if content is None:
            content = RecordDict({"about": ConfigRecord({"round": round_ or 1})})
        message = Message(content, NODE, kind, ttl=ttl)
        message.metadata.__dict__["_message_id"] = f"{next(self.numbers):064x}"
        return message

    def farewell(self, complete: bool = True) -> Message:
        return self.message(pack_farewell(Farewell(complete, "Training complete: 3 rounds.")))

    def play(self, *script: Any) -> bool:
        """Take part until the script and then the farewell have come."""
        self.coordinator.script += [*script, self.farewell()]
        return self.membership.run()

    def until_answered(self, count: int = 1) -> Callable[[], Any]:
        """In a script: nothing comes before so many replies are there."""

        def wait() -> Any:
            if len(self.coordinator.sent) < count:
                self.coordinator.script.insert(0, wait)
            return None

        return wait

    @property
    def answers(self) -> list[Message]:
        """All replies but the last, which acknowledges the farewell."""
        assert "farewell" in self.coordinator.sent[-1].content
        return self.coordinator.sent[:-1]


@pytest.fixture
def stage(accepted, invitation, terms, monkeypatch, caplog) -> Stage:
    caplog.set_level(logging.INFO, "fedbrats")
    for name, value in {
        "POLL_SECONDS": 0.01,
        "FIRST_WAIT": 0.01,
        "LONGEST_WAIT": 0.08,
    }.items():
        monkeypatch.setattr(module, name, value)
    coordinator = Coordinator(accepted, [], (terms.federation, terms.code_hash))
    workers = Workers(answered, [PREPARED])
    monkeypatch.setattr(module, "Connection", lambda *arguments: coordinator)
    monkeypatch.setattr(module, "Worker", workers)
    settings = load_site_config(accepted.config)
    status = accepted.status
    shown = Display(status, site="Oslo")
    membership = Membership(accepted, settings, invitation, shown)
    return Stage(coordinator, workers, membership, accepted, terms, status)


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


# --------------------------------------------------------------------------- as it should be


def test_it_prepares_connects_answers_and_says_goodbye(stage, caplog):
    call, train = stage.message(), stage.message(kind=MessageType.TRAIN, round_=4)
    done = stage.until_answered
    assert stage.play(None, call, done(1), train, done(2), None) is True
    assert [m.metadata.message_id for m in stage.workers.asked] == [
        call.metadata.message_id,
        train.metadata.message_id,
    ]
    assert stage.workers.asked[0].content == call.content, "unchanged"
    assert [r.content["card"]["config_fingerprint"] for r in stage.answers] == [
        call.metadata.message_id,
        train.metadata.message_id,
    ]
    assert all(reply.metadata.src_node_id == NODE for reply in stage.coordinator.sent)
    assert stage.coordinator.did[0] == "open"
    assert stage.coordinator.did[-1] == "close"
    assert stage.coordinator.did.count("run") == 1, "asked once for each run"
    assert stage.coordinator.asked == [0, MODEL_BYTES, 0], "no weights where none belong"
    assert len(stage.workers.made) == 1, "the process stays warm"
    assert stage.workers.living == 0
    kinds = [row["kind"] for row in outbound.departures(stage.folder.audit)]
    assert kinds == ["card", "card", "other"]
    text = said(caplog)
    assert "12 training, 5 held out, 1 left out, 0 warnings" in text
    assert "round 4: training" in text
    assert "at work" in text
    assert "the federation is over.\nTraining complete: 3 rounds." in text


def test_the_farewells_verdict_is_the_result(stage):
    stage.coordinator.script += [stage.farewell(complete=False)]
    assert stage.membership.run() is False


@pytest.mark.parametrize("error", [Unreachable("gone"), RunOver("over"), Refused("no")])
def test_a_farewell_that_cannot_be_acknowledged_is_still_one(stage, error):
    stage.coordinator.send_errors = [error]
    assert stage.play() is True
    assert stage.coordinator.did[-1] == "close"


# ------------------------------------------------------------------------- what is not done


def refused(stage: Stage, message: Message) -> str:
    """The one reason that goes out; and nothing reaches the worker."""
    assert stage.play(message) is True
    assert stage.workers.asked == []
    (answer,) = stage.answers
    assert answer.metadata.reply_to_message_id == message.metadata.message_id
    return answer.error.reason


def test_another_federations_task_is_refused(stage):
    stage.coordinator.foreign = ("ee" * 16, stage.terms.code_hash)
    reason = refused(stage, stage.message(kind=MessageType.TRAIN, run=FOREIGN))
    assert reason == f"Oslo: the task is of another federation ({'ee' * 16})."
    assert stage.coordinator.asked == [0], "only the farewell was fetched"


def test_a_foreign_farewell_ends_nothing(stage):
    stage.coordinator.foreign = ("ee" * 16, stage.terms.code_hash)
    farewell = pack_farewell(Farewell(False, "go home"))
    assert "another federation" in refused(stage, stage.message(farewell, run=FOREIGN))


def test_a_task_for_other_code_is_refused(stage, caplog):
    stage.coordinator.foreign = (stage.terms.federation, "c0de" * 16)
    reason = refused(stage, stage.message(run=FOREIGN))
    assert "other code (c0dec0dec0de)" in reason
    assert f"({stage.terms.code_hash[:12]}); nothing was run" in reason
    assert reason in said(caplog), "told on both sides"


@pytest.mark.parametrize("kind", ["system", "train.mine", "query.shell", "evaluate.x"])
def test_unknown_kinds_of_tasks_are_refused(stage, kind):
    message = stage.message(RecordDict(), MessageType.TRAIN)
    message.metadata.__dict__["_message_type"] = kind
    assert refused(stage, message) == "Oslo: there is no such task."
    assert stage.coordinator.asked == [0], "only the farewell was fetched"


def test_what_is_too_large_or_no_roll_call_is_refused(stage):
    stage.coordinator.fetch_errors = [TooLarge("the message holds more than 5 bytes of weights.")]
    bad = stage.message(RecordDict({"terms": ConfigRecord({"document": "[]"})}))
    none = stage.message(RecordDict())
    assert stage.play(stage.message(kind=MessageType.TRAIN), bad, none) is True
    assert stage.workers.asked == []
    large, *others = stage.coordinator.reasons
    assert large == "the message holds more than 5 bytes of weights."
    assert others == [
        "the terms are not a JSON object.",
        "the message has no ConfigRecord called 'terms'.",
    ]


def test_a_spoilt_farewell_is_no_end(stage):
    spoilt = stage.message(RecordDict({"farewell": ConfigRecord({"complete": 1})}))
    assert stage.play(spoilt) is True
    assert stage.coordinator.reasons == ["'complete' must be of type bool, found int."]


def test_a_message_of_a_run_that_is_over_is_dropped(stage):
    stage.coordinator.fetch_errors = [RunOver("over")]
    first, second = stage.message(), stage.message()
    assert stage.play(first, second, stage.until_answered()) is True
    assert [m.metadata.message_id for m in stage.workers.asked] == [second.metadata.message_id]


def test_changed_terms_wait_for_a_yes(stage, caplog, tiny_config):
    config = tiny_config("rounds.number=9", "training.learning_rate=0.5")
    other = replace(stage.terms, config=config)
    call, again = (stage.message(pack_roll_call(other)) for _ in range(2))
    seen = {}

    def look() -> None:
        seen["proposed"] = consent.proposed_terms(stage.folder)
        seen["workers"] = len(stage.workers.made)
        seen["status"] = stage.status.read_text()
        consent.accept(stage.folder, other, other.hash())

    assert stage.play(call, look, again, stage.until_answered(2)) is True
    assert stage.coordinator.reasons == [
        "Oslo: has not accepted the changed terms yet (fed-client review)."
    ]
    assert seen["proposed"] == other
    assert '"state": "terms to review"' in seen["status"]
    text = said(caplog)
    assert "rounds.number: 3 -> 9" in text
    assert "training.learning_rate: 0.02 -> 0.5" in text
    assert f"fed-client review {stage.folder.path}" in text
    assert len(stage.workers.made) == seen["workers"] + 1, "prepared anew"
    assert [m.metadata.message_id for m in stage.workers.asked] == [again.metadata.message_id]
    assert consent.proposed_terms(stage.folder) is None


def test_terms_of_other_code_or_federation_are_changed_terms(stage):
    for other in (
        replace(stage.terms, code_hash="ab" * 32),
        replace(stage.terms, federation="ab" * 16),
    ):
        stage.coordinator.script.append(stage.message(pack_roll_call(other)))
    assert stage.play() is True
    assert len(stage.coordinator.reasons) == 2
    assert stage.workers.asked == []


def test_changed_terms_are_told_of_once(stage, caplog, tiny_config):
    other = replace(stage.terms, config=tiny_config("rounds.number=9"))
    calls = [stage.message(pack_roll_call(other)) for _ in range(3)]
    assert stage.play(*calls) is True
    assert len(stage.coordinator.reasons) == 3
    assert said(caplog).count("the coordinator has changed the terms") == 1


def updated(message: Message) -> list[Event]:
    """A worker's answer as it is after training, with weights."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = RUN, RUN, NODE
    round_ = message.content["about"]["round"]
    if message.metadata.message_type == MessageType.TRAIN:
        weights = {"w": torch.ones(3)}
        content = pack_site_update(SiteUpdate("Oslo", round_, 12, weights, loss=0.5))
    else:
        means = dict.fromkeys(("loss", "dice/WT", "dice/TC", "dice/ET"), 0.5)
        metrics = SiteMetrics(5, means, dict.fromkeys(means, 5))
        content = pack_site_report(SiteReport("Oslo", round_, metrics))
    return [Event("reply", {}, pack(Message(content, reply_to=message)))]


def asked_in_turn(stage: Stage, *tasks: tuple[str, int]) -> list[str]:
    """Each task after the answer to the last: what was refused, "" for what was done."""
    stage.workers.answer = updated
    script: list[Any] = []
    before = len(stage.coordinator.sent)
    for number, (kind, round_) in enumerate(tasks, start=1):
        script += [stage.message(kind=kind, round_=round_), stage.until_answered(before + number)]
    assert stage.play(*script) is True
    return [r.error.reason if r.has_error() else "" for r in stage.answers[before:]]


def test_nobody_asks_for_more_answers_about_a_round_than_it_takes(stage, monkeypatch):
    """Many answers about one round tell more about the data than the one that was agreed to."""
    monkeypatch.setattr(refusals, "MOST_ANSWERS", 3)
    train, evaluate = MessageType.TRAIN, MessageType.EVALUATE
    reasons = asked_in_turn(stage, *[(train, 1)] * 4, *[(evaluate, 1)] * 4, (train, 2))
    many = "Oslo: it has answered 3 times for round 1."
    assert reasons == ["", "", "", many, "", "", "", many, ""]
    assert len(stage.workers.asked) == 7, "what is refused is not computed"


def test_nobody_trains_for_an_earlier_round_again(stage):
    train, evaluate = MessageType.TRAIN, MessageType.EVALUATE
    refusals = asked_in_turn(stage, (train, 2), (train, 1), (evaluate, 1), (train, 2), (train, 3))
    assert refusals == [
        "",
        "Oslo: it has trained for later rounds than 1 already.",
        "",  # the chosen model is measured at the end, of whatever round
        "",
        "",
    ]


def test_a_new_yes_begins_the_count_anew(stage, monkeypatch):
    monkeypatch.setattr(refusals, "MOST_ANSWERS", 1)
    train = MessageType.TRAIN
    assert asked_in_turn(stage, (train, 1), (train, 1))[1] != ""
    consent.accept(stage.folder, stage.terms, stage.terms.hash())
    assert asked_in_turn(stage, (train, 1))[-1:] == [""]


def test_a_task_without_a_round_is_refused(stage):
    stage.workers.answer = updated
    for content in (RecordDict(), RecordDict({"about": ConfigRecord({"round": "one"})})):
        stage.coordinator.script.append(stage.message(content, MessageType.TRAIN))
    assert stage.play() is True
    assert stage.coordinator.reasons == ["Oslo: the task names no round."] * 2
    assert stage.workers.asked == []


def test_who_withdraws_the_yes_takes_no_further_part(stage):
    with pytest.raises(JoinFailed, match="not accepted"):
        stage.play(lambda: consent.withdraw(stage.folder), stage.message())
    assert stage.coordinator.sent == []
    assert stage.workers.living == 0


# --------------------------------------------------------------------------- the site's own policy


@pytest.fixture
def under(stage) -> Callable[..., None]:
    """A function that puts the stage's membership under a policy."""

    def put(**rules: Any) -> None:
        policy = Policy(**rules)
        membership = stage.membership
        membership._settings = membership._settings.model_copy(update={"policy": policy})
        membership._gate = replace(membership._gate, policy=policy)

    return put


def never() -> str:
    """A window of one minute, twelve hours from now."""
    then = datetime.now() + timedelta(hours=12)
    day = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"][then.weekday()]
    end = then + timedelta(minutes=1)
    return f"{day} {then:%H:%M}-{end:%H:%M}"


def test_a_task_against_the_policy_is_refused_by_the_rules_name(stage, under, caplog):
    under(max_rounds=2)
    reason = refused(stage, stage.message(kind=MessageType.TRAIN, round_=3))
    assert reason == "Oslo: policy rule `max_rounds`: found 3, allowed at most 2."
    assert reason in said(caplog)
    stage.membership._display.write()
    assert json.loads(stage.status.read_text())["refused"] == reason


def test_out_of_hours_it_takes_no_part_and_says_so_once(stage, under, caplog):
    under(train_when=(never(),))
    calls = [stage.message() for _ in range(3)]
    assert stage.play(*calls, stage.message(kind=MessageType.TRAIN, round_=1)) is True
    assert stage.workers.asked == []
    assert len(stage.coordinator.reasons) == 4
    assert all("policy rule `train_when`" in reason for reason in stage.coordinator.reasons)
    assert said(caplog).count("policy rule `train_when`") == 1


def test_what_it_may_evaluate_out_of_hours_it_does(stage, under):
    under(train_when=(never(),))
    stage.workers.answer = updated
    task = stage.message(kind=MessageType.EVALUATE, round_=1)
    assert stage.play(task, stage.until_answered()) is True
    assert "means" in stage.answers[0].content


def test_training_ends_with_its_hours(stage, under):
    stage.workers.answer = silent
    task = stage.message(kind=MessageType.TRAIN, round_=1)
    close = lambda: under(train_when=(never(),))  # noqa: E731
    assert stage.play(task, close, stage.until_answered()) is True
    assert "policy rule `train_when`" in stage.answers[0].error.reason
    assert stage.workers.made[0].killed


def test_a_task_ends_after_the_policys_hours(stage, under):
    under(max_hours=0.3 / 3600)
    stage.workers.answer = silent
    begin = time.monotonic()
    task = stage.message(kind=MessageType.EVALUATE, round_=1)
    assert stage.play(task, stage.until_answered()) is True
    assert time.monotonic() - begin >= 0.3
    assert "policy rule `max_hours`" in stage.answers[0].error.reason
    assert stage.workers.made[0].killed


def test_a_task_ends_after_the_policys_hours_while_the_coordinator_is_away(stage, under):
    """Nobody can be told, and the worker stops all the same."""
    under(max_hours=0.2 / 3600)
    stage.workers.answer = silent
    task = stage.message(kind=MessageType.TRAIN, round_=1)
    killed: list[bool] = []

    def away() -> Any:
        if time.monotonic() < begin + 1.0:
            stage.coordinator.script.insert(0, away)
            return Unreachable("away")
        killed.append(stage.workers.made[0].killed)
        return None

    begin = time.monotonic()
    assert stage.play(task, away, stage.until_answered()) is True
    assert killed == [True]
    assert "policy rule `max_hours`" in stage.answers[0].error.reason


def test_an_answer_that_was_kept_for_too_long_does_not_leave(stage, under):
    stage.workers.answer = updated
    task = stage.message(kind=MessageType.TRAIN, round_=1)

    def away() -> Any:
        if time.monotonic() > begin + 0.5:
            under(train_when=(never(),))
            return None
        stage.coordinator.script.insert(0, away)
        return Unreachable("away")

    begin = time.monotonic()
    assert stage.play(task, away, stage.until_answered()) is True
    (answer,) = stage.answers
    assert "policy rule `train_when`" in answer.error.reason
    assert answer.error.code == POLICY_REFUSED


def test_what_a_rule_refuses_has_a_code_of_its_own_and_nothing_else_has(stage, under):
    under(train_when=(never(),))
    none = stage.message(kind=MessageType.EVALUATE)
    none.content["about"]["round"] = "one"
    other = replace(stage.terms, code_hash="ab" * 32)
    assert stage.play(stage.message(), none, stage.message(pack_roll_call(other))) is True
    codes = [answer.error.code for answer in stage.answers]
    assert codes[:2] == [POLICY_REFUSED, ErrorCode.CLIENT_APP_RAISED_EXCEPTION]
    assert "has not accepted the changed terms" in stage.coordinator.reasons[2]
    assert codes[2] == ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def test_a_site_that_has_too_few_to_train_need_not_protect_what_it_does_not_send(stage, under):
    under(min_subjects=13, require_privacy=True, require_secure_aggregation=True)
    assert stage.play(stage.message(), stage.until_answered()) is True
    assert stage.answers[0].has_content()
    under(min_subjects=12, require_privacy=True)
    stage.coordinator.sent.clear()
    assert stage.play(stage.message(), stage.until_answered()) is True
    assert "policy rule `require_privacy`" in stage.answers[0].error.reason


def test_patients_are_counted_once_the_data_are(stage):
    few = {**PREPARED.details, "training_patients": 4}
    stage.workers.preparing = [Event("prepared", few)]
    reason = refused(stage, stage.message(kind=MessageType.TRAIN, round_=1))
    assert "policy rule `min_subjects`" in reason


def test_what_too_few_subjects_keep_from_leaving_is_said_at_the_start(stage, under, caplog):
    few = {**PREPARED.details, "training_patients": 4, "held_out_patients": 3}
    stage.workers.preparing = [Event("prepared", few)]
    assert stage.play(stage.message(), stage.until_answered()) is True
    text = said(caplog)
    assert (
        "this site does not train: it has 4 training subjects, and its policy.min_subjects lets no "
        "update leave that was trained on fewer than 5." in text
    )
    assert "this site tells no metric: it holds out 3 subjects, and its policy.min_subjects" in text
    assert f"joining again. What may leave: fed-client policy explain {stage.folder.path}" in text
    caplog.clear()
    under(min_subjects=3)
    stage.workers.preparing = [Event("prepared", few)]
    assert stage.play(stage.message(), stage.until_answered()) is True
    assert "min_subjects" not in said(caplog)


def test_changed_terms_against_the_policy_are_told_to_be(stage, under, tiny_config):
    under(max_rounds=5)
    other = replace(stage.terms, config=tiny_config("rounds.number=9"))
    assert stage.play(stage.message(pack_roll_call(other))) is True
    assert stage.coordinator.reasons == [
        "Oslo: the terms are against policy rule `max_rounds`: found 9, allowed at most 5."
    ]
    assert consent.proposed_terms(stage.folder) == other, "to be looked at all the same"


def test_terms_that_were_accepted_behind_the_policys_back_are_refused(stage, under):
    under(max_rounds=1)
    assert "policy rule `max_rounds`" in refused(stage, stage.message())


def test_what_the_gate_holds_back_is_told_on_both_sides(stage, under, caplog):
    """The worker has trained all the same: a slip that the gate makes good."""
    stage.workers.answer = updated
    task = stage.message(kind=MessageType.TRAIN, round_=1)

    def begun() -> None:
        under(require_secure_aggregation=True)

    stage.workers.answer = lambda m: begun() or updated(m)
    assert stage.play(task, stage.until_answered()) is True
    assert "policy rule `require_secure_aggregation`" in stage.answers[0].error.reason
    assert "the answer was not let out: policy rule" in said(caplog)


# --------------------------------------------------------------------------- one task at a time


def test_a_newer_message_replaces_the_task_in_hand(stage):
    old, new = stage.message(kind=MessageType.TRAIN), stage.message()
    stage.workers.answer = lambda m: (
        answered(m) if m.metadata.message_id == new.metadata.message_id else []
    )
    begun = [lambda: None, lambda: None]
    assert stage.play(old, *begun, new, stage.until_answered()) is True
    assert len(stage.workers.asked) == 2
    first, second = stage.workers.made
    assert first.killed, "it would go on for hours"
    (answer,) = stage.answers
    assert answer.content["card"]["config_fingerprint"] == new.metadata.message_id
    assert second is not first


def test_the_same_message_again_changes_nothing(stage):
    task = stage.message(kind=MessageType.TRAIN)
    events: list[Event] = []
    stage.workers.answer = lambda m: events.extend(answered(m)) or []

    def finish() -> None:
        stage.workers.made[0]._events += events

    assert stage.play(task, task, None, task, finish, stage.until_answered()) is True
    assert len(stage.workers.asked) == 1
    assert len(stage.workers.made) == 1
    assert len(stage.answers) == 1


def test_the_deadline_ends_a_task_that_hangs(stage):
    stage.workers.answer = lambda m: silent(m) if m.metadata.ttl < 1 else answered(m)
    hung, next_ = stage.message(kind=MessageType.TRAIN, ttl=0.3), stage.message()
    begin = time.monotonic()
    done = stage.until_answered
    assert stage.play(hung, done(1), next_, done(2)) is True
    assert time.monotonic() - begin >= 0.27
    late, good = stage.answers
    assert late.error.reason == "it took longer than the round's deadline of 0.005 minutes."
    assert good.has_content()
    assert [worker.killed for worker in stage.workers.made] == [True, True]
    assert len(stage.workers.made) == 2, "the next task has a new worker"


def test_a_worker_that_talks_all_the_time_has_the_same_deadline(stage):
    step = answered(stage.message())[1]
    stage.workers.answer = lambda m: [step] * 10**6 if m.metadata.ttl < 1 else []
    stage.play(stage.message(kind=MessageType.TRAIN, ttl=0.2), stage.until_answered())
    assert "deadline" in stage.answers[0].error.reason


def test_a_dead_worker_is_an_answer_and_the_next_task_has_a_new_one(stage):
    words = "the training process was killed (signal 9)."
    events = iter([[Event("died", {"text": words})], None])
    stage.workers.answer = lambda m: next(events) or answered(m)
    done = stage.until_answered
    assert stage.play(stage.message(), done(1), stage.message(), done(2)) is True
    died, good = stage.answers
    assert died.error.reason == words
    assert good.has_content()
    assert len(stage.workers.made) == 2


def test_what_failed_inside_is_told_on_this_side_only(stage, caplog):
    secret = "internal error (KeyError) at /data/BraTS20_Training_001"
    stage.workers.answer = lambda m: [Event("failed", {"text": secret, "findings": []})]
    assert stage.play(stage.message(), stage.until_answered()) is True
    assert stage.coordinator.reasons == ["internal error."]
    assert secret in said(caplog)


def test_an_answer_that_nobody_waits_for_is_let_go(stage, caplog):
    stage.coordinator.waits = False
    assert stage.play(stage.message(), stage.until_answered()) is True
    assert "no longer waits for this answer" in said(caplog)


# --------------------------------------------------------------------------------- preparation


def test_data_that_cannot_be_used_end_it_with_the_findings(stage):
    findings = [{"site": "Oslo", "subject": "S1"}]
    stage.workers.preparing = [Event("failed", {"text": "no subject", "findings": findings})]
    with pytest.raises(JoinFailed, match="no subject") as caught:
        stage.membership.run()
    assert caught.value.findings == findings
    assert stage.coordinator.did == [], "nobody was connected to"
    assert stage.workers.living == 0
    stage.workers.preparing = [Event("died", {"text": "ended with exit code 1."})]
    with pytest.raises(JoinFailed, match="exit code 1"):
        stage.membership.run()


def test_it_can_be_stopped_while_preparing(stage):
    stage.workers.preparing = []
    threading.Timer(0.1, stage.membership.stop).start()
    with pytest.raises(Stopped):
        stage.membership.run()
    assert stage.workers.living == 0


# ------------------------------------------------------------------------------- being stopped


def test_who_is_stopped_in_a_task_tells_the_coordinator(stage):
    stage.workers.answer = silent
    stage.coordinator.script = [stage.message(), None, None, lambda: stage.membership.stop()]
    with pytest.raises(Stopped):
        stage.membership.run()
    assert stage.coordinator.reasons == ["the site's client was stopped."]
    assert stage.coordinator.did[-2:] == ["hurry", "close"]
    assert stage.workers.living == 0


def test_who_is_stopped_without_a_task_says_goodbye_only(stage):
    stage.coordinator.script = [None, lambda: stage.membership.stop()]
    with pytest.raises(Stopped):
        stage.membership.run()
    assert stage.coordinator.sent == []
    assert stage.coordinator.did[-1] == "close"


def test_being_stopped_works_while_the_coordinator_is_away(stage, monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 1000.0)
    stage.coordinator.open_errors = [Unreachable("away")] * 100
    threading.Timer(0.1, stage.membership.stop).start()
    begin = time.monotonic()
    with pytest.raises(Stopped):
        stage.membership.run()
    assert time.monotonic() - begin < 30


def test_signals_stop_it_and_are_given_back(stage):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        stage.membership._stop.clear()
        with stopping(stage.membership):
            os.kill(os.getpid(), number)
            assert stage.membership._stop.wait(10)
    assert {number: signal.getsignal(number) for number in before} == before


# --------------------------------------------------------------------- the coordinator is away


def test_it_comes_back_after_any_pause(stage, caplog):
    away = [Unreachable("127.0.0.1: nothing listens there now.")] * 3
    stage.coordinator.open_errors = away[:2]
    assert stage.play(*away, stage.message(), stage.until_answered(), *away) is True
    assert len(stage.answers) == 1
    text = said(caplog)
    assert text.count("nothing listens there now. Trying again.") == 3, "once for each absence"
    assert "connected again" in text


def test_pauses_grow_up_to_a_limit_and_are_not_the_same_everywhere(stage, monkeypatch):
    waited: list[float] = []
    factors: list[tuple[float, float]] = []
    monkeypatch.setattr(Membership, "_wait", lambda self, seconds: waited.append(seconds))
    monkeypatch.setattr(
        module.random, "uniform", lambda low, high: factors.append((low, high)) or 1.0
    )
    assert stage.play(*[Unreachable("away")] * 7) is True
    assert waited == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.08, 0.08, 0.08])
    assert set(factors) == {(0.8, 1.2)}, "so that not all hospitals come at once"


class Clock:
    """Time for `client.join` alone; every look takes a minute."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        self._now += 60
        return self._now


def minutes_in(text: str) -> int:
    return int(text.partition("Given up after ")[2].split()[0])


def test_patience_ends(stage, monkeypatch):
    monkeypatch.setattr(module, "time", Clock())
    stage.coordinator.open_errors = [Unreachable("127.0.0.1: away.")] * 1000
    with pytest.raises(JoinFailed) as caught:
        stage.membership.run()
    assert str(caught.value).startswith("127.0.0.1: away. Given up after ")
    assert "Ask the coordinator whether the server runs." in str(caught.value)
    assert 30 < minutes_in(str(caught.value)) < 35, "half an hour, by site.yaml"


def test_another_client_with_the_key_is_waited_for_three_minutes(stage, monkeypatch):
    monkeypatch.setattr(module, "time", Clock())
    stage.coordinator.open_errors = [AlreadyConnected("another client")] * 1000
    with pytest.raises(JoinFailed, match="fed-client rotate-key") as caught:
        stage.membership.run()
    assert "another machine" in str(caught.value)
    assert 3 < minutes_in(str(caught.value)) < 8


def test_a_task_whose_answer_was_not_taken_is_not_done_again(stage):
    """Offered again, it is answered with words, once: the round need not wait for its deadline."""
    task = stage.message()
    stage.coordinator.send_errors = [RunOver("the reply was refused")]
    asked = stage.workers.asked

    def refused() -> Any:
        if stage.coordinator.send_errors:
            stage.coordinator.script.insert(0, refused)
        return None

    assert stage.play(task, refused, task, task, None, task) is True
    assert [m.metadata.message_id for m in asked] == [task.metadata.message_id]
    assert stage.coordinator.reasons == ["its answer was not accepted."]


def test_a_refusal_that_is_not_taken_is_not_said_without_end(stage):
    stage.coordinator.foreign = ("ee" * 16, stage.terms.code_hash)
    stage.coordinator.waits = False
    task = stage.message(kind=MessageType.TRAIN, run=77)
    assert stage.play(*[task] * 20) is True
    assert len(stage.coordinator.reasons) == 2, "the refusal, and that it was not accepted"
    assert len(outbound.departures(stage.folder.audit)) == 3, "and the farewell"


def test_a_refusal_at_the_door_is_the_end(stage):
    stage.coordinator.open_errors = [Refused("does not know this site's key")]
    with pytest.raises(JoinFailed, match="does not know this site's key"):
        stage.membership.run()
    assert stage.coordinator.did == ["open", "hurry", "close"]


def test_a_refusal_later_may_pass(stage):
    """The server may have begun anew, a clock may be wrong for a moment, a proxy in between."""
    refusals = [Refused("unknown node")] * 3
    assert stage.play(*refusals, stage.message(), stage.until_answered()) is True
    assert stage.coordinator.did.count("open") == 1 + 3, "it becomes its key's node again"
    assert len(stage.answers) == 1


def test_becoming_the_node_again_may_find_that_it_is_it_already(stage):
    stage.coordinator.open_errors = []

    def refuse() -> Exception:
        stage.coordinator.open_errors = [AlreadyConnected("it is this client")]
        return Refused("a proxy said no")

    assert stage.play(refuse, stage.message(), stage.until_answered()) is True


def test_a_refusal_that_stays_is_the_end_after_minutes(stage, monkeypatch):
    stage.coordinator.script = [lambda: monkeypatch.setattr(module, "time", Clock())]
    stage.coordinator.script += [Refused("does not know this site's key")] * 1000
    with pytest.raises(JoinFailed, match="does not know this site's key") as caught:
        stage.membership.run()
    assert 5 < minutes_in(str(caught.value)) < 10
    assert str(caught.value).endswith("minutes.")
    assert stage.workers.living == 0


def test_what_the_worker_says_meanwhile_is_not_lost(stage):
    """The answer is ready while the server is down for a while: it is sent when it is back, once."""
    events: list[Event] = []
    stage.workers.answer = lambda message: events.extend(answered(message)) or []

    def finish() -> Exception:
        """The worker is ready now, and nobody is there."""
        stage.workers.made[0]._events += events
        return Unreachable("away")

    away = [lambda: Unreachable("away")] * 4
    task = stage.message(kind=MessageType.TRAIN)
    assert stage.play(task, None, finish, *away, None, stage.until_answered()) is True
    assert stage.workers.made[0]._events == [], "heard while nobody was there, or it would be stuck"
    (reply,) = stage.answers
    assert reply.content["card"]["config_fingerprint"] == task.metadata.message_id
    assert [row["kind"] for row in outbound.departures(stage.folder.audit)] == ["card", "other"]


def test_an_answer_is_sent_again_until_it_has_arrived_and_recorded_once(stage):
    stage.coordinator.send_errors = [Unreachable("cut")] * 3
    assert stage.play(stage.message(), stage.until_answered()) is True
    assert len(stage.answers) == 1
    assert [row["kind"] for row in outbound.departures(stage.folder.audit)] == ["card", "other"]


def test_an_answer_to_a_run_that_is_over_is_let_go(stage):
    stage.coordinator.send_errors = [RunOver("over")]
    done = stage.until_answered
    assert stage.play(stage.message(), None, None, stage.message(), done(1)) is True
    assert len(stage.answers) == 1


# -------------------------------------------------------------------------- the only way out


def test_without_the_record_nothing_leaves(stage):
    stage.folder.audit.path.write_bytes(b"not a log" * 100)
    with pytest.raises(JoinFailed, match="tampered with or damaged: entry 1 "):
        stage.play(stage.message(), stage.until_answered())
    assert stage.coordinator.did == [], "not even a connection"
    assert stage.workers.living == 0


@pytest.mark.parametrize("what", ["answer", "refusal", "farewell", "last word"])
def test_once_the_record_cannot_be_written_nothing_leaves_any_more(stage, what):
    def spoil() -> None:
        stage.folder.audit.path.write_bytes(b"not a log")

    if what == "last word":
        stage.workers.answer = silent
        script = [stage.message(), None, spoil, stage.membership.stop]
    elif what == "answer":
        task = stage.message()
        stage.workers.answer = lambda message: [spoil(), *answered(message)][1:]
        script = [task, stage.until_answered()]
    else:
        script = [spoil, *([stage.message(RecordDict())] if what == "refusal" else [])]
    with pytest.raises(Stopped if what == "last word" else JoinFailed):
        stage.play(*script)
    assert stage.coordinator.sent == []
    assert stage.coordinator.did[-1] == "close"
    assert stage.workers.living == 0


# ------------------------------------------------------------------------------ the audit trail


def trail(stage: Stage, *kinds: str) -> list[dict[str, Any]]:
    return [{**e.details, "kind": e.kind} for e in told(stage.folder.audit, *kinds)]


def with_heads(message: Message, mine: Head, yours: Head = EMPTY) -> Message:
    attach_heads(message.content, Heads(mine, yours))
    return message


def one(number: int, digit: str = "a") -> Head:
    return Head(number, digit * 64)


def test_every_event_is_an_entry(stage):
    block = Array("uint8", (3,), STYPE, b"abc")
    content = RecordDict(
        {"about": ConfigRecord({"round": 4}), "weights": ArrayRecord({"weights": block})}
    )
    train = stage.message(content, MessageType.TRAIN)
    foreign = stage.message(run=FOREIGN)
    done = stage.until_answered
    stage.play(stage.message(), done(1), train, done(2), foreign)
    entries = trail(stage)
    assert [entry["kind"] for entry in entries] == [
        *("key", "folder made", "terms accepted", "join begun", "connected"),
        *("task received", "answered", "sent"),
        *("task received", "trained", "sent"),
        *("refused", "sent"),
        *("task received", "farewell", "sent", "join ended"),
    ]
    begun, received = entries[3], entries[8]
    assert (begun["site"], begun["terms"]) == ("Oslo", stage.terms.hash())
    assert (received["task"], received["round"], received["bytes"]) == ("train", 4, 3)
    assert received["sha256"] == hashlib.sha256(b"abc").hexdigest()
    assert entries[9]["round"] == 4
    assert "another federation" in entries[11]["why"]
    assert entries[-1]["how"] == "complete"
    assert verified(stage.folder.audit).unfinished == 0


def test_heads_are_exchanged_and_written_down(stage):
    """Each reply tells the entry before its own, and the last that was heard."""
    first = with_heads(stage.message(), one(7))
    second = with_heads(stage.message(), one(9, "b"), one(0, "0"))
    done = stage.until_answered
    stage.play(first, done(1), second, done(2))
    numbers = {entry.number: entry for entry in verified(stage.folder.audit).entries}
    sent = [entry for entry in numbers.values() if entry.kind == "sent"]
    for reply, entry, heard in zip(
        stage.coordinator.sent, sent, (one(7), one(9, "b"), one(9, "b")), strict=True
    ):
        heads = attached_heads(reply.content)
        assert heads == Heads(numbers[entry.number - 1].head, heard)
        assert entry.details["details"]["audit"]["number"] == entry.number - 1
    told_ = [
        entry["heard"]["number"] for entry in trail(stage, "task received") if "heard" in entry
    ]
    assert told_ == [7, 9]


def test_what_the_coordinator_remembers_must_be_in_the_log(stage):
    known = verified(stage.folder.audit).head
    done = stage.until_answered
    good = with_heads(stage.message(), one(7), known)
    bad = with_heads(stage.message(), one(8), Head(known.number, "c" * 64))
    with pytest.raises(JoinFailed, match=r"remembers entry 3 .* not in it"):
        stage.play(good, done(1), bad)
    assert [len(stage.coordinator.sent), len(stage.coordinator.reasons)] == [2, 1]
    assert "cut off, rewritten" in stage.coordinator.reasons[0]
    assert trail(stage, "problem")
    assert stage.coordinator.did[-1] == "close"


def test_a_log_that_was_cut_off_together_with_its_anchor_is_noticed(stage):
    log = stage.folder.audit
    known = verified(log).head
    before = log.path.read_bytes(), log.anchor.read_bytes()
    for _ in range(3):
        known = append(log, "sent", {}).head
    log.path.write_bytes(before[0])
    log.anchor.write_bytes(before[1])
    with pytest.raises(JoinFailed, match=rf"remembers entry {known.number} "):
        stage.play(with_heads(stage.message(), one(8), known))


@pytest.mark.parametrize("then", [one(6), one(7, "d"), None], ids=["back", "other", "silent"])
def test_a_coordinator_whose_log_goes_back_is_named_and_that_is_an_entry(stage, caplog, then):
    done = stage.until_answered
    second = stage.message()
    if then is not None:
        with_heads(second, then)
    stage.play(with_heads(stage.message(), one(7)), done(1), second, done(2))
    assert "the coordinator " in (said_ := trail(stage, "problem")[0]["what"])
    assert said_ in said(caplog)


def test_the_coordinators_head_is_remembered_over_a_restart(stage, caplog, invitation):
    stage.play(with_heads(stage.message(), one(7)), stage.until_answered())
    settings = load_site_config(stage.folder.config)
    stage.membership = Membership(
        stage.folder, settings, invitation, Display(stage.status, site="Oslo")
    )
    stage.play(with_heads(stage.message(), one(5)))
    assert "5 entries, and it had 7" in said(caplog)


def test_heads_of_another_form_are_refused(stage):
    strange = stage.message()
    strange.content["audit"] = ConfigRecord({"number": -1, "hash": "x"})
    stage.play(strange)
    assert "audit log has an impossible value" in stage.coordinator.reasons[0] or (
        "heard_number" in stage.coordinator.reasons[0]
    )


NETWORK = {  # what can open a connection or hand something to another program
    *("httpx", "requests", "aiohttp", "urllib", "urllib3", "http", "socket", "socketserver", "ssl"),
    *("ftplib", "smtplib", "poplib", "imaplib", "telnetlib", "xmlrpc", "asyncio", "grpc"),
    *("websockets", "paramiko", "zmq", "uvicorn", "fastapi", "starlette", "subprocess", "pty"),
    *("multiprocessing", "ctypes", "cffi", "webbrowser", "importlib", "runpy", "pickle", "shelve"),
}
MAY = {
    "client/connection.py": {"httpx", "ssl"},
    "client/worker.py": {"multiprocessing"},  # its end of the pair of sockets
    "client/worker_process.py": {"multiprocessing", "subprocess"},
    # they answer this machine's browser, and ask nobody
    "client/viewer.py": {"fastapi", "starlette"},
    "common/monai_on_demand.py": {"importlib"},  # modules that MONAI's own packages name
    "common/few_connections.py": {"asyncio", "socket"},
    "common/local_page.py": {"socket", "starlette", "urllib", "webbrowser"},
    "common/served.py": {"socket", "ssl", "uvicorn"},
}
PAGES = ("client.viewer", "client.viewing", "common.local_page", "common.served")
FLOWER_NETWORK = (
    *("flwr.supernode.", "flwr.superlink.", "flwr.client.", "flwr.server.", "flwr.cli."),
    *("flwr.serverapp.", "flwr.simulation.", "flwr.supercore.protobuf.", "flwr.supercore.grpc."),
)
MODULES = sorted(
    p for package in ("client", "common", "sites") for p in (ROOT / package).rglob("*.py")
)


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(name of the function or method, the call) in order of lines."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(found, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(call.func, ast.Attribute):
            yield call.func.attr, call
        elif isinstance(call.func, ast.Name):
            yield call.func.id, call


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_only_the_connection_can_reach_the_network(path):
    name = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text())
    found = imports(tree)
    # these two parts of importlib read versions and files, and import nothing
    harmless = ("importlib.metadata.", "importlib.resources.")
    tops = {module_.split(".")[0] for module_ in found if not module_.startswith(harmless)}
    assert not (tops & NETWORK) - MAY.get(name, set()), name
    if name != "client/connection.py":
        assert not [m for m in found if m.startswith(FLOWER_NETWORK)], name
    for call, node in calls(tree):
        if isinstance(node.func, ast.Name):
            assert call not in ("eval", "exec", "compile", "__import__"), name
        else:
            assert not re.fullmatch(
                r"(exec|spawn|posix_spawn)[lv]?p?e?|system|popen|import_module", call
            )
    if name != "client/join.py":
        assert not [m for m in found if m == "client.connection.Connection"], name
    if not name.startswith(
        ("client/view", "common/local_page")
    ):  # nothing that has to do with a federation serves a page
        served = [m for m in found if m.startswith(PAGES)]
        assert not served or (name, served) == ("client/cli.py", ["client.viewer_commands"]), name


def test_whatever_is_sent_was_released_in_the_lines_above():
    tree = ast.parse((ROOT / "client" / "join.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    sends = 0
    for function in functions:
        given = [
            ast.unparse(node.value)
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "released"
        ]
        assert set(given) <= RELEASES, function.name
        others = [
            node for node in ast.walk(function) if isinstance(node, ast.NamedExpr | ast.AugAssign)
        ]
        assert not [node for node in others if ast.unparse(node.target) == "released"]
        released_at = [call.lineno for name, call in calls(function) if name == "release"]
        for name, call in calls(function):
            if name == "send":
                sends += 1
                assert [ast.unparse(argument) for argument in call.args] == ["released.reply"]
                assert min(released_at) < call.lineno, f"{function.name}: {call.lineno}"
    assert sends == 3, "an answer, the farewell's acknowledgement, and that the client was stopped"


def test_there_is_one_gate_and_nobody_else_opens_it():
    """`Released` is made by `release` alone, and the gate of a membership holds this site's policy."""
    made: list[tuple[str, str]] = []
    for path in MODULES:
        for name, call in calls(ast.parse(path.read_text())):
            if name in ("Released", "Gate", "release", "permitted", "_allowed"):
                made.append((path.relative_to(ROOT).as_posix(), ast.unparse(call)))
    assert sorted(made) == [
        (
            "client/join.py",
            "outbound.Gate(folder.audit, settings.policy, own, self._sign)",
        ),
        ("client/join.py", "outbound.release(reply, message, self._gate)"),
        *[("client/join.py", "outbound.release(reply, task, self._gate)")] * 2,
        ("client/outbound.py", "Released(allowed, _record(allowed, gate.record))"),
        ("client/outbound.py", "_allowed(reply, task, gate)"),
        ("client/outbound.py", "permitted(reply.content, gate.policy, gate.own)"),
    ]
    text = (ROOT / "client" / "join.py").read_text()
    assert text.count("self._gate = ") == 2
    assert "self._gate = replace(self._gate, own=own)" in text, "once the data were counted"


def test_what_reaches_the_connection_is_what_was_released(stage, monkeypatch):
    """Whatever the worker says: a good answer, one with more in it than agreed, an error, the end."""
    released: list[Message] = []
    release = outbound.release

    def listed(reply: Message, task: Message, gate: outbound.Gate) -> outbound.Released:
        made = release(reply, task, gate)
        released.append(made.reply)
        return made

    monkeypatch.setattr(outbound, "release", listed)

    def talkative(message: Message) -> list[Event]:
        (event,) = updated(message)
        reply = unpack(event.payload)
        reply.content["subjects"] = ConfigRecord({"ids": ["BraTS20_Training_001"]})
        reply.content["about"]["folder"] = "/data/brats"
        return [Event("reply", {}, pack(reply))]

    stage.workers.answer = talkative
    done = stage.until_answered
    train, evaluate = (
        stage.message(kind=kind, round_=1) for kind in (MessageType.TRAIN, MessageType.EVALUATE)
    )
    stage.coordinator.foreign = ("ee" * 16, stage.terms.code_hash)
    foreign = stage.message(kind=MessageType.TRAIN, run=FOREIGN)
    assert stage.play(train, done(1), evaluate, done(2), foreign, done(3)) is True
    assert len(stage.coordinator.sent) == len(released) == 4
    assert all(a is b for a, b in zip(stage.coordinator.sent, released, strict=True))
    update, report = stage.answers[:2]
    assert set(update.content) == {"about", "weights", "audit"}
    assert set(report.content) == {"about", "means", "defined", "audit"}
    for answer in (update, report):
        assert "folder" not in answer.content["about"]


def test_a_connection_sends_contents_in_one_place_only():
    """Its other requests hold numbers of nodes and runs, names of pieces, and the key."""
    tree = ast.parse((ROOT / "client" / "connection.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    pushing = {
        function.name
        for function in functions
        if {"PushMessages", "PushObject", "PushMessagesRequest", "PushObjectRequest"}
        & {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
        | {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        & {"PushMessagesRequest", "PushObjectRequest"}
    }
    assert pushing == {"send"}
    given = {
        keyword.arg
        for name, call in calls(tree)
        if name.endswith("Request") and not name.startswith("Push")
        for keyword in call.keywords
    }
    assert given == {"public_key", "heartbeat_interval", "node_id", "node", "run_id", "object_id"}


def test_the_process_with_the_connection_does_without_torch():
    """It runs for weeks; only its worker needs torch's seconds and 200 MB."""
    program = "import client.join, client.display, sys; print('torch' in sys.modules)"
    command = (sys.executable, "-c", program)
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"
