"""Who takes part in a round: waited for within limits, named when missing, asked again when refusing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.app.error import Error
from flwr.supercore.task_identity import TaskIdentity

from common.message_words import POLICY_REFUSED
from common.messages import SiteCard, pack_site_card
from common.notices import unpack_roll_call
from common.terms import Terms
from server.attendance import Attendance, Waiting, note_terms
from server.history import Contribution, History, RoundRecord
from server.link_grid import Contact
from server.roll_call import FederationFailed
from tests.server.test_tables import metrics

MINUTE = 60.0
LAST = datetime(2026, 11, 24, 10, 0, tzinfo=UTC)
CODE = "ab" * 32


@dataclass
class Sites:
    """The grid, its sites and the clock: `then` maps a time in seconds to what happens at it."""

    terms: Terms
    enrolled: list[str] = field(default_factory=lambda: ["a", "b", "c"])
    now: float = 0.0
    then: dict[float, Callable[[], None]] = field(default_factory=dict)
    contacts_: dict[str, Contact] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    called: list[tuple[str, float]] = field(default_factory=list)
    shown: list[Waiting | None] = field(default_factory=list)
    _sent: dict[str, tuple[str, float, Message]] = field(default_factory=dict)
    _ids: Any = field(default_factory=count)

    def card(self, site: str, **more: Any) -> SiteCard:
        fingerprint = self.terms.config.fingerprint()
        return SiteCard(site, **{"trains": True, "n_training": 4, "n_held_out": 2,
                                 "n_left_out": 0, "config_fingerprint": fingerprint, **more})  # fmt: skip

    def come(self, *names: str, started: int = 0, node: int = 0, **more: Any) -> None:
        """These connect; from now on they answer with a card, `seconds` after they were called."""
        for name in names:
            moment = LAST.replace(second=started)
            number = node or ord(name)
            self.contacts_[name] = Contact(number, name, True, LAST, moment)
            self.answers.setdefault(name, self.card(name, **more))

    def go(self, *names: str) -> None:
        for name in names:
            self.contacts_[name] = replace(self.contacts_[name], online=False)

    # --------------------------------------------------------------- what the attendance is given

    def contacts(self) -> dict[str, Contact]:
        return dict(self.contacts_)

    def push_messages(self, messages: list[Message]) -> list[str]:
        (message,) = messages
        assert unpack_roll_call(message.content).hash() == self.terms.hash()
        assert message.metadata.message_type == "query"
        (site,) = [
            c.site for c in self.contacts_.values() if c.node == message.metadata.dst_node_id
        ]
        self.called.append((site, self.now))
        message_id = str(next(self._ids))
        self._sent[message_id] = site, self.now + self.seconds.get(site, 0.0), message
        return [message_id]

    def pull_messages(self, ids: list[str]) -> list[Message]:
        (message_id,) = ids
        site, due, message = self._sent[message_id]
        if self.now < due or site not in self.answers:
            return []
        del self._sent[message_id]
        answer = self.answers[site]
        if isinstance(answer, str):
            answer = Error(code=2, reason=answer)
        elif isinstance(answer, SiteCard):
            answer = pack_site_card(answer)
        return [Message(answer, reply_to=message)]

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 10**5, "it waits for ever"
        for moment in sorted(m for m in self.then if m <= self.now):
            self.then.pop(moment)()


@pytest.fixture
def make(tiny_config, monkeypatch) -> Callable[..., tuple[Sites, Attendance]]:
    """A function: further `section.key=value` texts -> sites that have never connected, attendance."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def made(*assign: str) -> tuple[Sites, Attendance]:
        limits = ("server.wait_minutes=30", "server.gather_minutes=2", "rounds.min_sites=2")
        terms = Terms("3f" * 16, CODE, tiny_config(*limits, *assign))
        sites = Sites(terms)
        monkeypatch.setattr("server.attendance.time", sites)
        return sites, Attendance(sites, terms, lambda: sites.enrolled, sites.shown.append)

    return made


@pytest.fixture
def history(tmp_path: Path):
    with History(tmp_path / "history.sqlite") as opened:
        yield opened


def failed(attend: Attendance, history: History) -> str:
    with pytest.raises(FederationFailed) as caught:
        attend(history, 1)
    return str(caught.value)


# ------------------------------------------------------------------------------ waiting


