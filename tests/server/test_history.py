"""A round is in the history whole or not at all, and reads back as it was written."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.messages import SiteCard
from common.metrics import SiteMetrics
from common.statement import Signed
from server.history import Contribution, GivenStatement, History, HistoryError, RoundRecord

NAN = math.nan


def metrics(dice: float, n: int = 4) -> SiteMetrics:
    means = {"loss": 1 - dice, "dice/WT": dice, "dice/TC": dice, "dice/ET": dice, "hd95/ET": NAN}
    return SiteMetrics(n, means, dict.fromkeys(means, n) | {"hd95/ET": 0})


def a_round(number: int = 1, **changes: Any) -> RoundRecord:
    record = RoundRecord(
        round=number,
        learning_rate=1e-4 / 3,
        seconds=12.25,
        loss=0.1 + 0.2,
        checkpoint=f"checkpoints/round-{number:04d}.safetensors",
        sha256="ab" * 32,
        contributions=(
            Contribution("a", True, "", 0.5, 3.5, 2.25, 1 << 33),
            Contribution("b", False, "its disk is full; 100 % of 2 TB"),
        ),
        metrics={"a": metrics(0.75), "ü b": metrics(0.5, 1)},
        unmeasured={"b": "no answer"},
        released={"ü b": "noised"},
    )
    return replace(record, **changes)


def comparable(record: RoundRecord) -> str:
    return repr(record)  # NaN does not equal itself, floats print to the last bit


def test_a_round_reads_back_as_it_was_written(tmp_path):
    written = [
        a_round(1),
        a_round(2, unmeasured={}, released={}, contributions=(), chosen="ü b"),
        a_round(3, loss=None, metrics={}, released={"b": "withheld"}),
    ]
    with History(tmp_path / "h") as history:
        for record in reversed(written):
            history.record_round(record)
    with History(tmp_path / "h") as again:
        assert [comparable(r) for r in again.rounds()] == [comparable(r) for r in written]
        assert math.isnan(again.rounds()[0].metrics["a"].means["hd95/ET"])


class Trap(dict[str, float]):
    """Means that do something when they are about to be written, after most rows of the round."""

    def __init__(self, spring: Callable[[], None]) -> None:
        super().__init__(metrics(0.5).means)
        self.spring = spring

    def items(self):
        self.spring()
        return super().items()


def stated(round_: int, stage: str = "training") -> GivenStatement:
    return GivenStatement(round_, "ü b", stage, Signed(f"round {round_}", b"\0\xff"))


def failing_statements():
    yield stated(2)
    raise ZeroDivisionError


def springing(spring: Callable[[], None]) -> RoundRecord:
    last = SiteMetrics(4, Trap(spring), {})
    return a_round(2, metrics={"a": metrics(0.75), "b": last})


def fail() -> None:
    raise ZeroDivisionError


def kill_9() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def rounds_in_every_table(path: Path) -> set[int]:
    database = sqlite3.connect(path)
    tables = ("rounds", "contributions", "metrics", "unmeasured", "released", "statements")
    rows = [row for t in tables for row in database.execute(f"SELECT round FROM {t}")]
    database.close()
    return {number for (number,) in rows}


def test_an_error_in_the_middle_of_a_round_leaves_nothing_of_it(tmp_path):
    path = tmp_path / "h"
    with History(path) as history:
        history.record_round(a_round(1))
        with pytest.raises(ZeroDivisionError):
            history.record_round(springing(fail), [stated(2)])
        with pytest.raises(ZeroDivisionError):
            history.record_round(a_round(2), failing_statements())
        assert rounds_in_every_table(path) == {1}
        history.record_round(a_round(2))
    assert rounds_in_every_table(path) == {1, 2}


def test_kill_9_in_the_middle_of_a_round_leaves_nothing_of_it(tmp_path):
    path = tmp_path / "h"
    child = os.fork()
    if child == 0:
        with History(path) as history:
            history.record_round(a_round(1))
            history.record_round(springing(kill_9))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert rounds_in_every_table(path) == {1}
    with History(path) as history:
        assert [comparable(r) for r in history.rounds()] == [comparable(a_round(1))]
        history.record_round(a_round(2))
    assert rounds_in_every_table(path) == {1, 2}


def test_a_round_is_recorded_once(tmp_path):
    with History(tmp_path / "h") as history:
        history.record_round(a_round(1))
        with pytest.raises(HistoryError):
            history.record_round(a_round(1, loss=9.0))
        assert history.rounds()[0].loss == a_round().loss


def test_a_reader_sees_complete_rounds_while_another_process_writes(tmp_path):
    path = tmp_path / "h"
    with History(path) as history:
        history.record_round(a_round(1))
        writer = sqlite3.connect(path)
        writer.execute("INSERT INTO rounds VALUES (2, 0, 0, 0, 'x', 'y')")  # not committed
        assert [r.round for r in history.rounds()] == [1]
        writer.close()


def test_mean_and_worst_are_over_sites_whatever_their_size():
    record = a_round(metrics={"large": metrics(0.9, 100), "small": metrics(0.3, 1)})
    assert record.mean_dice == pytest.approx(0.6)
    assert record.worst == ("small", pytest.approx(0.3))


def test_sites_are_those_of_the_last_attempt(tmp_path):
    cards = [
        SiteCard("b", True, 5, 2, 0, "f"),
        SiteCard("a", False, 0, 3, 1, "f", shows_name=False),
    ]
    with History(tmp_path / "h") as history:
        history.record_sites([*cards, SiteCard("gone", True, 1, 1, 0, "f")])
        history.record_sites(cards)
    with History(tmp_path / "h") as history:
        kept = [replace(card, config_fingerprint="f") for card in history.sites()]
    assert kept == sorted(cards, key=lambda card: card.site)


def test_a_history_from_before_names_could_be_hidden_shows_them(tmp_path):
    with closing(sqlite3.connect(tmp_path / "h")) as database, database:
        database.execute(
            "CREATE TABLE sites (site TEXT PRIMARY KEY, trains INTEGER, n_training INTEGER,"
            " n_held_out INTEGER, n_left_out INTEGER)"
        )
        database.execute("INSERT INTO sites VALUES ('a', 1, 5, 2, 0)")
    with History(tmp_path / "h") as history:
        assert history.sites() == [SiteCard("a", True, 5, 2, 0, "")]


def test_final_metrics_replace_those_of_an_earlier_end(tmp_path):
    with History(tmp_path / "h") as history:
        assert history.final() is None
        history.record_round(a_round(1))
        history.record_final(1, {"a": metrics(0.5), "b": metrics(0.5)}, {"c": "no answer"})
        history.record_final(1, {"a": metrics(0.6)}, {})
        number, found = history.final() or (0, {})
        assert (number, repr(found)) == (1, repr({"a": metrics(0.6)}))
        assert history.final_unmeasured() == {}
        assert repr(history.rounds()[0]) == repr(a_round(1))  # not mixed up with the round's own


def test_failures_say_why_it_stopped_until_it_gets_further(tmp_path):
    with History(tmp_path / "h") as history:
        history.record_failure(1, {"b": "disk full", "a": "no answer"})
        history.record_failure(1, {"b": "disk full"})
        assert history.failures() == [(1, "b", "disk full")]
        assert history.rounds() == []
        history.record_round(a_round(1))
        assert history.failures() == []


def test_facts_about_the_run_survive(tmp_path):
    with History(tmp_path / "h") as history:
        assert history.noted("config") is None
        history.note("config", "x")
        history.note("config", {"a": [1, None]})
    with History(tmp_path / "h") as history:
        assert history.noted("config") == {"a": [1, None]}


def test_a_damaged_file_is_named_in_words(tmp_path):
    path = tmp_path / "history.sqlite"
    path.write_bytes(b"this is no database, " * 100)
    with pytest.raises(HistoryError, match=r"history\.sqlite.*not a database"):
        History(path)
    with History(tmp_path / "good") as history:
        for number in range(1, 60):
            history.record_round(a_round(number))
    whole = (tmp_path / "good").read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"\0" * (len(whole) - len(whole) // 2))
    with pytest.raises(HistoryError, match="malformed"), History(path) as history:
        history.rounds()
    with pytest.raises(HistoryError, match="unable to open"):
        History(tmp_path / "none" / "h")


def test_statements_come_back_to_the_byte_in_the_order_in_which_they_were_given(tmp_path):
    first = [stated(1, stage) for stage in ("training", "metrics")]
    with History(tmp_path / "h") as history:
        history.record_round(a_round(1), first)
        history.record_round(a_round(2))
        history.record_final(1, {}, {}, {}, [stated(1, "final")])
    with History(tmp_path / "h") as history:
        assert history.statements() == [*first, stated(1, "final")]


def test_the_end_is_known_without_any_metric_and_is_replaced_whole(tmp_path):
    with History(tmp_path / "h") as history:
        for number in (1, 2):
            history.record_round(a_round(number), [stated(number)])
        withheld = {"a": "withheld"}
        history.record_final(1, {}, {"a": "it withholds"}, withheld, [stated(1, "final")])
        assert history.final() == (1, {})
        assert history.final_released() == withheld
        history.record_final(2, {}, {}, {"b": "noised"}, [stated(2, "final")])
        assert history.final() == (2, {})
        assert history.final_released() == {"b": "noised"}
        assert history.rounds()[0].released == {"ü b": "noised"}, "not mixed up with the round's"
        assert history.statements() == [stated(1), stated(2), stated(2, "final")]


def test_without_metrics_there_is_no_mean_and_no_worst():
    record = a_round(metrics={})
    assert (record.mean_dice, record.worst) == (None, None)


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE sites ADD COLUMN country TEXT",
        "ALTER TABLE sites DROP COLUMN n_left_out",
        "ALTER TABLE rounds RENAME COLUMN sha256 TO digest",
        "CREATE TABLE later (round INTEGER)",
    ],
)
def test_a_history_of_another_version_is_recognised_and_left_as_it_is(tmp_path, change, copied):
    path = tmp_path / "history.sqlite"
    with History(path) as history:
        history.record_round(a_round())
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(change)
        database.execute("DROP TABLE chosen")
    before = path.read_bytes()
    with pytest.raises(HistoryError, match=r"history\.sqlite: was written by another version"):
        History(path, copied=copied)
    assert path.read_bytes() == before


def test_a_table_that_was_added_since_does_not_make_another_version(tmp_path):
    with History(tmp_path / "h") as history:
        history.record_round(a_round())
    with closing(sqlite3.connect(tmp_path / "h")) as database, database:
        database.execute("DROP TABLE chosen")
    for copied in (True, False):
        with History(tmp_path / "h", copied=copied) as history:
            assert [r.round for r in history.rounds()] == [1]


def test_a_note_that_is_no_json_is_told_in_words(tmp_path):
    path = tmp_path / "history.sqlite"
    with History(path) as history:
        history.note("terms", [])
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE run SET value = '{'")
    with History(path) as history, pytest.raises(HistoryError, match=r"history.sqlite: .*Restore"):
        history.noted("terms")
