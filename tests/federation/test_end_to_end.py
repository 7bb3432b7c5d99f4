"""A whole federation by its commands alone: one server and three hospitals, every step typed.

Compared with a simulation of the same split, seed and configuration, number for number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import pytest

from client.hospital import HospitalFolder
from common.audit_log import told

pytestmark = pytest.mark.slow
SITES = "site-01", "site-06", "site-13"


@dataclass
class Finished:
    """The federation after its end, and what was seen while it ran."""

    federation: Any
    server: Any
    clients: dict[str, Any]
    status: dict[str, Any]
    ports: dict[str, list[int]]
    port: int


@pytest.fixture(scope="module")
def finished(federation_at, exact_arguments, scans, port, tmp_path_factory):
    f = federation_at(tmp_path_factory.mktemp("end-to-end"))
    folder, free = str(f.coordinator.path), port()
    where = "--address", "127.0.0.1", "--port", str(free), "--set", "server.listen=127.0.0.1"
    f.typed("fed-server", "init", folder, *where, *exact_arguments)
    for site in SITES:
        f.typed(
            "fed-client", "init", str(f.path / site), "--name", site, "--data", str(scans[site])
        )
        f.hospitals[site] = HospitalFolder(f.path / site)
        f.put_policy(site)
        sent = str(f.hospitals[site].public_key)
        f.typed("fed-server", "admit", folder, sent, "--name", site)
    pause = f.may_misbehave(SITES[0])  # only to be looked at in the middle of a round
    pause.hold("train-2")
    server = f.serving()
    clients = {site: f.join(site) for site in SITES}
    pause.until_held("train-2")
    f.until(SITES[0], "training")
    ports = {"server": listening_ports(server.pid)}
    ports["clients"] = [port for c in clients.values() for port in listening_ports(c.pid)]
    workers = [worker for site in SITES for worker in f.workers(site)]
    ports["workers"] = [port for worker in workers for port in listening_ports(worker)]
    status = json.loads(f.typed("fed-server", "status", folder, "--json"))
    pause.release("train-2")
    for program in (server, *clients.values()):
        program.ends_well()
    return Finished(f, server, clients, status, ports, free)


def listening_ports(pid: int) -> list[int]:
    """The TCP ports on which a process listens."""
    held = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            held.add(str(descriptor.readlink()))
        except FileNotFoundError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in held:
                found.append(int(local.rpartition(":")[2], 16))
    return sorted(found)


def test_same_metrics_and_weights_as_the_simulation(finished, simulated):
    results = finished.federation.results()
    assert results["verdict"]["complete"]
    assert results["verdict"]["everyone"]
    assert results["sites"] == simulated.results["sites"]
    assert len(results["rounds"]) == len(simulated.results["rounds"]) == 3
    for ours, theirs in zip(results["rounds"], simulated.results["rounds"], strict=True):
        assert ours["metrics"] == theirs["metrics"]  # on one machine not only to 1e-4
        for key in ("learning_rate", "loss", "mean_dice", "worst_site", "worst_dice", "sha256"):
            assert ours[key] == theirs[key]
        losses = [[c["train_loss"] for c in r["contributions"]] for r in (ours, theirs)]
        assert losses[0] == losses[1]
    assert results["final"] == simulated.results["final"]
    model = finished.federation.coordinator.run / "model.safetensors"
    assert model.read_bytes() == simulated.model


def test_nothing_is_left_running(finished):
    assert finished.federation.orphans() == []
    assert finished.federation.status()["state"] == "not running"


def test_one_port_and_no_other_listens(finished):
    assert finished.ports == {"server": [finished.port], "clients": [], "workers": []}


def test_status_tells_of_the_round_in_progress(finished):
    status = finished.status
    assert (status["running"], status["state"]) == (True, "training")
    assert (status["rounds_done"], status["rounds"]) == (1, 3)
    assert status["pid"] == finished.server.pid
    assert status["sites"][SITES[0]]["state"] == "training"
    assert status["sites"][SITES[0]]["round"] == 1
    assert all(site["bytes"] > 0 and site["loss"] > 0 for site in status["sites"].values())
    assert len(status["results"]["rounds"]) == 1


def test_what_hospitals_say_has_left_is_what_the_server_got(finished):
    f = finished.federation
    rounds = f.results()["rounds"]
    for site in SITES:
        updates, sets = f.left(site, "update"), f.left(site, "metrics")
        assert [row["round"] for row in updates] == [r["round"] for r in rounds]
        for row, record in zip(updates, rounds, strict=True):
            got = next(c for c in record["contributions"] if c["site"] == site)
            assert row["bytes"] - len(json.dumps(row["details"])) == got["bytes"]
            assert row["details"]["about"]["loss"] == got["train_loss"]
        for row, record in zip(sets, rounds, strict=False):  # at the end there is one more
            assert row["details"]["means"] == record["metrics"][site]["means"]
        assert len(sets) == len(rounds) + 1
        assert f.left(site, "error") == []
        # a roll call and the farewell: nothing else has left
        assert {row["kind"] for row in f.left(site)} == {"card", "update", "metrics", "other"}
        (farewell,) = f.left(site, "other")
        assert farewell["details"]["farewell"] == {"received": True}
        assert farewell["details"].keys() == {"farewell", "audit"}


def test_the_audit_logs_of_both_sides_fit_together(finished):
    f = finished.federation
    server = f.coordinator
    for site in SITES:
        hospital = f.hospitals[site]
        other = "--against", str(server.audit.path)
        f.typed("fed-client", "audit", "verify", str(hospital.path), *other)
        other = "--against", str(hospital.audit.path)
        f.typed("fed-server", "audit", "verify", str(server.path), *other)
        sent = [e.details["sha256"] for e in told(hospital.audit, "sent") if e.details["tensors"]]
        got = [e.details for e in told(server.audit, "reply received")]
        assert sent == [d["sha256"] for d in got if d["site"] == site and d["sha256"]]
        given = [e.details for e in told(server.audit, "task sent")]
        taken = [e.details["sha256"] for e in told(hospital.audit, "task received")]
        assert [d["sha256"] for d in given if d["site"] == site] == taken
    recorded = [e.details["sha256"] for e in told(server.audit, "round recorded")]
    assert recorded == [record["sha256"] for record in f.results()["rounds"]]
    assert not list(told(server.audit, "problem", "repaired"))
    assert [e.kind for e in told(server.audit)][-1] == "finished"


def test_the_verdict_is_told_to_everybody(finished):
    for program in (finished.server, *finished.clients.values()):
        text = program.text()
        assert "Training complete: 3 rounds." in text
        for site in SITES:
            assert f"{site} contributed to every round." in text
    assert "3 model updates" in finished.clients[SITES[0]].text()


def test_exported_model_segments_a_patient(finished, scans, tmp_path):
    f = finished.federation
    out = tmp_path / "exported"
    f.typed("fed-server", "export", str(f.coordinator.path), str(out))
    card = json.loads((out / "model-card.json").read_text())
    results = f.results()
    assert card["round"] == results["final"]["round"]
    assert card["mean_dice"] == results["final"]["mean_dice"]
    assert {s["site"]: s["rounds"] for s in card["sites"]} == {site: [1, 2, 3] for site in SITES}
    assert card["terms"][-1]["terms"]["code_hash"] in (out / "MODEL-CARD.md").read_text()
    patient = next(folder for folder in sorted(scans[SITES[0]].iterdir()) if folder.is_dir())
    segmentation = tmp_path / "segmentation.nii.gz"
    model = str(out / "model.safetensors")
    f.typed("fed-client", "predict", model, str(patient), str(segmentation))
    assert nibabel.load(segmentation).shape == (32, 32, 20)