def test_when_everybody_is_there_nobody_waits(make, history):
    sites, attend = make()
    sites.come("c", "a", "b")
    roll = attend(history, 1)
    assert sites.now < 1
    assert list(roll.cards) == ["a", "b", "c"]
    assert roll.nodes == {name: ord(name) for name in "abc"}
    assert (roll.absent, roll.absent_evaluators) == ({}, {})
    assert roll.cards["a"] == sites.card("a")
    recorded = [(c.site, c.n_training, c.n_held_out) for c in history.sites()]
    assert recorded == [("a", 4, 2), ("b", 4, 2), ("c", 4, 2)]
    assert sites.shown == [None]


def test_before_the_first_round_latecomers_are_gathered_for_a_while(make, history):
    sites, attend = make()
    sites.come("a", "b")
    sites.then[1.5 * MINUTE] = lambda: sites.come("c")
    roll = attend(history, 1)
    assert 1.5 * MINUTE <= sites.now < 1.6 * MINUTE
    assert list(roll.cards) == ["a", "b", "c"]


def test_gathering_ends_and_names_who_is_absent(make, history):
    sites, attend = make()
    sites.come("a", "b", "c")
    sites.go("c")
    roll = attend(history, 1)
    assert 2 * MINUTE <= sites.now < 2.1 * MINUTE
    assert list(roll.cards) == ["a", "b"]
    assert roll.absent == {"c": "it is not connected (last heard of 24 Nov 10:00:00 UTC)."}
    begin = sites.now
    attend(history, 2)
    assert sites.now - begin < 1, "later rounds do not wait for who is not needed"


def test_gathering_begins_when_there_are_enough(make, history):
    sites, attend = make()
    sites.come("a")
    sites.then[10 * MINUTE] = lambda: sites.come("b")
    attend(history, 1)
    assert 12 * MINUTE <= sites.now < 12.1 * MINUTE


def test_the_wait_is_shown_with_a_countdown(make, history):
    sites, attend = make()
    sites.come("a")
    sites.then[5 * MINUTE] = lambda: sites.come("b", "c")
    attend(history, 4)
    *waits, last = sites.shown
    assert last is None, "it says that it is over"
    assert all(w.round == 4 and w.needed == 2 for w in waits)
    lefts = [w.seconds_left for w in waits]
    assert lefts == sorted(lefts, reverse=True)
    assert lefts[0] == pytest.approx(30 * MINUTE)
    assert lefts[-1] == pytest.approx(25 * MINUTE, abs=2)
    assert waits[-1].present == ("a",)
    assert waits[0].absent["b"] == "it has never connected."


def test_the_end_of_the_wait_names_who_is_missing_and_why(make, history):
    sites, attend = make()
    sites.come("a", "b", "c")
    sites.go("b")
    sites.answers["c"] = "has not accepted the changed terms yet (fed-client review)."
    sites.enrolled.append("d")
    text = failed(attend, history)
    assert 30 * MINUTE <= sites.now < 30.1 * MINUTE
    assert text.splitlines() == [
        "1 of 2 needed sites came within 30 minutes.",
        "  b: it is not connected (last heard of 24 Nov 10:00:00 UTC).",
        "  c: has not accepted the changed terms yet (fed-client review).",
        "  d: it has never connected.",
        "Start again when they are ready; nothing is lost.",
    ]


def test_without_a_subject_to_measure_on_no_round_begins(make, history):
    sites, attend = make()
    sites.come("a", "b", "c", n_held_out=0)
    text = failed(attend, history)
    assert "3 of 2 needed sites came" in text
    assert "No connected site holds out a subject to measure on." in text


# ---------------------------------------------------------------------------- how many


def test_without_a_number_every_site_is_needed(make, history):
    sites, attend = make("rounds.min_sites=null")
    sites.come("a", "b")
    sites.then[20 * MINUTE] = lambda: sites.come("c")
    roll = attend(history, 1)
    assert list(roll.cards) == ["a", "b", "c"]
    sites.go("c")
    assert "2 of 3 needed sites came" in failed(attend, history)


def test_without_a_number_a_site_that_only_evaluates_is_not_needed_to_train(make, history):
    sites, attend = make("rounds.min_sites=null")
    sites.come("a", "b")
    sites.come("c", trains=False, n_training=0)
    roll = attend(history, 1)
    assert sites.now < 1
    assert (roll.training, roll.evaluating) == (["a", "b"], ["a", "b", "c"])
    sites.go("c")  # known by now not to train: no round fails without it
    roll = attend(history, 2)
    assert sites.now < 2
    assert roll.absent == {}
    assert roll.absent_evaluators == {
        "c": "it is not connected (last heard of 24 Nov 10:00:00 UTC)."
    }


