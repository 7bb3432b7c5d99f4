"""The rounds of a federation: roll call, then train, average, evaluate, record, until done.

Works over any Flower `Grid`. Replies are taken in the order of site names, one at a time, so that
the result does not depend on who was fast and memory not on how many they are. A round counts only
if enough sites gave a good reply; otherwise it is tried again or the run fails, and says who is
missing. Who takes part is asked anew before every round (`attend`); a simulation answers with the
same roll each time, a real federation with whoever is there (`server.attendance`).
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common.config import FederationConfig
from common.console import plain
from common.messages import (
    EvaluateTask,
    SiteCard,
    SiteReport,
    SiteUpdate,
    TrainTask,
    pack_evaluate_task,
    pack_train_task,
    unpack_site_report,
    unpack_site_update,
    weight_bytes,
)
from common.metrics import SiteMetrics, mean_dice
from common.model import initial_weights
from common.weights import BadWeights, Weights, check_update, relative_change, save_weights
from server.average import WeightedSum, add, mean
from server.checkpoint import RunFolder, load_checkpoint, prune_checkpoints, save_checkpoint
from server.comparison import best_rounds, comparable_losses
from server.exchange import answers
from server.history import Contribution, History, RoundRecord
from server.roll_call import FederationFailed, Roll, call_roll, same_run
from server.schedule import learning_rate, should_stop

LOG = logging.getLogger("fedbrats")
LARGEST = 1e9  # of a reported loss, time or distance
MOST_METRICS = 200


def run_rounds(
    grid: Grid,
    config: FederationConfig,
    folder: RunFolder,
    on_round: Callable[[RoundRecord], None] = lambda record: None,
    *,
    attend: Callable[[History, int], Roll] | None = None,
    attempts: int = 1,
) -> None:
    """Train until the configured rounds are done or the validation loss says stop.

    Continues after the last complete round that `folder` holds, with the same result as a run that
    was never interrupted. At the end writes the best models and their metrics with HD95.

    Args:
        attend: who takes part in the round of this number; by default one roll call, all that
            answer it, and they must be those of the rounds so far.
        attempts: how often one round is tried with too few good replies.

    Raises:
        FederationFailed: sites are missing or disagree, or a round had too few good replies.
        BadWeights: the checkpoint to continue from is damaged.
    """
    with History(folder.history) as history:
        if attend is None:
            roll = call_roll(grid, config)
            same_run(history, roll, config)

        def present(number: int) -> Roll:
            return roll if attend is None else attend(history, number)

        done = history.rounds()
        if done:
            weights = load_checkpoint(folder, done[-1].round, done[-1].sha256)
            LOG.info(f"continuing after round {done[-1].round}")
        else:
            weights = initial_weights(config)
        failed = 0
        losses = comparable_losses(done)
        while len(done) < config.rounds.number and not should_stop(losses, config.rounds):
            rate = learning_rate(config.training.learning_rate, losses, config.rounds)
            number = len(done) + 1
            try:
                weights, record = _one_round(
                    grid, config, folder, present(number), number, rate, weights
                )
            except _TooFew as few:
                history.record_failure(number, few.reasons)
                failed += 1
                if failed >= attempts:
                    raise FederationFailed(few.text()) from None
                LOG.warning(f"{few.text()}\nTrying round {number} again ({failed + 1}/{attempts}).")
                continue
            failed = 0
            history.record_round(record)
            done.append(record)
            losses = comparable_losses(done)
            best_mean, best_worst = best_rounds(done)
            prune_checkpoints(folder, {number, best_mean.round, best_worst.round})
            on_round(record)
        if history.final() is None:
            _finish(grid, config, folder, present, history, done, attempts)


@dataclass
class _TooFew(Exception):
    round: int
    stage: str
    needed: int
    good: int
    reasons: dict[str, str]

    def text(self) -> str:
        sites = "".join(f"  {site}: {reason}\n" for site, reason in self.reasons.items())
        return (
            f"Round {self.round} failed: {self.good} sites could {self.stage}, "
            f"{self.needed} are needed.\n{sites}"
            "The rounds before it are kept; the same command continues after them."
        )


def _one_round(
    grid: Grid,
    config: FederationConfig,
    folder: RunFolder,
    roll: Roll,
    number: int,
    rate: float,
    weights: Weights,
) -> tuple[Weights, RoundRecord]:
    begin = time.monotonic()
    task = TrainTask(number, config.fingerprint(), rate, weights)
    running: WeightedSum | None = None

    def take(site: str, content: RecordDict) -> Contribution | str:
        """Add an update to the sum and forget it: it is a whole model."""
        nonlocal running
        update = unpack_site_update(content, since=weights)
        if reason := _refuse(update, roll.cards[site], task, config.rounds.max_change):
            return reason
        running = add(running, update.weights, update.n_training)
        return Contribution(
            site,
            trained=True,
            train_loss=update.loss,
            seconds=update.seconds,
            samples_per_second=update.samples_per_second,
            bytes=weight_bytes(content),
        )

    contributions: list[Contribution] = []
    content = pack_train_task(task)
    messages = _messages(content, MessageType.TRAIN, roll.training, roll, config)
    for site, answer in answers(grid, messages, take):
        if isinstance(answer, str):
            LOG.warning(f"round {number}: {site} did not contribute: {answer}")
            answer = Contribution(site, trained=False, reason=answer)
        contributions.append(answer)
    for site, why in roll.absent.items():
        contributions.append(Contribution(site, trained=False, reason=why))
    contributions.sort(key=lambda c: c.site)
    missing = {c.site: c.reason for c in contributions if not c.trained}
    _enough(config, number, "train", len(contributions), missing)
    assert running is not None
    averaged = mean(running, like=weights)
    metrics, unmeasured = _evaluate(grid, config, roll, number, averaged, surface_distances=False)
    checkpoint, digest = save_checkpoint(folder, number, averaged)
    record = RoundRecord(
        round=number,
        learning_rate=rate,
        seconds=time.monotonic() - begin,
        loss=_pooled(metrics, "loss"),
        checkpoint=checkpoint,
        sha256=digest,
        contributions=tuple(contributions),
        metrics=metrics,
        unmeasured={**roll.absent_evaluators, **unmeasured},
    )
    return averaged, record


def _evaluate(
    grid: Grid,
    config: FederationConfig,
    roll: Roll,
    number: int,
    weights: Weights,
    *,
    surface_distances: bool,
) -> tuple[dict[str, SiteMetrics], dict[str, str]]:
    """The metrics by site, and why there are none by each site that gave none."""
    task = EvaluateTask(number, config.fingerprint(), surface_distances, weights)
    content = pack_evaluate_task(task)
    messages = _messages(content, MessageType.EVALUATE, roll.evaluating, roll, config)
    metrics: dict[str, SiteMetrics] = {}
    # who is absent from a round is among its contributions already; the end has none
    missing = {**roll.absent, **roll.absent_evaluators} if surface_distances else {}
    asked = len(roll.evaluating) + len(missing)

    def take(site: str, content: RecordDict) -> SiteMetrics | str:
        report = unpack_site_report(content)
        return _refuse_report(report, roll.cards[site], number) or report.metrics

    for site, answer in answers(grid, messages, take):
        if isinstance(answer, str):
            missing[site] = answer
        else:
            metrics[site] = answer
    for site, reason in missing.items():
        LOG.warning(f"round {number}: {site} did not evaluate: {reason}")
    _enough(config, number, "evaluate", asked, missing)
    return metrics, missing


def _messages(
    content: RecordDict, kind: str, sites: list[str], roll: Roll, config: FederationConfig
) -> dict[str, Message]:
    """One for each site; its time to live is the round's deadline."""
    seconds = 60 * config.rounds.deadline_minutes
    return {site: Message(content, roll.nodes[site], kind, ttl=seconds) for site in sites}


