"""What this process may use, from the files in which Linux says it."""

from __future__ import annotations

import os

import pytest

from common import machine
from common.machine import available_cores, available_memory


@pytest.mark.parametrize(
    ("meminfo", "cgroup", "found"),
    [
        ("MemTotal: 9 kB\nMemAvailable:    2048 kB\n", None, 2 * 2**20),
        ("MemAvailable: 2048 kB\n", "max\n", 2 * 2**20),
        ("MemAvailable: 2048 kB\n", "1048576\n", 2**20),
        ("MemTotal: 9 kB\n", None, None),
        ("MemAvailable:\n", "", None),
        (None, None, None),
        (None, "4096\n", 4096),
    ],
)
def test_the_smaller_of_what_is_free_and_what_the_container_may(
    tmp_path, monkeypatch, meminfo, cgroup, found
):
    for name, text in (("MEMINFO", meminfo), ("CGROUP", cgroup)):
        path = tmp_path / name
        monkeypatch.setattr(machine, name, path)
        if text is not None:
            path.write_text(text)
    assert available_memory() == found


def test_this_machines_own():
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
    memory = available_memory()
    assert memory is None or memory > 2**20
