"""What the server and a site say to each other, as typed values with one Flower form each.

Four exchanges: roll call (who are you), train, evaluate, and the answers to them. Everything a site
receives is in a task below, everything it sends is in an answer below; nothing else crosses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch  # noqa: F401  Flower's ArrayRecord finds torch only if it is already imported
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.metrics import SiteMetrics
from common.weights import Weights


class BadMessage(ValueError):
    """A message does not have the agreed form; the text says what is wrong."""


@dataclass(frozen=True)
class SiteCard:
    """A site's answer to the roll call. `trains` is False for a site that only evaluates."""

    site: str
    trains: bool
    n_training: int
    n_held_out: int
    n_left_out: int
    config_fingerprint: str


@dataclass(frozen=True)
class TrainTask:
    round: int
    config_fingerprint: str
    learning_rate: float
    weights: Weights


@dataclass(frozen=True)
class SiteUpdate:
    """The weights after local training, and what the server's history keeps about it."""

    site: str
    round: int
    n_training: int
    loss: float
    seconds: float
    samples_per_second: float
    weights: Weights


@dataclass(frozen=True)
class EvaluateTask:
    round: int
    config_fingerprint: str
    surface_distances: bool  # HD95 is slow: asked for once, at the end
    weights: Weights


@dataclass(frozen=True)
class SiteReport:
    """Metrics over a site's held-out subjects, as means with the number of subjects behind each."""

    site: str
    round: int
    seconds: float
    metrics: SiteMetrics


def pack_site_card(card: SiteCard) -> RecordDict:
    return RecordDict({"card": ConfigRecord(dict(vars(card)))})


def unpack_site_card(content: RecordDict) -> SiteCard:
    record = _record(content, "card", ConfigRecord)
    card = SiteCard(
        site=_value(record, "site", str),
        trains=_value(record, "trains", bool),
        n_training=_value(record, "n_training", int),
        n_held_out=_value(record, "n_held_out", int),
        n_left_out=_value(record, "n_left_out", int),
        config_fingerprint=_value(record, "config_fingerprint", str),
    )
    if min(card.n_training, card.n_held_out, card.n_left_out) < 0:
        raise BadMessage("a number of subjects is negative.")
    if card.trains and card.n_training == 0:
        raise BadMessage("the site says that it trains, on no subject.")
    return card


def pack_train_task(task: TrainTask) -> RecordDict:
    return _with_weights(task)


def unpack_train_task(content: RecordDict) -> TrainTask:
    record = _record(content, "about", ConfigRecord)
    return TrainTask(
        round=_value(record, "round", int),
        config_fingerprint=_value(record, "config_fingerprint", str),
        learning_rate=_value(record, "learning_rate", float),
        weights=_weights(content),
    )


def pack_site_update(update: SiteUpdate) -> RecordDict:
    return _with_weights(update)


def unpack_site_update(content: RecordDict) -> SiteUpdate:
    record = _record(content, "about", ConfigRecord)
    return SiteUpdate(
        site=_value(record, "site", str),
        round=_value(record, "round", int),
        n_training=_value(record, "n_training", int),
        loss=_value(record, "loss", float),
        seconds=_value(record, "seconds", float),
        samples_per_second=_value(record, "samples_per_second", float),
        weights=_weights(content),
    )


def pack_evaluate_task(task: EvaluateTask) -> RecordDict:
    return _with_weights(task)


def unpack_evaluate_task(content: RecordDict) -> EvaluateTask:
    record = _record(content, "about", ConfigRecord)
    return EvaluateTask(
        round=_value(record, "round", int),
        config_fingerprint=_value(record, "config_fingerprint", str),
        surface_distances=_value(record, "surface_distances", bool),
        weights=_weights(content),
    )


def pack_site_report(report: SiteReport) -> RecordDict:
    about = {"site": report.site, "round": report.round, "seconds": report.seconds}
    return RecordDict(
        {
            "about": ConfigRecord(about),
            "means": MetricRecord(dict(report.metrics.means)),
            "defined": MetricRecord({"n": report.metrics.n, **report.metrics.defined}),
        }
    )


def unpack_site_report(content: RecordDict) -> SiteReport:
    record = _record(content, "about", ConfigRecord)
    means = _record(content, "means", MetricRecord)
    counts = _record(content, "defined", MetricRecord)
    n = _value(counts, "n", int)
    defined = {name: _value(counts, name, int) for name in means}
    if any(not 0 <= count <= n for count in defined.values()):
        raise BadMessage(f"a mean is over fewer than 0 or more than all {n} subjects.")
    return SiteReport(
        site=_value(record, "site", str),
        round=_value(record, "round", int),
        seconds=_value(record, "seconds", float),
        metrics=SiteMetrics(
            n=n, means={name: _value(means, name, float) for name in means}, defined=defined
        ),
    )


def _with_weights(message: TrainTask | SiteUpdate | EvaluateTask) -> RecordDict:
    about = {name: value for name, value in vars(message).items() if name != "weights"}
    return RecordDict(
        {"about": ConfigRecord(about), "weights": ArrayRecord(torch_state_dict=message.weights)}
    )


def _weights(content: RecordDict) -> Weights:
    record = _record(content, "weights", ArrayRecord)
    try:
        return dict(record.to_torch_state_dict())
    except Exception as error:  # the bytes come from outside: whatever they do wrong, name it
        raise BadMessage(f"the weights cannot be decoded ({type(error).__name__}).") from error


def _record(content: RecordDict, name: str, kind: type) -> Any:
    record = content.get(name)
    if not isinstance(record, kind):
        raise BadMessage(f"the message has no {kind.__name__} called {name!r}.")
    return record


def _value(record: Mapping[str, Any], name: str, kind: type) -> Any:
    value = record.get(name)
    # bool is an int in Python, not here
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadMessage(f"{name!r} must be of type {kind.__name__}, found {type(value).__name__}.")
    return value
