"""What the server and a site say to each other, as typed values with one Flower form each.

Roll call (who are you), train, evaluate, and the answers to them. Everything a site receives is in
a task below or a notice (`common.notices`), everything it sends is in an answer below; nothing else
crosses. Weights travel as one block of bytes (`common.wire`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.message_words import BLOCK, EXACT, MOST_SUBJECTS, NOISED, NONCE, STYPE, WITHHELD
from common.metrics import SiteMetrics
from common.records import BadMessage, record_of, value_of
from common.statement import Signed, attach, attached
from common.weights import BadWeights, Weights
from common.wire import decode, encode, encode_change


@dataclass(frozen=True)
class SiteCard:
    """A site's answer to the roll call. `trains` is False for a site that only evaluates.

    `n_training` is None where secure aggregation hides it. `resting` says why a site does not train
    although it has subjects to train on: its privacy budget is spent.
    `shows_name` is the site's choice whether other sites may read its name.
    """

    site: str
    trains: bool
    n_training: int | None
    n_held_out: int
    n_left_out: int
    config_fingerprint: str
    resting: str = ""
    shows_name: bool = True


@dataclass(frozen=True)
class TrainTask:
    round: int
    config_fingerprint: str
    learning_rate: float
    weights: Weights


@dataclass(frozen=True)
class SiteUpdate:
    """The weights after local training, and what the server's history keeps about it.

    Loss, time and throughput depend on the patients that were drawn, so a site that trains with
    differential privacy keeps them to itself.
    """

    site: str
    round: int
    n_training: int
    weights: Weights
    loss: float | None = None
    seconds: float | None = None
    samples_per_second: float | None = None
    statement: Signed | None = None


@dataclass(frozen=True)
class EvaluateTask:
    round: int
    config_fingerprint: str
    surface_distances: bool  # HD95 is slow: asked for once, at the end
    weights: Weights


@dataclass(frozen=True)
class SiteReport:
    """Metrics over a site's held-out subjects, as means with the number of subjects behind each.

    `released` is the site's choice: exact, noised (differentially private: Dice of the regions
    only), or withheld (no mean at all).
    """

    site: str
    round: int
    metrics: SiteMetrics
    seconds: float | None = None
    released: str = EXACT
    statement: Signed | None = None


def pack_site_card(card: SiteCard) -> RecordDict:
    told = {name: value for name, value in vars(card).items() if value is not None}
    return RecordDict({"card": ConfigRecord(told)})


def unpack_site_card(content: RecordDict) -> SiteCard:
    record = record_of(content, "card", ConfigRecord)
    card = SiteCard(
        site=value_of(record, "site", str),
        trains=value_of(record, "trains", bool),
        n_training=value_of(record, "n_training", int) if "n_training" in record else None,
        n_held_out=value_of(record, "n_held_out", int),
        n_left_out=value_of(record, "n_left_out", int),
        config_fingerprint=value_of(record, "config_fingerprint", str),
        resting=value_of(record, "resting", str),
        shows_name=value_of(record, "shows_name", bool),
    )
    numbers = card.n_training or 0, card.n_held_out, card.n_left_out
    if min(numbers) < 0 or max(numbers) > MOST_SUBJECTS:
        raise BadMessage("a number of subjects is negative or impossibly large.")
    if card.trains and card.n_training == 0:
        raise BadMessage("the site says that it trains, on no subject.")
    if card.trains and card.resting:
        raise BadMessage("the site says that it trains, and why it does not.")
    return card


def pack_train_task(task: TrainTask) -> RecordDict:
    return _with_weights(task, encode(task.weights))


def unpack_train_task(content: RecordDict) -> TrainTask:
    record = record_of(content, "about", ConfigRecord)
    return TrainTask(
        round=value_of(record, "round", int),
        config_fingerprint=value_of(record, "config_fingerprint", str),
        learning_rate=value_of(record, "learning_rate", float),
        weights=_weights(content),
    )


def pack_site_update(update: SiteUpdate, since: Weights | None = None) -> RecordDict:
    """The whole weights, or their fp16 change since those of the task.

    Raises:
        BadWeights: of a change, if a value is not finite.
    """
    block = encode(update.weights) if since is None else encode_change(update.weights, since)
    return _with_weights(update, block)


def unpack_site_update(content: RecordDict, since: Weights | None = None) -> SiteUpdate:
    """`since` is the task's weights, for an update that travelled as a change."""
    record = record_of(content, "about", ConfigRecord)
    return SiteUpdate(
        site=value_of(record, "site", str),
        round=value_of(record, "round", int),
        n_training=value_of(record, "n_training", int),
        weights=_weights(content, since),
        loss=_if_told(record, "loss"),
        seconds=_if_told(record, "seconds"),
        samples_per_second=_if_told(record, "samples_per_second"),
        statement=attached(content),
    )


