"""Secure aggregation between real processes: the rounds, a hospital killed in it, policies, the logs."""

from __future__ import annotations

import json

import pytest

from client.outbound import departures
from common.fixed_point import vector_length
from common.weights import load_weights

pytestmark = pytest.mark.slow
SITES = "site-01", "site-06", "site-13"
FOURTH = "site-21"
SECURE = "secure_aggregation=true"


def test_the_server_never_sees_an_update_and_the_model_is_the_same(new_federation):
    """Two rounds in plain and two under masks, of the same hospitals from the same seed."""
    ends = {}
    for name, assign in (("plain", ()), ("secure", (SECURE,))):
        f = new_federation("rounds.number=1", *assign)
        for site in SITES:
            f.invite(site)  # the roster is complete now
        server = f.serving()
        clients = [f.join(site) for site in SITES]
        for client in clients:
            client.ends_well()
        server.ends_well()
        ends[name] = f
    plain, secure = (load_weights(ends[n].coordinator.run / "model.safetensors")[0] for n in ends)
    largest = max(float((plain[n].double() - secure[n].double()).abs().max()) for n in plain)
    assert 0 < largest < 1e-5
    f = ends["secure"]
    for site in SITES:
        rows = departures(f.hospitals[site].audit)
        updates = [row for row in rows if row["kind"] == "update"]
        assert [row["names"] for row in updates] == [["masked"]]
        assert updates[0]["weights"] == vector_length(secure)
        assert {"keys", "sealed", "revealed", "card", "metrics"} <= {row["kind"] for row in rows}
        cards = [row["details"]["card"] for row in rows if row["kind"] == "card"]
        assert all("n_training" not in card for card in cards)
        log = f.hospitals[site].audit.path.read_text()
        assert "n_training" not in log
        f.typed("fed-client", "audit", "verify", str(f.hospitals[site].path))
    f.typed("fed-server", "audit", "verify", str(f.coordinator.path))
    assert all(c["trained"] for c in f.results()["rounds"][0]["contributions"])


@pytest.mark.long
def test_a_hospital_killed_in_mid_round_drops_out_and_comes_back(
    new_federation, scans, cohort_cache
):
    f = new_federation(
        "rounds.number=4", SECURE, "server.return_minutes=0.05", "server.gather_minutes=2"
    )
    f.hospital(FOURTH, scans["site-06"], cohort_cache)
    f.admit(FOURTH)
    for site in SITES:
        f.invite(site)
    pause, meanwhile = f.may_misbehave(FOURTH), f.may_misbehave(SITES[0])
    pause.hold("train-2")
    meanwhile.hold("train-3")
    server = f.serving()
    clients = {site: f.join(site) for site in (*SITES, FOURTH)}
    pause.until_held("train-2")
    clients[FOURTH].kill_group()
    server.says("round 2: site-21 did not contribute")
    pause.release("train-2")
    clients[FOURTH] = f.join(FOURTH, accept=False)
    clients[FOURTH].says("connected to")
    meanwhile.release("train-3")
    for client in clients.values():
        client.ends_well()
    server.ends_well()
    rounds = f.results()["rounds"]
    trained = [[c["site"] for c in r["contributions"] if c["trained"]] for r in rounds]
    assert trained[0] == [*SITES, FOURTH]
    assert trained[1] == list(SITES)
    assert trained[3] == [*SITES, FOURTH]


def test_a_hospital_that_demands_it_refuses_a_federation_without_it(new_federation):
    f = new_federation()
    site = SITES[0]
    config = f.hospitals[site].config
    text = config.read_text().replace(
        "require_secure_aggregation: false", "require_secure_aggregation: true"
    )
    assert "require_secure_aggregation: true" in text
    config.write_text(text)
    f.join(site).fails_saying("policy rule `require_secure_aggregation`")
    assert departures(f.hospitals[site].audit) == []


@pytest.mark.long
def test_a_hospital_admitted_while_it_runs_waits_for_the_others_yes(
    new_federation, scans, cohort_cache
):
    """Nobody has agreed to its key: it takes no part, and the server says what to do."""
    f = new_federation("rounds.number=2", SECURE, misbehaving=[SITES[0]])
    for site in SITES:
        f.invite(site)
    hold = f.faults[SITES[0]]
    hold.hold("train-2")
    server = f.serving()
    clients = [f.join(site) for site in SITES]
    hold.until_held("train-2")
    f.hospital(FOURTH, scans["site-06"], cohort_cache)
    f.admit(FOURTH)
    server.says("site-21 takes no part yet: with secure aggregation every hospital must agree")
    hold.release("train-2")
    for client in clients:
        client.ends_well()
    server.ends_well()
    assert FOURTH not in json.dumps(f.results()["rounds"])
