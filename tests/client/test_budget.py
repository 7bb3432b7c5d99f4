"""A site's budget holds: over rounds, crashes, federations, new folders, and two processes at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from client.accounting import Steps, epsilon, noise_multiplier
from client.budget import (
    GROWTH,
    BudgetSpent,
    delta_of,
    may_train,
    most_spent,
    patients_of,
    pay_for_metrics,
    pay_for_training,
    record_done,
    record_unprotected,
    statement,
)
from client.ledger import DONE, METRICS, PLAN, TRAINING, UNPROTECTED, LedgerError, create_ledger
from client.ledger import open_ledger as open_
from client.site import Site, load_site, write_site
from client.site_config import PrivacyBudget
from common.code_hash import code_hash
from common.config_file import dump_config

ROUNDS = 5
BUDGET = 6.0


@pytest.fixture
def make_site(tmp_path, prepared, tiny_config) -> Callable[..., Site]:
    """A function: a site over the first subjects; keys of the configuration; what else is special."""

    def make(
        *keys: str,
        name: str = "Oslo",
        folder: str = "state",
        federation: str = "f1",
        training=prepared.ready[:6],
        budget: PrivacyBudget | None = PrivacyBudget(epsilon=BUDGET),
        ledger: Path = tmp_path / "ledger.sqlite",
        **more,
    ) -> Site:
        config = tiny_config("network.norm=group", f"rounds.number={ROUNDS}", *keys)
        if not ledger.exists():
            create_ledger(ledger)
        write_site(
            tmp_path / folder,
            name=name,
            trains=True,
            config_text=dump_config(config),
            training=training,
            held_out=prepared.ready[6:10],
            findings=[],
            federation=federation,
            budget=budget,
            ledger=ledger,
            **more,
        )
        return load_site(tmp_path / folder)

    return make


def spent(site: Site) -> float:
    with open_(site.ledger, site.anchor, write=False) as ledger:
        from client.budget import _identities

        return most_spent(ledger, _identities(site, site.training), delta_of(site))


def kinds(site: Site) -> list[str]:
    with open_(site.ledger, None, write=False) as ledger:
        return [entry.kind for entry in ledger.entries]


# ---------------------------------------------------------------------------------------- planning


def test_the_noise_is_calibrated_for_the_planned_rounds_and_kept(make_site):
    site = make_site()
    permits = [pay_for_training(site, round_) for round_ in range(1, ROUNDS + 1)]
    sigma = noise_multiplier(BUDGET, 1 / 60, sampling_rate=1.0, steps=ROUNDS)
    assert {p.noise for p in permits} == {Steps(sigma, 1.0, 1)}
    for n, permit in enumerate(permits, start=1):
        # trap 10: one composition of all steps so far, never a new count each round
        assert permit.entry.epsilon == epsilon([Steps(sigma, 1.0, n)], 1 / 60)
        assert (permit.entry.delta, permit.entry.budget, permit.patients) == (1 / 60, BUDGET, 6)
    assert BUDGET * 0.99 < permits[-1].entry.epsilon <= BUDGET
    assert kinds(site) == [PLAN, *[TRAINING] * ROUNDS]


def test_the_round_after_the_last_is_refused_before_anything(make_site):
    """Trap 11."""
    site = make_site()
    for round_ in range(1, ROUNDS + 1):
        assert may_train(site) == ""
        pay_for_training(site, round_)
    before = site.ledger.read_bytes()
    with pytest.raises(
        BudgetSpent,
        match=r"its privacy budget is spent: epsilon 5.9\d\d of 6 at delta 0.017, and the next "
        r"round would bring it to 6.\d+. It goes on evaluating.",
    ):
        pay_for_training(site, ROUNDS)
    assert site.ledger.read_bytes() == before
    assert "budget is spent" in may_train(site)


def test_rate_steps_and_clip_are_the_federations_and_the_sites(make_site, tmp_path):
    site = make_site("privacy.expected_batch=1.5", "privacy.steps=2", "privacy.clip=0.7")
    permit = pay_for_training(site, 1)
    assert (permit.noise.sampling_rate, permit.noise.steps, permit.entry.clip) == (0.25, 2, 0.7)
    expected = noise_multiplier(BUDGET, 1 / 60, sampling_rate=0.25, steps=2 * ROUNDS)
    assert permit.noise.noise_multiplier == expected
    budget = PrivacyBudget(epsilon=BUDGET, delta=1e-5, clip=0.2)
    own = make_site(budget=budget, folder="b", ledger=tmp_path / "own.sqlite")
    permit = pay_for_training(own, 1)
    assert (permit.entry.clip, permit.entry.delta) == (0.2, 1e-5)


def test_a_federation_can_ask_for_less_and_not_for_more(make_site, tmp_path):
    less = make_site("privacy.epsilon=2", ledger=tmp_path / "less.sqlite", folder="less")
    for round_ in range(1, ROUNDS + 1):
        permit = pay_for_training(less, round_)
    assert 1.98 < permit.entry.epsilon <= 2
    with pytest.raises(BudgetSpent, match=r"this federation's epsilon to 2.\d+, agreed are 2"):
        pay_for_training(less, ROUNDS)
    more = make_site("privacy.epsilon=50", ledger=tmp_path / "more.sqlite", folder="more")
    for round_ in range(1, ROUNDS + 1):
        permit = pay_for_training(more, round_)
    assert permit.entry.epsilon <= BUDGET
    with pytest.raises(BudgetSpent):
        pay_for_training(more, ROUNDS)


def test_a_round_paid_twice_is_made_up_for_by_the_rounds_that_are_left(make_site):
    site = make_site()
    first = pay_for_training(site, 1).noise.noise_multiplier
    pay_for_training(site, 2)
    again = pay_for_training(site, 2).noise.noise_multiplier  # its answer was lost
    assert first < again < 1.2 * first
    assert [pay_for_training(site, n).noise.noise_multiplier for n in (3, 4, 5)] == [again] * 3
    assert BUDGET - 0.1 < spent(site) <= BUDGET


def test_the_last_round_is_not_paid_twice_with_far_more_noise(make_site):
    site = make_site()
    sigmas = {pay_for_training(site, n).noise.noise_multiplier for n in range(1, ROUNDS + 1)}
    assert len(sigmas) == 1
    assert "budget is spent" in may_train(site)
    with pytest.raises(BudgetSpent, match=r"^its privacy budget is spent"):
        pay_for_training(site, ROUNDS)


def test_what_was_spent_elsewhere_meanwhile_is_made_up_for(make_site, caplog):
    site = make_site()
    first = pay_for_training(site, 1).noise.noise_multiplier
    other = make_site("rounds.number=2", folder="other", federation="f2")
    pay_for_training(other, 1)
    # absent from round 2, which does not make up for it by itself
    again = pay_for_training(site, 3).noise.noise_multiplier
    assert first < again <= GROWTH * first
    for n in (4, 5):
        pay_for_training(site, n)
    assert spent(site) <= BUDGET
    assert "has been spent on its patients" in caplog.text


def test_another_federations_plan_is_no_measure_of_this_ones(make_site):
    other = make_site(folder="other", federation="f2")
    for n in (1, 2, 3):
        pay_for_training(other, n)
    site = make_site()
    sigmas = [pay_for_training(site, n).noise.noise_multiplier for n in (1, 2, 2, 3, 4, 5)]
    assert sigmas == sorted(sigmas)
    assert len(set(sigmas)) == 2
    assert spent(site) <= BUDGET


def test_another_patient_makes_another_plan_within_the_same_budget(make_site, prepared):
    site = make_site()
    pay_for_training(site, 1)
    pay_for_training(site, 2)
    grown = make_site(training=prepared.ready[:5] + prepared.ready[10:12])
    for round_ in (3, 4, 5):
        permit = pay_for_training(grown, round_)
    assert kinds(site).count(PLAN) == 2
    assert 5.9 < permit.entry.epsilon <= BUDGET
    with open_(grown.ledger, None, write=False) as ledger:
        sigmas = [e.noise_multiplier for e in ledger.entries if e.kind == TRAINING]
    delta = delta_of(grown)
    assert delta == 1 / 70
    old = [Steps(s, 1.0, 1) for s in sigmas]
    # who was there from the beginning is the most affected
    assert permit.entry.epsilon == epsilon(old, delta)
    assert epsilon(old[2:], delta) < epsilon(old, delta)


# ---------------------------------------------------------------------- the same patients elsewhere


def test_spending_adds_up_over_federations_folders_and_names(make_site, prepared, tmp_path):
    first = make_site()
    for round_ in range(1, 4):
        pay_for_training(first, round_)
    half = spent(first)
    assert 3 < half < 5
    renamed = [replace(entry, id=f"case-{n}") for n, entry in enumerate(prepared.ready[:6])]
    monkey = {entry.id: entry for entry in renamed}
    second = make_site(folder="moved/elsewhere", federation="f2", name="Oslo-2")
    second = replace(
        second, training=tuple(renamed), patients={i: i for i in monkey}, federation="f2"
    )
    assert spent(second) == half, "recognised by their voxels"
    permits = [pay_for_training(second, round_) for round_ in range(1, ROUNDS + 1)]
    assert permits[-1].entry.epsilon <= BUDGET
    assert permits[-1].entry.epsilon > 5.9
    fresh = noise_multiplier(BUDGET, 1 / 60, sampling_rate=1.0, steps=ROUNDS)
    assert permits[0].noise.noise_multiplier > fresh
    with pytest.raises(BudgetSpent):
        pay_for_training(first, 4)


def test_other_patients_have_spent_nothing(make_site, prepared):
    first = make_site()
    pay_for_training(first, 1)
    others = make_site(folder="b", training=prepared.ready[12:18])
    assert spent(others) == 0


def test_two_scans_of_one_patient_are_one_patient(make_site, prepared):
    same = {entry.id: entry.id for entry in prepared.ready}
    same[prepared.ready[1].id] = prepared.ready[0].id
    site = make_site(patients=same)
    permit = pay_for_training(site, 1)
    assert permit.patients == 5
    assert permit.entry.delta == 1 / 50


def test_two_ids_with_one_scan_are_one_person_who_trains_once(make_site, prepared):
    first, second = prepared.ready[:2]
    alike = replace(second, fingerprints=(*second.fingerprints, first.fingerprints[0]))
    site = replace(make_site(), training=(first, alike, *prepared.ready[2:6]))
    assert {name: len(scans) for name, scans in patients_of(site, site.training).items()} == {
        first.id: 2,
        **{entry.id: 1 for entry in prepared.ready[2:6]},
    }
    assert pay_for_training(site, 1).patients == 5


def test_either_id_of_a_person_with_two_is_known_afterwards(make_site, prepared):
    first, second = prepared.ready[:2]
    alike = replace(second, fingerprints=(*second.fingerprints, first.fingerprints[0]))
    site = replace(make_site(), training=(first, alike, *prepared.ready[2:6]))
    pay_for_training(site, 1)
    changed = replace(second, fingerprints=("exported anew",))  # known by its id alone
    assert spent(replace(site, training=(changed,))) > 0
    nobody = prepared.ready[6]
    assert spent(replace(site, training=(nobody,))) == 0


def test_who_was_trained_on_as_two_patients_has_spent_for_two(make_site, prepared):
    """Found out afterwards, by patients.csv: one gradient of theirs was worth two clipping norms."""
    site = make_site()
    sigma = pay_for_training(site, 1).noise.noise_multiplier
    same = {entry.id: entry.id for entry in prepared.ready}
    same[prepared.ready[1].id] = prepared.ready[0].id
    known = make_site(patients=same)
    assert spent(known) == epsilon([Steps(sigma / 2, 1.0, 1)], 1 / 50)
    assert spent(known) > epsilon([Steps(sigma, 1.0, 1)], 1 / 50)


def test_a_person_with_two_records_in_a_sample_is_drawn_more_often(make_site, prepared):
    site = make_site("privacy.expected_batch=1.5")
    sigma = pay_for_training(site, 1).noise.noise_multiplier
    same = {entry.id: entry.id for entry in prepared.ready}
    same[prepared.ready[1].id] = prepared.ready[0].id
    known = make_site("privacy.expected_batch=1.5", patients=same)
    assert spent(known) == epsilon([Steps(sigma / 2, 1 - 0.75**2, 1)], 1 / 50)


def test_delta_never_grows_for_who_was_there_before(make_site, prepared):
    many = make_site(training=prepared.ready[:6] + prepared.ready[10:14])
    pay_for_training(many, 1)
    few = make_site(folder="few", federation="f2")
    assert delta_of(few) == 1 / 60
    assert pay_for_training(few, 1).entry.delta == 1 / 100


# ------------------------------------------------------------------------------------------ crashes

PAY_AND_DIE = """
import os, signal, sys
from pathlib import Path
from client.budget import pay_for_training
from client.site import load_site
import client.privacy

