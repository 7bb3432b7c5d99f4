"""What the dashboard is told of a run agrees with its history, in every state of its files."""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.audit_log import append
from common.config_file import dump_config
from common.files import locked
from common.messages import SiteCard
from common.metrics import SiteMetrics
from common.statement import Signed, Statement
from server.coordinator import init_folder
from server.dashboard import Observer
from server.dashboard_alerts import recorded_alerts, slow_alerts, status_alerts
from server.dashboard_state import recorded
from server.history import (
    TRAINING,
    Contribution,
    GivenStatement,
    History,
    HistoryError,
    RoundRecord,
)
from server.source import Source

HOSTILE = '<script>alert("x")</script>'


def metrics(wt: float, tc: float, et: float, n: int = 4) -> SiteMetrics:
    dice = {"WT": wt, "TC": tc, "ET": et}
    means = {"loss": 1 - wt, "hd95/WT": math.nan}
    means |= {f"dice/{region}": value for region, value in dice.items()}
    means |= {f"iou/{region}": value / (2 - value) for region, value in dice.items()}
    return SiteMetrics(n, means, dict.fromkeys(means, n))


def a_round(number: int, of: dict[str, SiteMetrics], *absent: str) -> RoundRecord:
    came = [Contribution(site, True, "", 0.5, 3.0, 1.0, 1000) for site in of if site not in absent]
    gone = [Contribution(site, False, f"{site} was off") for site in absent]
    return RoundRecord(number, 0.01, 10.0, 0.25, "c", "s", (*came, *gone), of)


def stated(site: str, number: int, epsilon: float | None, budget: float | None = 8.0) -> Any:
    statement = Statement("f", site, number, "c", "t", True, "exact", epsilon, 1e-3, budget)
    return GivenStatement(number, site, TRAINING, Signed(statement.text()))


@pytest.fixture
def run(tmp_path: Path, tiny_config: Callable[..., Any]) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "federation.yaml").write_text(dump_config(tiny_config("name=study")))
    with History(folder / "history.sqlite") as history:
        history.record_sites(
            [SiteCard("a", True, 7, 3, 0, ""), SiteCard(HOSTILE, True, 9, 2, 0, "")]
        )
        for number, dice in ((1, 0.5), (2, 0.7)):
            of = {"a": metrics(dice, dice, dice), HOSTILE: metrics(0.9, 0.6, 0.3)}
            statements = [stated("a", number, 2.0 * number), stated(HOSTILE, number, None)]
            history.record_round(a_round(number, of), statements)
    return folder


def words(alerts: Any) -> str:
    return "\n".join(f"{alert['level']}: {alert['text']}" for alert in alerts)


def test_the_numbers_are_the_historys(run):
    told = recorded(Source(run))
    assert (told["name"], told["rounds_planned"], told["rounds"]) == ("study", 3, [1, 2])
    assert told["mean_dice"] == pytest.approx([(0.5 + 0.6) / 2, (0.7 + 0.6) / 2])
    assert told["worst_site"] == ["a", HOSTILE]
    assert told["worst_dice"] == pytest.approx([0.5, 0.6])
    assert told["loss"] == [0.25, 0.25]
    a, other = told["sites"]["a"], told["sites"][HOSTILE]
    assert a["dice"]["mean"] == pytest.approx([0.5, 0.7])
    assert other["dice"] == {"mean": [0.6] * 2, "WT": [0.9] * 2, "TC": [0.6] * 2, "ET": [0.3] * 2}
    ious = [d / (2 - d) for d in (0.9, 0.6, 0.3)]
    assert other["iou"]["mean"][1] == pytest.approx(sum(ious) / 3, abs=1e-4)
    assert (a["n_training"], a["n_held_out"], a["bytes"], a["contributed"]) == (7, 3, 2000, "1-2")
    assert (a["epsilon"], a["epsilon_spent"], a["budget"]) == ([2.0, 4.0], 4.0, 8.0)
    assert other["epsilon"] == [None, None]
    assert not told["complete"]
    json.dumps(told, allow_nan=False)


def test_nothing_is_written_beside_or_into_the_history(run):
    def state() -> dict[str, tuple[bytes, int]]:
        return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir()}

    before = state()
    observer = Observer(Source(run))
    for _ in range(3):
        observer.look()
    assert state() == before