def _finish(
    grid: Grid,
    config: FederationConfig,
    folder: RunFolder,
    present: Callable[[int], Roll],
    history: History,
    done: list[RoundRecord],
    attempts: int,
) -> None:
    best_mean, best_worst = best_rounds(done)
    chosen = load_checkpoint(folder, best_mean.round, best_mean.sha256)
    for attempt in range(1, attempts + 1):
        try:
            roll = present(best_mean.round)
            metrics, unmeasured = _evaluate(
                grid, config, roll, best_mean.round, chosen, surface_distances=True
            )
            break
        except _TooFew as few:
            history.record_failure(best_mean.round, few.reasons)
            if attempt == attempts:
                raise FederationFailed(few.text()) from None
            LOG.warning(f"{few.text()}\nEvaluating again ({attempt + 1}/{attempts}).")
    contributed = {c.site for record in done for c in record.contributions if c.trained}
    about = {"config": config.agreed(), "sites": sorted(contributed)}
    save_weights(folder.model, chosen, {**about, "round": best_mean.round})
    worst = load_checkpoint(folder, best_worst.round, best_worst.sha256)
    save_weights(folder.model_worst_site, worst, {**about, "round": best_worst.round})
    history.record_final(best_mean.round, metrics, unmeasured)


def _refuse(update: SiteUpdate, card: SiteCard, task: TrainTask, max_change: float) -> str:
    """Why an update cannot be averaged; empty if it can."""
    if (update.site, update.round) != (card.site, task.round):
        return f"its update is from {update.site} for round {update.round}."
    if update.n_training != card.n_training:
        return f"it trained on {update.n_training} subjects but announced {card.n_training}."
    told = update.loss, update.seconds, update.samples_per_second
    if not all(x is None or abs(x) <= LARGEST for x in told):
        return "its training loss, time or throughput is not a possible number."
    try:
        check_update(update.weights, task.weights)
    except BadWeights as error:
        return str(error)
    change = relative_change(update.weights, task.weights)
    if not change <= max_change:
        return f"its change is {change:.3g} times as large as the model (limit: {max_change:g})."
    return ""


