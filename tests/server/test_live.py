"""What the coordinator sees while it runs: each number where it belongs, and a glitch ends nothing."""

from __future__ import annotations

import json
import logging
import math
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from server.attendance import Waiting
from server.history import Contribution
from server.link_grid import Contact
from server.live import Board, showing
from tests.link import until
from tests.server.test_tables import a_round, cells, metrics, printed

LAST = datetime(2026, 11, 24, 10, 0, 5, 900, tzinfo=UTC)
WAITING = Waiting(2, ("a",), {"b": "it has never connected."}, 2, 125.9, 1)


class Facts:
    """What the board asks for."""

    def __init__(self) -> None:
        self.sites = ["a", "b", "c"]
        self.contacts = {
            "a": Contact(1, "a", True, LAST, LAST),
            "b": Contact(2, "b", False, LAST, LAST),
            "c": Contact(3, "c", False, None, None),
        }
        self.doing: dict[str, str] = {}
        self.error: Exception | None = None

    def __call__(self) -> dict[str, Contact]:
        if self.error is not None:
            raise self.error
        return self.contacts


@pytest.fixture
def facts() -> Facts:
    return Facts()


@pytest.fixture
def board(tmp_path, facts) -> Board:
    board = Board(
        tmp_path / "status.json",
        lambda: facts.sites,
        facts,
        lambda: facts.doing,
        rounds=5,
        rounds_before=1,
        name="study",
        address="fed.org:8443",
        terms="ab" * 32,
    )
    board.live = True  # no table of every round on standard output
    return board


