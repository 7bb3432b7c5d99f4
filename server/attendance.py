"""Who takes part in the next round of a real federation: roll call of whoever is connected.

Called before every round. A site that connects late, comes back or accepts changed terms enters at
the next round; one that is enrolled and not there is absent, with the reason. Waits, within limits,
until there are as many as a round needs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from flwr.app import Message, MessageType

from common.config import FederationConfig
from common.console import plain
from common.messages import SiteCard, unpack_site_card
from common.notices import pack_roll_call
from common.records import BadMessage
from common.terms import Terms, changes, terms_from
from server.exchange import refused_by_policy, send, why_not
from server.history import History
from server.link_grid import Contact, LinkGrid
from server.roll_call import FederationFailed, Roll, by_site, nobody_trains
from server.updates import fewest_to_aggregate

LOG = logging.getLogger("fedbrats")
CALL_SECONDS = 300.0  # for one roll call: a site's worker may have to start first
ANSWER_SECONDS = 30.0  # that a round waits for the answer of a site that is connected
ASK_AGAIN_SECONDS = 10.0  # a site that refused: it may have changed its mind
PAUSE_SECONDS = 0.2
NOT_CHANGEABLE = ("network.", "modalities", "preprocess.mode", "federation")


@dataclass(frozen=True)
class Waiting:
    """What the wait for a round is about, to be shown while it lasts."""

    round: int
    present: tuple[str, ...]
    absent: dict[str, str]
    needed: int
    seconds_left: float
    training: int = 0
    resting: dict[str, str] = field(default_factory=dict)
    not_training: tuple[str, ...] = ()


@dataclass
class _Called:
    """A site's last roll call; `card` is its answer, `reason` why there is no good one."""

    node: int
    activated: datetime | None
    at: float
    message_id: str = ""
    card: SiteCard | None = None
    reason: str = ""


@dataclass
class Attendance:
    """`enrolled` names the active sites whenever it is called, for that can change at any time.

    `show` is told what is waited for, and None when the wait is over.
    """

    grid: LinkGrid
    terms: Terms
    enrolled: Callable[[], Sequence[str]]
    show: Callable[[Waiting | None], None]
    _called: dict[str, _Called] = field(default_factory=dict)
    _told: dict[str, str] = field(default_factory=dict)
    _gathered: bool = False

    def __call__(self, history: History, number: int) -> Roll:
        """The roll of round `number`; its sites are recorded in the history.

        Raises:
            FederationFailed: too few sites came within `server.wait_minutes`; it says who did not.
        """
        self._recall_those_who_failed(history)
        settings = self.terms.config.server
        begin = enough_since = time.monotonic()
        was_enough = False
        while True:
            sites = list(self.enrolled())
            self._call(sites)
            roll = self._roll(sites, {c.site for c in history.sites() if not c.trains})
            needed = _needed(roll, self.terms.config)
            enough = len(roll.training) >= max(needed, 1) and bool(roll.evaluating)
            now = time.monotonic()
            if enough and not was_enough:
                enough_since = now
            was_enough = enough
            gathering = (
                not self._gathered
                and _is_awaited(roll)
                and now - enough_since < 60 * settings.gather_minutes
            )
            if enough and not gathering and not self._is_answering(sites):
                break
            fewest = fewest_to_aggregate(self.terms.config, roll)
            if nobody_trains(roll, fewest) and not self._is_answering(sites):
                if history.rounds():  # they are the result
                    break
                raise FederationFailed(_nobody_trains(roll))
            left = 60 * settings.wait_minutes - (now - begin)
            if left <= 0:
                raise FederationFailed(_who_is_missing(roll, needed, settings.wait_minutes))
            present = tuple(roll.cards)
            absent = {**roll.absent, **roll.absent_evaluators}
            counted = len(roll.training)
            others = _not_training(roll)
            self.show(Waiting(number, present, absent, needed, left, counted, roll.resting, others))
            time.sleep(PAUSE_SECONDS)
        self._gathered = True
        self.show(None)
        known = {card.site: card for card in history.sites()} | roll.cards
        history.record_sites(list(known.values()))
        return roll

    def _recall_those_who_failed(self, history: History) -> None:
        """A site whose answer was no good may have other numbers to announce by now."""
        records = history.rounds()
        last = records[-1].contributions if records else ()
        failed = {c.site for c in last if not c.trained}
        failed |= {site for _, site, _ in history.failures()}  # of the round that is tried again
        for site in failed:
            called = self._called.get(site)
            if called is not None and not called.message_id:
                del self._called[site]

    def _is_answering(self, sites: Sequence[str]) -> bool:
        """Is a site about to answer that has just come, or failed in the last round?"""
        contacts, now = self.grid.contacts(), time.monotonic()
        return any(
            called.message_id and now - called.at < ANSWER_SECONDS
            for site, called in self._called.items()
            if site in sites and site in contacts and contacts[site].online
        )

    def _call(self, sites: Sequence[str]) -> None:
        """Send roll calls to whom it is due and take the answers that are there; never waits."""
        contacts = self.grid.contacts()
        now = time.monotonic()
        for site in sites:
            contact, called = contacts.get(site), self._called.get(site)
            if contact is not None and contact.online and self._is_due(called, contact, now):
                content = pack_roll_call(self.terms)
                message = Message(content, contact.node, MessageType.QUERY, ttl=CALL_SECONDS)
                message_id = send(self.grid, message)
                if message_id:
                    self._called[site] = _Called(
                        contact.node, contact.activated, now, message_id=message_id
                    )
        for site, called in self._called.items():
            if called.message_id:
                for reply in self.grid.pull_messages([called.message_id]):
                    called.message_id = ""
                    called.card, called.reason = self._answer(site, reply)
                    if called.reason and called.reason != self._told.get(site):
                        LOG.warning(f"{site} does not take part: {called.reason}")
                    self._told[site] = called.reason

    def _is_due(self, called: _Called | None, contact: Contact, now: float) -> bool:
        if called is None or called.node != contact.node:
            return True
        if called.message_id:
            return False
        if called.activated != contact.activated:
            return True
        return bool(called.reason) and now - called.at > ASK_AGAIN_SECONDS

    def _answer(self, site: str, reply: Message) -> tuple[SiteCard | None, str]:
        if reply.has_error():
            return None, why_not(reply)
        try:
            card = unpack_site_card(reply.content)
        except BadMessage as error:
            return None, f"its answer to the roll call cannot be used: {plain(str(error))}"
        if card.site != site:
            return (
                None,
                f"it calls itself {plain(card.site, 64)}; its invitation is another site's.",
            )
        if card.config_fingerprint != self.terms.config.fingerprint():
            return None, "it holds another configuration than the server."
        return card, ""

    def _roll(self, sites: Sequence[str], evaluators: Collection[str]) -> Roll:
        """`evaluators` are known, from earlier rounds, not to train."""
        cards: dict[str, SiteCard] = {}
        nodes: dict[str, int] = {}
        absent: dict[str, str] = {}
        contacts = self.grid.contacts()
        for site in sorted(sites):
            contact, called = contacts.get(site), self._called.get(site)
            if contact is None or contact.last is None:
                absent[site] = "it has never connected."
            elif not contact.online:
                absent[site] = (
                    f"it is not connected (last heard of {contact.last:%d %b %H:%M:%S} UTC)."
                )
            elif called is None or called.node != contact.node:
                absent[site] = "it has just connected."
            elif called.card is not None:
                cards[site], nodes[site] = called.card, contact.node
            else:
                absent[site] = called.reason or "it has not answered the roll call yet."
        return Roll(
            cards,
            nodes,
            {site: why for site, why in absent.items() if site not in evaluators},
            {site: why for site, why in absent.items() if site in evaluators},
            roster=self.terms.roster,
        )