RULE = "c: policy rule `train_when`: allowed mon 10:00-12:00, this site's time."


def test_without_a_number_nobody_waits_for_who_refuses_by_policy_and_asks_it_again(make, history):
    sites, attend = make("rounds.min_sites=null")
    sites.come("a", "b", "c")
    sites.answers["c"] = Error(code=POLICY_REFUSED, reason=RULE)
    roll = attend(history, 1)
    assert sites.now < 1
    assert (roll.training, roll.absent) == (["a", "b"], {"c": RULE})
    recorded(history, 1, c=RULE)
    sites.answers["c"] = sites.card("c")
    assert attend(history, 2).training == ["a", "b", "c"]
    recorded(history, 2, a="it failed")
    sites.answers["a"] = "it failed"
    assert "2 of 3 needed sites" in failed(attend, history), "any other reason is waited for"


def test_a_policy_is_no_way_below_what_is_needed(make, history):
    for assign, said in (
        ("rounds.min_sites=3", "2 of 3 needed sites"),
        ("secure_aggregation=true", "2 of 3 needed sites"),
    ):
        sites, attend = make("rounds.min_sites=null", assign)
        sites.come("a", "b", "c")
        sites.answers["c"] = Error(code=POLICY_REFUSED, reason=RULE)
        text = failed(attend, history)
        assert said in text
        assert RULE in text
    sites, attend = make("rounds.min_sites=null")
    sites.come("a", "b", "c")
    sites.answers |= dict.fromkeys("abc", Error(code=POLICY_REFUSED, reason=RULE))
    assert "0 of 1 needed sites" in failed(attend, history)


def test_a_number_counts_who_trains(make, history):
    sites, attend = make()
    sites.come("a")
    sites.come("b", "c", trains=False, n_training=0)
    said = failed(attend, history)
    assert "1 of 2 needed sites" in said
    assert (
        "Connected, but not training: b, c. A site does not train where it has no training" in said
    )
    assert {w.not_training for w in sites.shown if w is not None} >= {("b", "c")}


SPENT = "its privacy budget is spent."


def test_a_site_whose_budget_is_spent_is_not_needed_and_goes_on_evaluating(make, history):
    sites, attend = make("rounds.min_sites=null")
    sites.come("a", "b")
    sites.come("c", trains=False, resting=SPENT)
    roll = attend(history, 1)
    assert sites.now < 1
    assert (roll.training, roll.evaluating) == (["a", "b"], ["a", "b", "c"])
    assert roll.resting == {"c": SPENT}
    recorded(history, 1, c=SPENT)
    sites.answers["c"] = sites.card("c")  # the hospital has raised it
    assert attend(history, 2).training == ["a", "b", "c"]


def test_when_every_budget_is_spent_nobody_is_waited_for(make, history):
    sites, attend = make()
    sites.come("a", "b", "c", trains=False, resting=SPENT)
    assert failed(attend, history) == (
        f"No site can train:\n  a: {SPENT}\n  b: {SPENT}\n  c: {SPENT}\n"
    )
    assert sites.now < 31
    recorded(history, 1)
    roll = attend(history, 2)
    assert (roll.training, list(roll.resting)) == ([], ["a", "b", "c"])


def test_when_too_few_are_left_for_a_sum_nobody_is_waited_for(make, history):
    sites, attend = make("secure_aggregation=true")
    sites.come("a", "b")
    sites.come("c", trains=False, resting=SPENT)
    recorded(history, 1)
    roll = attend(history, 2)
    assert sites.now < 31
    assert (roll.training, list(roll.resting)) == (["a", "b"], ["c"])


def test_sites_are_waited_for_until_a_sum_can_be_made(make, history):
    """`rounds.min_sites` is 2, and secure aggregation needs three of three."""
    sites, attend = make("secure_aggregation=true", "server.wait_minutes=1")
    sites.come("a", "b")
    assert "2 of 3 needed sites came" in failed(attend, history)
    assert sites.now > 59


