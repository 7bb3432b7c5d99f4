"""What a client shows: the status file follows, the log says each thing once, nothing stays behind."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from client import display as module
from client.display import Display, display
from common.progress import Progress


def told(path) -> dict:
    return json.loads(path.read_text())


def step(done: int, total: int = 10, remark: str = "loss 0.5") -> Progress:
    return Progress("round 1, Oslo: training", done, total, "batches", 2.0 * done, remark)


@pytest.fixture
def lines(caplog) -> list[str]:
    caplog.set_level(logging.INFO, "fedbrats")

    class Lines(list):
        def __eq__(self, other: object) -> bool:
            return [record.getMessage() for record in caplog.records] == other

    return Lines()


def test_the_status_file_follows_what_the_client_does(tmp_path):
    path = tmp_path / "status.json"
    begin = datetime.now(UTC).replace(microsecond=0)
    with display(path, site="Oslo") as shown:
        shown.state("waiting", "connected")
        first = told(path)
        assert (first["site"], first["state"], first["pid"]) == ("Oslo", "waiting", os.getpid())
        assert first["progress"] is None
        for key in ("since", "written"):
            assert begin <= datetime.fromisoformat(first[key]) <= datetime.now(UTC)
        shown.state("training", "round 1", round=1)
        shown.set(last_contact="then")
        assert "last_contact" not in told(path), "with the next change, or soon"
        shown.state("waiting")
        assert told(path)["last_contact"] == "then"
        assert told(path)["round"] == 1
    assert told(path)["state"] == "stopped"


def test_it_says_stopped_whatever_happened(tmp_path):
    def fail() -> None:
        with display(tmp_path / "s") as shown:
            shown.state("training")
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert told(tmp_path / "s")["state"] == "stopped"


def test_the_log_says_each_thing_once(tmp_path, lines):
    shown = Display(tmp_path / "s")
    for text in ("connecting", "connecting", "", "connected", "connected"):
        shown.state("x", text)
    assert lines == ["connecting", "connected"]


def test_progress_is_written_now_and_then_and_logged_now_and_then(tmp_path, monkeypatch, lines):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    path = tmp_path / "s"
    shown = Display(path)
    shown.state("training")
    shown.progress(step(0))
    shown.progress(step(1))
    shown.set(last_contact="then")
    assert told(path)["progress"] is None, "not at every step"
    assert "last_contact" not in told(path)
    now[0] += 1.5
    shown.progress(step(5))
    written = told(path)["progress"]
    assert {key: written[key] for key in ("what", "done", "total", "unit", "remark")} == {
        "what": "round 1, Oslo: training",
        "done": 5,
        "total": 10,
        "unit": "batches",
        "remark": "loss 0.5",
    }
    assert written["seconds_left"] == pytest.approx(10.0)
    assert lines == []
    assert told(path)["last_contact"] == "then"
    now[0] += 15
    shown.set(last_contact="later")
    assert told(path)["last_contact"] == "later", "but soon"
    shown.progress(step(6))
    shown.progress(step(7))
    now[0] += 16
    shown.progress(step(10))
    assert lines == ["round 1, Oslo: training: 6/10, 0.5 batches/s, 8 s left, loss 0.5"]


def test_a_status_file_that_cannot_be_written_stops_nothing(tmp_path):
    with display(tmp_path / "gone" / "status.json") as shown:
        shown.state("training", "x")
        shown.progress(step(1))
    assert not (tmp_path / "gone").exists()


PROGRAM = """
import sys
from pathlib import Path
from client.display import display
from common.progress import Progress
with display(Path(sys.argv[1])) as shown:
    shown.state("training")
    for done in range(4):
        shown.progress(Progress("round 1, Oslo: training", done, 3, "batches", 1.0, "loss 0.25"))
    shown.state("sending")
print("result")
"""


def test_a_terminal_gets_a_bar(tmp_path):
    reading, writing = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "s")],
            stdout=subprocess.PIPE,
            stderr=writing,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
            text=True,
            check=True,
            timeout=100,
        )
        seen = os.read(reading, 1 << 20).decode()
    finally:
        os.close(reading)
        os.close(writing)
    assert done.stdout == "result\n"
    for text in ("round 1, Oslo: training", "loss 0.25", "/3"):
        assert text in seen