def _needed(roll: Roll, config: FederationConfig) -> int:
    """How many sites have to train: never fewer than a model can be made of. A site that refuses by
    its own policy is asked again before each round, and not waited for where all sites are needed."""
    fewest = fewest_to_aggregate(config, roll)
    if config.rounds.min_sites:
        return max(config.rounds.min_sites, fewest)
    needed = len(roll.training) + len(roll.absent)
    return max(needed - refused_by_policy(roll.absent.values()), fewest)


def _not_training(roll: Roll) -> tuple[str, ...]:
    """Those here that do not train, and do not say that their budget is spent."""
    return tuple(s for s, card in roll.cards.items() if not card.trains and not card.resting)


def _is_awaited(roll: Roll) -> bool:
    """Is anybody absent who might still come?"""
    absent = [*roll.absent.values(), *roll.absent_evaluators.values()]
    return len(absent) > refused_by_policy(absent)


def note_terms(history: History, terms: Terms) -> None:
    """Record the terms under which the next rounds run; refuse a change that cannot be continued.

    Raises:
        FederationFailed: the rounds so far are of another network or federation.
    """
    noted = history.noted("terms") or []
    assert isinstance(noted, list)
    rounds = len(history.rounds())
    if noted and rounds:
        changed = changes(terms_from(noted[-1]["terms"]), terms)
        fixed = [key for key, _, _ in changed if key.startswith(NOT_CHANGEABLE)]
        if fixed:
            raise FederationFailed(
                f"The rounds so far are of another model (changed: {', '.join(fixed)}). Restore "
                "federation.yaml, or begin a new federation with `fed-server init`."
            )
        if not changed:
            return
        keys = ", ".join(key for key, _, _ in changed)
        LOG.warning(
            f"the terms have changed after round {rounds} ({keys}); every site is asked to accept "
            "them before it goes on (fed-client review)"
        )
    noted = [entry for entry in noted if entry["after_round"] < rounds]
    history.note("terms", [*noted, {"after_round": rounds, "terms": terms.document()}])
    history.note("config", terms.config.fingerprint())


def _nobody_trains(roll: Roll) -> str:
    return f"No site can train:\n{by_site(roll.resting)}"


def _who_is_missing(roll: Roll, needed: int, minutes: float) -> str:
    lines = by_site({**roll.absent, **roll.absent_evaluators, **roll.resting})
    if roll.resting:
        lines += (
            "A site that rests does so for good: lower rounds.min_sites, or enrol another site.\n"
        )
    if others := _not_training(roll):
        lines += (
            f"Connected, but not training: {', '.join(others)}. A site does not train where it has no "
            "training subjects, or fewer than its own policy.min_subjects (5, if it has not changed "
            "that), or where its policy sends no updates; what `fed-client join` said when it began, or "
            "`fed-client policy explain`, tells which.\n"
        )
    measured = "" if roll.evaluating else " No connected site holds out a subject to measure on."
    return (
        f"{len(roll.training)} of {needed} needed sites came within {minutes:g} minutes.{measured}\n"
        f"{lines}Start again when they are ready; nothing is lost."
    )