def test_a_run_that_writes_all_the_time_is_neither_held_up_nor_read_half(run):
    """Every look sees whole rounds: each site in each of them."""
    stop, seen = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            told = recorded(Source(run))
            seen.append(len(told["rounds"]))
            assert len(told["sites"]["a"]["dice"]["WT"]) == len(told["rounds"])
            assert None not in told["sites"]["a"]["dice"]["WT"], told["problem"]

    looking = threading.Thread(target=look)
    looking.start()
    with History(run / "history.sqlite") as history:
        for number in range(3, 500):
            history.record_round(a_round(number, {"a": metrics(0.5, 0.5, 0.5)}))
            time.sleep(0.01)
            if len(set(seen)) > 3:
                break
    stop.set()
    looking.join()
    assert len(set(seen)) > 3
    assert seen == sorted(seen)
    assert recorded(Source(run))["rounds"][-1] == number


def test_a_round_that_is_being_written_is_not_there_yet(run):
    database = sqlite3.connect(run / "history.sqlite")
    database.execute("BEGIN IMMEDIATE")
    database.execute("INSERT INTO rounds VALUES (3, 0, 0, 0, 'c', 's')")
    assert recorded(Source(run))["rounds"] == [1, 2]
    database.commit()
    assert recorded(Source(run))["rounds"] == [1, 2, 3]
    database.close()


def test_a_run_killed_in_the_middle_of_writing_is_said_in_words(run, tmp_path):
    """Its journal must be played back, which the run itself does when it goes on."""
    database = sqlite3.connect(run / "history.sqlite")
    database.execute("PRAGMA cache_size = 1")  # so that changes reach the file before the commit
    database.execute("BEGIN IMMEDIATE")
    database.executemany("INSERT INTO run VALUES (?, ?)", [(f"{i}", "x" * 2000) for i in range(50)])
    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    database.close()
    assert (killed / "history.sqlite-journal").stat().st_size > 0
    before = {p.name: p.read_bytes() for p in killed.iterdir()}
    told = recorded(Source(killed))
    assert "killed in the middle of writing" in told["problem"]
    assert {p.name: p.read_bytes() for p in killed.iterdir()} == before
    with History(killed / "history.sqlite") as history:
        assert len(history.rounds()) == 2
    assert recorded(Source(killed))["rounds"] == [1, 2]


def test_missing_damaged_and_vanished_files_are_words(run, tmp_path):
    observer = Observer(Source(run))
    observer.look()
    first = observer.view
    observer.look()
    assert observer.view.numbers == first.numbers, "nothing changed, so nobody is told"

    (run / "federation.yaml").write_text("rounds: {numbr: 3}")
    observer.look()
    told = json.loads(observer.view.recorded)
    assert (told["rounds"], told["rounds_planned"]) == ([1, 2], None)
    assert observer.view.numbers[0] > first.numbers[0]

    (run / "history.sqlite").write_bytes(b"no database at all" * 100)
    observer.look()
    assert "not a database" in json.loads(observer.view.recorded)["problem"]

    (run / "history.sqlite").unlink()
    observer.look()
    assert json.loads(observer.view.recorded)["problem"] == "No round is recorded yet."

    sqlite3.connect(run / "history.sqlite").executescript(
        "CREATE TABLE rounds (round INTEGER); INSERT INTO rounds VALUES ('x')"
    )
    observer.look()  # of another program: neither a crash nor a line for each second
    shutil.rmtree(run)
    observer.look()
    live = json.loads(observer.view.live)
    assert live["state"] == "gone"
    assert "is not there" in words(live["alerts"])


def test_what_was_known_stays_while_the_history_cannot_be_read_and_is_read_as_soon_as_it_can(
    run, monkeypatch
):
    """The file's size and time stay as they were: they do not say when to try again."""
    observer = Observer(Source(run))
    observer.look()
    (before,) = [json.loads(observer.view.recorded)]
    os.utime(run / "history.sqlite")

    class OutOfFiles:
        def __init__(self, path: Path, *, copied: bool) -> None:
            raise HistoryError(f"{path}: unable to open database file")

    with monkeypatch.context() as patched:
        patched.setattr("server.dashboard_state.History", OutOfFiles)
        for _ in range(2):
            observer.look()
            told = json.loads(observer.view.recorded)
            assert {**told, "problem": "", "unreadable": False} == before
            assert "error: " in words(json.loads(observer.view.live)["alerts"])
            assert "unable to open database file" in observer.view.live
        fresh = Observer(Source(run))
        fresh.look()
        assert "unable to open" in json.loads(fresh.view.recorded)["problem"]
    for healed in (observer, fresh):
        healed.look()
        assert json.loads(healed.view.recorded) == before
        assert "unable" not in healed.view.live


