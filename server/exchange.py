"""Sending one message to each of several nodes and taking the answers in a fixed order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.config import FederationConfig
from common.console import plain
from common.messages import BUDGET_SPENT, BadMessage

POLL_SECONDS = 0.02


class BudgetSpent(str):
    """A site's words that its privacy budget is spent: no failure, it rests from now on."""


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
        said = plain(reply.error.reason or "")
        if reply.error.code == BUDGET_SPENT:
            return BudgetSpent(said)
        return said or f"it failed without a reason (code {reply.error.code})."
    try:
        return take(key, reply.content)
    except BadMessage as error:
        return f"its reply cannot be used: {plain(str(error))}"


def _await(grid: Grid, message_id: str) -> Message:
    while True:
        for reply in grid.pull_messages([message_id]):
            return reply
        time.sleep(POLL_SECONDS)
