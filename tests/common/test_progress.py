"""Progress goes to standard error: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys

import pytest

from common import progress
from common.progress import stepping, track

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
