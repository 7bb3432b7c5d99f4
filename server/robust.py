"""A round's updates looked at together: which is an outlier, and one model of the others.

`fedavg` is `server.average`, read from the disk. The others are Flower's strategies, given one block
of values at a time:

    median         of each value                     (Yin et al. 2018, arXiv:1803.01498)
    trimmed_mean   of each value, the lowest and highest int(trim * n) left out    (same paper)
    krum           the one update nearest to its n - f - 2 nearest      (Blanchard et al. 2017)

In these three a site counts once, however many subjects it has: a site's number of subjects is its
own word. None of them stops a site that stays within the spread of the others (docs/robustness.md).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum

from common.config import Rounds
from common.console import many
from common.weights import Weights
from server.average import WeightedMean, add, mean
from server.spool import Kept, read

TOGETHER = 2**20  # values of all sites in memory at a time, 8 MiB in float64
FEWEST_TO_COMPARE = 3  # of two updates nobody can tell which is the bad one


def fewest_updates(rounds: Rounds) -> int:
    """How many good updates the aggregation needs to do what it is chosen for.

    Krum's bound is Blanchard et al.'s 2 f + 3. With fewer than three updates a median is a mean, and
    with fewer than 1 / trim a trimmed mean leaves out nothing.
    """
    if rounds.aggregation == "krum":
        return 2 * rounds.bad_sites + 3
    if rounds.aggregation == "median":
        return FEWEST_TO_COMPARE
    if rounds.aggregation == "trimmed_mean" and rounds.trim:
        fewest = 1
        while int(rounds.trim * fewest) < 1:  # as Flower counts
            fewest += 1
        return fewest
    return 1


def compares_updates(rounds: Rounds) -> bool:
    """Whether a round's updates must be seen together, not only their sum."""
    return rounds.aggregation != "fedavg" or rounds.outlier_factor is not None


def outliers(kept: Sequence[Kept], factor: float) -> dict[str, str]:
    """Which sites changed the model far more than the others did, each with the reason in words.

    The measure is the median norm of the round's changes. A site with more subjects than the median
    takes as many more steps, and may move as many times further. Fewer than three updates are not
    judged, nor a round in which the median change is 0.
    """
    if len(kept) < FEWEST_TO_COMPARE:
        return {}
    usual, subjects = median(k.change for k in kept), median(k.n_training for k in kept)
    if not usual:
        return {}
    found = {}
    for k in kept:
        limit = factor * max(1.0, k.n_training / subjects)
        if k.change / usual > limit:
            found[k.site] = (
                f"its change is {k.change / usual:.3g} times the median of the round's "
                f"(limit for its {many(k.n_training, 'subject')}: {limit:.3g})."
            )
    return found


def aggregate(kept: Sequence[Kept], model: Weights, rounds: Rounds) -> tuple[Weights, str | None]:
    """One model of the updates, with the types of `model`, the one they all began from.

    Integer buffers (BatchNorm's counters) are rounded. Also returns the site whose update it is, if
    it is one's alone (krum).
    """
    if rounds.aggregation == "fedavg":
        return _fedavg(kept, model), None
    with _flower_is_quiet():
        if rounds.aggregation == "krum":
            chosen = _nearest(kept, model, rounds.bad_sites)
            return _whole(chosen, model), chosen.site
        strategy = FedTrimmedAvg(beta=rounds.trim)
        return _value_by_value(
            FedMedian() if rounds.aggregation == "median" else strategy, kept, model
        ), None


def _fedavg(kept: Sequence[Kept], model: Weights) -> Weights:
    """The same means in the same order as without a spool, so the same result to the last bit."""
    result: Weights = {}
    for name, tensor in model.items():
        running: WeightedMean | None = None
        since = {name: tensor.reshape(-1)}
        for k in kept:
            running = add(running, {name: read(k, name, 0, tensor.numel())}, k.n_training, since)
        if running is not None:
            result[name] = mean(running, since)[name].view(tensor.shape)
    return result


def _value_by_value(strategy: FedAvg, kept: Sequence[Kept], model: Weights) -> Weights:
    """Flower works in the type it is given: float64, so that the result is rounded only once."""
    result = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in model.items()}
    for name, start, end in _blocks(model, len(kept)):
        values = [read(k, name, start, end).double().numpy() for k in kept]
        arrays, _ = strategy.aggregate_train(1, [_reply(v, 0) for v in values])
        block = torch.from_numpy(next(iter(cast(ArrayRecord, arrays).values())).numpy())
        if not model[name].is_floating_point():
            block = block.round()
        result[name].view(-1)[start:end].copy_(block)
    return result


def _nearest(kept: Sequence[Kept], model: Weights, bad_sites: int) -> Kept:
    """Krum's choice, over all floating tensors as one vector.

    Flower's Krum wants all updates whole and takes distances from |x|^2 + |y|^2 - 2 x.y in float32,
    where for weights that differ little nothing is left but rounding. So it is given n points with
    the same distances in n dimensions: G = D D^T of the changes D since the round's model, summed
    block by block in float64, is V L V^T, and the rows of V sqrt(L) are such points.
    """
    products = torch.zeros(len(kept), len(kept), dtype=torch.float64)
    for name, start, end in _blocks(model, len(kept)):
        if model[name].is_floating_point():
            begin = model[name].reshape(-1)[start:end].double()
            changes = torch.stack([read(k, name, start, end).double() - begin for k in kept])
            products += changes @ changes.T
    eigenvalues, vectors = torch.linalg.eigh(products)
    points = (vectors * eigenvalues.clamp(min=0).sqrt()).numpy()
    replies = [_reply(point, number) for number, point in enumerate(points)]
    _, metrics = Krum(num_malicious_nodes=bad_sites).aggregate_train(1, replies)
    return kept[int(cast(float, cast(MetricRecord, metrics)["number"]))]


def _whole(kept: Kept, model: Weights) -> Weights:
    return {n: read(kept, n, 0, t.numel()).to(t.dtype).view(t.shape) for n, t in model.items()}


def _blocks(model: Weights, sites: int) -> Iterator[tuple[str, int, int]]:
    length = max(1, TOGETHER // sites)
    for name, tensor in model.items():
        for start in range(0, tensor.numel(), length):
            yield name, start, min(start + length, tensor.numel())


def _reply(values: np.ndarray, number: int) -> Message:
    """What Flower's strategies take for a site's reply; every site has the same weight."""
    content = RecordDict(
        {
            "arrays": ArrayRecord({"values": Array(np.ascontiguousarray(values))}),
            "metrics": MetricRecord({"num-examples": 1, "number": number}),
        }
    )
    return Message(content, dst_node_id=1, message_type=MessageType.TRAIN)


@contextmanager
def _flower_is_quiet() -> Iterator[None]:
    """It logs a line for every block."""
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