def strict(path: Path) -> dict:
    """The file as any other program would read it."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


def two_rounds(board: Board) -> None:
    for number, size in ((2, 1_000_000), (3, 500_000)):
        contributions = (
            Contribution("a", True, "", 0.25, 12.34, 2.0, size),
            Contribution("b", False, "it was off"),
        )
        measured = {"a": metrics(2, dice_wt=0.9, dice_tc=0.6, dice_et=0.3), "c": metrics(1)}
        record = replace(a_round(number, "ab"), contributions=contributions, metrics=measured)
        board.round_done(record)


def test_the_document_says_what_is_known(board, facts):
    facts.doing = {"a": "training", "b": "training"}
    document = board.document()
    for key, value in {
        "pid": os.getpid(),
        "name": "study",
        "address": "fed.org:8443",
        "terms": "ab" * 32,
        "state": "training",
        "rounds_done": 1,
        "rounds": 5,
        "waiting": None,
    }.items():
        assert document[key] == value, key
    assert datetime.fromisoformat(document["started"]) <= datetime.now(UTC)
    states = {site: about["state"] for site, about in document["sites"].items()}
    assert states == {"a": "training", "b": "offline", "c": "never connected"}
    contacts = [about["last_contact"] for about in document["sites"].values()]
    assert contacts == ["2026-11-24T10:00:05+00:00"] * 2 + [None]
    facts.doing = {}
    facts.sites = ["a", "new"]
    states = {site: about["state"] for site, about in board.document()["sites"].items()}
    assert states == {"a": "connected", "new": "never connected"}


def test_the_numbers_of_the_last_round_and_all_bytes(board):
    two_rounds(board)
    document = board.document()
    assert document["rounds_done"] == 3
    a, b, c = document["sites"].values()
    assert (a["round"], a["loss"], a["seconds"], a["bytes"]) == (3, 0.25, 12.34, 1_500_000)
    assert a["dice"] == pytest.approx((0.9 + 0.6 + 0.3) / 3)
    iou = metrics(2).means
    assert a["iou"] == pytest.approx((iou["iou/WT"] + iou["iou/TC"] + iou["iou/ET"]) / 3)
    assert (b["round"], b["loss"], b["dice"], b["bytes"]) == (None, None, None, 0)
    assert (c["round"], c["loss"]) == (None, None), "it only evaluates"
    assert c["dice"] is not None


def test_the_wait_is_in_the_document_and_in_the_table(board):
    board.waiting(WAITING)
    document = board.document()
    assert document["state"] == "waiting for sites"
    assert json.loads(json.dumps(document["waiting"])) == {
        "round": 2,
        "present": ["a"],
        "absent": {"b": "it has never connected."},
        "needed": 2,
        "seconds_left": 125.9,
        "training": 1,
        "resting": {},
        "not_training": [],
    }
    assert document["sites"]["b"]["absent"] == "it has never connected."
    text = printed(board.table(document))
    assert "round 2: 1 sites that train are here, 2 needed; waiting for b (2:05 left)" in text
    assert "it has never connected." in text
    board.waiting(None)
    document = board.document()
    assert (document["state"], document["waiting"]) == ("training", None)
    assert "waiting" not in printed(board.table(document))
    board.waiting(replace(WAITING, absent={}, not_training=("c", "d")))
    said = printed(board.table(board.document()))
    assert "sites that train (2:05 left); here, but not training (too few subjects, or" in said


def test_the_table_has_every_number(board):
    before = printed(board.table(board.document()))
    assert "1 of 5 rounds done" in before
    two_rounds(board)
    group = board.table(board.document())
    text = printed(group)
    assert "3 of 5 rounds done; Dice 0.745 (mean over sites), worst 0.600 at a" in text
    rows = cells(type(group)(group.renderables[1]))
    assert rows == [
        ["a", "connected", "3", "0.250", "0.600", "0.860", "12.3", "1.5"],
        ["b", "offline", "-", "-", "-", "-", "-", "0.0"],
        ["c", "never connected", "-", "-", "0.890", "0.860", "-", "0.0"],
    ]


def test_a_name_cannot_colour_the_table(board, facts):
    facts.sites = ["[red]x[/red]"]
    facts.contacts = {}
    assert "[red]x[/red]" in printed(board.table(board.document()))


def test_the_log_says_what_changed_and_the_wait_now_and_then(board, facts, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "fedbrats")

    def said() -> list[str]:
        board.lines(board.document())
        lines = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return lines

    assert said() == ["a: connected", "c: never connected"]
    assert said() == []
    facts.doing = {"a": "training"}
    facts.contacts["b"] = replace(facts.contacts["b"], online=True)
    assert said() == ["a: training", "b: connected"]
    board.waiting(WAITING)
    (line,) = said()
    assert "waiting for b (2:05 left)" in line
    assert said() == [], "not every second"
    monkeypatch.setattr("server.live.SECONDS_BETWEEN_LINES", -1.0)
    assert len(said()) == 1
    board.waiting(None)
    assert said() == []


def test_the_status_file_is_json_whatever_the_numbers(board, tmp_path):
    two_rounds(board)
    undefined = {"a": metrics(2, iou_wt=math.nan), "c": metrics(1)}
    board.round_done(replace(a_round(4, "a"), metrics=undefined))
    board.write(board.document())
    assert strict(tmp_path / "status.json")["sites"]["a"]["iou"] is None


def test_while_the_block_runs_the_file_follows_and_at_the_end_it_says_so(board, facts, tmp_path):
    path = tmp_path / "status.json"
    board.live = False
    with showing(board):
        until(path.exists, "the first file")
        assert strict(path)["sites"]["a"]["state"] == "connected"
        facts.doing = {"a": "training"}
        until(lambda: strict(path)["sites"]["a"]["state"] == "training", "the change")
        board.waiting(WAITING)
    last = strict(path)
    assert (last["state"], last["waiting"]) == ("not running", None)
    assert last["sites"]["a"]["state"] == "training"


def test_a_glitch_of_the_display_ends_nothing(board, facts, tmp_path, monkeypatch, caplog):
    """Nor does it hide what ended the run."""
    monkeypatch.setattr("server.live.every", lambda seconds, action: every(0.01, action))
    from server.background import every

    board.live = False
    path = tmp_path / "status.json"
    facts.error = RuntimeError("database is locked")
    with caplog.at_level("WARNING", "fedbrats"), showing(board):
        until(lambda: "database is locked" in caplog.text, "the glitch")
        facts.error = None
        until(path.exists, "the next time")
        facts.error = RuntimeError("again")
    facts.error = RuntimeError("and again")

    def fail() -> None:
        with showing(board):
            raise ValueError("what ended the run")

    with pytest.raises(ValueError, match="what ended the run"):
        fail()


def test_a_file_that_cannot_be_written_ends_nothing(board, tmp_path):
    (tmp_path / "status.json").mkdir()
    with showing(board):
        pass
    assert not list((tmp_path / "status.json").iterdir())


def test_piped_there_is_a_table_for_every_round(board, capsys):
    board.live = False
    board.round_done(a_round(2, "ab", "c"))
    out = capsys.readouterr().out
    assert "Round 2: Dice" in out
    assert "absent" in out


PROGRAM = """
import logging, sys, time
from pathlib import Path
from server.live import Board, showing
from common.console import start_logging
start_logging()
path = Path(sys.argv[1])
board = Board(path, lambda: ["a-site"], dict, dict, rounds=5, name="study")
assert board.live
before = list(logging.getLogger("fedbrats").handlers)
with showing(board):
    while not path.exists():
        time.sleep(0.05)
    logging.getLogger("fedbrats").info("a line [bold]above\\x1b[2J")
    time.sleep(0.2)
assert logging.getLogger("fedbrats").handlers == before
"""


def test_a_terminal_gets_a_table_and_the_log_above_it(tmp_path):
    reading, writing = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "status.json")],
            stdout=writing,
            stderr=writing,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        assert process.wait(timeout=100) == 0
        os.set_blocking(reading, False)
        seen = re.sub(r"\x1b\[[0-9;]*m", "", os.read(reading, 1 << 20).decode(errors="replace"))
    finally:
        os.close(reading)
        os.close(writing)
    for text in ("a-site", "never connected", "of 5 rounds done", "a line [bold]above?[2J"):
        assert text in seen, text


def test_a_round_without_metrics_losses_or_times_is_shown(board, tmp_path):
    contributions = (Contribution("a", True), Contribution("b", True))
    record = replace(a_round(2, "ab"), contributions=contributions, metrics={}, loss=None)
    board.live = False
    board.round_done(record)
    document = board.document()
    about = document["sites"]["a"]
    assert (about["round"], about["loss"], about["dice"], about["seconds"]) == (2, None, None, None)
    assert "2 of 5 rounds done; no site releases its metrics" in printed(board.table(document))
    board.write(document)
    strict(tmp_path / "status.json")