def test_a_history_that_another_program_holds_is_said_and_nobody_waits_for_ever(run, monkeypatch):
    monkeypatch.setattr("server.history.COPY_SECONDS", 0.3)
    observer = Observer(Source(run))
    observer.look()
    holder = sqlite3.connect(run / "history.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    os.utime(run / "history.sqlite")
    begin = time.monotonic()
    observer.look()
    with pytest.raises(HistoryError, match="another program has it locked"):
        History(run / "history.sqlite", copied=True)
    assert time.monotonic() - begin < 3
    assert json.loads(observer.view.recorded)["rounds"] == [1, 2]
    assert "another program has it locked" in observer.view.live
    holder.execute("ROLLBACK")
    holder.close()
    observer.look()
    assert "locked" not in observer.view.live + observer.view.recorded


def test_what_nobody_foresaw_is_one_line(run, monkeypatch):
    observer = Observer(Source(run))
    observer.look()
    monkeypatch.setattr("server.dashboard.lock_holder", lambda path: 1 / 0)
    observer.look()
    assert "cannot be understood (ZeroDivisionError at" in observer.view.live
    assert json.loads(observer.view.recorded)["rounds"] == [1, 2], "what is known stays"


def test_a_run_is_running_while_its_lock_is_held(run):
    observer = Observer(Source(run))
    observer.look()
    live = json.loads(observer.view.live)
    assert live["state"] == "stopped"
    assert (
        "No process works on this run. The command that began it continues after round 2."
        in words(live["alerts"])
    )
    with locked(run / "run.lock"):
        observer.look()
        live = json.loads(observer.view.live)
        assert (live["state"], live["alerts"]) == ("training", [])
        assert live["sites"]["a"]["state"] == "trained in round 2"
    with History(run / "history.sqlite") as history:
        history.record_final(2, {"a": metrics(0.8, 0.8, 0.8)}, {})
    observer.look()
    told, live = json.loads(observer.view.recorded), json.loads(observer.view.live)
    assert (live["state"], live["alerts"]) == ("complete", [])
    assert told["final"]["sites"]["a"]["values"][:3] == [0.8, 0.8, 0.8]
    assert told["final"]["sites"]["a"]["values"][6] is None, "HD95 is not defined there"


def test_the_final_table_says_which_numbers_are_noised_and_who_withholds_them(run):
    with History(run / "history.sqlite") as history:
        of = {"a": metrics(0.8, 0.8, 0.8), HOSTILE: metrics(1.2, 0.9, 0.9)}
        released = {"b": "withheld", HOSTILE: "noised"}
        history.record_final(2, of, {"b": "withheld"}, released)
    final = recorded(Source(run))["final"]
    told = {site: (about["n"], about["released"]) for site, about in final["sites"].items()}
    assert told == {"a": (4, None), "b": (0, "withheld"), HOSTILE: (4, "noised")}
    assert final["sites"]["b"]["values"] == [None] * 9
    assert final["mean"][0] == 1.0, "over those that told theirs"


# ----------------------------------------------------------------------------------- alerts


def test_who_did_not_contribute_and_why_the_run_stopped(run):
    with History(run / "history.sqlite") as history:
        history.record_round(a_round(3, {HOSTILE: metrics(0.5, 0.5, 0.5)}, "a"))
        history.record_failure(4, {"a": "update refused:\nnot finite"})
    told = recorded(Source(run))
    text = words(recorded_alerts(told))
    assert "warning: a did not contribute to round 3: a was off" in text
    assert "error: Round 4 could not be completed: a: update refused: not finite" in text
    assert told["events"][0] == {"round": 3, "site": "a", "text": "a was off"}


@pytest.mark.parametrize(
    ("spent", "said"),
    [
        (9.0, "error: States more epsilon than its budget: a."),
        (8.0, "warning: Budget of epsilon spent: a."),
        (7.5, "note: Budget of epsilon nearly spent: a."),
        (7.0, ""),
    ],
)
def test_a_budget_that_is_spent_or_nearly(run, spent, said):
    with History(run / "history.sqlite") as history:
        history.record_round(a_round(3, {"a": metrics(0.8, 0.8, 0.8)}), [stated("a", 3, spent)])
    assert words(recorded_alerts(recorded(Source(run)))) == said


@pytest.mark.parametrize(
    ("last", "falls"), [((0.5, 0.44), True), ((0.5, 0.54), False), ((0.58, 0.56), False)]
)
def test_the_worst_site_falling(run, last, falls):
    """Its mean Dice was 0.6 in round 2."""
    with History(run / "history.sqlite") as history:
        for number, dice in enumerate(last, start=3):
            of = {"a": metrics(0.9, 0.9, 0.9), HOSTILE: metrics(dice, dice, dice)}
            history.record_round(a_round(number, of))
    assert ("the worst site, falls" in words(recorded_alerts(recorded(Source(run))))) is falls


def test_a_round_far_slower_than_the_others(run):
    told = recorded(Source(run))  # whose rounds took 10 s
    assert not list(slow_alerts(told, 39.0))
    assert "60 s so far, usually 10 s" in words(slow_alerts(told, 60.0))
    observer = Observer(Source(run), now=lambda: (run / "history.sqlite").stat().st_mtime + 600)
    with locked(run / "run.lock"):
        observer.look()
    assert "The round after 2 takes far longer than usual: 10 min so far" in observer.view.live


def test_a_running_server_that_waits_or_says_nothing():
    status = {
        "written": "2026-01-01T00:00:00+00:00",
        "waiting": {
            "round": 3, "needed": 2, "training": 1, "seconds_left": 61.0,
            "absent": {"b": "has not connected"}, "resting": {"c": "its budget is spent"},
        },
        "sites": {"a": {"state": "connected"}, "b": {"state": "offline"}, "d": {"state": "offline"}},
    }  # fmt: skip
    written = 1767225600.0
    text = words(status_alerts(status, written + 5))
    assert "Round 3 waits for sites: 1 that train are here, 2 needed; 2 min left." in text
    assert "warning: b is absent: has not connected" in text
    assert "note: c rests: its budget is spent" in text
    assert "d: offline." in text
    assert "b: offline." not in text, "said already"
    assert "said nothing" not in text
    assert "said nothing of itself for 60 s" in words(status_alerts(status, written + 60))


def test_a_low_disk(run, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10**8))
    observer = Observer(Source(run))
    observer.look()
    assert "Less than 1 GB is free" in observer.view.live


