"""Sending one message to each of several nodes and taking the answers in a fixed order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.config import FederationConfig
from common.console import plain
from common.message_words import BUDGET_SPENT, POLICY_REFUSED
from common.messages import BadMessage

POLL_SECONDS = 0.02


class BudgetSpent(str):
    """A site's words that its privacy budget is spent: no failure, it rests from now on."""


class PolicyRefused(str):
    """A site's words that its own policy refuses: the federation goes on without it, and asks again."""


def refused_by_policy(reasons: Iterable[object]) -> int:
    """How many of these reasons are a site's own policy."""
    return sum(isinstance(reason, PolicyRefused) for reason in reasons)


Answer = TypeVar("Answer")
Key = TypeVar("Key")


def send(grid: Grid, message: Message) -> str:
    """The message's id, or "" if it cannot be sent. (Grids differ in how they say so.)"""
    return next(iter(grid.push_messages([message])), None) or ""


def addressed(
    content: RecordDict,
    kind: str,
    sites: Sequence[str],
    nodes: Mapping[str, int],
    config: FederationConfig,
) -> dict[str, Message]:
    """A message for each site; its time to live is the round's deadline."""
    seconds = 60 * config.rounds.deadline_minutes
    return {site: Message(content, nodes[site], kind, ttl=seconds) for site in sites}


def answers(
    grid: Grid,
    messages: Mapping[Key, Message],
    take: Callable[[Key, RecordDict], Answer],
) -> Iterator[tuple[Key, Answer | str]]:
    """Send all messages, then yield what `take` makes of each answer in turn, or why there is none.

    How long to wait is the grid's affair: a reply that no longer can come is an error reply.
    """
    sent = {key: send(grid, message) for key, message in messages.items()}
    for key, message_id in sent.items():
        if not message_id:
            yield key, "the message could not be sent."
            continue
        yield key, _answer(key, _await(grid, message_id), take)


def _answer(key: Key, reply: Message, take: Callable[[Key, RecordDict], Answer]) -> Answer | str:
    """A function of its own, so that no reply outlives its turn: each holds a whole model."""
    if reply.has_error():
        return why_not(reply)
    try:
        return take(key, reply.content)
    except BadMessage as error:
        return f"its reply cannot be used: {plain(str(error))}"


def why_not(reply: Message) -> str:
    """The words of an error reply; those of a spent budget or a policy are marked as such."""
    said = plain(reply.error.reason or "")
    if reply.error.code == BUDGET_SPENT:
        return BudgetSpent(said)
    if reply.error.code == POLICY_REFUSED:
        return PolicyRefused(said or "its own policy refuses.")
    return said or f"it failed without a reason (code {reply.error.code})."


def _await(grid: Grid, message_id: str) -> Message:
    while True:
        for reply in grid.pull_messages([message_id]):
            return reply
        time.sleep(POLL_SECONDS)