def test_who_waits_for_sites_that_train_is_told_who_rests(make, history):
    sites, attend = make("rounds.min_sites=2", "server.wait_minutes=1")
    sites.enrolled[:] = ["a", "b"]
    sites.come("a")
    sites.come("b", trains=False, resting=SPENT)
    said = failed(attend, history)
    assert "1 of 2 needed sites" in said
    assert f"  b: {SPENT}\n" in said
    assert "lower rounds.min_sites" in said
    waited = [waiting for waiting in sites.shown if waiting is not None]
    assert {(w.training, w.needed, tuple(w.resting)) for w in waited} == {(1, 2, ("b",))}


def test_a_site_whose_failure_stopped_a_round_is_asked_again_before_it_is_tried_again(
    make, history
):
    sites, attend = make("rounds.min_sites=null")
    sites.come("a", "b", "c")
    attend(history, 1)
    history.record_failure(1, {"c": SPENT})
    sites.answers["c"] = sites.card("c", trains=False, resting=SPENT)
    assert attend(history, 1).training == ["a", "b"]


def test_without_any_site_there_is_no_round(make, history):
    sites, attend = make("rounds.min_sites=null")
    sites.enrolled.clear()
    assert "0 of 1 needed sites" in failed(attend, history)


# ------------------------------------------------------------------------- coming and going


def test_who_is_admitted_or_revoked_meanwhile_counts_from_the_next_round_on(make, history):
    sites, attend = make()
    sites.come("a", "b", "c")
    attend(history, 1)
    sites.enrolled[:] = ["a", "b", "d"]
    sites.come("d")
    roll = attend(history, 2)
    assert list(roll.cards) == ["a", "b", "d"]
    assert [card.site for card in history.sites()] == ["a", "b", "c", "d"], "c has contributed"


def test_who_has_answered_is_not_asked_again(make, history):
    sites, attend = make()
    sites.come("a", "b", "c")
    for number in range(1, 4):
        attend(history, number)
    assert [site for site, _ in sites.called] == ["a", "b", "c"]


def test_who_started_anew_or_has_a_new_key_is_asked_again(make, history):
    sites, attend = make()
    sites.come("a", "b", "c")
    attend(history, 1)
    sites.answers["b"] = sites.card("b", n_training=9)
    sites.come("b", started=30)
    sites.answers["c"] = sites.card("c", n_training=8)
    sites.come("c", node=999)
    roll = attend(history, 2)
    assert [site for site, _ in sites.called[3:]] == ["b", "c"]
    assert (roll.cards["b"].n_training, roll.cards["c"].n_training) == (9, 8)
    assert roll.nodes["c"] == 999


def recorded(history: History, number: int, **failed_: str) -> None:
    """A round in which these sites did not train, and all others did."""
    contributions = tuple(
        Contribution(site, site not in failed_, failed_.get(site, ""), 0.5, 1.0, 2.0, 100)
        for site in "abc"
    )
    values = {site: metrics(2) for site in "abc"}
    history.record_round(RoundRecord(number, 1e-4, 1.5, 0.4, "c", "s", contributions, values))


def test_who_failed_in_the_last_round_is_asked_again(make, history):
    """Its numbers may have changed; the round waits for its answer, within limits."""
    sites, attend = make()
    sites.come("a", "b", "c")
    attend(history, 1)
    recorded(history, 1, b="it trained on 5 subjects but announced 4.")
    sites.answers["b"] = sites.card("b", n_training=5)
    sites.seconds["b"] = 12.0
    roll = attend(history, 2)
    assert roll.cards["b"].n_training == 5
    assert 12 <= sites.now < 14
    recorded(history, 2, b="no")
    sites.seconds["b"] = 1000.0
    begin = sites.now
    roll = attend(history, 3)
    assert roll.absent == {"b": "it has not answered the roll call yet."}
    assert 30 <= sites.now - begin < 32
    begin = sites.now
    recorded(history, 3, b="absent")
    attend(history, 4)
    assert sites.now - begin < 1, "its answer was waited for once"
    assert len(sites._sent) == 1, "and it is not called twice at a time"


