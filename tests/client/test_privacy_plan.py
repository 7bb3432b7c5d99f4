"""The plan before joining: the same noise as the budget would choose, and honest about what it drowns."""

from __future__ import annotations

import math
import shutil

import pytest

from client.accounting import Steps, epsilon
from client.budget import pay_for_training
from client.consent import accept, propose
from client.privacy_plan import (
    CONTINUES,
    DROWNS,
    FROM_SCRATCH,
    LEARNS,
    PRE_TRAINED,
    Cohort,
    NothingToPlan,
    Recipe,
    cohort_of,
    config_of,
    parameters_of,
    plan_document,
    verdict,
)
from common.config_file import load_config
from common.invitation import write_invitation
from common.model import initial_weights
from common.terms import Terms
from tests.client.conftest import FEDERATION
from tests.client.paid_site import N_TRAINING, prepared_site

QUICK = Recipe("this plan", 6, 1, None, 10_000)


@pytest.fixture(scope="module")
def private():
    return load_config(preset="private")


@pytest.fixture
def alone(monkeypatch):
    """Nothing is compared, which would take seconds."""
    monkeypatch.setattr("client.privacy_plan._recipes", lambda patients, recipe: [])


@pytest.fixture(scope="module")
def document(private):
    return plan_document(Cohort(8, 3, "as given"), private, QUICK, [8.0, 3.0], None, 8.0)


def test_noise_is_that_of_the_budget(hospital, prepared, tiny_config, alone):
    site = prepared_site(hospital, prepared.ready, tiny_config("rounds.number=6"))
    paid = pay_for_training(site, 1).noise
    cohort = Cohort(N_TRAINING, None, "")
    planned = plan_document(cohort, site.config, QUICK, [8.0], None, 8.0)
    assert planned["plans"][0]["noise_multiplier"] == pytest.approx(paid.noise_multiplier, rel=1e-3)
    assert planned["recipe"]["sampling_rate"] == paid.sampling_rate
    assert planned["delta"] == 1 / (10 * N_TRAINING)


def test_noise_is_set_against_the_largest_signal(document):
    for plan in document["plans"]:
        sigma = plan["noise_multiplier"]
        # norm of the noise, sigma C sqrt(P), over 8 patients' gradients of norm C
        assert plan["noise_to_signal"] == pytest.approx(sigma * math.sqrt(10_000) / 8)
        assert plan["noise_to_signal_of_run"] == pytest.approx(plan["noise_to_signal"] / 6**0.5)
        assert plan["noise_per_coordinate"] == pytest.approx(sigma / 8)
        sites = plan["sites_needed"]
        enough = plan["noise_to_signal_of_run"] / math.sqrt(sites)
        assert enough <= FROM_SCRATCH < plan["noise_to_signal_of_run"] / math.sqrt(sites - 1)


def test_small_batches_are_sampled(private, alone):
    recipe = Recipe("this plan", 2, 2, 4.0, 10_000)
    [plan] = plan_document(Cohort(8, None, ""), private, recipe, [8.0], 0.01, 8.0)["plans"]
    assert plan["sampling_rate"] == 0.5
    sigma = plan["noise_multiplier"]
    assert epsilon([Steps(sigma, 0.5, 4)], 0.01) == pytest.approx(8.0, abs=0.1)
    assert plan["noise_to_signal"] == pytest.approx(sigma * 100 / 4)
    assert Recipe("", 1, 1, 4.0, 1).rate(3) == 1.0


def test_more_patients_a_step_than_there_are_is_said(private, alone):
    recipe = Recipe("this plan", 2, 1, 40.0, 10_000)
    document = plan_document(Cohort(8, None, ""), private, recipe, [8.0], 0.01, 8.0)
    assert document["advice"][0].startswith("40 patients a step are more than there are")


def test_the_course_ends_at_the_budget(document):
    for plan in document["plans"]:
        course = dict(plan["course"])
        assert list(course) == [1, 2, 3, 4, 5, 6]
        values = list(course.values())
        assert values == sorted(values)
        assert values[-1] == pytest.approx(plan["epsilon"], abs=0.1)
        assert values[-1] <= plan["epsilon"]
        step = Steps(plan["noise_multiplier"], 1.0, 3)
        assert course[3] == pytest.approx(epsilon([step], document["delta"]), abs=0.011)


def test_verdicts():
    assert verdict(FROM_SCRATCH) == LEARNS
    assert verdict(FROM_SCRATCH + 0.01) == verdict(PRE_TRAINED) == CONTINUES
    assert verdict(PRE_TRAINED + 0.01) == DROWNS


def test_eight_patients_and_epsilon_three_are_told_that_nothing_is_learned(private, alone):
    recipe = Recipe("this plan", 20, 1, None, parameters_of(private))
    document = plan_document(Cohort(8, None, ""), private, recipe, [3.0], None, 3.0)
    [plan] = document["plans"]
    assert plan["verdict"] == DROWNS
    assert 100 < plan["noise_to_signal"] < 150
    [first, *others] = document["advice"]
    assert first.startswith("With 8 patients and epsilon 3 the noise of a step is 122 times")
    assert "nothing can be learned from scratch" in first
    assert any("server.init_from" in text for text in others)


