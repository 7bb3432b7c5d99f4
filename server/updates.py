"""The first half of a round: have the sites train, and make one model of their updates."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import MessageType, RecordDict
from flwr.serverapp import Grid

from common.config import FederationConfig, Rounds
from common.masking import fewest_in_sum
from common.messages import (
    SiteUpdate,
    TrainTask,
    pack_train_task,
    unpack_site_update,
    weight_bytes,
)
from common.weights import Weights, norm, relative_change
from server.average import WeightedMean, add, mean
from server.exchange import BudgetSpent, addressed, answers
from server.history import TRAINING, Contribution, GivenStatement
from server.replies import refuse_change, refuse_update
from server.robust import aggregate, compares_updates, fewest_updates, outliers
from server.roll_call import Roll
from server.spool import Kept, spool, write

LOG = logging.getLogger("fedbrats")


@dataclass
class Gathered:
    """What the sites that were asked made of a task.

    `weights` is the new model, None if too few updates were good; `contributions` are of all that
    were asked but those in `spent`, which say that their privacy budget is spent. `chosen` is as in
    `RoundRecord`.
    """

    weights: Weights | None = None
    chosen: str | None = None
    contributions: list[Contribution] = field(default_factory=list)
    spent: dict[str, str] = field(default_factory=dict)
    statements: list[GivenStatement] = field(default_factory=list)


def roster_size(roll: Roll) -> int:
    """For secure aggregation: of how many sites two thirds must take part. A simulation's roster is
    of all that ever train."""
    return len(roll.roster) or len(roll.training) + len(roll.resting) + len(roll.absent)


def fewest_to_aggregate(config: FederationConfig, roll: Roll) -> int:
    """Without so many good updates no model can be made of them, whatever `rounds.min_sites` says."""
    if config.secure_aggregation:
        return fewest_in_sum(config, roster_size(roll))
    return fewest_updates(config.rounds)


def sites_needed(
    config: FederationConfig, roll: Roll, asked: int, spent: int, refused: int = 0
) -> int:
    """How many good updates make a round; by default those of every site that was asked.

    `spent` further sites have answered that their privacy budget is spent: nobody waits for them, and
    they are none of `rounds.min_sites`. `refused` of those asked refuse by their own policy: they are
    missed only where `rounds.min_sites` says how many are needed.
    """
    needed = asked - refused
    if config.rounds.min_sites is not None:
        needed = min(config.rounds.min_sites, asked + spent)
    return max(needed, fewest_to_aggregate(config, roll) if config.secure_aggregation else 1)


def gather_updates(
    grid: Grid, config: FederationConfig, roll: Roll, task: TrainTask, folder: Path
) -> Gathered:
    """No update stays in memory, each is a whole model: it moves a mean, and is put into `folder`
    for as long as the round lasts if the updates must be compared. If the comparison refuses none,
    that mean is the result.

    Raises:
        OSError: the disk has no room for the updates of a round.
    """
    gathered = Gathered()
    running: WeightedMean | None = None

    def average(update: SiteUpdate, change: float) -> None:
        nonlocal running
        if config.rounds.aggregation == "fedavg":
            running = add(running, update.weights, update.n_training, task.weights)

    if compares_updates(config.rounds):
        with spool(folder) as place:
            kept: list[Kept] = []

            def keep(update: SiteUpdate, change: float) -> None:
                path = place / f"{len(kept):04d}.safetensors"
                write(path, update.weights)
                average(update, change)
                kept.append(Kept(update.site, update.n_training, change, path))

            _gather(grid, config, roll, task, gathered, keep)
            _compare(kept, config.rounds, task, gathered, running)
        return gathered
    _gather(grid, config, roll, task, gathered, average)
    if running is not None:
        gathered.weights = mean(running, task.weights)
    return gathered


def _gather(
    grid: Grid,
    config: FederationConfig,
    roll: Roll,
    task: TrainTask,
    gathered: Gathered,
    use: Callable[[SiteUpdate, float], None],
) -> None:
    """Have the sites train; `use` takes each good update and how large its change is."""
    length = norm(task.weights)

    def take(site: str, content: RecordDict) -> Contribution | str:
        update = unpack_site_update(content, since=task.weights)
        if reason := refuse_update(update, roll.cards[site], task):
            return reason
        change = relative_change(update.weights, task.weights, length)
        if reason := refuse_change(change, config.rounds.max_change):
            return reason
        use(update, change)
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


def _compare(
    kept: list[Kept],
    rounds: Rounds,
    task: TrainTask,
    gathered: Gathered,
    of_all: WeightedMean | None,
) -> None:
    """Refuse the outliers among the updates, and make one model of the others.

    Args:
        of_all: the mean of all of them, where a mean is what the aggregation makes.
    """
    refused = outliers(kept, rounds.outlier_factor) if rounds.outlier_factor else {}
    for site, reason in refused.items():
        LOG.warning(f"round {task.round}: {site} did not contribute: {reason}")
    gathered.contributions = [
        Contribution(c.site, trained=False, reason=refused[c.site]) if c.site in refused else c
        for c in gathered.contributions
    ]
    # as of any refused update: what it states is of no answer that counts
    gathered.statements = [s for s in gathered.statements if s.site not in refused]
    good = [k for k in kept if k.site not in refused]
    if len(good) < fewest_updates(rounds):
        return
    if of_all is not None and not refused:
        gathered.weights = mean(of_all, task.weights)
        return
    of_all = None  # a model's memory
    gathered.weights, gathered.chosen = aggregate(good, task.weights, rounds)
    if gathered.chosen is not None:
        LOG.info(
            f"round {task.round}: of {len(good)} updates {gathered.chosen}'s is the nearest to the others"
        )