def die(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)

client.privacy.patient_gradient = die
import torch
from client.private_answers import private_update
from common.messages import TrainTask, pack_train_task
from common.model import initial_weights, network_for

site = load_site(Path(sys.argv[1]))
task = TrainTask(int(sys.argv[2]), site.config.fingerprint(), 0.02, initial_weights(site.config))
private_update(site, task, pack_train_task(task), network_for(site.config), torch.device("cpu"))
"""


def test_killed_in_mid_round_the_planned_spending_stays_spent(make_site, tmp_path):
    """Trap 9: kill -9 at the first gradient, then the same rounds again."""
    killed, whole = make_site(), make_site(folder="w", ledger=tmp_path / "whole.sqlite")
    pay_for_training(killed, 1)
    pay_for_training(whole, 1)
    died = subprocess.run([sys.executable, "-c", PAY_AND_DIE, str(killed.folder), "2"], check=False)
    assert died.returncode == -signal.SIGKILL
    assert kinds(killed) == [PLAN, TRAINING, TRAINING], "and nothing says that it was done"
    assert spent(killed) > spent(whole)
    pay_for_training(whole, 2)
    assert spent(killed) == spent(whole), "reloaded: not less than without the kill"
    for round_ in (2, 3, 4):  # the interrupted round is paid a second time
        pay_for_training(killed, round_)
    for round_ in (3, 4):
        pay_for_training(whole, round_)
    assert BUDGET >= spent(killed) > spent(whole)
    pay_for_training(killed, 5)  # with more noise than planned at first
    assert spent(killed) <= BUDGET
    with pytest.raises(BudgetSpent):
        pay_for_training(killed, 5)


def test_two_processes_cannot_both_spend_the_last_round(make_site):
    """Both would fit alone, not together."""
    site = make_site()
    for round_ in range(1, ROUNDS):
        pay_for_training(site, round_)
    program = (
        "import sys; from pathlib import Path; from client.site import load_site;"
        "from client.budget import pay_for_training, BudgetSpent\n"
        "try: pay_for_training(load_site(Path(sys.argv[1])), 5); print('paid')\n"
        "except BudgetSpent: print('refused')"
    )
    command = [sys.executable, "-c", program, str(site.folder)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(p.communicate()[0].strip() for p in both) == ["paid", "refused"]
    assert spent(site) <= BUDGET


def test_a_missing_or_tampered_ledger_stops(make_site):
    site = make_site()
    pay_for_training(site, 1)
    content = site.ledger.read_bytes()
    site.ledger.unlink()
    for action in (lambda: pay_for_training(site, 2), lambda: may_train(site)):
        with pytest.raises(LedgerError, match="is missing"):
            action()
    site.ledger.write_bytes(content.replace(b'"steps":1', b'"steps":0'))
    with pytest.raises(LedgerError, match="tampered"):
        pay_for_training(site, 2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_ledger_that_cannot_be_written_stops(make_site):
    site = make_site()
    site.ledger.chmod(0o400)
    with pytest.raises(LedgerError, match="cannot be used"):
        pay_for_training(site, 1)


# ------------------------------------------------------------------------------------------ metrics


def test_noised_metrics_are_paid_by_the_held_out_patients_alone(make_site):
    site = make_site(budget=PrivacyBudget(epsilon=BUDGET, metrics="noised"))
    permits = [pay_for_metrics(site, round_) for round_ in (1, 2, 3, 4, 5, 5)]
    sigma = noise_multiplier(BUDGET, 1 / 60, sampling_rate=1.0, steps=ROUNDS + 1)
    assert {p.noise for p in permits} == {Steps(sigma, 1.0, 1)}
    assert permits[0].patients == 4
    assert spent(site) == 0, "the training patients"
    with pytest.raises(BudgetSpent):
        pay_for_metrics(site, 5)
    assert kinds(site) == [PLAN, *[METRICS] * 6]
    pay_for_training(site, 1)


# --------------------------------------------------------------------------------------- statements


def test_what_is_stated_is_what_was_paid(make_site):
    site = make_site()
    permit = pay_for_training(site, 1)
    record_done(site, permit)
    stated = statement(site, 1, permit)
    with open_(site.ledger, site.anchor, write=False) as ledger:
        paid, done = ledger.entries[1:]
        assert (stated.ledger, stated.entries, stated.head) == (ledger.id, paid.number, paid.hash)
    assert (done.kind, done.of) == (DONE, paid.number)
    assert stated.private
    assert (stated.epsilon, stated.budget, stated.metrics) == (paid.epsilon, BUDGET, "withheld")
    assert (stated.federation, stated.site, stated.round) == ("f1", "Oslo", 1)
    assert (stated.noise_multiplier, stated.clip) == (paid.noise_multiplier, paid.clip)
    assert stated.code == code_hash()


def test_a_round_without_privacy_is_remembered_and_costs_no_epsilon(make_site):
    open_site = make_site(budget=None)
    record_unprotected(open_site, 1)
    assert kinds(open_site) == [UNPROTECTED]
    assert not statement(open_site, 1).private
    protected = make_site()
    assert pay_for_training(protected, 1).entry.number == 3
    open_site.ledger.unlink()
    with pytest.raises(LedgerError, match="is missing"):
        record_unprotected(open_site, 2)
    open_site.anchor.unlink()
    record_unprotected(open_site, 2)
    assert not open_site.ledger.exists(), "who protects nobody need not keep one"
