"""A federation of one hospital with a budget that withholds its metrics, one that sends noised ones,
and one without privacy. The first is killed in the middle of round 2, which it had paid: the last round
gets more noise for it. It is killed there again, and nothing is left: that goes on without it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from client.ledger import DONE, METRICS, PLAN, TRAINING, UNPROTECTED, open_ledger
from client.site_config import PrivacyBudget, load_site_config
from common.config_file import commented
from common.files import write_text_atomically

pytestmark = pytest.mark.slow
PRIVATE, NOISED, OPEN = "site-01", "site-06", "site-13"
BUDGETS = {PRIVATE: {"epsilon": 8.0}, NOISED: {"epsilon": 20.0, "metrics": "noised"}}


@dataclass
class Ended:
    federation: Any
    server: Any
    clients: dict[str, list[Any]]


@pytest.fixture(scope="module")
def ended(new_federation, waiting):
    f = new_federation("network.norm=group", "rounds.min_sites=2", misbehaving=(PRIVATE,))
    for site, budget in BUDGETS.items():
        path = f.hospitals[site].config
        settings = load_site_config(path).model_copy(update={"privacy": PrivacyBudget(**budget)})
        write_text_atomically(path, commented(settings))
    for stage in ("private-2", "private-3"):
        f.faults[PRIVATE].hold(stage)
    server = f.serving()
    clients = {site: [f.join(site)] for site in f.hospitals}
    for stage in ("private-2", "private-3"):
        f.faults[PRIVATE].until_held(stage)
        clients[PRIVATE][-1].kill()
        waiting(lambda: not f.workers(PRIVATE), "the killed client's worker has ended")
        f.faults[PRIVATE].release(stage)
        clients[PRIVATE].append(f.join(PRIVATE))
    for program in (server, *(of[-1] for of in clients.values())):
        program.ends_well()
    return Ended(f, server, clients)


def entries(ended: Ended, site: str) -> list[Any]:
    folder = ended.federation.hospitals[site]
    ledger = load_site_config(folder.config).privacy_ledger
    with open_ledger(ledger, folder.state / "ledger-anchor.json", write=False) as book:
        return [entry for entry in book.entries if entry.site == site]


def test_the_interrupted_round_stays_paid_and_the_budget_holds(ended):
    mine = entries(ended, PRIVATE)
    assert [(e.kind, e.round) for e in mine] == [
        (PLAN, 1),
        (TRAINING, 1),
        (DONE, 1),
        (TRAINING, 2),
        (PLAN, 2),
        (TRAINING, 2),
        (DONE, 2),
        (TRAINING, 3),
    ]
    first, again = (e.noise_multiplier for e in mine if e.kind == PLAN)
    assert first < again < 1.5 * first
    epsilons = [e.epsilon for e in mine if e.kind == TRAINING]
    assert epsilons == sorted(epsilons)
    assert 7.9 < epsilons[-1] <= 8


def test_the_last_round_is_refused_to_both_sides_and_goes_on_without_it(ended):
    text = "its privacy budget is spent: epsilon "
    ended.clients[PRIVATE][-1].says(text)
    ended.server.says(f"Round 3: without {PRIVATE}: {text}")
    assert ended.federation.reasons(2) == {}
    (reason,) = ended.federation.reasons(3).values()
    assert reason.startswith(text)
    assert reason.endswith("It goes on evaluating.")
    asked = [row["round"] for row in ended.federation.left(PRIVATE, "metrics")]
    assert asked.count(3) >= 1


def test_each_sites_metrics_are_released_as_it_chose(ended):
    for record in ended.federation.results()["rounds"]:
        assert PRIVATE not in record["metrics"]
        assert set(record["metrics"][NOISED]["means"]) == {"dice/WT", "dice/TC", "dice/ET"}
        assert "loss" in record["metrics"][OPEN]["means"]
        losses = {c["site"]: c["train_loss"] for c in record["contributions"]}
        assert losses[PRIVATE] is losses[NOISED] is None
        assert losses[OPEN] > 0
    kinds = [e.kind for e in entries(ended, NOISED)]
    assert kinds.count(METRICS) == kinds.count(TRAINING) + 1 == 4
    assert [e.kind for e in entries(ended, OPEN)] == [UNPROTECTED] * 3


def test_nothing_but_weights_and_the_statement_left_the_private_site(ended):
    for row in ended.federation.left(PRIVATE, "update"):
        assert set(row["details"]) == {"about", "privacy", "audit"}
        assert set(row["details"]["about"]) == {"site", "round", "n_training"}
    for row in ended.federation.left(PRIVATE, "metrics"):
        assert row["details"]["means"] == {}
        assert set(row["details"]["defined"]) == {"n"}


def test_the_coordinator_has_every_sites_signed_statement(ended):
    f = ended.federation
    document = json.loads(
        f.typed("fed-server", "privacy-report", str(f.coordinator.path), "--json")
    )
    sites = {site["site"]: site for site in document["sites"]}
    assert {site["signature"] for site in sites.values()} == {"good"}
    assert all(site["warnings"] == [] for site in sites.values()), sites
    assert sites[PRIVATE]["private_rounds"] == [1, 2]
    assert sites[NOISED]["private_rounds"] == [1, 2, 3]
    assert (sites[OPEN]["private_rounds"], sites[OPEN]["epsilon"]) == ([], None)
    assert sites[OPEN]["rounds_without_privacy"] == [1, 2, 3]
    last = [e for e in entries(ended, PRIVATE) if e.kind == DONE][-1]
    assert sites[PRIVATE]["epsilon"] == last.epsilon, "of what was sent"
    assert (sites[PRIVATE]["budget"], sites[PRIVATE]["metrics"]) == (8.0, "withheld")


def test_the_hospitals_own_report_agrees(ended):
    f = ended.federation
    folder = f.hospitals[PRIVATE].path
    document = json.loads(f.typed("fed-client", "privacy-report", str(folder), "--json"))
    page = (folder / "privacy-report" / "privacy-report.html").read_text()
    last = [e for e in entries(ended, PRIVATE) if e.kind == TRAINING][-1]
    assert f"{last.epsilon:.3f}" in page
    assert json.dumps(document).count('"state": "interrupted"') == 2
