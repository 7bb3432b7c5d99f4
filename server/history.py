"""The run's history in SQLite: what every site did in every round, written in one transaction a round.

A round is complete exactly when its row is there, so a killed run continues after the last such row.
Holds numbers per site only, and what sites state about privacy, as it came: no weights
(`server.checkpoint`), no subject ids. A mean over a single held-out subject is that subject's result
all the same.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from common.metrics import SiteMetrics, mean_dice
from common.statement import Signed

if TYPE_CHECKING:
    from common.messages import SiteCard

COPY_SECONDS = 3.0  # that who only looks on waits for a writer, who needs milliseconds
SCHEMA = """
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sites (
    site TEXT PRIMARY KEY, trains INTEGER, n_training INTEGER, n_held_out INTEGER, n_left_out INTEGER
);
CREATE TABLE IF NOT EXISTS hidden (site TEXT PRIMARY KEY);
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
CREATE TABLE IF NOT EXISTS unmeasured (stage TEXT, round INTEGER, site TEXT, reason TEXT);
CREATE TABLE IF NOT EXISTS released (stage TEXT, round INTEGER, site TEXT, how TEXT);
CREATE TABLE IF NOT EXISTS statements (
    id INTEGER PRIMARY KEY, round INTEGER, site TEXT, stage TEXT, text TEXT, signature BLOB
);
CREATE TABLE IF NOT EXISTS chosen (round INTEGER PRIMARY KEY, site TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS final (round INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS failures (round INTEGER, site TEXT, reason TEXT);
"""
HELD = (
    "another program has it locked, and nobody else can read or write it. End that program (an SQLite "
    "browser, a backup); the file itself is whole."
)
ROUND, FINAL = "round", "final"  # stages: after each round, and the chosen model at the end
TRAINING, METRICS = "training", "metrics"  # what of a round a statement came with; at the end FINAL


class HistoryError(RuntimeError):
    """The database cannot be read or written, or is another version's; the text names file and reason."""


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
class GivenStatement:
    """What a site stated about the privacy of its patients, beside an update or beside metrics."""

    round: int
    site: str
    stage: str
    signed: Signed


@dataclass(frozen=True)
class RoundRecord:
    """One complete round. `metrics` holds the sites that told any; `loss` is over all subjects of
    those that told theirs, None if nobody did. `chosen` is the site whose update became the model,
    where the aggregation takes a single one: the others were weighed, and contributed too.

    `unmeasured` says of a site that has no metrics why. `released` says which sites report other
    than exact metrics: one that withholds them did report, and is no absence.
    """

    round: int
    learning_rate: float
    seconds: float
    loss: float | None
    checkpoint: str
    sha256: str
    contributions: tuple[Contribution, ...]
    metrics: dict[str, SiteMetrics]
    unmeasured: dict[str, str] = field(default_factory=dict)
    released: dict[str, str] = field(default_factory=dict)
    chosen: str | None = None

    @property
    def mean_dice(self) -> float | None:
        """Unweighted over sites, of each site's mean Dice over WT, TC and ET; None if none told."""
        dice = [mean_dice(site) for site in self.metrics.values()]
        return sum(dice) / len(dice) if dice else None

    @property
    def worst(self) -> tuple[str, float] | None:
        """The site with the lowest mean Dice, and that Dice."""
        pairs = [(site, mean_dice(metrics)) for site, metrics in self.metrics.items()]
        return min(pairs, key=lambda pair: pair[1]) if pairs else None


def _columns(database: sqlite3.Connection) -> dict[str, list[str]]:
    """The names of each table's columns, in order."""
    query = (
        "SELECT t.name, c.name FROM sqlite_master t, pragma_table_info(t.name) c"
        " WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY t.name, c.cid"
    )
    found: dict[str, list[str]] = {}
    for table, column in database.execute(query):
        found.setdefault(table, []).append(column)
    return found


class History:
    """The open database; use it as a context manager. Every method may raise HistoryError.

    With `copied` it is a copy in memory, as the file is now, for who only looks on: the file is not
    changed, and locked against its run's writing only for the milliseconds that copying takes. If
    another program holds it for seconds, that is a HistoryError, too.
    """

    def __init__(self, path: Path, *, copied: bool = False) -> None:
        self._path = path
        with self._in_words():
            if copied:
                self._database = sqlite3.connect(":memory:")
                uri = f"{path.absolute().as_uri()}?mode=ro"
                with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=0)) as file:
                    file.backup(self._database, sleep=0.02, progress=self._patience())
            else:
                self._database = sqlite3.connect(path, timeout=60)
                self._database.execute("PRAGMA synchronous = FULL")
            self._require_our_tables()
            self._database.executescript(f"BEGIN; {SCHEMA} COMMIT;")

    def __enter__(self) -> History:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._database.close()

    def _require_our_tables(self) -> None:
        """A table may be missing, as it was added since; any other difference is not understood."""
        with contextlib.closing(sqlite3.connect(":memory:")) as ours:
            ours.executescript(SCHEMA)
            known = _columns(ours)
        found = _columns(self._database)
        if any(known.get(table) != columns for table, columns in found.items()):
            self._database.close()
            raise HistoryError(
                f"{self._path}: was written by another version of fedbrats, or is no history. Use the "
                "version that wrote it; the file is as it was."
            )

    def _patience(self) -> Callable[[int, int, int], None]:
        """Told of every attempt to copy; SQLite itself would try for ever."""
        until = time.monotonic() + COPY_SECONDS

        def attempted(status: int, remaining: int, total: int) -> None:
            if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) and time.monotonic() > until:
                self._database.close()
                raise HistoryError(f"{self._path}: {HELD}")

        return attempted

    def note(self, key: str, value: object) -> None:
        """Keep one fact about the run, replacing an earlier one of that name."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (key, json.dumps(value)))

    def noted(self, key: str) -> object | None:
        rows = self._read("SELECT value FROM run WHERE key = ?", key)
        try:
            return json.loads(rows[0][0]) if rows else None
        except ValueError as error:
            raise HistoryError(
                f"{self._path}: the run's history cannot be read ({error}). Restore the file."
            ) from error

    def record_sites(self, cards: Sequence[SiteCard]) -> None:
        """Who takes part, in place of whom an earlier attempt had."""
        with self._transaction() as db:
            db.execute("DELETE FROM sites")
            db.execute("DELETE FROM hidden")
            db.executemany(
                "INSERT INTO hidden VALUES (?)", [(c.site,) for c in cards if not c.shows_name]
            )
            db.executemany(
                "INSERT INTO sites VALUES (?, ?, ?, ?, ?)",
                [(c.site, c.trains, c.n_training, c.n_held_out, c.n_left_out) for c in cards],
            )

    def sites(self) -> list[SiteCard]:
        # imported here for torch comes with it: no command's error should wait seconds for that
        from common.messages import SiteCard

        rows = self._read(
            "SELECT *, site NOT IN (SELECT site FROM hidden) FROM sites ORDER BY site"
        )
        return [
            SiteCard(s, bool(t), n, h, left, "", shows_name=bool(shown))
            for s, t, n, h, left, shown in rows
        ]

    def record_round(self, record: RoundRecord, statements: Sequence[GivenStatement] = ()) -> None:
        """All of a round, or nothing of it."""
        r = record
        with self._transaction() as db:
            db.execute(
                "INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?)",
                (r.round, r.learning_rate, r.seconds, r.loss, r.checkpoint, r.sha256),
            )
            db.executemany(
                "INSERT INTO contributions VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [(r.round, *vars(c).values()) for c in r.contributions],
            )
            if r.chosen is not None:
                db.execute("INSERT INTO chosen VALUES (?, ?)", (r.round, r.chosen))
            self._insert_metrics(ROUND, r.round, r.metrics, r.unmeasured, r.released)
            self._insert_statements(statements)
            db.execute("DELETE FROM failures")  # overcome

    def record_final(
        self,
        round_: int,
        metrics: dict[str, SiteMetrics],
        unmeasured: Mapping[str, str],
        released: Mapping[str, str] | None = None,
        statements: Sequence[GivenStatement] = (),
    ) -> None:
        """The metrics of the chosen model (that of `round_`), HD95 included where it is told."""
        with self._transaction() as db:
            for table in ("metrics", "unmeasured", "released", "statements"):
                db.execute(f"DELETE FROM {table} WHERE stage = ?", (FINAL,))
            db.execute("DELETE FROM final")
            db.execute("INSERT INTO final VALUES (?)", (round_,))
            self._insert_metrics(FINAL, round_, metrics, unmeasured, released or {})
            self._insert_statements(statements)
            db.execute("DELETE FROM failures")

    def final(self) -> tuple[int, dict[str, SiteMetrics]] | None:
        """Which round's model was chosen, and its metrics; None before the end."""
        rows = self._read("SELECT round FROM final")  # there may be no metrics at all
        return (rows[0][0], self._metrics(FINAL, rows[0][0])) if rows else None

    def final_unmeasured(self) -> dict[str, str]:
        """Why a site has no metrics of the chosen model, by site."""
        return dict(self._read("SELECT site, reason FROM unmeasured WHERE stage = ?", FINAL))

    def final_released(self) -> dict[str, str]:
        """Which sites reported other than exact metrics of the chosen model, and how."""
        return dict(self._read("SELECT site, how FROM released WHERE stage = ?", FINAL))

    def statements(self) -> list[GivenStatement]:
        """What sites stated beside answers that counted, in the order in which it was recorded."""
        rows = self._read("SELECT round, site, stage, text, signature FROM statements ORDER BY id")
        return [
            GivenStatement(number, site, stage, Signed(text, signature))
            for number, site, stage, text, signature in rows
        ]

    def record_failure(self, round_: int, reasons: Mapping[str, str]) -> None:
        """Why a round could not be completed; the round itself stays unrecorded."""
        with self._transaction() as db:
            db.execute("DELETE FROM failures")
            db.executemany(
                "INSERT INTO failures VALUES (?, ?, ?)",
                [(round_, site, reason) for site, reason in reasons.items()],
            )

    def failures(self) -> list[tuple[int, str, str]]:
        """Round, site and reason of what last stopped the run; empty once it got further."""
        return self._read("SELECT round, site, reason FROM failures ORDER BY site")

    def rounds(self) -> list[RoundRecord]:
        """Every complete round, in order."""
        chosen = dict(self._read("SELECT round, site FROM chosen"))
        rows = self._read(
            "SELECT round, learning_rate, seconds, loss, checkpoint, sha256"
            " FROM rounds ORDER BY round"
        )
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
                unmeasured=self._of_round("site, reason FROM unmeasured", number),
                released=self._of_round("site, how FROM released", number),
                chosen=chosen.get(number),
            )
            for number, rate, seconds, loss, checkpoint, sha256 in rows
        ]

    def _insert_metrics(
        self,
        stage: str,
        round_: int,
        metrics: dict[str, SiteMetrics],
        unmeasured: Mapping[str, str],
        released: Mapping[str, str],
    ) -> None:
        self._database.executemany(
            "INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (round_, site, key, value, of.defined.get(key, of.n), of.n, stage)
                for site, of in metrics.items()
                for key, value in of.means.items()
            ],
        )
        self._database.executemany(
            "INSERT INTO unmeasured VALUES (?, ?, ?, ?)",
            [(stage, round_, site, reason) for site, reason in unmeasured.items()],
        )
        self._database.executemany(
            "INSERT INTO released VALUES (?, ?, ?, ?)",
            [(stage, round_, site, how) for site, how in released.items()],
        )

    def _insert_statements(self, statements: Sequence[GivenStatement]) -> None:
        self._database.executemany(
            "INSERT INTO statements (round, site, stage, text, signature) VALUES (?, ?, ?, ?, ?)",
            [(s.round, s.site, s.stage, s.signed.text, s.signed.signature) for s in statements],
        )

    def _of_round(self, columns: str, number: int) -> dict[str, str]:
        return dict(self._read(f"SELECT {columns} WHERE stage = ? AND round = ?", ROUND, number))

    def _contributions(self, round_: int) -> tuple[Contribution, ...]:
        rows = self._read(
            "SELECT site, trained, reason, train_loss, seconds, samples_per_second, bytes"
            " FROM contributions WHERE round = ? ORDER BY site",
            round_,
        )
        return tuple(Contribution(site, bool(trained), *rest) for site, trained, *rest in rows)

    def _metrics(self, stage: str, round_: int) -> dict[str, SiteMetrics]:
        rows = self._read(
            "SELECT site, key, mean, defined, n FROM metrics"
            " WHERE stage = ? AND round = ? ORDER BY site, rowid",
            stage,
            round_,
        )
        found: dict[str, SiteMetrics] = {}
        for site, key, value, defined, n in rows:
            of = found.setdefault(site, SiteMetrics(n=n, means={}, defined={}))
            of.means[key] = float("nan") if value is None else value  # SQLite keeps NaN as NULL
            of.defined[key] = defined
        return found

    def _read(self, query: str, *values: object) -> list[Any]:
        with self._in_words():
            return self._database.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._in_words(), self._database as database:
            yield database

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorname", "") == "SQLITE_READONLY_ROLLBACK":
                raise HistoryError(
                    f"{self._path}: the run was killed in the middle of writing. Type the run's command "
                    "again, which repairs it."
                ) from error
            if getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
                raise HistoryError(f"{self._path}: {HELD}") from error
            raise HistoryError(
                f"{self._path}: the run's history cannot be read or written ({error}). Free disk "
                "space or restore the file, or start a new run in another folder."
            ) from error