def test_a_coordinators_folder(run, tmp_path, tiny_config):
    folder = init_folder(tmp_path / "study", tiny_config("name=study"))
    source = Source(folder.path)
    observer = Observer(source)
    observer.look()
    assert json.loads(observer.view.live)["state"] == "not running"
    folder.run.mkdir()
    shutil.copy(run / "history.sqlite", folder.run)
    status = {
        "pid": os.getpid(), "written": "2026-01-01T00:00:00+00:00", "state": "training",
        "waiting": None,
        "sites": {"a": {"state": "training", "last_contact": "2026-01-01T00:00:00+00:00"}},
    }  # fmt: skip
    observer.now = lambda: 1767225600.0
    with locked(folder.lock):
        for text, state in (
            ("", "starting"),
            (json.dumps(status)[:70], "starting"),
            (json.dumps({**status, "pid": 1}), "starting"),  # of an earlier start
            (json.dumps({**status, "sites": []}), "starting"),
            (json.dumps(status), "training"),
        ):
            folder.status.write_text(text)
            observer.look()
            assert json.loads(observer.view.live)["state"] == state, text
        sites = json.loads(observer.view.live)["sites"]
        assert sites["a"]["state"] == "training"
        assert sites[HOSTILE]["state"] == "trained in round 2"
        append(folder.audit, "problem", {"site": "a", "what": "a's audit log has gone back"})
        observer.look()
        assert "error: Audit log: a's audit log has gone back" in words(
            json.loads(observer.view.live)["alerts"]
        )
    folder.audit.path.write_bytes(folder.audit.path.read_bytes()[:-30] + b"{}\n")
    observer.look()
    assert "Audit log: " in observer.view.live