def _refuse_report(report: SiteReport, card: SiteCard, number: int) -> str:
    """Why a report cannot be used; empty if it can. A NaN mean is only an undefined one."""
    metrics = report.metrics
    if (report.site, report.round) != (card.site, number):
        return f"its report is from {report.site} for round {report.round}."
    if metrics.n != card.n_held_out:
        return f"it evaluated {metrics.n} subjects but announced {card.n_held_out}."
    if not abs(metrics.means.get("loss", math.nan)) <= LARGEST:
        return "its validation loss is not a possible number."
    impossible = [name for name, mean in metrics.means.items() if not _possible(name, mean)]
    if len(metrics.means) > MOST_METRICS or impossible or not 0 <= mean_dice(metrics) <= 1:
        return f"its metrics are missing or not possible ({plain(', '.join(impossible), 80)})."
    return ""


def _possible(name: str, mean: float) -> bool:
    if not re.fullmatch(r"[A-Za-z0-9_/-]{1,40}", name):
        return False
    if math.isnan(mean):
        return True  # undefined for every subject
    largest = LARGEST if name == "loss" or name.startswith("hd95/") else 1.0
    return (-largest if name == "loss" else 0.0) <= mean <= largest


def _enough(
    config: FederationConfig, number: int, stage: str, asked: int, missing: dict[str, str]
) -> None:
    """By default every site that was asked must have answered: no silent subset."""
    good = asked - len(missing)
    needed = asked
    if config.rounds.min_sites is not None:
        needed = min(config.rounds.min_sites, asked)
    if good < max(needed, 1):
        raise _TooFew(number, stage, needed, good, missing)


def _pooled(metrics: dict[str, SiteMetrics], key: str) -> float:
    """Mean over all sites' subjects of a metric that every subject has."""
    total = sum(m.means[key] * m.n for m in metrics.values())
    return total / sum(m.n for m in metrics.values())
