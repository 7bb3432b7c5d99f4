"""A simulated federation with a budget: each site has its own ledger, keeps it through a kill, and is
refused where nothing could be protected."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.ledger import DONE, PLAN, TRAINING, open_ledger
from server.checkpoint import RunFolder
from server.history import History

FED_SIM = str(Path(sys.executable).parent / "fed-sim")
BUDGET = 8.0
SITES = "site-01", "site-06", "site-13"


@pytest.fixture(scope="module")
def command(cohort_data, cohort_cache, tiny_arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("private") / "run"
    keys = ("network.norm=group", f"privacy.epsilon={BUDGET}", "privacy.clip=0.5")
    assign = [part for key in keys for part in ("--set", key)]
    where = ("run", str(cohort_data), "--out", str(out), "--cache", str(cohort_cache))
    return out, [FED_SIM, *where, *tiny_arguments, *assign]


def entries(out: Path, site: str):
    folder = out / "sites" / site
    with open_ledger(
        folder / "privacy-ledger.sqlite", folder / "ledger-anchor.json", write=False
    ) as ledger:
        return list(ledger.entries)


def test_a_killed_run_goes_on_and_no_site_exceeds_its_budget(command):
    out, run = command
    running = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, start_new_session=True)
    history = RunFolder(out).history
    until = time.monotonic() + 120

    def rounds() -> int:
        if not history.exists():
            return 0
        with History(history) as open_history:
            return len(open_history.rounds())

    while rounds() < 1 and running.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    killed = {site: entries(out, site) for site in SITES}
    done = subprocess.run([*run, "--json"], capture_output=True, text=True, check=False)
    # an interrupted round is paid twice unless its answer was kept: if it was the last, the site
    # rests, or the rounds before are the result
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").exists()
    for site in SITES:
        now = entries(out, site)
        assert now[: len(killed[site])] == killed[site], "nothing is forgotten"
        paid = [e for e in now if e.kind == TRAINING]
        assert [e.kind for e in now].count(PLAN) <= 2
        assert [e.kind for e in now].count(DONE) <= len(paid) <= 3
        assert all(e.epsilon <= BUDGET for e in paid)
        assert [e.epsilon for e in paid] == sorted(e.epsilon for e in paid)
        assert {e.clip for e in paid} == {0.5}


def test_what_cannot_be_protected_is_wrong_usage_before_anything_is_prepared(command, tmp_path):
    _, run = command
    out = tmp_path / "run"
    refused = [str(out) if part == str(command[0]) else part for part in run]
    refused += ["--set", "network.norm=batch"]
    done = subprocess.run(refused, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "`privacy.epsilon` is set: network.norm batch" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_no_loss_of_a_private_site_is_in_the_results(command):
    out, _ = command
    results = json.loads((out / "results.json").read_text())
    assert results["rounds"]
    for record in results["rounds"]:
        assert {c["train_loss"] for c in record["contributions"]} == {None}
