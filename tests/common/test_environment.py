"""What is in the environment before a dependency is imported."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

from common.environment import PATIENT, SILENT

PROGRAM = """
import atexit, common.environment, gc, os
atexit.register(lambda: print(gc.get_freeze_count() > 0))  # what is registered first runs last
common.environment.prepare_environment()
import flwr.supercore.telemetry as telemetry
print(telemetry.FLWR_TELEMETRY_ENABLED, os.environ["RAY_USAGE_STATS_ENABLED"],
      os.environ["GOMP_SPINCOUNT"], gc.get_threshold()[0])
"""


def run(**extra: str) -> list[str]:
    environment = {**os.environ, **extra}
    command = [sys.executable, "-c", PROGRAM]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return out.stdout.split()


def test_telemetry_is_off_even_where_the_environment_says_on():
    asked_for = dict.fromkeys(SILENT, "1")
    assert run(**asked_for)[:2] == ["0", "0"]


def test_garbage_is_looked_for_as_python_does_until_the_end_and_then_no_more():
    """A rarer search kept a hundred dead models of a federation of 64 sites in memory."""
    assert run()[3:] == [str(gc.get_threshold()[0]), "True"]


def test_a_users_own_spin_count_wins():
    assert run(GOMP_SPINCOUNT="77")[2] == "77"
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", PROGRAM]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split()[2] == PATIENT["GOMP_SPINCOUNT"]
