"""Progress goes to standard error: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys

import pytest

from common import progress
from common.progress import Progress, hand_over, line, remark, stepping, track

PROGRAM = """
import time
from common.progress import track
for item in track([1, 2, 3, 4], "preparing", 4, "subjects"):
    time.sleep(0.15)
print("result")
"""


def test_items_come_through_in_order_and_one_at_a_time():
    taken = []

    def produce():
        for item in range(3):
            taken.append(item)
            yield item

    items = track(produce(), "work", 3, "things")
    assert taken == []
    assert next(items) == 0
    assert taken == [0]
    assert list(items) == [1, 2]


def test_lines_in_a_log_say_what_how_many_and_how_long(monkeypatch, caplog):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with caplog.at_level(logging.INFO, "fedbrats"), stepping("cache", 3, "subjects") as step:
        for _ in range(3):
            step()
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in lines] == ["cache: 1/3", "cache: 2/3"]
    assert all("subjects/s" in line and "s left" in line for line in lines)


def test_short_work_is_silent_in_a_log(caplog):
    with caplog.at_level(logging.INFO, "fedbrats"):
        assert list(track([1, 2], "cache", 2, "subjects")) == [1, 2]
        assert list(track([], "cache", 0, "subjects")) == []
    assert caplog.records == []


@pytest.fixture
def handed(monkeypatch) -> list[Progress]:
    """What a process that works for another one hands over, instead of showing it."""
    received: list[Progress] = []
    monkeypatch.setattr(progress, "_receiver", None)
    monkeypatch.setattr(progress, "_remark", "")
    hand_over(received.append)
    return received


def test_progress_is_handed_over_at_every_step_and_shown_nowhere(handed, capsys, caplog):
    with caplog.at_level(logging.INFO, "fedbrats"):
        for item in track([5, 6, 7], "round 1, a: training", 3, "batches"):
            remark(f"loss {item}")
    about = [(p.what, p.done, p.total, p.unit, p.remark) for p in handed]
    said = ("", "loss 5", "loss 6", "loss 7")
    assert about == [
        ("round 1, a: training", done, 3, "batches", text) for done, text in enumerate(said)
    ]
    seconds = [p.seconds for p in handed]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0.0
    assert (capsys.readouterr().err, caplog.records) == ("", [])


def test_new_work_does_not_carry_over_what_the_last_said(handed):
    with stepping("training", 1, "batches") as step:
        remark("loss 0.5")
        step()
    with stepping("evaluating", 1, "subjects") as step:
        step()
    assert [p.remark for p in handed] == ["", "loss 0.5", "", ""]


def test_rate_and_time_left_follow_from_the_numbers():
    half = Progress("x", 5, 20, "batches", 10.0)
    assert (half.rate, half.seconds_left) == (0.5, 30.0)
    assert (Progress("x", 20, 20, "b", 10.0).seconds_left) == 0.0
    for begun in (Progress("x", 0, 20, "b", 0.0), Progress("x", 0, 20, "b", 3.0)):
        assert begun.rate == 0.0
        assert begun.seconds_left is None


def test_a_line_says_it_all():
    assert line(Progress("round 2, a: training", 5, 20, "batches", 10.0, "loss 0.25")) == (
        "round 2, a: training: 5/20, 0.5 batches/s, 30 s left, loss 0.25"
    )
    assert line(Progress("cache", 0, 20, "subjects", 0.0)) == "cache: 0/20, 0.0 subjects/s"


def test_a_remark_is_in_the_log_line(monkeypatch, caplog):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with caplog.at_level(logging.INFO, "fedbrats"), stepping("training", 3, "batches") as step:
        remark("loss 0.5")
        step()
    assert caplog.records[0].getMessage().endswith(", loss 0.5")


def test_an_error_in_the_work_passes_through():
    with pytest.raises(ZeroDivisionError):
        list(track((1 // n for n in (1, 0)), "work", 2, "things"))


def test_a_terminal_gets_a_bar_and_standard_output_only_the_result():
    reading, writing = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            stdout=subprocess.PIPE,
            stderr=writing,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
            text=True,
            check=True,
        )
        seen = os.read(reading, 1 << 20).decode()
    finally:
        os.close(reading)
        os.close(writing)
    assert done.stdout == "result\n"
    assert "preparing" in seen
    assert "4/4" in seen or "3/4" in seen
    assert "subjects/s" in seen
