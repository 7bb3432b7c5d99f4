"""The first half of a round: have the sites train, and make one model of their updates."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from flwr.app import MessageType, RecordDict
from flwr.serverapp import Grid

from common.config import FederationConfig
from common.masking import fewest_sites
from common.messages import TrainTask, pack_train_task, unpack_site_update, weight_bytes
from common.weights import Weights
from server.average import WeightedSum, add, mean
from server.exchange import BudgetSpent, addressed, answers
from server.history import TRAINING, Contribution, GivenStatement
from server.replies import refuse_update
from server.roll_call import Roll

LOG = logging.getLogger("fedbrats")


@dataclass
class Gathered:
    """What the sites that were asked made of a task.

    `weights` is the new model, None if no update was good; `contributions` are of all that were
    asked but those in `spent`, which say that their privacy budget is spent.
    """

    weights: Weights | None = None
    contributions: list[Contribution] = field(default_factory=list)
    spent: dict[str, str] = field(default_factory=dict)
    statements: list[GivenStatement] = field(default_factory=list)


def sites_needed(config: FederationConfig, asked: int, spent: int) -> int:
    """How many good updates make a round; by default those of every site that was asked.

    `spent` further sites have answered that their privacy budget is spent: nobody waits for them, and
    they are none of `rounds.min_sites`.
    """
    needed = asked
    if config.rounds.min_sites is not None:
        needed = min(config.rounds.min_sites, asked + spent)
    return max(needed, fewest_sites(config) if config.secure_aggregation else 1)


def gather_updates(grid: Grid, config: FederationConfig, roll: Roll, task: TrainTask) -> Gathered:
    """Each update is added to the sum and forgotten: it is a whole model."""
    gathered = Gathered()
    running: WeightedSum | None = None

    def take(site: str, content: RecordDict) -> Contribution | str:
        nonlocal running
        update = unpack_site_update(content, since=task.weights)
        if reason := refuse_update(update, roll.cards[site], task, config.rounds.max_change):
            return reason
        running = add(running, update.weights, update.n_training)
        if update.statement is not None:
            gathered.statements.append(GivenStatement(task.round, site, TRAINING, update.statement))
        return Contribution(
            site,
            trained=True,
            train_loss=update.loss,
            seconds=update.seconds,
            samples_per_second=update.samples_per_second,
            bytes=weight_bytes(content),
        )

    content = pack_train_task(task)
    messages = addressed(content, MessageType.TRAIN, roll.training, roll.nodes, config)
    for site, answer in answers(grid, messages, take):
        if isinstance(answer, str):
            LOG.warning(f"round {task.round}: {site} did not contribute: {answer}")
            if isinstance(answer, BudgetSpent):
                gathered.spent[site] = answer
                continue
            answer = Contribution(site, trained=False, reason=answer)
        gathered.contributions.append(answer)
    if running is not None:
        gathered.weights = mean(running, like=task.weights)
    return gathered