def pack_evaluate_task(task: EvaluateTask) -> RecordDict:
    return _with_weights(task, encode(task.weights))


def unpack_evaluate_task(content: RecordDict) -> EvaluateTask:
    record = record_of(content, "about", ConfigRecord)
    return EvaluateTask(
        round=value_of(record, "round", int),
        config_fingerprint=value_of(record, "config_fingerprint", str),
        surface_distances=value_of(record, "surface_distances", bool),
        weights=_weights(content),
    )


def pack_site_report(report: SiteReport) -> RecordDict:
    content = RecordDict(
        {
            "about": _about(report, "metrics"),
            "means": MetricRecord(dict(report.metrics.means)),
            "defined": MetricRecord({"n": report.metrics.n, **report.metrics.defined}),
        }
    )
    attach(content, report.statement)
    return content


def unpack_site_report(content: RecordDict) -> SiteReport:
    record = record_of(content, "about", ConfigRecord)
    means = record_of(content, "means", MetricRecord)
    counts = record_of(content, "defined", MetricRecord)
    n = value_of(counts, "n", int)
    defined = {name: value_of(counts, name, int) for name in means}
    if any(not 0 <= count <= n for count in defined.values()):
        raise BadMessage(f"a mean is over fewer than 0 or more than all {n} subjects.")
    released = value_of(record, "released", str)
    if released not in (EXACT, NOISED, WITHHELD) or (released == WITHHELD and len(means)):
        raise BadMessage("the metrics are not released in one of the agreed ways.")
    return SiteReport(
        site=value_of(record, "site", str),
        round=value_of(record, "round", int),
        metrics=SiteMetrics(
            n=n, means={name: value_of(means, name, float) for name in means}, defined=defined
        ),
        seconds=_if_told(record, "seconds"),
        released=released,
        statement=attached(content),
    )


def task_hash(content: RecordDict) -> str:
    """sha256 (hex) of everything a task says, its weights as they travelled: the same question?"""
    about = record_of(content, "about", ConfigRecord)
    text = json.dumps({name: value for name, value in sorted(about.items()) if name != NONCE})
    return hashlib.sha256(text.encode() + b"\0" + _block(content)).hexdigest()


def weight_bytes(content: RecordDict) -> int:
    """How many bytes of weights a message carries, as they travel."""
    return len(_block(content))


def _with_weights(message: TrainTask | SiteUpdate | EvaluateTask, block: bytes) -> RecordDict:
    array = Array("uint8", (len(block),), STYPE, block)
    about = _about(message, "weights")
    content = RecordDict({"about": about, "weights": ArrayRecord({BLOCK: array})})
    if isinstance(message, SiteUpdate):
        attach(content, message.statement)
    return content


def _about(message: object, *others: str) -> ConfigRecord:
    """What has no record of its own and is told at all."""
    values = {k: v for k, v in vars(message).items() if k not in (*others, "statement")}
    return ConfigRecord({name: value for name, value in values.items() if value is not None})


def _if_told(record: ConfigRecord, name: str) -> float | None:
    return value_of(record, name, float) if name in record else None


def _block(content: RecordDict) -> bytes:
    array = record_of(content, "weights", ArrayRecord).get(BLOCK)
    if not isinstance(array, Array) or array.stype != STYPE:
        raise BadMessage("the message has no block of weights.")
    return array.data


def _weights(content: RecordDict, since: Weights | None = None) -> Weights:
    try:
        return decode(_block(content), since)
    except BadWeights as error:
        raise BadMessage(str(error)) from error
