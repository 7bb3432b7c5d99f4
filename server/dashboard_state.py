"""What a dashboard shows of a run, as plain JSON: from the run's files, which are read and not changed.

`recorded` is what the history holds, `state` all of it with what goes on now; what needs somebody's
attention is in `server.dashboard_alerts`. Names and reasons are the sites' own text. No weights, no subjects.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config_file import ConfigError, load_config
from common.console import plain
from common.metrics import REGIONS, SiteMetrics, mean_over_regions
from common.statement import BadStatement, Statement, read_statement
from server.history import TRAINING, GivenStatement, History, HistoryError, RoundRecord
from server.source import Source
from server.tables import average, spans, verdict

Document = dict[str, Any]
MEAN = "mean"  # over the regions
MOST_EVENTS = 200


def recorded(source: Source, before: Document | None = None) -> Document:
    """Every complete round, by site; of a run without a history why there is nothing. Lists are as
    long as `rounds`; what was not told or is no number is null. Of a history that cannot be read,
    perhaps for the moment, what was known `before`, and why."""
    document: Document = {"problem": "", "unreadable": False, **_agreed(source.config)}
    records: list[RoundRecord] = []
    sites: dict[str, Document] = {}
    final: Document | None = None
    failures: list[tuple[int, str, str]] = []
    absent: list[tuple[int, str, str]] = []
    if not source.run.history.exists():
        document["problem"] = "No round is recorded yet."
    else:
        try:
            with History(source.run.history, copied=True) as history:
                records, given = history.rounds(), history.statements()
                judged = verdict(history)
                failures, absent = history.failures(), list(judged.absent)
                sites = _sites(history, records, given, judged.contributed)
                final = _final(history)
        except HistoryError as error:
            document |= {"problem": str(error), "unreadable": True}
            if before:
                return before | document
    return document | {
        "complete": final is not None,
        "rounds": [r.round for r in records],
        "mean_dice": [_short(r.mean_dice) for r in records],
        "worst_site": [r.worst[0] if r.worst else None for r in records],
        "worst_dice": [_short(r.worst[1]) if r.worst else None for r in records],
        "loss": [_short(r.loss) for r in records],
        "learning_rate": [_short(r.learning_rate) for r in records],
        "seconds": [_short(r.seconds) for r in records],
        "sites": sites,
        "final": final,
        "failures": [_event(*failure) for failure in failures],
        "events": [_event(*one) for one in reversed(absent)][:MOST_EVENTS],
    }


def _event(number: int, site: str, why: str) -> Document:
    return {"round": number, "site": plain(site, 64), "text": plain(why)}


def _agreed(path: Path) -> Document:
    """What of the configuration is shown; nothing of one that cannot be read."""
    try:
        config = load_config(path)
    except (ConfigError, OSError):
        return {"name": "", "rounds_planned": None, "preset": None, "aggregation": None}
    return {
        "name": config.name,
        "rounds_planned": config.rounds.number,
        "preset": config.preset,
        "aggregation": "secure " * config.secure_aggregation + config.rounds.aggregation,
    }


def _sites(
    history: History,
    records: Sequence[RoundRecord],
    given: Sequence[GivenStatement],
    contributed: Mapping[str, Sequence[int]],
) -> dict[str, Document]:
    cards = {card.site: card for card in history.sites()}
    stated = statements_with_epsilon(given)
    names = {*cards, *contributed, *stated}
    names |= {site for r in records for site in (*r.metrics, *(c.site for c in r.contributions))}
    found = {}
    for site in sorted(names):
        card, told = cards.get(site), stated.get(site, {})
        metrics = [r.metrics.get(site) for r in records]
        updates = [next((c for c in r.contributions if c.site == site), None) for r in records]
        by_round = {number: s for (number, stage), s in told.items() if stage == TRAINING}
        most = max(told.values(), key=lambda s: s.epsilon or 0.0, default=None)
        last = updates[-1] if updates else None
        found[site] = {
            "trains": card.trains if card else None,
            "n_training": card.n_training if card else None,
            "n_held_out": card.n_held_out if card else None,
            "contributed": spans(contributed.get(site, ())),
            "absent": plain(last.reason) if last and not last.trained else None,
            "released": records[-1].released.get(site) if records else None,
            "dice": {key: [_of(m, "dice", key) for m in metrics] for key in (MEAN, *REGIONS)},
            "iou": {key: [_of(m, "iou", key) for m in metrics] for key in (MEAN, *REGIONS)},
            "loss": [_short(c.train_loss) if c else None for c in updates],
            "seconds": [_short(c.seconds) if c else None for c in updates],
            "bytes": sum(c.bytes or 0 for c in updates if c),
            "epsilon": [_epsilon(by_round.get(r.round)) for r in records],
            "epsilon_spent": _epsilon(most),
            "delta": _short(most.delta) if most else None,
            "budget": _short(most.budget) if most else None,
        }
    return found


def statements_with_epsilon(
    given: Sequence[GivenStatement],
) -> dict[str, dict[tuple[int, str], Statement]]:
    """By site, then round and stage; those with an epsilon."""
    found: dict[str, dict[tuple[int, str], Statement]] = {}
    for one in given:
        try:
            statement = read_statement(one.signed.text)
        except BadStatement:  # `fed-server privacy-report` says so
            continue
        if _epsilon(statement) is not None:
            found.setdefault(one.site, {})[one.round, one.stage] = statement
    return found


def _epsilon(statement: Statement | None) -> float | None:
    return _short(statement.epsilon) if statement else None


def _of(metrics: SiteMetrics | None, metric: str, region: str) -> float | None:
    if metrics is None:
        return None
    if region != MEAN:
        return _short(metrics.means.get(f"{metric}/{region}"))
    return _short(mean_over_regions(metrics, metric))


def _final(history: History) -> Document | None:
    found = history.final()
    if found is None:
        return None
    number, metrics = found
    released = history.final_released()
    keys = [f"{metric}/{region}" for metric in ("dice", "iou", "hd95") for region in REGIONS]
    nothing = SiteMetrics(0, {}, {})
    told = {site: metrics.get(site, nothing) for site in sorted(metrics.keys() | released.keys())}
    return {
        "round": number,
        "keys": keys,
        "sites": {
            site: {
                "n": m.n,
                "values": [_short(m.means.get(key)) for key in keys],
                "released": plain(released[site]) if site in released else None,
            }
            for site, m in told.items()
        },
        "mean": [_short(average(metrics, key, by_subject=False)) for key in keys],
    }


def _short(value: float | None) -> float | None:
    """Four digits are more than a screen shows; JSON has no NaN."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def status_of(source: Source, holder: int | None) -> Document:
    """What the running server last wrote of itself; nothing if that cannot be read, is of another
    version, or of a process that has ended."""
    if holder is None or not source.is_coordinators:
        return {}
    try:
        told = json.loads(source.coordinator.status.read_text(encoding="utf-8"))
        whole = told["pid"] == holder and all(
            isinstance(about["state"], str) for about in told["sites"].values()
        )
        waiting = told.get("waiting")
        if waiting is not None:
            whole &= {"round", "absent", "needed", "training", "seconds_left"} <= waiting.keys()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return told if whole else {}


def state(known: Document, status: Document, *, running: bool, coordinators: bool) -> str:
    """Of the whole run, in a word or two."""
    if known["complete"]:
        return "complete"
    if not running:
        return "failed" if known["failures"] else "stopped" if known["rounds"] else "not running"
    if coordinators:
        return str(status.get("state", "starting"))
    return "training" if known["rounds"] else "preparing, or in the first round"


def site_states(known: Document, status: Document) -> dict[str, Document]:
    """What each site does, as the running server says; else what it did in the last round."""
    told = {
        site: {
            "state": plain(about.get("absent") or about["state"]),
            "last_contact": about.get("last_contact"),
        }
        for site, about in status.get("sites", {}).items()
    }
    for site, about in known["sites"].items():
        if site not in told:
            last = known["rounds"][-1] if known["rounds"] else None
            if last is None:
                did = "-"
            elif about["absent"] is not None:
                did = f"not in round {last}: {about['absent']}"
            elif about["trains"] is False:
                did = "evaluates only"
            else:
                did = f"trained in round {last}"
            told[site] = {"state": did, "last_contact": None}
    return told
