"""Comparing rounds that not the same sites reported on: always over the sites that both have.

Sites join late, drop out and come back. A mean over other sites is another quantity, so a round
without its worst site would look better than it is, and a round with a new hard site worse.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from common.metrics import mean_dice
from server.history import RoundRecord


def best_rounds(records: Sequence[RoundRecord]) -> tuple[RoundRecord, RoundRecord]:
    """The rounds with the highest mean Dice over sites, and with the highest worst-site Dice.

    Going through the rounds in order, one replaces the best so far if it is better over the sites
    that reported on both; so with the same sites throughout, the first of the best.
    """
    return _best(records, _mean), _best(records, min)


def comparable_losses(records: Sequence[RoundRecord]) -> list[float]:
    """A sequence that falls where the validation loss fell over the same sites.

    Each entry is the best one so far plus the difference between the two rounds' losses over the
    sites that reported on both (pooled over their subjects). With the same sites throughout these
    are the validation losses themselves. A round that shares no site with the best is left out.
    """
    losses: list[float] = []
    best: tuple[RoundRecord, float] | None = None
    for record in records:
        if best is None:
            loss = record.loss
        elif common := record.metrics.keys() & best[0].metrics.keys():
            same = record.metrics.keys() == best[0].metrics.keys()
            now, then = (
                (record.loss, best[0].loss)
                if same
                else (_loss(record, common), _loss(best[0], common))
            )
            loss = now + (best[1] - then)
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


def _loss(record: RoundRecord, sites: Collection[str]) -> float:
    chosen = [record.metrics[site] for site in sorted(sites)]
    return sum(m.means["loss"] * m.n for m in chosen) / sum(m.n for m in chosen)
