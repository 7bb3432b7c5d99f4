"""The history as people read it: the table after each round, the final table, and the verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from common.message_words import NOISED, WITHHELD
from common.metrics import REGIONS, SiteMetrics, mean_dice
from server.history import History, RoundRecord

NOTHING_TO_DO = (
    "took no part: nothing to train on (or its own policy forbids it), and nothing to measure."
)


@dataclass(frozen=True)
class Verdict:
    """Did the training succeed, and who contributed to which round.

    `absent` lists every (round, site, reason) in which a site that should have trained or evaluated
    did not; `stopped` lists the same for the round at which a run that is not complete stopped.
    `withheld` and `noised` name the sites that, by their own choice, ever released no metrics or
    none without noise: that is no absence.
    """

    complete: bool
    rounds: int
    contributed: dict[str, tuple[int, ...]]
    absent: tuple[tuple[int, str, str], ...]
    stopped: tuple[tuple[int, str, str], ...] = ()
    withheld: tuple[str, ...] = ()
    noised: tuple[str, ...] = ()
    ended: str = ""  # why before the last agreed round
    idle: tuple[str, ...] = ()  # they had nothing to train on or to measure

    @property
    def everyone(self) -> bool:
        return not self.absent

    def lines(self) -> list[str]:
        state = "complete" if self.complete else "NOT complete"
        why = f" It ended there: {self.ended}." if self.ended else ""
        lines = [f"Training {state}: {self.rounds} rounds.{why}"]
        for site, rounds in self.contributed.items():
            share = f"rounds {spans(rounds)}" if rounds else "no round"
            if rounds and len(rounds) == self.rounds:
                share = "every round"
            lines.append(f"  {site} contributed to {share}.")
        lines += [f"  {site} withholds its metrics." for site in self.withheld]
        lines += [f"  {site} releases its metrics with noise." for site in self.noised]
        lines += [f"  {site} {NOTHING_TO_DO}" for site in self.idle]
        lines += [f"  Round {n}: without {site}: {why}" for n, site, why in self.absent]
        lines += [f"  Round {n} failed: {site}: {why}" for n, site, why in self.stopped]
        return lines


def verdict(history: History) -> Verdict:
    """From the recorded rounds alone, so that it says what happened, not what was planned."""
    records = history.rounds()
    training = {card.site for card in history.sites() if card.trains}
    training |= {c.site for r in records for c in r.contributions if c.trained}
    contributed = {
        site: tuple(
            r.round for r in records if any(c.site == site and c.trained for c in r.contributions)
        )
        for site in sorted(training)
    }
    idle = tuple(
        sorted(
            card.site
            for card in history.sites()
            if card.site not in training and not card.n_held_out and not card.resting
        )
    )
    absent = []
    for r in records:
        absent += [(r.round, c.site, c.reason) for c in r.contributions if not c.trained]
        unmeasured = _absent(r.unmeasured, r.released)
        absent += [(r.round, s, f"not evaluated: {why}") for s, why in unmeasured]
    final = history.final()
    ways = [r.released for r in records]
    if final is not None:
        ways.append(history.final_released())
        unmeasured = _absent(history.final_unmeasured(), ways[-1])
        absent += [(final[0], s, f"final model not evaluated: {why}") for s, why in unmeasured]
    withheld, noised = (
        tuple(sorted({site for way in ways for site, how in way.items() if how == chosen}))
        for chosen in (WITHHELD, NOISED)
    )
    return Verdict(
        final is not None,
        len(records),
        contributed,
        tuple(absent),
        tuple(history.failures()),
        withheld,
        noised,
        _ended(history, len(records)),
        idle if records else (),
    )


def _ended(history: History, rounds: int) -> str:
    """Why the run ended after its last round; nothing if budgets were raised since and it went on."""
    match history.noted("ended"):
        case {"after_round": after, "why": str(why)} if after == rounds:
            return why
    return ""


def _absent(unmeasured: Mapping[str, str], released: Mapping[str, str]) -> list[tuple[str, str]]:
    """Without those that did report, and tell no metrics by their own choice."""
    return [(site, why) for site, why in unmeasured.items() if released.get(site) != WITHHELD]


def spans(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 5] as `1-3, 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts) or "none"


def round_table(record: RoundRecord) -> Group:
    table = site_table(["train loss", *_headings("Dice"), *_headings("IoU"), "n", "s"])
    contributions = {c.site: c for c in record.contributions}
    for site in sorted(contributions.keys() | record.metrics.keys() | record.released.keys()):
        c = contributions.get(site)
        m = record.metrics.get(site)
        table.add_row(
            escape(site),
            ("-" if c is None else number(c.train_loss) if c.trained else "absent"),
            *_cells(m, "dice"),
            *_cells(m, "iou"),
            _count(m, record.released.get(site)),
            number(c.seconds, 1) if c else "-",
        )
    loss = "" if record.loss is None else f"validation loss {record.loss:.3f}, "
    return Group(
        f"Round {record.round}: {dice_text(record)}, {loss}{record.seconds:.1f} s",
        table,
    )


def dice_text(record: RoundRecord) -> str:
    """A round's headline figures, for rich."""
    if record.mean_dice is None or record.worst is None:
        return "no site releases its metrics"
    site, worst = record.worst
    return f"Dice {record.mean_dice:.3f} (mean over sites), worst {worst:.3f} at {escape(site)}"


