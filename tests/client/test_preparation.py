"""A hospital's scans made ready: the same subjects as a simulation's, or words about what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from client.policy import Policy
from client.preparation import Prepared, UnusableData, prepare_hospital
from client.site import load_site
from client.site_config import PrivacyBudget, SiteConfig
from client.worker import _explain
from common.code_hash import code_hash
from common.config import FederationConfig
from common.terms import Terms
from sites.institutions import grades_of
from sites.patients import PatientsError, patients_of
from sites.site_cohort import prepare_site
from sites.subject import discover
from tests.client.conftest import FEDERATION


def prepare(
    data: Path,
    tmp_path: Path,
    config: FederationConfig,
    cache: Path,
    budget: PrivacyBudget | None = None,
) -> Prepared:
    settings = SiteConfig(data=data, cache=cache, privacy=budget)
    terms = Terms(FEDERATION, code_hash(), config)
    return prepare_hospital("Oslo", settings, tmp_path / "state", terms, tmp_path / "site.key")


@pytest.fixture
def own_data(cohort_data, tmp_path) -> Path:
    """Five subjects that a test may spoil."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for subject in sorted({s.folder for s in discover(cohort_data).subjects})[:5]:
        shutil.copytree(subject, folder / subject.name)
    return folder


def test_what_is_prepared_is_what_a_simulation_would_prepare(
    cohort_data, cohort_cache, tmp_path, tiny_config
):
    config = tiny_config()
    done = prepare(cohort_data, tmp_path, config, cohort_cache)
    found = discover(cohort_data, modalities=config.modalities, site="Oslo")
    grades = grades_of(found.subjects, cohort_data)
    patients = patients_of(found.subjects, cohort_data)
    expected = prepare_site("Oslo", found.subjects, grades, patients, config, cohort_cache)
    site = load_site(tmp_path / "state")
    assert (site.name, site.trains, site.config) == ("Oslo", True, config)
    assert [s.id for s in site.training] == [s.id for s in expected.training]
    assert [s.id for s in site.held_out] == [s.id for s in expected.held_out]
    assert (done.n_training, done.n_held_out) == (len(site.training), len(site.held_out))
    trained, measured = (
        {site.patients[s.id] for s in side} for side in (site.training, site.held_out)
    )
    assert (done.training_patients, done.held_out_patients) == (len(trained), len(measured))
    assert done.n_training + done.n_held_out == 18
    assert done.n_left_out == 0
    assert site.patients == patients
    again = prepare(cohort_data, tmp_path, config, cohort_cache)
    assert again == done


def test_a_subject_that_cannot_be_used_is_left_out_or_refused_as_agreed(
    own_data, tmp_path, tiny_config
):
    bad = sorted(own_data.iterdir())[0]
    next(bad.glob("*_seg.nii*")).write_bytes(b"no scan")
    cache = tmp_path / "cache"
    with pytest.raises(UnusableData, match="1 subjects cannot be used") as caught:
        prepare(own_data, tmp_path, tiny_config("on_bad_subject=refuse"), cache)
    assert {f.subject for f in caught.value.findings if f.severity == "error"} == {bad.name}
    assert "on_bad_subject: refuse" in str(caught.value)
    assert not (tmp_path / "state").exists()

    done = prepare(own_data, tmp_path, tiny_config("on_bad_subject=skip"), cache)
    assert done.n_left_out == 1
    assert done.n_training + done.n_held_out == 4
    site = load_site(tmp_path / "state")
    assert site.left_out.keys() == {bad.name}
    assert bad.name not in {s.id for s in (*site.training, *site.held_out)}


def test_the_hospitals_list_of_patients_decides_and_is_written_down(
    own_data, tmp_path, tiny_config
):
    a, b, *others = sorted(p.name for p in own_data.iterdir())
    csv = own_data / "patients.csv"
    sides = set()
    for seed in range(6):
        csv.write_text(f"Subject_ID,Patient_ID\n{a},P{seed}\n{b},P{seed}\n")
        prepare(own_data, tmp_path, tiny_config(), tmp_path / "cache")
        site = load_site(tmp_path / "state")
        assert site.patients == {a: f"P{seed}", b: f"P{seed}", **{i: i for i in others}}
        sides.add(frozenset(s.id for s in site.held_out) & {a, b})
    assert sides == {frozenset(), frozenset({a, b})}


def test_a_list_of_patients_that_contradicts_itself_is_said_on_the_hospitals_screen(
    own_data, tmp_path, tiny_config
):
    csv = own_data / "patients.csv"
    csv.write_text("Subject_ID,Patient_ID\na,P1\na,P2\n")
    with pytest.raises(PatientsError, match="delete the wrong line") as caught:
        prepare(own_data, tmp_path, tiny_config(), tmp_path / "cache")
    assert not (tmp_path / "state").exists()
    assert _explain(caught.value) == (str(caught.value), [])


def test_a_misspelt_line_of_the_list_is_refused_with_a_budget_and_warned_about_without(
    own_data, tmp_path, tiny_config
):
    a, b, *_ = sorted(p.name for p in own_data.iterdir())
    (own_data / "patients.csv").write_text(f"Subject_ID,Patient_ID\n{a},P\n{b.lower()},P\n")
    cache = tmp_path / "cache"
    assert prepare(own_data, tmp_path, tiny_config(), cache).warnings == 1
    budget = PrivacyBudget(epsilon=8)
    with pytest.raises(PatientsError, match=f"names subject {b.lower()}.*Correct the Subject_ID"):
        prepare(own_data, tmp_path, tiny_config(), cache, budget)


def test_a_folder_without_subjects_is_named(tmp_path, tiny_config):
    def text(data: Path) -> str:
        with pytest.raises(UnusableData) as caught:
            prepare(data, tmp_path, tiny_config(), tmp_path / "cache")
        return str(caught.value)

    gone = tmp_path / "gone"
    assert text(gone) == f"{gone} is no folder; correct `data` in site.yaml."
    empty = tmp_path / "empty"
    empty.mkdir()
    assert text(empty) == f"{empty}: no subject was found."


def test_a_folder_in_which_nothing_can_be_used_is_named_with_all_findings(
    own_data, tmp_path, tiny_config
):
    for path in own_data.rglob("*_seg.nii*"):
        path.write_bytes(b"no scan")
    with pytest.raises(UnusableData, match="no subject can be used") as caught:
        prepare(own_data, tmp_path, tiny_config("on_bad_subject=skip"), tmp_path / "cache")
    assert len({f.subject for f in caught.value.findings}) == 5


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (Policy(min_subjects=1), True),
        (Policy(min_subjects=1, metrics=()), False),
        (Policy(min_subjects=1000), False),
    ],
)
def test_the_site_knows_whether_its_policy_lets_any_metric_out(
    cohort_data, cohort_cache, tmp_path, tiny_config, policy, told
):
    settings = SiteConfig(data=cohort_data, cache=cohort_cache, policy=policy)
    terms = Terms(FEDERATION, code_hash(), tiny_config())
    prepare_hospital("Oslo", settings, tmp_path / "state", terms, tmp_path / "site.key")
    assert load_site(tmp_path / "state").tells_metrics is told