def test_many_patients_are_told_that_something_is(private, alone):
    recipe = Recipe("this plan", 20, 1, None, parameters_of(private))
    document = plan_document(Cohort(300, None, ""), private, recipe, [20.0], None, 20.0)
    assert document["plans"][0]["verdict"] == LEARNS
    assert "something can be learned" in document["advice"][0]
    assert not any("server.init_from" in text for text in document["advice"])


def test_recipes_are_compared_and_marked(document):
    found = {one["recipe"]: one for one in document["compared"]}
    assert [one["rounds"] for one in found.values()] == [10, 20, 50, 10, 20]
    assert {one["epsilon"] for one in found.values()} == {8.0}
    assert found["batches of 4, 10 rounds of 2 steps"]["sampling_rate"] == 0.5
    assert found["preset private"]["parameters"] == parameters_of(load_config(preset="private"))
    assert all(one["verdict"] == verdict(one["noise_to_signal_of_run"]) for one in found.values())


def test_the_preset_is_not_computed_twice(private):
    recipe = Recipe("this plan", 20, 1, None, parameters_of(private))
    document = plan_document(Cohort(8, None, ""), private, recipe, [8.0], None, 8.0)
    names = [one["recipe"] for one in document["compared"]]
    assert len(names) == 4
    assert "all patients in every step, 20 rounds (preset private)" in names


def test_what_no_noise_can_pay_for_is_said(private, alone):
    many = Recipe("this plan", 2_000, 1, None, 10_000)
    document = plan_document(Cohort(8, None, ""), private, many, [0.1], 1e-6, 8.0)
    [plan] = document["plans"]
    assert plan["noise_multiplier"] is None
    assert plan["course"] == []
    assert plan["verdict"] == DROWNS
    assert "cannot be paid for" in document["advice"][0]


def test_a_network_that_cannot_be_protected_is_said_first(tiny_config, alone):
    config = tiny_config("network.norm=batch")
    document = plan_document(Cohort(8, None, ""), config, QUICK, [8.0], None, 8.0)
    assert "network.norm" in document["not_protectable"]
    assert document["advice"][0].startswith("Nothing of this can be used as it is")


def test_parameters_are_those_of_the_network(private):
    assert parameters_of(private) == sum(t.numel() for t in initial_weights(private).values())


# ------------------------------------------------------------------------------------ who trains


def test_patients_are_counted_not_scans(hospital, cohort_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(cohort_data, data)
    hospital.config.write_text(f"data: {data}\n")
    assert cohort_of(hospital, None) == Cohort(18, None, str(data))
    ids = sorted({path.parent.name for path in data.rglob("*_seg.nii*")})
    lines = [f"{subject},one" for subject in ids[:4]]
    (data / "patients.csv").write_text("\n".join(["Subject_ID,Patient_ID", *lines]))
    assert cohort_of(hospital, None).training == 15


def test_held_out_patients_are_those_of_the_federation(hospital, tiny_config):
    fewer, more = (
        cohort_of(hospital, tiny_config(f"held_out_fraction={f}")) for f in ("0.1", "0.6")
    )
    for cohort in (fewer, more):
        assert cohort.held_out is not None
        assert cohort.training + cohort.held_out == 18
    assert more.held_out > fewer.held_out


def test_counting_agrees_with_what_is_prepared(hospital, terms):
    from client.preparation import prepare_hospital
    from client.site_config import load_site_config

    settings = load_site_config(hospital.config)
    made = prepare_hospital("Oslo", settings, hospital.state, terms, hospital.private_key)
    cohort = cohort_of(hospital, terms.config)
    assert (cohort.training, cohort.held_out) == (made.n_training, made.n_held_out)


def test_no_subject_is_nothing_to_plan(hospital, tmp_path):
    (tmp_path / "empty").mkdir()
    hospital.config.write_text(f"data: {tmp_path / 'empty'}\n")
    with pytest.raises(NothingToPlan, match="--patients"):
        cohort_of(hospital, None)


def test_nobody_trains_is_nothing_to_plan(hospital, tiny_config):
    with pytest.raises(NothingToPlan, match="held out"):
        cohort_of(hospital, tiny_config("held_out_fraction=0.999999"))


def test_the_newest_terms_are_planned_for(hospital, invitation, terms, tiny_config):
    from common.code_hash import code_hash

    assert config_of(hospital) is None
    write_invitation(hospital.invitation, invitation)
    assert config_of(hospital) == invitation.terms.config
    accepted, proposed = (
        Terms(FEDERATION, code_hash(), tiny_config(f"rounds.number={n}")) for n in (7, 9)
    )
    accept(hospital, accepted, accepted.hash())
    assert config_of(hospital).rounds.number == 7
    propose(hospital, proposed)
    assert config_of(hospital).rounds.number == 9