def _count(metrics: SiteMetrics | None, released: str | None) -> str:
    """How many subjects metrics are over, and whether they are what was measured."""
    count = str(metrics.n) if metrics else ""
    return " ".join(filter(None, (count, released))) or "0"


def site_table(headings: Sequence[str]) -> Table:
    """An empty table with a column for the site and one for each number."""
    table = Table("site")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def final_table(
    round_: int, metrics: dict[str, SiteMetrics], released: Mapping[str, str] | None = None
) -> Group:
    """`released` says which sites report other than exact metrics, and how."""
    released = released or {}
    table = site_table([*_headings("Dice"), *_headings("IoU"), *_headings("HD95"), "n"])
    for site in sorted(metrics.keys() | released.keys()):
        m = metrics.get(site)
        table.add_row(
            escape(site),
            *_cells(m, "dice"),
            *_cells(m, "iou"),
            *_cells(m, "hd95", 1),
            _count(m, released.get(site)),
        )
    table.add_section()
    n = sum(m.n for m in metrics.values())
    for name, weight in (("mean over sites", False), ("mean over subjects", True)):
        cells = [
            number(
                average(metrics, f"{key}/{region}", by_subject=weight), 1 if key == "hd95" else 3
            )
            for key in ("dice", "iou", "hd95")
            for region in REGIONS
        ]
        table.add_row(name, *cells, str(n))
    return Group(f"Model of round {round_} on each site's held-out subjects", table)


def average(metrics: dict[str, SiteMetrics], key: str, *, by_subject: bool) -> float:
    """Mean over sites (each alike) or over subjects, leaving out where the metric is undefined."""
    pairs = [
        (m.means[key], m.defined.get(key, m.n) if by_subject else 1)
        for m in metrics.values()
        if key in m.means and not math.isnan(m.means[key])
    ]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else math.nan


def results_document(history: History) -> dict[str, Any]:
    """Everything the history holds, for `results.json` and `--json`."""
    judged = verdict(history)
    final = history.final()
    return {
        "verdict": {**asdict(judged), "everyone": judged.everyone},
        "sites": [
            {k: v for k, v in vars(card).items() if k != "config_fingerprint"}
            for card in history.sites()
        ],
        "rounds": [
            {
                **asdict(r),
                "mean_dice": r.mean_dice,
                "worst_site": r.worst and r.worst[0],
                "worst_dice": r.worst and r.worst[1],
                "metrics": _without_nan(r.metrics),
            }
            for r in history.rounds()
        ],
        "final": final
        and {
            "round": final[0],
            "mean_dice": {site: mean_dice(m) for site, m in final[1].items()},
            "metrics": _without_nan(final[1]),
            "released": history.final_released(),
        },
    }


def results_json(history: History) -> str:
    return json.dumps(_finite(results_document(history)), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: what is no number becomes null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _headings(metric: str) -> list[str]:
    return [f"{metric} {region}" for region in REGIONS]


def _cells(metrics: SiteMetrics | None, key: str, digits: int = 3) -> list[str]:
    means = metrics.means if metrics else {}
    return [number(means.get(f"{key}/{region}"), digits) for region in REGIONS]


def _without_nan(metrics: dict[str, SiteMetrics]) -> dict[str, Any]:
    """JSON has no NaN: an undefined mean becomes null."""
    return {
        site: {
            "n": m.n,
            "means": {k: None if math.isnan(v) else v for k, v in m.means.items()},
            "defined": m.defined,
        }
        for site, m in metrics.items()
    }
