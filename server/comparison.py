"""Comparing rounds that not the same sites reported on: always over the sites that both have.

Sites join late, drop out and come back, or withhold their metrics. A mean over other sites is another
quantity, so a round without its worst site would look better than it is, and a round with a new hard
site worse.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from common.metrics import mean_dice
from server.history import RoundRecord


def best_rounds(records: Sequence[RoundRecord]) -> tuple[RoundRecord, RoundRecord]:
    """The rounds with the highest mean Dice over sites, and with the highest worst-site Dice.

    Going through the rounds in order, one replaces the best so far if it is better over the sites
    that told Dice of both; so with the same sites throughout, the first of the best. If no site
    ever told any, it is the last round.
    """
    told = [record for record in records if record.metrics] or [records[-1]]
    return _best(told, _mean), _best(told, min)


def comparable_losses(records: Sequence[RoundRecord]) -> list[float]:
    """A sequence that falls where the validation loss fell over the same sites.

    Each entry is the best one so far plus the difference between the two rounds' losses over the
    sites that told it of both (pooled over their subjects). With the same sites throughout these
    are the validation losses themselves. A round that shares no such site with the best is left out,
    and so is one of which no site told a loss.
    """
    losses: list[float] = []
    best: tuple[RoundRecord, float] | None = None
    for record in records:
        told = _telling_loss(record)
        if record.loss is None:
            continue
        if best is None:
            loss = record.loss
        elif told == _telling_loss(best[0]):
            assert best[0].loss is not None
            loss = record.loss + (best[1] - best[0].loss)
        elif common := told & _telling_loss(best[0]):
            loss = _loss(record, common) + (best[1] - _loss(best[0], common))
        else:
            continue
        losses.append(loss)
        if best is None or loss < best[1]:
            best = record, loss
    return losses


def _best(
    records: Sequence[RoundRecord], over: Callable[[Collection[float]], float]
) -> RoundRecord:
    best = records[0]
    for record in records[1:]:
        common = sorted(record.metrics.keys() & best.metrics.keys())
        if common and over(_dice(record, common)) > over(_dice(best, common)):
            best = record
    return best


def _dice(record: RoundRecord, sites: Collection[str]) -> list[float]:
    return [mean_dice(record.metrics[site]) for site in sites]


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


def _telling_loss(record: RoundRecord) -> set[str]:
    return {site for site, metrics in record.metrics.items() if "loss" in metrics.means}


def _loss(record: RoundRecord, sites: Collection[str]) -> float:
    chosen = [record.metrics[site] for site in sorted(sites)]
    return sum(m.means["loss"] * m.n for m in chosen) / sum(m.n for m in chosen)
