"""The rounds of a federation: roll call, then train, average, evaluate, record, until done.

Works over any Flower `Grid`. Replies are taken in the order of site names, one at a time, so that
the result does not depend on who was fast and memory not on how many they are. A round counts only
if enough sites gave a good reply; otherwise it is tried again or the run fails, and says who is
missing. Who takes part is asked anew before every round (`attend`); a simulation answers with the
same roll each time, a real federation with whoever is there (`server.attendance`). A site may withhold
its metrics or release them with noise: that is a good reply, with less to record.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import MessageType, RecordDict
from flwr.serverapp import Grid

from common.config import FederationConfig
from common.message_words import EXACT, WITHHELD
from common.messages import (
    EvaluateTask,
    SiteReport,
    TrainTask,
    pack_evaluate_task,
    unpack_site_report,
)
from common.metrics import SiteMetrics
from common.weights import Weights, save_weights
from server.average import moving
from server.beginning import beginning
from server.checkpoint import (
    RunFolder,
    load_checkpoint,
    load_to_continue,
    prune_checkpoints,
    save_checkpoint,
)
from server.comparison import best_rounds, comparable_losses
from server.exchange import addressed, answers, refused_by_policy
from server.history import (
    FINAL,
    METRICS,
    Contribution,
    GivenStatement,
    History,
    RoundRecord,
)
from server.replies import refuse_report
from server.roll_call import FederationFailed, Roll, by_site, call_roll, nobody_trains, same_run
from server.schedule import learning_rate, should_stop
from server.secure_round import gather_secure_sum
from server.secure_state import begun, forget
from server.shown_names import shown_names
from server.updates import fewest_to_aggregate, gather_updates, sites_needed

LOG = logging.getLogger("fedbrats")
WITHHOLDS = "it withholds its metrics, by its own choice."


def run_rounds(
    grid: Grid,
    config: FederationConfig,
    folder: RunFolder,
    on_round: Callable[[RoundRecord], None] = lambda record: None,
    *,
    attend: Callable[[History, int], Roll] | None = None,
    attempts: int = 1,
) -> None:
    """Train until the configured rounds are done, the validation loss says stop, or every site that
    could train has spent its privacy budget.

    Continues after the last complete round that `folder` holds, with the same result as a run that
    was never interrupted. At the end writes the best models and their metrics with HD95.

    Args:
        attend: who takes part in the round of this number; by default one roll call, all that
            answer it, and they must be those of the rounds so far.
        attempts: how often one round is tried with too few good replies.

    Raises:
        FederationFailed: sites are missing or disagree, or a round had too few good replies.
        BadWeights: the checkpoint to continue from is damaged.
        ConfigError: the weights to begin with cannot be used.
    """
    with History(folder.history) as history:
        if attend is None:
            called = call_roll(grid, config)
            same_run(history, called, config)

        def present(number: int) -> Roll:
            return called if attend is None else attend(history, number)

        done = history.rounds()
        models = _begin(config, folder, history, done)
        failed = 0
        losses = comparable_losses(done)
        over = history.final() is not None and history.noted("ended") is not None
        while (
            not over and len(done) < config.rounds.number and not should_stop(losses, config.rounds)
        ):
            rate = learning_rate(config.training.learning_rate, losses, config.rounds)
            number = len(done) + 1
            try:
                roll = present(number)
                fewest = fewest_to_aggregate(config, roll)
                if done and nobody_trains(roll, fewest) and not begun(folder, number):
                    _say_the_end(history, config, len(done), roll.resting, fewest)
                    break
                models, record, statements = _one_round(
                    grid, config, folder, roll, number, rate, models
                )
            except _AllSpent as spent:
                if not done:
                    raise FederationFailed(str(spent)) from None
                _say_the_end(history, config, len(done), spent.reasons, 1)
                break
            except _TooFew as few:
                history.record_failure(number, few.reasons)
                failed += 1
                if failed >= attempts:
                    raise FederationFailed(few.text()) from None
                LOG.warning(f"{few.text()}\nTrying round {number} again ({failed + 1}/{attempts}).")
                continue
            failed = 0
            history.record_round(record, statements)
            forget(folder)
            _tell_who_withholds(record, done)
            done.append(record)
            losses = comparable_losses(done)
            best_mean, best_worst = best_rounds(done)
            prune_checkpoints(folder, {number, best_mean.round, best_worst.round})
            on_round(record)
        if history.final() is None:
            _finish(grid, config, folder, present, history, done, attempts)


@dataclass(frozen=True)
class _Models:
    """Training continues from `raw`. With `rounds.average_decay` the moving average is measured and
    kept instead of it; None before the first round."""

    raw: Weights
    average: Weights | None


def _begin(
    config: FederationConfig, folder: RunFolder, history: History, done: list[RoundRecord]
) -> _Models:
    if not done:
        first = beginning(config)
        if first.sha256 != history.noted("init_from"):
            history.note("init_from", first.sha256)
        if first.sha256 is not None:
            LOG.info(f"beginning from {config.server.init_from}, sha256 {first.sha256}")
        return _Models(first.weights, None)
    if config.server.init_from is not None and history.noted("init_from") is None:
        LOG.warning("server.init_from is not read: round 1 is done, and began without it")
    average, raw = load_to_continue(folder, done[-1].round, done[-1].sha256)
    LOG.info(f"continuing after round {done[-1].round}")
    return _Models(raw, average)


@dataclass
class _TooFew(Exception):
    round: int
    stage: str
    needed: int
    good: int
    reasons: dict[str, str]
    why: str = ""  # so many are needed, if that is not a matter of rounds.min_sites

    def text(self) -> str:
        return (
            f"Round {self.round} failed: {self.good} sites could {self.stage}, "
            f"{self.needed} are needed{self.why}.\n{by_site(self.reasons)}"
            "The rounds before it are kept; the same command continues after them."
        )


@dataclass
class _AllSpent(Exception):
    """Every site that was asked has spent its privacy budget."""

    reasons: dict[str, str]

    def __str__(self) -> str:
        return "No site can train: " + " ".join(f"{s}: {why}" for s, why in self.reasons.items())


def _say_the_end(
    history: History, config: FederationConfig, rounds: int, reasons: Mapping[str, str], fewest: int
) -> None:
    """Rounds that nobody can pay for any more do not take place; those before are the result."""
    why = "every site that could train has spent its privacy budget"
    if fewest > 1:
        why = f"fewer than the {fewest} sites that are needed have a privacy budget left"
    history.note("ended", {"after_round": rounds, "why": why})
    text = (
        f"training ends after round {rounds} of {config.rounds.number}: {why}\n{by_site(reasons)}"
    )
    LOG.warning(text.rstrip())


def _one_round(
    grid: Grid,
    config: FederationConfig,
    folder: RunFolder,
    roll: Roll,
    number: int,
    rate: float,
    models: _Models,
) -> tuple[_Models, RoundRecord, list[GivenStatement]]:
    begin = time.monotonic()
    decay = config.rounds.average_decay
    task = TrainTask(number, config.fingerprint(), rate, models.raw)
    # if nobody trains, it is said below why; and a round that is half aggregated needs no training
    if roll.training and not begun(folder, number):
        others = {**roll.absent, **roll.resting}
        _enough_to_aggregate(config, roll, number, len(roll.training), others)
    if config.secure_aggregation:
        gathered = gather_secure_sum(grid, config, folder, roll, task)
    else:
        gathered = gather_updates(grid, config, roll, task, folder.updates)
    contributions, spent = gathered.contributions, gathered.spent
    told = {c.site for c in contributions}  # of a sum that was begun before, also who is gone now
    for site, why in roll.absent.items():
        if site not in told:
            contributions.append(Contribution(site, trained=False, reason=why))
    missing = {c.site: c.reason for c in contributions if not c.trained}
    resting = {s: why for s, why in {**roll.resting, **spent}.items() if s not in told}
    if resting and not contributions:
        raise _AllSpent(resting)
    refused = refused_by_policy(missing.values())
    needed = sites_needed(config, roll, len(contributions), len(spent), refused)
    _enough(number, "train", needed, len(contributions), missing, spent)
    good = len(contributions) - len(missing)
    _enough_to_aggregate(config, roll, number, good, {**missing, **gathered.spent})
    assert gathered.weights is not None
    # a site that rests is none that the round needs
    contributions += [Contribution(s, trained=False, reason=why) for s, why in resting.items()]
    contributions.sort(key=lambda c: c.site)
    raw = kept = gathered.weights
    if decay and models.average is not None:
        kept = moving(models.average, raw, decay)
    measured = _evaluate(grid, config, roll, number, kept, surface_distances=False)
    checkpoint, digest = save_checkpoint(folder, number, kept, None if kept is raw else raw)
    record = RoundRecord(
        round=number,
        learning_rate=rate,
        seconds=time.monotonic() - begin,
        loss=_pooled(measured.metrics, "loss"),
        checkpoint=checkpoint,
        sha256=digest,
        contributions=tuple(contributions),
        metrics=measured.metrics,
        unmeasured={**roll.absent_evaluators, **measured.unmeasured},
        released=measured.released,
        chosen=gathered.chosen,
    )
    return _Models(raw, kept), record, gathered.statements + measured.statements


@dataclass(frozen=True)
class _Measured:
    """What the sites report about a model, as in `RoundRecord`."""

    metrics: dict[str, SiteMetrics]
    unmeasured: dict[str, str]
    released: dict[str, str]
    statements: list[GivenStatement]


def _evaluate(
    grid: Grid,
    config: FederationConfig,
    roll: Roll,
    number: int,
    weights: Weights,
    *,
    surface_distances: bool,
) -> _Measured:
    task = EvaluateTask(number, config.fingerprint(), surface_distances, weights)
    content = pack_evaluate_task(task)
    messages = addressed(content, MessageType.EVALUATE, roll.evaluating, roll.nodes, config)
    measured = _Measured({}, {}, {}, [])
    # who is absent from a round is among its contributions already; the end has none
    missing = {**roll.absent, **roll.absent_evaluators} if surface_distances else {}
    asked = len(roll.evaluating) + len(missing)

    def take(site: str, content: RecordDict) -> SiteReport | str:
        report = unpack_site_report(content)
        return refuse_report(report, roll.cards[site], number) or report

    for site, answer in answers(grid, messages, take):
        if isinstance(answer, str):
            missing[site] = answer
            continue
        if answer.released != EXACT:
            measured.released[site] = answer.released
        if answer.released == WITHHELD:
            measured.unmeasured[site] = WITHHOLDS
        else:
            measured.metrics[site] = answer.metrics
        if answer.statement is not None:
            stage = FINAL if surface_distances else METRICS
            measured.statements.append(GivenStatement(number, site, stage, answer.statement))
    for site, reason in missing.items():
        LOG.warning(f"round {number}: {site} did not evaluate: {reason}")
    needed = asked - refused_by_policy(missing.values())
    if config.rounds.min_sites is not None:
        needed = min(config.rounds.min_sites, asked)
    _enough(number, "evaluate", max(needed, 1), asked, missing)
    measured.unmeasured.update(missing)
    return measured


def _tell_who_withholds(record: RoundRecord, before: list[RoundRecord]) -> None:
    """Once a run: it is no failure, but nobody shall wonder where the numbers are."""
    known = {site for r in before for site, how in r.released.items() if how == WITHHELD}
    for site, how in record.released.items():
        if how == WITHHELD and site not in known:
            LOG.info(f"{site} withholds its metrics, by its own choice")


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
            measured = _evaluate(
                grid, config, roll, best_mean.round, chosen, surface_distances=True
            )
            break
        except _TooFew as few:
            history.record_failure(best_mean.round, few.reasons)
            if attempt == attempts:
                raise FederationFailed(few.text()) from None
            LOG.warning(f"{few.text()}\nEvaluating again ({attempt + 1}/{attempts}).")
    contributed = {c.site for record in done for c in record.contributions if c.trained}
    # whoever gets the model reads this
    names = shown_names(history.sites())
    sites = sorted(names.get(site, site) for site in contributed)
    about = {"config": config.agreed(), "sites": sites}
    save_weights(folder.model, chosen, {**about, "round": best_mean.round})
    worst = load_checkpoint(folder, best_worst.round, best_worst.sha256)
    save_weights(folder.model_worst_site, worst, {**about, "round": best_worst.round})
    history.record_final(
        best_mean.round,
        measured.metrics,
        measured.unmeasured,
        measured.released,
        measured.statements,
    )


def _enough(
    number: int,
    stage: str,
    needed: int,
    asked: int,
    missing: dict[str, str],
    spent: Mapping[str, str] | None = None,
) -> None:
    """By default every site that was asked must have answered: no silent subset."""
    good = asked - len(missing)
    if good < needed:
        raise _TooFew(number, stage, needed, good, {**missing, **(spent or {})})


def _enough_to_aggregate(
    config: FederationConfig, roll: Roll, number: int, good: int, missing: Mapping[str, str]
) -> None:
    """Asked before the sites train too: work that cannot be used is not asked for."""
    needed = fewest_to_aggregate(config, roll)
    if good < needed:
        why = f" for rounds.aggregation: {config.rounds.aggregation}"
        if config.secure_aggregation:
            why = " for secure_aggregation"
        raise _TooFew(number, "train", needed, good, dict(missing), why)


def _pooled(metrics: dict[str, SiteMetrics], key: str) -> float | None:
    """Mean of a metric that every subject has, over all subjects of the sites that tell it."""
    told = [m for m in metrics.values() if key in m.means]
    return sum(m.means[key] * m.n for m in told) / sum(m.n for m in told) if told else None
