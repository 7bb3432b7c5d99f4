"""Which replies of sites count: why an update cannot be averaged, or a report not be used.

Each function answers in words that the verdict repeats, or with "" for a good reply. What they check
is form and size; plausible but false numbers of an enrolled site are not noticed.
"""

from __future__ import annotations

import math
import re

from common.console import plain
from common.message_words import EXACT, NOISED, WITHHELD
from common.messages import SiteCard, SiteReport, SiteUpdate, TrainTask
from common.metrics import REGIONS, SiteMetrics, mean_dice
from common.secure_messages import Trained
from common.statement import BadStatement, Signed, read_statement
from common.weights import BadWeights, check_update

LARGEST = 1e9  # of a reported loss, time or distance
MOST_METRICS = 200
NOISED_METRICS = {f"dice/{region}" for region in REGIONS}


def refuse_update(update: SiteUpdate, card: SiteCard, task: TrainTask) -> str:
    """Why an update cannot be averaged, whatever its size; empty if it can."""
    if (update.site, update.round) != (card.site, task.round):
        return f"its update is from {update.site} for round {update.round}."
    if reason := _refuse_statement(update.statement, card, task.round):
        return reason
    if update.n_training != card.n_training:
        return f"it trained on {update.n_training} subjects but announced {card.n_training}."
    if reason := _refuse_numbers(update):
        return reason
    try:
        check_update(update.weights, task.weights)
    except BadWeights as error:
        return str(error)
    return ""


def refuse_change(change: float, max_change: float) -> str:
    """Why an update of this size (`common.weights.relative_change`) cannot be averaged.

    How it compares with those of the other sites: `server.robust.outliers`.
    """
    if not change <= max_change:
        return f"its change is {change:.3g} times as large as the model (limit: {max_change:g})."
    return ""


def refuse_trained(trained: Trained, card: SiteCard, number: int) -> str:
    """Why a site that has trained cannot be in the sum; empty if it can. Its keys are checked later."""
    if (trained.site, trained.round) != (card.site, number):
        return f"its answer is from {trained.site} for round {trained.round}."
    return _refuse_statement(trained.statement, card, number) or _refuse_numbers(trained)


def refuse_report(report: SiteReport, card: SiteCard, number: int) -> str:
    """Why a report cannot be used; empty if it can, also if it withholds its metrics."""
    if (report.site, report.round) != (card.site, number):
        return f"its report is from {report.site} for round {report.round}."
    if reason := _refuse_statement(report.statement, card, number):
        return reason
    if report.metrics.n != card.n_held_out:
        return f"it evaluated {report.metrics.n} subjects but announced {card.n_held_out}."
    return {EXACT: _refuse_exact, NOISED: _refuse_noised, WITHHELD: _refuse_withheld}[
        report.released
    ](report.metrics)


def _refuse_numbers(said: SiteUpdate | Trained) -> str:
    told = [said.loss, said.seconds]
    if isinstance(said, SiteUpdate):
        told.append(said.samples_per_second)
    if not all(x is None or abs(x) <= LARGEST for x in told):
        return "its training loss, time or throughput is not a possible number."
    return ""


def _refuse_exact(metrics: SiteMetrics) -> str:
    """A NaN mean is only an undefined one, but for the loss. Which there are, beside the Dice by which
    the model is chosen, is the site's choice."""
    if "loss" in metrics.means and not abs(metrics.means["loss"]) <= LARGEST:
        return "its validation loss is not a possible number."
    impossible = [name for name, mean in metrics.means.items() if not _possible(name, mean)]
    if len(metrics.means) > MOST_METRICS or impossible or not 0 <= mean_dice(metrics) <= 1:
        return f"its metrics are missing or not possible ({plain(', '.join(impossible), 80)})."
    return ""


def _refuse_noised(metrics: SiteMetrics) -> str:
    if metrics.means.keys() != NOISED_METRICS:
        return f"its noised metrics are not {', '.join(sorted(NOISED_METRICS))}."
    if not all(0 <= mean <= 1 for mean in metrics.means.values()):
        return "its noised metrics are not between 0 and 1."
    return ""


def _refuse_withheld(metrics: SiteMetrics) -> str:
    return "it says that it withholds its metrics, and tells some." if metrics.means else ""


def _refuse_statement(signed: Signed | None, card: SiteCard, number: int) -> str:
    """Who signed it is for `server.privacy_report` to say: the statement is kept as it came."""
    if signed is None:
        return ""
    try:
        stated = read_statement(signed.text)
    except BadStatement as error:
        return str(error)
    if (stated.site, stated.round) != (card.site, number):
        return f"its privacy statement is from {plain(stated.site, 64)} for round {stated.round}."
    return ""


def _possible(name: str, mean: float) -> bool:
    if not re.fullmatch(r"[A-Za-z0-9_/-]{1,40}", name):
        return False
    if math.isnan(mean):
        return True  # undefined for every subject
    largest = LARGEST if name == "loss" or name.startswith("hd95/") else 1.0
    return (-largest if name == "loss" else 0.0) <= mean <= largest