def test_who_refuses_is_asked_again_until_it_agrees(make, history, caplog):
    sites, attend = make()
    sites.come("a", "b", "c")
    refusal = "has not accepted the changed terms yet (fed-client review)."
    sites.answers["c"] = refusal

    def agree() -> None:
        sites.answers["c"] = sites.card("c")

    sites.then[65.0] = agree
    with caplog.at_level("WARNING", "fedbrats"):
        roll = attend(history, 1)
    assert "c" in roll.cards
    times = [at for site, at in sites.called if site == "c"]
    pauses = [after - before for before, after in pairwise(times)]
    assert len(times) > 3
    assert all(10 < pause < 11 for pause in pauses), "not in every moment"
    assert [r.getMessage() for r in caplog.records] == [f"c does not take part: {refusal}"], "once"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("the disk is full.", "the disk is full."),
        ("", "it failed without a reason (code 2)."),
        ("\x1b[2J" + "x" * 3000, "?[2Jxxx"),
        (RecordDict(), "its answer to the roll call cannot be used: the message has no"),
        ({"n_training": -1}, "cannot be used: a number of subjects is negative"),
        ({"site": "b"}, "it calls itself b; its invitation is another site's."),
        ({"site": "\n" * 500}, "it calls itself "),
        ({"config_fingerprint": "x"}, "it holds another configuration than the server."),
    ],
)
def test_an_answer_that_is_no_good_is_named(make, history, answer, said):
    sites, attend = make("server.gather_minutes=0")
    sites.come("a", "b", "c")
    sites.answers["c"] = sites.card(**{"site": "c", **answer}) if type(answer) is dict else answer
    roll = attend(history, 1)
    assert list(roll.cards) == ["a", "b"]
    assert said in roll.absent["c"]
    assert roll.absent["c"].isprintable()
    assert len(roll.absent["c"]) < 700


# --------------------------------------------------------------------------------- the terms


@pytest.fixture
def terms(tiny_config) -> Terms:
    return Terms("3f" * 16, CODE, tiny_config())


def noted(history: History) -> list[tuple[int, dict]]:
    return [(entry["after_round"], entry["terms"]) for entry in history.noted("terms")]


def test_terms_are_noted_with_the_round_after_which_they_hold(history, terms, tiny_config, caplog):
    other = replace(terms, config=tiny_config("rounds.number=9", "server.wait_minutes=1"))
    third = replace(other, code_hash="cd" * 32)
    note_terms(history, terms)
    note_terms(history, terms)
    assert noted(history) == [(0, terms.document())]
    assert history.noted("config") == terms.config.fingerprint()
    note_terms(history, other)
    assert noted(history) == [(0, other.document())], "no round was under the first"
    recorded(history, 1)
    with caplog.at_level("WARNING", "fedbrats"):
        note_terms(history, other)
        assert not caplog.records
        note_terms(history, third)
    assert "the terms have changed after round 1 (code_hash)" in caplog.text
    assert "fed-client review" in caplog.text
    assert noted(history) == [(0, other.document()), (1, third.document())]
    recorded(history, 2)
    recorded(history, 3)
    note_terms(history, other)
    assert noted(history)[-1] == (3, other.document())
    assert history.noted("config") == other.config.fingerprint()


@pytest.mark.parametrize(
    "change",
    ["rounds.number=9", "rounds.updates=fp32", "training.learning_rate=0.1", "loss.gamma=3",
     "held_out_fraction=0.25", "rounds.min_sites=2", "server.wait_minutes=3", "name=other"],
)  # fmt: skip
def test_what_leaves_the_model_comparable_may_change(history, terms, tiny_config, change):
    note_terms(history, terms)
    recorded(history, 1)
    note_terms(history, replace(terms, config=tiny_config(change)))


@pytest.mark.parametrize(
    "change",
    ["network.channels=[4,2,2,2,2]", "network.norm=batch", "network.name=attention_unet",
     "modalities=[t2]", "preprocess.mode=patches"],
)  # fmt: skip
def test_another_model_is_refused_and_nothing_is_noted(history, terms, tiny_config, change):
    note_terms(history, terms)
    other = replace(terms, config=tiny_config(change))
    note_terms(history, other)  # before the first round everything may change
    note_terms(history, terms)
    recorded(history, 1)
    before = noted(history)
    with pytest.raises(FederationFailed, match="of another model") as caught:
        note_terms(history, other)
    assert change.partition("=")[0] in str(caught.value)
    assert "Restore federation.yaml" in str(caught.value)
    assert noted(history) == before


def test_another_federation_is_refused(history, terms):
    note_terms(history, terms)
    recorded(history, 1)
    with pytest.raises(FederationFailed, match=r"changed: federation\)"):
        note_terms(history, replace(terms, federation="ee" * 16))
