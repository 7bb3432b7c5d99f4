"""A run's numbers for TensorBoard and MLflow, copied from its history by a process of their own.

So no run waits for them or fails with them. What a target holds already is looked up there, and only
the rest is added: to repeat or to kill this does no harm. No models, no subjects. An MLflow server is
not told the names of sites that hide theirs, unless asked to; folders on this machine hold every name.

How each of the two is written: `server.tracking_targets`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from common.config_file import ConfigError, load_config
from common.metrics import REGIONS, SiteMetrics, mean_dice
from server.dashboard_state import statements_with_epsilon
from server.history import TRAINING, History, HistoryError, RoundRecord
from server.shown_names import shown_names
from server.source import NO_FILE, Source, stamp
from server.tables import average

LOG = logging.getLogger("fedbrats")
LOOK_SECONDS = 2.0
FEDERATION = ""  # whose the numbers of no single site are
LONGEST = 500  # of a parameter; MLflow takes at most 6000 characters


class NotTracked(RuntimeError):
    """The numbers cannot be written there; the text says why and what to do."""


@dataclass(frozen=True)
class Point:
    """One number of a site, or of the FEDERATION, after a round."""

    site: str
    key: str
    round: int
    value: float

    @property
    def place(self) -> tuple[str, str, int]:
        return self.site, self.key, self.round


class Target(Protocol):
    name: str
    hides: bool
    """Whether it gets stand-ins for the names of sites that hide theirs."""

    def open(self, numbers: Numbers) -> None:
        """Look up what is there. Raises NotTracked if it is of another run, or names sites otherwise."""

    def add(self, points: Iterable[Point]) -> int:
        """Write those that are not there yet; returns how many. Raises NotTracked."""

    def finish(self) -> None:
        """Nothing will follow. Raises NotTracked."""


@dataclass(frozen=True)
class Numbers:
    """Everything that is to be tracked of a run, so far. `run` tells it from every other.

    `stand_ins` are what the sites that hide their names are called where they do: `hospital 2`. The
    number is the site's place in the order in which the history first tells of all sites, so that it
    stays when others join or change their minds.
    """

    run: str
    parameters: dict[str, str]
    points: list[Point]
    complete: bool
    stand_ins: dict[str, str] = field(default_factory=dict)

    def without_hidden_names(self) -> list[Point]:
        return [replace(p, site=self.stand_ins.get(p.site, p.site)) for p in self.points]


def track(source: Source, targets: Sequence[Target], *, follow: bool) -> dict[str, int]:
    """Copy what is new; with `follow` until the run is complete. How many numbers were added, by target.

    What fails while it is followed is tried again: a target, as a server that is restarted, or a history
    that is locked, or whose run was killed in the middle of writing.

    Raises:
        NotTracked: no round is complete yet (without `follow`), or a target cannot be used.
        HistoryError: the run's history cannot be read (without `follow`).
    """
    added = dict.fromkeys((target.name for target in targets), 0)
    opened, seen, said = False, None, ""
    while True:
        now = stamp(source.run.history)
        numbers, failed = None, ""
        try:
            if now not in (seen, NO_FILE):
                numbers = numbers_of(source)
        except HistoryError as error:
            if not follow:
                raise
            failed = str(error)
        if numbers is not None and not opened:
            for target in targets:
                target.open(numbers)
            opened = True
        if numbers is not None:
            for target in targets:
                try:
                    points = numbers.without_hidden_names() if target.hides else numbers.points
                    added[target.name] += target.add(points)
                    if numbers.complete:
                        target.finish()
                except NotTracked as error:
                    if not follow:
                        raise
                    failed = str(error)
        if failed and failed != said:
            LOG.warning(f"{failed} (tried again every {LOOK_SECONDS:g} s)")
        if numbers is not None and numbers.complete and not failed:
            return added
        if numbers is not None or failed:
            said, seen = failed, None if failed else now
        if not follow:
            if not opened:
                raise NotTracked(f"{source.path}: no round is complete yet.")
            return added
        time.sleep(LOOK_SECONDS)


def numbers_of(source: Source) -> Numbers | None:
    """None before the first complete round. Raises HistoryError."""
    with History(source.run.history, copied=True) as history:
        records, final = history.rounds(), history.final()
        stated = statements_with_epsilon(history.statements())
        cards = history.sites()
    if not records:
        return None
    points = [point for record in records for point in _of_round(record)]
    for site, told in stated.items():
        points += [
            Point(site, "epsilon", number, statement.epsilon or 0.0)
            for (number, stage), statement in told.items()
            if stage == TRAINING
        ]
    if final is not None:
        points += _of_final(*final)
    points = [point for point in points if math.isfinite(point.value)]
    by_round = [{c.site for c in r.contributions} | set(r.metrics) for r in records]
    since = set(stated) | (set(final[1]) if final is not None else set())
    order = dict.fromkeys(site for sites in (*by_round, since) for site in sorted(sites))
    names = shown_names(cards, order)
    stand_ins = {
        site: f"hospital {number}"  # no enrolled name holds a space
        for number, site in enumerate(order, start=1)
        if names[site] != site
    }
    parameters = _parameters(source.config)
    return Numbers(records[0].sha256, parameters, points, final is not None, stand_ins)


def _of_round(record: RoundRecord) -> Iterator[Point]:
    number = record.round
    came = [c for c in record.contributions if c.trained]
    whole = {
        "dice/mean": record.mean_dice,
        "dice/worst_site": record.worst[1] if record.worst else None,
        "loss": record.loss,
        "learning_rate": record.learning_rate,
        "seconds": record.seconds,
        "bytes": sum(c.bytes or 0 for c in came),
        "sites": len(came),
        **_means(record.metrics, ("dice", "iou")),
    }
    yield from _points(FEDERATION, number, whole)
    for c in came:
        about = {"train_loss": c.train_loss, "seconds": c.seconds, "bytes": c.bytes}
        yield from _points(c.site, number, about)
    for site, metrics in record.metrics.items():
        told = {"dice/mean": mean_dice(metrics), "loss": metrics.means.get("loss")}
        yield from _points(site, number, told | _regions(metrics, ("dice", "iou")))


def _of_final(number: int, metrics: dict[str, SiteMetrics]) -> Iterator[Point]:
    kinds = ("dice", "iou", "hd95")
    whole = {f"final/{key}": value for key, value in _means(metrics, kinds).items()}
    yield from _points(FEDERATION, number, whole)
    for site, of in metrics.items():
        told = {f"final/{key}": value for key, value in _regions(of, kinds).items()}
        yield from _points(site, number, told)


def _means(metrics: dict[str, SiteMetrics], kinds: Sequence[str]) -> dict[str, float]:
    keys = [f"{kind}/{region}" for kind in kinds for region in REGIONS]
    return {key: average(metrics, key, by_subject=False) for key in keys}


def _regions(metrics: SiteMetrics, kinds: Sequence[str]) -> dict[str, float | None]:
    keys = [f"{kind}/{region}" for kind in kinds for region in REGIONS]
    return {key: metrics.means.get(key) for key in keys}


def _points(site: str, number: int, values: Mapping[str, float | None]) -> Iterator[Point]:
    for key, value in values.items():
        if value is not None:
            yield Point(site, key, number, float(value))


def _parameters(path: Path) -> dict[str, str]:
    """What the sites agree on, flat: `training.epochs`; nothing of a configuration that is damaged."""
    try:
        agreed = load_config(path).agreed()
    except (ConfigError, OSError):
        return {}
    return dict(_flat(agreed))


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, str(value)[:LONGEST]
