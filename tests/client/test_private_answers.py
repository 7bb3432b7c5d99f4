"""What a site with a budget sends: noised weights and nothing that depends on who was drawn."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import app
from client.budget import pay_for_metrics
from client.ledger import DONE, METRICS, PLAN, TRAINING, UNPROTECTED, create_ledger, open_ledger
from client.privacy import train_privately
from client.private_answers import noised_dice
from client.site import load_site, write_site
from client.site_config import PrivacyBudget
from common.config_file import dump_config
from common.message_words import BUDGET_SPENT
from common.messages import (
    EvaluateTask,
    TrainTask,
    pack_evaluate_task,
    pack_train_task,
    unpack_site_card,
    unpack_site_report,
    unpack_site_update,
)
from common.metrics import SubjectMetrics
from common.model import initial_weights
from common.statement import read_statement
from common.weights import Weights
from sites.cache import load_entry

KEYS = ("network.norm=group", "rounds.number=2", "rounds.updates=fp32")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def make_site(tmp_path, prepared, tiny_config) -> Callable[..., Path]:
    def make(budget: PrivacyBudget | None, *keys: str, trains: bool = True) -> Path:
        ledger = tmp_path / "ledger.sqlite"
        if not ledger.exists():
            create_ledger(ledger)
        write_site(
            tmp_path / "state",
            name="Oslo",
            trains=trains,
            config_text=dump_config(tiny_config(*KEYS, *keys)),
            training=prepared.ready[:3],
            held_out=prepared.ready[3:7],
            findings=[],
            federation="f1",
            budget=budget,
            ledger=ledger,
        )
        return tmp_path / "state"

    return make


def ask(site: Path, kind: str, content: RecordDict) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    context = Context(1, 2, {"site-folder": str(site)}, RecordDict(), {})
    return app(Message(content, 2, kind), context)


def scaled(weights: Weights, factor: float) -> Weights:
    """Another question."""
    return {name: t * factor if t.is_floating_point() else t for name, t in weights.items()}


def train(site: Path, round_: int = 1, scale: float = 1.0):
    config = load_site(site).config
    weights = scaled(initial_weights(config), scale)
    task = TrainTask(round_, config.fingerprint(), 0.02, weights)
    return ask(site, MessageType.TRAIN, pack_train_task(task))


def evaluate(site: Path, round_: int = 1, scale: float = 1.0):
    config = load_site(site).config
    weights = scaled(initial_weights(config), scale)
    task = EvaluateTask(round_, config.fingerprint(), False, weights)
    return ask(site, MessageType.EVALUATE, pack_evaluate_task(task))


def kinds(site: Path) -> list[str]:
    with open_ledger(load_site(site).ledger, None, write=False) as ledger:
        return [entry.kind for entry in ledger.entries]


def test_an_update_holds_weights_a_statement_and_nothing_about_the_draw(make_site):
    site = make_site(PrivacyBudget(epsilon=8))
    reply = train(site)
    update = unpack_site_update(reply.content)
    assert (update.loss, update.seconds, update.samples_per_second) == (None, None, None)
    assert set(reply.content) == {"about", "weights", "privacy"}
    assert dict(reply.content["about"]) == {"site": "Oslo", "round": 1, "n_training": 3}
    start = initial_weights(load_site(site).config)
    assert all(not torch.equal(update.weights[name], start[name]) for name in start)
    stated = read_statement(update.statement.text)
    assert stated.private
    assert 0 < stated.epsilon < 8
    assert (stated.budget, stated.patients, stated.metrics) == (8, 3, "withheld")
    assert kinds(site) == [PLAN, TRAINING, DONE]


def test_the_same_question_gets_the_same_answer_and_is_not_paid_again(make_site):
    site = make_site(PrivacyBudget(epsilon=8))
    first = unpack_site_update(train(site).content)
    again = unpack_site_update(train(site).content)
    assert all(torch.equal(first.weights[name], t) for name, t in again.weights.items())
    assert first.statement == again.statement
    assert kinds(site) == [PLAN, TRAINING, DONE]
    other = unpack_site_update(train(site, scale=1.01).content)
    assert not any(torch.equal(first.weights[name], t) for name, t in other.weights.items())
    # the rounds that are left make up for it
    assert kinds(site) == [PLAN, TRAINING, DONE, PLAN, TRAINING, DONE]


@pytest.mark.parametrize("damage", ["truncated", "missing", "another budget"])
def test_a_kept_answer_that_is_not_whole_or_not_to_this_question_is_not_given(make_site, damage):
    site = make_site(PrivacyBudget(epsilon=8))
    first = unpack_site_update(train(site).content)
    kept = site / "kept" / "update.safetensors"
    if damage == "truncated":
        kept.write_bytes(kept.read_bytes()[:-100])
    elif damage == "missing":
        kept.unlink()
    else:
        make_site(PrivacyBudget(epsilon=7))
    second = unpack_site_update(train(site).content)
    assert not any(torch.equal(first.weights[name], t) for name, t in second.weights.items())
    assert kinds(site).count(TRAINING) == 2


def test_when_the_budget_is_spent_it_refuses_and_goes_on_evaluating(make_site, log):
    site = make_site(PrivacyBudget(epsilon=8))
    assert unpack_site_card(ask(site, MessageType.QUERY, RecordDict()).content).trains
    for round_, scale in ((1, 1.0), (1, 1.1), (2, 1.0)):
        assert not train(site, round_=round_, scale=scale).has_error()
    # without a voxel being read: there is none any more
    for entry in load_site(site).training:
        assert load_entry(entry.folder)
    refused = train(site, round_=2, scale=1.2)
    assert refused.error.code == BUDGET_SPENT
    assert re.match(r"its privacy budget is spent: epsilon (7.9|8.0)", refused.error.reason)
    assert refused.error.reason.endswith("It goes on evaluating.")
    assert any("privacy budget is spent" in line for line in log)
    assert unpack_site_report(evaluate(site, 2).content).metrics.n == 4
    card = unpack_site_card(ask(site, MessageType.QUERY, RecordDict()).content)
    assert (card.trains, card.n_training, card.n_held_out) == (False, 3, 4)
    assert card.resting == refused.error.reason


def test_the_refusal_comes_before_any_voxel_is_read(make_site, monkeypatch):
    site = make_site(PrivacyBudget(epsilon=8))
    train(site)
    train(site, round_=2)
    for name in ("image", "labels", "truth"):
        monkeypatch.setattr(f"sites.cache.CachedSubject.{name}", lambda self: pytest.fail("read"))
    assert "budget is spent" in train(site, round_=2, scale=1.1).error.reason


def test_a_missing_ledger_is_an_answer_that_names_no_file(make_site, log):
    site = make_site(PrivacyBudget(epsilon=8))
    load_site(site).ledger.unlink()
    for reply in (train(site), ask(site, MessageType.QUERY, RecordDict())):
        assert reply.error.reason == (
            "its privacy ledger cannot be used, so it does not train; its log says more."
        )
    assert any("ledger.sqlite" in line for line in log)


def test_batch_norm_is_an_answer_in_words_and_costs_nothing(make_site):
    site = make_site(PrivacyBudget(epsilon=8), "network.norm=batch")
    assert "network.norm batch" in train(site).error.reason
    assert kinds(site) == []


def test_the_rate_follows_the_schedule_of_the_federation(make_site, monkeypatch):
    rates = []
    real = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda p, lr: rates.append(lr) or real(p, lr=lr))
    site = make_site(PrivacyBudget(epsilon=8), "privacy.learning_rate=0.3")
    config = load_site(site).config
    for rate in (0.02, 0.005):
        task = TrainTask(1, config.fingerprint(), rate, initial_weights(config))
        ask(site, MessageType.TRAIN, pack_train_task(task))
    assert rates == pytest.approx([0.3, 0.075])


def test_without_a_budget_the_site_says_so(make_site):
    site = make_site(None)
    update = unpack_site_update(train(site).content)
    assert update.loss is not None
    assert not read_statement(update.statement.text).private
    report = unpack_site_report(evaluate(site).content)
    assert report.released == "exact"
    assert not read_statement(report.statement.text).private
    assert kinds(site) == [UNPROTECTED]


# ------------------------------------------------------------------------------------------ metrics


def test_metrics_are_withheld_unless_the_site_chooses_otherwise(make_site):
    site = make_site(PrivacyBudget(epsilon=8))
    reply = evaluate(site)
    report = unpack_site_report(reply.content)
    assert (report.released, report.metrics.n, report.metrics.means) == ("withheld", 4, {})
    assert report.seconds is None
    assert len(reply.content["means"]) == 0
    kept = json.loads((site / "evaluation" / "round-0001.json").read_text())
    assert len(kept) == 4, "the site itself sees them"
    exact = make_site(PrivacyBudget(epsilon=8, metrics="exact"))
    report = unpack_site_report(evaluate(exact).content)
    assert report.released == "exact"
    assert "dice/WT" in report.metrics.means
    assert "loss" in report.metrics.means
    assert report.seconds is None
    assert kinds(site) == []


def test_noised_metrics_are_three_paid_numbers_and_kept(make_site):
    site = make_site(PrivacyBudget(epsilon=8, metrics="noised"))
    first, again = (unpack_site_report(evaluate(site).content) for _ in range(2))
    assert first.released == "noised"
    assert set(first.metrics.means) == {"dice/WT", "dice/TC", "dice/ET"}
    assert all(0 <= value <= 1 for value in first.metrics.means.values())
    assert first == again, "the same question, the same noise"
    assert kinds(site) == [PLAN, METRICS, DONE]
    stated = read_statement(first.statement.text)
    assert stated.metrics == "noised"
    assert 0 < stated.epsilon < 8
    for round_, scale in ((1, 1.1), (2, 1.2)):
        unpack_site_report(evaluate(site, round_, scale).content)
    spent = unpack_site_report(evaluate(site, 2, 1.3).content)
    assert spent.released == "withheld"
    assert spent.metrics.means == {}


def test_the_noise_of_metrics_covers_what_one_patient_can_change(make_site):
    """sigma sqrt(3) / n for n patients, whatever their scans; measured before clamping."""
    site = load_site(make_site(PrivacyBudget(epsilon=8, metrics="noised", delta=0.01)))
    permit = pay_for_metrics(site, 1)
    many, times = 200, 600  # so many subjects that 0 and 1 are far away
    scores = {region: {"dice": 0.5} for region in ("WT", "TC", "ET")}
    scans = [replace(site.held_out[0], id=f"s{i}", fingerprints=()) for i in range(many)]
    measured = [SubjectMetrics(scan.id, scores, 1.0, None) for scan in scans]
    site = replace(site, held_out=tuple(scans))

    def drawn() -> np.ndarray:
        return np.array([list(noised_dice(site, measured, permit).values()) for _ in range(times)])

    site.patients.update({result.subject: result.subject for result in measured})
    found = drawn()
    expected = permit.noise.noise_multiplier * math.sqrt(3) / many
    assert found.std() == pytest.approx(expected, rel=0.08)
    assert found.mean() == pytest.approx(0.5, abs=0.003)
    assert abs(np.corrcoef(found.T)[0, 1]) < 0.2, "independent noise for each region"
    # half of all scans are one person's, and bad: it counts as one of 101, and the noise as for 101
    site.patients.update({result.subject: "one" for result in measured[:100]})
    bad = {region: {"dice": 0.0} for region in scores}
    measured[:100] = [SubjectMetrics(r.subject, bad, 1.0, None) for r in measured[:100]]
    found = drawn()
    assert found.mean() == pytest.approx(0.5 * 100 / 101, abs=0.003)
    assert found.std() == pytest.approx(expected * many / 101, rel=0.08)


def test_metrics_that_the_policy_does_not_let_out_are_not_paid_for(make_site):
    site = make_site(PrivacyBudget(epsilon=8, metrics="noised"))
    manifest = json.loads((site / "site.json").read_text()) | {"tells_metrics": False}
    (site / "site.json").write_text(json.dumps(manifest))
    os.utime(site / "site.json", (2e9, 2e9))
    assert unpack_site_report(evaluate(site).content).released == "withheld"
    assert kinds(site) == []


def test_noised_metrics_of_nobody_are_withheld(make_site):
    site = make_site(PrivacyBudget(epsilon=8, metrics="noised"))
    manifest = json.loads((site / "site.json").read_text()) | {"held_out": {}}
    (site / "site.json").write_text(json.dumps(manifest))
    os.utime(site / "site.json", (2e9, 2e9))
    report = unpack_site_report(evaluate(site).content)
    assert (report.released, report.metrics.n) == ("withheld", 0)


def test_every_statement_tells_how_far_the_ledger_goes(make_site):
    site = make_site(PrivacyBudget(epsilon=8))
    train(site)
    stated = read_statement(unpack_site_report(evaluate(site).content).statement.text)
    with open_ledger(load_site(site).ledger, None, write=False) as ledger:
        assert (stated.ledger, stated.entries, stated.head) == (ledger.id, 3, ledger.head)


def test_two_scans_of_one_patient_are_trained_on_as_one_patient(make_site, monkeypatch):
    """Trap 6: what is paid for is what is clipped."""
    site = make_site(PrivacyBudget(epsilon=8))
    manifest = json.loads((site / "site.json").read_text())
    first, second, third = manifest["training"]
    manifest["patients"][second] = first
    (site / "site.json").write_text(json.dumps(manifest))
    os.utime(site / "site.json", (2e9, 2e9))
    trained = []
    real = train_privately
    monkeypatch.setattr(
        "client.private_answers.train_privately",
        lambda network, patients, *rest, **named: (
            trained.append(patients) or real(network, patients, *rest, **named)
        ),
    )
    stated = read_statement(unpack_site_update(train(site).content).statement.text)
    (patients,) = trained
    assert {name: [s.id for s in scans] for name, scans in patients.items()} == {
        first: [first, second],
        third: [third],
    }
    assert stated.patients == 2
