"""What the server and a site say to each other, as typed values with one Flower form each.

Roll call (who are you), train, evaluate, and the answers to them. Everything a site receives is in
a task below or a notice (`common.notices`), everything it sends is in an answer below; nothing else
crosses. Weights travel as one block of bytes (`common.wire`).
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.metrics import SiteMetrics
from common.records import BadMessage, record_of, value_of
from common.weights import BadWeights, Weights
from common.wire import decode, encode, encode_change

BLOCK = "weights"  # the one array of a message that carries weights
STYPE = "safetensors"
MOST_SUBJECTS = 10**7


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
    record = record_of(content, "card", ConfigRecord)
    card = SiteCard(
        site=value_of(record, "site", str),
        trains=value_of(record, "trains", bool),
        n_training=value_of(record, "n_training", int),
        n_held_out=value_of(record, "n_held_out", int),
        n_left_out=value_of(record, "n_left_out", int),
        config_fingerprint=value_of(record, "config_fingerprint", str),
    )
    numbers = card.n_training, card.n_held_out, card.n_left_out
    if min(numbers) < 0 or max(numbers) > MOST_SUBJECTS:
        raise BadMessage("a number of subjects is negative or impossibly large.")
    if card.trains and card.n_training == 0:
        raise BadMessage("the site says that it trains, on no subject.")
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
        loss=value_of(record, "loss", float),
        seconds=value_of(record, "seconds", float),
        samples_per_second=value_of(record, "samples_per_second", float),
        weights=_weights(content, since),
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
    about = {"site": report.site, "round": report.round, "seconds": report.seconds}
    return RecordDict(
        {
            "about": ConfigRecord(about),
            "means": MetricRecord(dict(report.metrics.means)),
            "defined": MetricRecord({"n": report.metrics.n, **report.metrics.defined}),
        }
    )


def unpack_site_report(content: RecordDict) -> SiteReport:
    record = record_of(content, "about", ConfigRecord)
    means = record_of(content, "means", MetricRecord)
    counts = record_of(content, "defined", MetricRecord)
    n = value_of(counts, "n", int)
    defined = {name: value_of(counts, name, int) for name in means}
    if any(not 0 <= count <= n for count in defined.values()):
        raise BadMessage(f"a mean is over fewer than 0 or more than all {n} subjects.")
    return SiteReport(
        site=value_of(record, "site", str),
        round=value_of(record, "round", int),
        seconds=value_of(record, "seconds", float),
        metrics=SiteMetrics(
            n=n, means={name: value_of(means, name, float) for name in means}, defined=defined
        ),
    )


def weight_bytes(content: RecordDict) -> int:
    """How many bytes of weights a message carries, as they travel."""
    return len(_block(content))


def _with_weights(message: TrainTask | SiteUpdate | EvaluateTask, block: bytes) -> RecordDict:
    about = {name: value for name, value in vars(message).items() if name != "weights"}
    array = Array("uint8", (len(block),), STYPE, block)
    return RecordDict({"about": ConfigRecord(about), "weights": ArrayRecord({BLOCK: array})})


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
