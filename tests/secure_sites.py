"""Hospitals for tests of secure aggregation: the sites' own code behind a grid that can lose messages.

Nothing is trained: each site's update is made up. A site can vanish before it hears a question
("unheard") or after it has answered ("lost"), at every stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.app.error import Error
from flwr.supercore.task_identity import TaskIdentity

from client.secure_round import RoundRefused, answer_stage, answer_task
from client.site import Site
from common.config import FederationConfig, Rounds
from common.keys import fingerprint, new_private_key, save_private_key
from common.masking import BadRound
from common.messages import SiteCard, SiteUpdate, TrainTask, task_hash, unpack_train_task
from common.secure_messages import STAGES, pack_trained, session_of
from common.weights import Weights
from server.roll_call import Roll

TRAIN = MessageType.TRAIN
UNHEARD, LOST = "unheard", "lost"


def config_of(**rounds: object) -> FederationConfig:
    return FederationConfig(secure_aggregation=True, rounds=Rounds(**rounds))


def model() -> Weights:
    """A little of everything: floats of several shapes, and a counter."""
    make = torch.Generator().manual_seed(7)
    return {
        "conv.weight": torch.randn(3, 2, 5, generator=make),
        "conv.bias": torch.zeros(3),
        "norm.num_batches_tracked": torch.tensor(11),
        "out.weight": 9 * torch.randn(70, 3, generator=make),
    }


def updates(base: Weights, numbers: Iterable[int]) -> list[tuple[int, Weights]]:
    """For each number of subjects an update of its own."""
    make = torch.Generator().manual_seed(8)
    return [
        (
            n,
            {
                name: (w + torch.randn(w.shape, generator=make) * 0.01)
                if w.is_floating_point()
                else w + 6 + place
                for name, w in base.items()
            },
        )
        for place, n in enumerate(numbers)
    ]


def plain_mean(parts: Iterable[tuple[int, Weights]], base: Weights) -> dict[str, torch.Tensor]:
    """In float64 and a naive loop, not rounded to the model's types."""
    parts = list(parts)
    total = sum(n for n, _ in parts)
    return {name: sum(n * w[name].double() for n, w in parts) / total for name in base}


@dataclass
class Hospitals:
    """A Flower grid whose nodes are sites; `seen` is everything that reached or left the server."""

    sites: list[Site]
    parts: list[tuple[int, Weights]]
    faults: dict[tuple[str, int], str] = field(default_factory=dict)
    tamper: Callable[[str, int, RecordDict], RecordDict] = lambda stage, node, content: content
    spoil: Callable[[str, int, RecordDict], RecordDict] = lambda stage, node, content: content
    seen: list[tuple[str, int, RecordDict]] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    said: dict[tuple[str, int], str] = field(default_factory=dict)
    _waiting: dict[str, Message] = field(default_factory=dict)
    _numbers: Iterable[int] = field(default_factory=itertools.count)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            name = f"m{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = name
            self._waiting[name] = message
            ids.append(name)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        return [self._reply(self._waiting.pop(i)) for i in ids]

    def _reply(self, message: Message) -> Message:
        node, stage = message.metadata.dst_node_id, message.metadata.message_type
        fault = self.faults.get((stage, node))
        if fault == UNHEARD:
            return Message(Error(2, "vanished"), reply_to=message)
        content = self.tamper(stage, node, deepcopy(message.content))
        try:
            answer = self.answer(stage, node, content)
        except (RoundRefused, BadRound) as error:
            self.said[stage, node] = str(error)
            return Message(Error(2, str(error)), reply_to=message)
        if fault == LOST:
            return Message(Error(2, "lost"), reply_to=message)
        answer = self.spoil(stage, node, answer)
        self.seen.append((stage, node, answer))
        return Message(answer, reply_to=message)

    def answer(self, stage: str, node: int, content: RecordDict) -> RecordDict:
        site, (n, weights) = self.sites[node], self.parts[node]
        if stage in STAGES:
            return answer_stage(site, stage, content)
        task = unpack_train_task(content)
        session = session_of(content)
        assert session is not None

        def train() -> SiteUpdate:
            self.trained.append(node)
            return SiteUpdate(site.name, task.round, n, weights, loss=0.5)

        return pack_trained(answer_task(site, task, task_hash(content), session, train))


def hospitals(
    folder: Path, parts: list[tuple[int, Weights]], config: FederationConfig
) -> Hospitals:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    keys = [new_private_key() for _ in parts]
    roster = tuple(sorted(fingerprint(key.public_key()) for key in keys))
    sites = []
    for number, key in enumerate(keys):
        home = folder / f"site-{number:02d}"
        home.mkdir(parents=True)
        save_private_key(home / "site.key", key)
        sites.append(
            Site(
                name=home.name,
                folder=home,
                trains=True,
                config=config,
                training=(),
                held_out=(),
                left_out={},
                patients={},
                federation="f0",
                key=home / "site.key",
                roster=roster,
            )
        )
    return Hospitals(sites, parts)


def roll_of(grid: Hospitals, *, without: Iterable[int] = ()) -> Roll:
    nodes = {site.name: n for n, site in enumerate(grid.sites) if n not in set(without)}
    cards = {name: SiteCard(name, True, None, 0, 0, "") for name in nodes}
    return Roll(cards, nodes, roster=grid.sites[0].roster)


def task_of(base: Weights, number: int = 1) -> TrainTask:
    return TrainTask(number, "", 0.01, base)
