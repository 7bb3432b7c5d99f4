"""The privacy report's contents: epsilon as the ledger gives it, what left, what is not covered."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import NormalDist

import pytest

from client.accounting import Steps, epsilon
from client.budget import (
    most_spent,
    pay_for_metrics,
    pay_for_training,
    record_done,
    record_unprotected,
    statement,
)
from client.consent import accept
from client.guarantee import right_at_most
from client.ledger import LedgerError, create_ledger, open_ledger
from client.privacy_report import privacy_document
from client.site import Site
from common.message_words import EXACT, NOISED, WITHHELD
from common.messages import SiteCard, SiteReport, pack_site_card, pack_site_report
from common.metrics import REGIONS, SiteMetrics
from tests.client.conftest import FEDERATION
from tests.client.paid_site import (
    N_TRAINING,
    OTHER,
    ledger_of,
    prepared_site,
    send_update,
    sent,
    trained,
)


@pytest.fixture
def site_of(hospital, prepared, tiny_config) -> Callable[..., Site]:
    """A function: (federation, budget, metrics) -> Oslo as prepared for it, site.yaml agreeing."""
    return partial(prepared_site, hospital, prepared.ready, tiny_config("rounds.number=20"))


def why(document: dict, what: str) -> str:
    return next(entry["why"] for entry in document["not_covered"] if entry["what"] == what)


# ------------------------------------------------------------------------------------- epsilon


def test_spent_is_what_the_accountant_gives_for_the_rounds_paid(hospital, site_of):
    site = site_of()
    trained(site, 1, 2)
    pay_for_training(site, 3)  # and interrupted: it counts the same

    document = privacy_document(hospital)

    entries = document["entries"]
    sigma = entries[0]["noise_multiplier"]
    delta = 1 / (10 * N_TRAINING)
    assert document["spent"]["delta"] == delta
    assert document["spent"]["epsilon"] == epsilon([Steps(sigma, 1.0, 3)], delta)
    assert document["spent"]["epsilon"] == pytest.approx(entries[-1]["epsilon"])
    assert document["spent"]["left"] == 8.0 - document["spent"]["epsilon"]
    assert [(e["round"], e["state"]) for e in entries] == [
        (1, "carried through"),
        (2, "carried through"),
        (3, "interrupted"),
    ]
    assert {e["steps"] for e in entries} == {1}
    assert {e["clip"] for e in entries} == {1.0}
    assert [e["number"] for e in entries] == [2, 4, 6]  # 1 is the plan, 3 and 5 say done
    assert document["federations"] == [
        {
            "id": FEDERATION,
            "this": True,
            "sites": ["Oslo"],
            "rounds": 3,
            "metrics": 0,
            "interrupted": 1,
            "unprotected": 0,
            "epsilon": document["spent"]["epsilon"],
        }
    ]
    assert document["mechanism"]["training_patients"] == N_TRAINING
    assert document["mechanism"]["sampling"] == "every patient in every step"


def test_other_federations_of_the_ledger_count_and_are_listed(hospital, site_of):
    trained(site_of(OTHER, budget=4.0), 1, 2)
    trained(site_of(), 1)

    document = privacy_document(hospital)

    other, here = document["federations"]
    assert (other["id"], other["this"], other["rounds"]) == (OTHER, False, 2)
    assert (here["id"], here["this"], here["rounds"]) == (FEDERATION, True, 1)
    together = document["spent"]["epsilon"]
    assert max(other["epsilon"], here["epsilon"]) < together < other["epsilon"] + here["epsilon"]
    with open_ledger(ledger_of(hospital), None, write=False) as ledger:
        everybody = {patient for group in ledger.groups.values() for patient in group}
        assert together == most_spent(ledger, everybody, document["spent"]["delta"])


def test_held_out_patients_who_paid_more_set_the_total(hospital, site_of):
    site = site_of(metrics=NOISED)
    trained(site, 1)
    for round_ in (1, 2, 3):
        record_done(site, pay_for_metrics(site, round_))

    document = privacy_document(hospital)

    metrics = [e for e in document["entries"] if e["kind"] == "metrics"]
    training = [e for e in document["entries"] if e["kind"] == "training"]
    assert metrics[-1]["epsilon"] > training[-1]["epsilon"]
    assert document["spent"]["epsilon"] == pytest.approx(metrics[-1]["epsilon"])
    assert document["federations"][0]["metrics"] == 3


def test_a_running_round_is_not_called_interrupted(hospital, site_of):
    from common.files import locked

    site = site_of()
    trained(site, 1)
    pay_for_training(site, 2)
    with locked(hospital.lock):
        states = [entry["state"] for entry in privacy_document(hospital)["entries"]]
    assert states == ["carried through", "in progress"]


def test_the_sums_do_not_keep_a_round_from_being_paid(hospital, site_of, monkeypatch):
    site = site_of()
    trained(site, 1)

    def paying_meanwhile(*arguments, **named):
        monkeypatch.undo()
        pay_for_training(site, 2)
        return most_spent(*arguments, **named)

    monkeypatch.setattr("client.ledger.WAIT_SECONDS", 0.5)
    monkeypatch.setattr("client.privacy_report.most_spent", paying_meanwhile)
    assert len(privacy_document(hospital)["entries"]) == 1
    assert len(privacy_document(hospital)["entries"]) == 2


def test_a_lowered_budget_is_seen(hospital, site_of):
    trained(site_of(), 1, 2, 3)
    site_of(budget=0.1)
    document = privacy_document(hospital)
    assert document["spent"]["left"] == 0
    assert any("more than the budget of 0.1" in text for text in document["warnings"])


def test_a_sum_at_another_delta_than_was_paid_at_is_said(hospital, site_of, prepared, tiny_config):
    site = site_of()
    trained(site, 1)
    assert not privacy_document(hospital)["warnings"]
    hospital.config.write_text(
        hospital.config.read_text().replace("epsilon: 8.0", "epsilon: 8.0, delta: 0.0001")
    )
    document = privacy_document(hospital)
    assert document["spent"]["delta"] == 0.0001
    assert document["spent"]["epsilon"] > document["entries"][-1]["epsilon"]
    assert any("0.00833" in text and "0.0001" in text for text in document["warnings"])


def test_a_deleted_cache_does_not_matter(hospital, site_of):
    trained(site_of(), 1)
    before = privacy_document(hospital)["spent"]
    path = hospital.state / "site.json"
    moved = re.sub(r'": "/[^"]*/([^/"]+)"', r'": "/gone/\1"', path.read_text())
    assert "/gone/" in moved
    path.write_text(moved)
    assert privacy_document(hospital)["spent"] == before


# ---------------------------------------------------------------------------------- in plain words


def test_the_guess_is_bounded_by_all_deltas(hospital, site_of):
    site = site_of()
    trained(site, *range(1, 21))
    document = privacy_document(hospital)
    spent = document["spent"]
    mu = math.sqrt(20) / document["entries"][0]["noise_multiplier"]
    truth = NormalDist().cdf(mu / 2)  # every patient in every step: a Gaussian mechanism
    assert truth <= spent["guess"] < truth + 0.02
    assert spent["guess"] < right_at_most(spent["epsilon"], spent["delta"]) - 0.05
    assert any(f"{math.ceil(1000 * spent['guess']) / 10:.1f} %" in t for t in document["meaning"])


# ------------------------------------------------------------------------------ without protection


def test_privacy_off_is_said_plainly(hospital):
    document = privacy_document(hospital)
    assert document["private"] is False
    assert "OFF" in document["headline"]
    assert "no guarantee" in document["headline"]
    assert document["protected_from"] == []
    assert document["spent"] == {"epsilon": 0.0, "delta": None, "left": None, "guess": 0.5}
    assert document["meaning"] == [
        "Nothing limits what can be found out about a patient from what has left."
    ]
    assert json.dumps(document, allow_nan=False)


def test_privacy_off_needs_no_ledger(hospital):
    ledger_of(hospital).unlink()
    assert privacy_document(hospital)["ledger"] is None


def test_before_any_round(hospital, site_of):
    hospital.config.write_text(hospital.config.read_text() + "privacy: {epsilon: 5}\n")
    document = privacy_document(hospital)  # nothing prepared yet
    assert "Nothing has been spent of the budget of epsilon 5" in document["headline"]
    assert document["spent"]["delta"] is None

    site_of()
    document = privacy_document(hospital)
    assert document["spent"]["left"] == 8.0
    assert document["spent"]["delta"] == 1 / (10 * N_TRAINING)
    assert any("99.97 %" in text for text in document["meaning"])  # of the whole budget
    assert document["entries"] == []
    assert not (hospital.state / "ledger-anchor.json").exists()  # a report vouches for nothing


def test_rounds_without_privacy_are_listed_and_in_the_headline(hospital, site_of):
    record_unprotected(site_of(budget=None), 1)
    trained(site_of(), 2)
    document = privacy_document(hospital)
    assert [(u["round"], u["same_patients"]) for u in document["unprotected"]] == [(1, True)]
    assert "1 round trained WITHOUT differential privacy" in document["headline"]
    assert document["federations"][0]["unprotected"] == 1
    assert "1 of them" in why(document, "Models trained before, or without privacy")


def test_rounds_without_privacy_on_other_patients_are_not_theirs(hospital, site_of, prepared):
    site = site_of(budget=None)
    others = replace(site, training=prepared.ready[N_TRAINING:])
    record_unprotected(others, 1)
    trained(site_of(), 2)
    assert [u["same_patients"] for u in privacy_document(hospital)["unprotected"]] == [False]


# -------------------------------------------------------------------------------- what has left


def test_what_left_is_counted_from_the_outbound_record(hospital, site_of):
    site = site_of()
    card = SiteCard("Oslo", True, N_TRAINING, 6, 2, site.config.fingerprint())
    sent(hospital, pack_site_card(card))
    permit = pay_for_training(site, 1)
    send_update(hospital, site, statement(site, 1, permit).text())
    n = SiteMetrics(6, {}, {})
    sent(hospital, pack_site_report(SiteReport("Oslo", 1, n, released=WITHHELD)))
    dice = [f"dice/{region}" for region in REGIONS]
    means = SiteMetrics(6, dict.fromkeys(dice, 0.5), dict.fromkeys(dice, 6))
    for way in (NOISED, EXACT, EXACT):
        sent(hospital, pack_site_report(SiteReport("Oslo", 1, means, released=way)))

    document = privacy_document(hospital)

    released = document["released"]
    assert released["updates"] == {"private": 1, "without_privacy": 0, "with_loss": 0}
    assert released["metrics"] == {"withheld": 1, "noised": 1, "exact": 2}
    assert released["site_size"] == {"n_training": N_TRAINING, "n_held_out": 6, "n_left_out": 2}
    assert document["warnings"] == []
    said = why(document, "Metrics on held-out patients")
    assert "1 withheld, 1 noised, 2 exact" in said
    assert "12 training, 6 held-out, 2 left-out" in why(document, "Size of the site")


@pytest.mark.parametrize("now", [WITHHELD, NOISED])
def test_exact_metrics_of_before_are_not_forgotten(hospital, site_of, now):
    site_of(metrics=now)
    assert "left before" not in why(privacy_document(hospital), "Held-out patients")
    dice = [f"dice/{region}" for region in REGIONS]
    means = SiteMetrics(6, dict.fromkeys(dice, 0.5), dict.fromkeys(dice, 6))
    sent(hospital, pack_site_report(SiteReport("Oslo", 1, means)))
    said = why(privacy_document(hospital), "Held-out patients")
    assert "But 1 set of exact ones left before" in said


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"site": "Oslo", "training": {"a": ""}, "held_out": {}}', '{"site": 5}'],
)
def test_a_list_of_subjects_of_another_version_is_none(hospital, site_of, text):
    trained(site_of(), 1)
    spent = privacy_document(hospital)["spent"]
    (hospital.state / "site.json").write_text(text)
    document = privacy_document(hospital)
    assert document["mechanism"]["training_patients"] is None
    assert document["spent"]["epsilon"] == spent["epsilon"]


def test_an_update_without_privacy_is_counted_as_one(hospital, site_of):
    site = site_of(budget=None)
    send_update(hospital, site, statement(site, 1).text(), loss=0.5)
    site_of()
    document = privacy_document(hospital)
    assert document["released"]["updates"] == {
        "private": 0,
        "without_privacy": 1,
        "with_loss": 1,
    }
    assert "WITHOUT differential privacy" in document["headline"]


def test_an_update_paid_from_another_ledger_is_seen(hospital, site_of):
    site = site_of()
    permit = pay_for_training(site, 1)
    send_update(hospital, site, statement(site, 1, permit).text())
    assert privacy_document(hospital)["warnings"] == []
    ledger_of(hospital).unlink()
    site.anchor.unlink()
    create_ledger(ledger_of(hospital))
    [warning] = privacy_document(hospital)["warnings"]
    assert "round 1" in warning
    assert "no entry of this ledger" in warning


@pytest.mark.parametrize(
    ("metrics", "said"),
    [(WITHHELD, "no result of theirs leaves"), (NOISED, "Covered"), (EXACT, "NOT protected")],
)
def test_held_out_patients_are_protected_by_the_sites_choice(hospital, site_of, metrics, said):
    site_of(metrics=metrics)
    assert said in why(privacy_document(hospital), "Held-out patients")


def test_the_accepted_terms_name_the_federation_and_its_limit(hospital, site_of, tiny_config):
    from common.code_hash import code_hash
    from common.terms import Terms

    terms = Terms(FEDERATION, code_hash(), tiny_config("privacy.epsilon=3"))
    accept(hospital, terms, terms.hash())
    document = privacy_document(hospital)
    assert document["federation"] == {"id": FEDERATION, "name": terms.config.name}
    assert document["agreed_epsilon"] == 3
    assert document["code"] == code_hash()


# ------------------------------------------------------------------------------------ a bad ledger


def test_a_missing_ledger_stops_the_report(hospital, site_of):
    site = site_of()
    trained(site, 1)
    ledger_of(hospital).unlink()
    with pytest.raises(LedgerError, match="missing"):
        privacy_document(hospital)
    # also after privacy was switched off: the anchor knows that there was one
    site_of(budget=None)
    with pytest.raises(LedgerError, match="missing"):
        privacy_document(hospital)


def test_a_replaced_ledger_stops_the_report(hospital, site_of):
    trained(site_of(), 1)
    ledger_of(hospital).unlink()
    create_ledger(ledger_of(hospital))
    with pytest.raises(LedgerError, match="another ledger"):
        privacy_document(hospital)
