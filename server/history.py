"""The run's history in SQLite: what every site did in every round, written in one transaction a round.

A round is complete exactly when its row is there, so a killed run continues after the last such row.
Holds numbers only: no weights (`server.checkpoint`), no subject ids, nothing about a single subject.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from common.messages import SiteCard
from common.metrics import SiteMetrics, mean_dice

SCHEMA = """
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sites (
    site TEXT PRIMARY KEY, trains INTEGER, n_training INTEGER, n_held_out INTEGER, n_left_out INTEGER
);
CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER PRIMARY KEY, learning_rate REAL, seconds REAL, loss REAL,
    checkpoint TEXT NOT NULL, sha256 TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS contributions (
    round INTEGER, site TEXT, trained INTEGER, reason TEXT, train_loss REAL, seconds REAL,
    samples_per_second REAL, bytes INTEGER, PRIMARY KEY (round, site)
);
CREATE TABLE IF NOT EXISTS metrics (
    round INTEGER, site TEXT, key TEXT, mean REAL, defined INTEGER, n INTEGER,
    stage TEXT NOT NULL, PRIMARY KEY (stage, round, site, key)
);
CREATE TABLE IF NOT EXISTS failures (round INTEGER, site TEXT, reason TEXT);
"""
ROUND, FINAL = "round", "final"  # stages: after each round, and the chosen model at the end


@dataclass(frozen=True)
class Contribution:
    """What one training site did in one round; `reason` says why it did not, if so."""

    site: str
    trained: bool
    reason: str = ""
    train_loss: float | None = None
    seconds: float | None = None
    samples_per_second: float | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class RoundRecord:
    """One complete round. `metrics` holds the sites that reported; `loss` is over all their subjects."""

    round: int
    learning_rate: float
    seconds: float
    loss: float
    checkpoint: str
    sha256: str
    contributions: tuple[Contribution, ...]
    metrics: dict[str, SiteMetrics]

    @property
    def mean_dice(self) -> float:
        """Unweighted over sites, of each site's mean Dice over WT, TC and ET."""
        dice = [mean_dice(site) for site in self.metrics.values()]
        return sum(dice) / len(dice)

    @property
    def worst(self) -> tuple[str, float]:
        """The site with the lowest mean Dice, and that Dice."""
        return min(((s, mean_dice(m)) for s, m in self.metrics.items()), key=lambda pair: pair[1])


class History:
    """The open database; use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, timeout=60)
        self._database.execute("PRAGMA synchronous = FULL")
        with self._database:
            self._database.executescript(SCHEMA)

    def __enter__(self) -> History:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._database.close()

    def note(self, key: str, value: object) -> None:
        """Keep one fact about the run, replacing an earlier one of that name."""
        with self._database as db:
            db.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (key, json.dumps(value)))

    def noted(self, key: str) -> object | None:
        row = self._database.execute("SELECT value FROM run WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def record_sites(self, cards: Sequence[SiteCard]) -> None:
        with self._database as db:
            db.executemany(
                "INSERT OR REPLACE INTO sites VALUES (?, ?, ?, ?, ?)",
                [(c.site, c.trains, c.n_training, c.n_held_out, c.n_left_out) for c in cards],
            )

    def sites(self) -> list[SiteCard]:
        rows = self._database.execute("SELECT * FROM sites ORDER BY site")
        return [SiteCard(s, bool(t), n, h, left, "") for s, t, n, h, left in rows]

    def record_round(self, record: RoundRecord) -> None:
        """All of a round, or nothing of it."""
        r = record
        with self._database as db:
            db.execute(
                "INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?)",
                (r.round, r.learning_rate, r.seconds, r.loss, r.checkpoint, r.sha256),
            )
            db.executemany(
                "INSERT INTO contributions VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [(r.round, *vars(c).values()) for c in r.contributions],
            )
            self._insert_metrics(ROUND, r.round, r.metrics)

    def record_final(self, round_: int, metrics: dict[str, SiteMetrics]) -> None:
        """The metrics of the chosen model (that of `round_`), HD95 included."""
        with self._database as db:
            db.execute("DELETE FROM metrics WHERE stage = ?", (FINAL,))
            self._insert_metrics(FINAL, round_, metrics)

    def final(self) -> tuple[int, dict[str, SiteMetrics]] | None:
        row = self._database.execute(
            "SELECT round FROM metrics WHERE stage = ? LIMIT 1", (FINAL,)
        ).fetchone()
        return (row[0], self._metrics(FINAL, row[0])) if row else None

    def record_failure(self, round_: int, reasons: dict[str, str]) -> None:
        """Why a round could not be completed; the round itself stays unrecorded."""
        with self._database as db:
            db.executemany(
                "INSERT INTO failures VALUES (?, ?, ?)",
                [(round_, site, reason) for site, reason in reasons.items()],
            )

    def rounds(self) -> list[RoundRecord]:
        """Every complete round, in order."""
        rows = self._database.execute(
            "SELECT round, learning_rate, seconds, loss, checkpoint, sha256"
            " FROM rounds ORDER BY round"
        ).fetchall()
        return [
            RoundRecord(
                number,
                rate,
                seconds,
                loss,
                checkpoint,
                sha256,
                contributions=self._contributions(number),
                metrics=self._metrics(ROUND, number),
            )
            for number, rate, seconds, loss, checkpoint, sha256 in rows
        ]

    def _insert_metrics(self, stage: str, round_: int, metrics: dict[str, SiteMetrics]) -> None:
        self._database.executemany(
            "INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (round_, site, key, value, of.defined.get(key, of.n), of.n, stage)
                for site, of in metrics.items()
                for key, value in of.means.items()
            ],
        )

    def _contributions(self, round_: int) -> tuple[Contribution, ...]:
        rows = self._database.execute(
            "SELECT site, trained, reason, train_loss, seconds, samples_per_second, bytes"
            " FROM contributions WHERE round = ? ORDER BY site",
            (round_,),
        )
        return tuple(Contribution(site, bool(trained), *rest) for site, trained, *rest in rows)

    def _metrics(self, stage: str, round_: int) -> dict[str, SiteMetrics]:
        rows = self._database.execute(
            "SELECT site, key, mean, defined, n FROM metrics"
            " WHERE stage = ? AND round = ? ORDER BY site, rowid",
            (stage, round_),
        )
        found: dict[str, SiteMetrics] = {}
        for site, key, value, defined, n in rows:
            of = found.setdefault(site, SiteMetrics(n=n, means={}, defined={}))
            of.means[key] = float("nan") if value is None else value  # SQLite keeps NaN as NULL
            of.defined[key] = defined
        return found
