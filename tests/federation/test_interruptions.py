"""One federation to which everything happens that breaks off work: the result is as if nothing had.

Round 1: the server is killed. Round 2: a connection breaks in mid-upload and its line stays down for
a while. Round 3: a client is killed, then the server again, in the middle of the evaluation.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Any

import pytest

from common.audit_compare import misfits
from common.audit_log import verified

pytestmark = pytest.mark.slow
STEADY, CUT, KILLED = "site-01", "site-06", "site-13"


@dataclass
class Survived:
    """The federation after its end, and what each of its programs said."""

    federation: Any
    servers: list[Any] = field(default_factory=list)
    clients: dict[str, list[Any]] = field(default_factory=dict)
    cuts: int = 0


@pytest.fixture(scope="module")
def survived(new_federation, proxy, waiting):
    f = new_federation(misbehaving=(CUT, KILLED))
    for task in ("train-1", "train-3", "evaluate-3"):
        f.faults[KILLED].hold(task)
    f.faults[CUT].hold("train-2")
    config = f.coordinator.config.read_text()
    line = proxy(int(config.partition("port: ")[2].split()[0]))
    f.invite(CUT, address=f"127.0.0.1:{line.port}")
    s = Survived(f, servers=[f.serving()])
    s.clients = {site: [f.join(site)] for site in f.hospitals}

    f.faults[KILLED].until_held("train-1")
    s.servers[-1].kill()
    s.clients[STEADY][0].says("Trying again")
    s.servers.append(f.serving())
    f.faults[KILLED].release("train-1")

    f.faults[CUT].until_held("train-2")
    line.cut_upload.set()
    f.faults[CUT].release("train-2")
    waiting(line.down.is_set, "the upload is cut")
    s.clients[CUT][0].says("the connection failed")
    line.down.clear()
    s.cuts = line.cuts

    f.faults[KILLED].until_held("train-3")
    workers = f.workers(KILLED)
    s.clients[KILLED][0].kill()
    assert len(workers) == 1
    waiting(lambda: not f.workers(KILLED), "the killed client's worker has ended")
    f.faults[KILLED].release("train-3")
    s.clients[KILLED].append(f.join(KILLED))

    f.faults[KILLED].until_held("evaluate-3")
    s.servers[-1].kill()
    s.servers.append(f.serving())
    f.faults[KILLED].release("evaluate-3")
    for program in (s.servers[-1], *(clients[-1] for clients in s.clients.values())):
        program.ends_well()
    return s


def test_the_result_is_that_of_an_undisturbed_run(survived, simulated):
    results = survived.federation.results()
    assert results["verdict"]["everyone"]
    for ours, theirs in zip(results["rounds"], simulated.results["rounds"], strict=True):
        assert (ours["sha256"], ours["metrics"]) == (theirs["sha256"], theirs["metrics"])
    assert results["final"] == simulated.results["final"]
    model = survived.federation.coordinator.run / "model.safetensors"
    assert model.read_bytes() == simulated.model


def test_a_server_continues_after_the_last_complete_round(survived):
    first, second, third = survived.servers
    assert [server.process.returncode for server in survived.servers] == [-9, -9, 0]
    assert "Round 1:" not in first.text()
    assert "continuing" not in second.text()
    assert "Round 2:" in second.text()
    assert "continuing after round 2" in third.text()
    assert "Round 2:" not in third.text()


def test_clients_stay_and_reconnect_while_the_server_is_away(survived):
    for site, times in ((STEADY, 2), (CUT, 3)):
        (client,) = survived.clients[site]
        assert client.text().count("connected again") == times
    (steady,) = survived.clients[STEADY]
    assert "nothing listens there now (the server is not running" in steady.text()


def test_an_upload_that_was_cut_arrives_after_all(survived):
    assert survived.cuts == 1
    (client,) = survived.clients[CUT]
    assert "the connection failed" in client.text()
    updates = survived.federation.left(CUT, "update")
    assert [row["round"] for row in updates].count(2) == 1  # recorded once, sent again


def test_a_killed_client_comes_back_within_the_round(survived):
    first, second = survived.clients[KILLED]
    assert first.process.returncode == -signal.SIGKILL
    # whether it is told to wait for the first one's time to run out depends on how quickly it starts
    assert "round 3: update" not in first.text()
    assert "round 3: update" in second.text()


def test_the_audit_logs_are_whole_and_fit_together(survived):
    """Kills at both ends left nothing that looks like tampering."""
    f = survived.federation
    coordinator = verified(f.coordinator.audit)
    for hospital in f.hospitals.values():
        log = verified(hospital.audit)
        assert misfits(log, coordinator) == []
        assert not [e for e in (*log.entries, *coordinator.entries) if e.kind == "problem"]


def test_nothing_is_left_running(survived):
    assert survived.federation.orphans() == []
