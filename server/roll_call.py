"""Who takes part: the roll call before the first round, and the check that a resumed run has the same."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common.config import FederationConfig
from common.console import plain
from common.messages import SiteCard, unpack_site_card
from server.exchange import POLL_SECONDS, answers
from server.history import History


class FederationFailed(RuntimeError):
    """The federation cannot go on; the text names the sites and the reasons."""


@dataclass(frozen=True)
class Roll:
    """Who takes part: the sites' cards and Flower node ids, both by site name in sorted order.

    `absent` says of a site that should take part too why it does not; `absent_evaluators` the same
    of one that is known not to train. `roster` is, for secure aggregation, whose keys the sites have
    accepted; a simulation's server does not know.
    """

    cards: dict[str, SiteCard]
    nodes: dict[str, int]
    absent: Mapping[str, str] = field(default_factory=dict)
    absent_evaluators: Mapping[str, str] = field(default_factory=dict)
    roster: tuple[str, ...] = ()

    @property
    def training(self) -> list[str]:
        return [site for site, card in self.cards.items() if card.trains]

    @property
    def resting(self) -> dict[str, str]:
        """Sites that could train and do not any more, by their own words, which go on evaluating."""
        return {site: plain(card.resting) for site, card in self.cards.items() if card.resting}

    @property
    def evaluating(self) -> list[str]:
        return [site for site, card in self.cards.items() if card.n_held_out > 0]


def by_site(reasons: Mapping[str, str]) -> str:
    """A line for each site."""
    return "".join(f"  {site}: {reason}\n" for site, reason in reasons.items())


def nobody_trains(roll: Roll, fewest: int = 1) -> bool:
    """Have so many sites spent their privacy budgets that fewer than `fewest` are left to train?"""
    return bool(roll.resting) and len(roll.training) + len(roll.absent) < fewest


def wait_for_nodes(grid: Grid, count: int, seconds: float) -> None:
    """Return once `count` nodes are connected.

    Raises:
        FederationFailed: they are not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while (connected := len(list(grid.get_node_ids()))) < count:
        if time.monotonic() > deadline:
            raise FederationFailed(
                f"Only {connected} of {count} sites connected within {seconds:.0f} s."
            )
        time.sleep(POLL_SECONDS)


def call_roll(grid: Grid, config: FederationConfig) -> Roll:
    """Ask every connected node who it is.

    Raises:
        FederationFailed: a site does not answer, two have one name, a configuration differs, too
            few train (unless all that could rest), or none holds out a subject.
    """
    cards: dict[str, SiteCard] = {}
    nodes: dict[str, int] = {}
    problems: list[str] = []
    messages = {n: Message(RecordDict(), n, MessageType.QUERY) for n in grid.get_node_ids()}
    for node, card in answers(grid, messages, lambda _, content: unpack_site_card(content)):
        if isinstance(card, str):
            problems.append(f"node {node}: {card}")
        elif card.site in cards:
            problems.append(f"two nodes say that they are site {card.site}.")
        elif card.config_fingerprint != config.fingerprint():
            problems.append(f"{card.site}: holds another configuration than the server.")
        else:
            cards[card.site], nodes[card.site] = card, node
    if problems:
        raise FederationFailed("Roll call failed:\n" + "\n".join(problems))
    roll = Roll(dict(sorted(cards.items())), nodes)
    needed = config.rounds.min_sites or 1
    if len(roll.training) < needed and not nobody_trains(roll):
        few = f"{len(roll.training)} sites can train, {needed} are needed."
        raise FederationFailed(f"{few}\n{by_site(roll.resting)}".rstrip())
    if not roll.evaluating:
        raise FederationFailed(
            "No site holds out a subject, so nothing could be measured: "
            "raise held_out_fraction, change the seed, or add subjects."
        )
    return roll


def same_run(history: History, roll: Roll, config: FederationConfig) -> None:
    """Refuse to continue rounds of other sites or another configuration; note those of this run.

    Raises:
        FederationFailed: the text names what changed.
    """
    if history.rounds():
        before = {card.site: _subjects(card) for card in history.sites()}
        now = {card.site: _subjects(card) for card in roll.cards.values()}
        changed = sorted(s for s in before.keys() | now.keys() if before.get(s) != now.get(s))
        if changed:
            raise FederationFailed(
                f"The run began with other sites or subjects; changed: {', '.join(changed)}. "
                "Restore them, or start a new run in another folder."
            )
        if history.noted("config") != config.fingerprint():
            raise FederationFailed(
                "The run began with another configuration. Restore it, or start a new run in "
                "another folder."
            )
    history.record_sites(list(roll.cards.values()))
    history.note("config", config.fingerprint())


def _subjects(card: SiteCard) -> tuple[int | None, int]:
    """Not whether it trains: one without training subjects never does, and one with some may rest."""
    return card.n_training, card.n_held_out
