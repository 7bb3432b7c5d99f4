"""From a BraTS folder to prepared sites: who trains, who is held out, who is left out and said so."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from client.site import load_site
from simulation.cohort import Cohort, UnusableData, assemble, changed_sites, write_sites
from sites.institutions import SplitError
from sites.subject import discover


@pytest.fixture
def data(cohort_data: Path, tmp_path: Path) -> Path:
    """A copy of the cohort that a test may spoil."""
    return Path(shutil.copytree(cohort_data, tmp_path / "data"))


@pytest.fixture
def build(data: Path, tiny_config, cohort_cache: Path):
    return lambda *keys: assemble(data, tiny_config(*keys), cohort_cache)


def ids(cohort: Cohort) -> dict[str, tuple[set[str], set[str]]]:
    return {s.name: ({e.id for e in s.training}, {e.id for e in s.held_out}) for s in cohort.sites}


def everyone(data: Path) -> set[str]:
    return {subject.id for subject in discover(data).subjects}


def truncate(data: Path, subject: str, role: str = "t2") -> Path:
    path = data / subject / f"{subject}_{role}.nii.gz"
    os.truncate(path, path.stat().st_size // 2)
    return path


def test_every_subject_is_at_one_site_on_one_side(build, data):
    cohort = build()
    sides = [side for pair in ids(cohort).values() for side in pair]
    assert sum(len(side) for side in sides) == 18
    assert set().union(*sides) == everyone(data)
    assert list(ids(cohort)) == ["site-01", "site-06", "site-13"]
    assert all(site.trains and site.held_out for site in cohort.sites)
    assert (cohort.unmapped, cohort.left_out, cohort.findings) == ((), (), ())


def test_a_held_out_site_trains_nothing_and_is_measured_on_everyone(build):
    cohort = build("split.hold_out=[site-06]")
    by_name = {site.name: site for site in cohort.sites}
    assert not by_name["site-06"].trains
    assert by_name["site-06"].training == ()
    assert len(by_name["site-06"].held_out) == 6
    assert ids(cohort)["site-01"] == ids(build())["site-01"], "the others are as they were"
    with pytest.raises(SplitError, match="site-13"):
        build("split.hold_out=[site-12]")


def test_a_site_below_the_minimum_only_evaluates(build, data):
    gone = sorted(ids(build())["site-13"][0])[0]
    shutil.rmtree(data / gone)
    trains = {site.name: site.trains for site in build("split.min_subjects=6").sites}
    assert trains == {"site-01": True, "site-06": True, "site-13": False}


def test_a_site_that_falls_below_the_minimum_by_bad_subjects_only_evaluates(build, data):
    truncate(data, sorted(ids(build())["site-13"][0])[0])
    cohort = build("split.min_subjects=6", "on_bad_subject=skip")
    trains = {site.name: site.trains for site in cohort.sites}
    assert trains == {"site-01": True, "site-06": True, "site-13": False}


def test_a_bad_subject_is_refused_by_default_and_named(build, data):
    bad = sorted(everyone(data))[4]
    path = truncate(data, bad)
    with pytest.raises(UnusableData, match="on_bad_subject: skip") as caught:
        build()
    (finding,) = (f for f in caught.value.findings if f.severity == "error")
    assert (finding.subject, finding.file) == (bad, path.name)
    assert finding.site in ("site-01", "site-06", "site-13")


def test_a_skipped_subject_is_left_out_and_nobody_else_moves(build, data):
    before = ids(build())
    bad = sorted(before["site-06"][0])[0]
    truncate(data, bad, "seg")
    cohort = build("on_bad_subject=skip")
    assert cohort.left_out == (bad,)
    assert [(f.site, f.subject) for f in cohort.findings] == [("site-06", bad)]
    before["site-06"][0].remove(bad)
    assert ids(cohort) == before


def test_bad_names_are_said_too(build, data):
    """A subject that discovery cannot place never reaches a site, but must not vanish."""
    twice = sorted(everyone(data))[0]
    shutil.copytree(data / twice, data / "copy" / twice)
    with pytest.raises(UnusableData) as caught:
        build()
    assert {f.code for f in caught.value.findings} == {"subject-in-two-folders"}
    assert build("on_bad_subject=skip").left_out == (twice,)


def test_a_folder_without_subjects_or_without_a_usable_one_is_said(
    build, data, tiny_config, tmp_path
):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnusableData, match="no subject"):
        assemble(tmp_path / "empty", tiny_config(), tmp_path / "cache")
    for subject in everyone(data):
        truncate(data, subject)
    with pytest.raises(UnusableData, match="No site has a subject to train on"):
        build("on_bad_subject=skip")


def test_a_patient_at_two_sites_is_warned_about(build, data):
    cohort = build()
    mine, other = sorted(ids(cohort)["site-01"][0])[0], sorted(ids(cohort)["site-13"][0])[0]
    for path in (data / other).iterdir():
        shutil.copy(data / mine / path.name.replace(other, mine), path)
    found = build().findings
    assert [f.code for f in found] == ["same-patient-at-two-sites"]
    assert (found[0].site, found[0].subject, found[0].severity) == ("site-13", other, "warning")
    assert mine in found[0].what


def test_time_points_at_two_sites_are_warned_about(build, data):
    mine, other = (sorted(ids(build())[site][0])[0] for site in ("site-01", "site-13"))
    listed(data, {mine: "P", other: "P"})
    (finding,) = build().findings
    assert (finding.code, finding.severity) == ("patient-at-two-sites", "warning")
    assert (finding.site, finding.subject) == ("site-13", other)


def test_a_patient_is_held_out_whole(build, data, tiny_config, tmp_path):
    before = ids(build())
    one = {sorted(before["site-01"][0])[0], sorted(before["site-01"][1])[0]}
    listed(data, dict.fromkeys(one, "P"))
    cohort = build()
    assert ids(cohort)["site-01"][1] & one in (set(), one)
    write_sites(cohort, tmp_path / "sites", tiny_config())
    patients = load_site(tmp_path / "sites" / "site-01").patients
    assert {i for i, patient in patients.items() if patient == "P"} == one
    assert len(patients) == 6


def listed(data: Path, patients: dict[str, str]) -> None:
    rows = "".join(f"{subject},{patient}\n" for subject, patient in patients.items())
    (data / "patients.csv").write_text("Subject_ID,Patient_ID\n" + rows)


def test_a_subject_without_a_site_is_listed(build, data, tmp_path):
    stranger = "Hospital_X_1"
    like = sorted(everyone(data))[0]
    (data / stranger).mkdir()
    for path in (data / like).iterdir():
        shutil.copy(path, data / stranger / path.name.replace(like, stranger))
    cohort = build()
    assert cohort.unmapped == (stranger,)
    assert stranger not in set().union(*(side for pair in ids(cohort).values() for side in pair))


def test_what_is_written_for_a_site_is_what_its_client_loads(build, tiny_config, tmp_path):
    cohort = build("split.hold_out=[site-06]")
    folders = write_sites(cohort, tmp_path / "sites", tiny_config())
    loaded = {site.name: site for site in map(load_site, folders.values())}
    for site in cohort.sites:
        mine = loaded[site.name]
        assert (mine.training, mine.held_out) == (site.training, site.held_out)
        assert (mine.trains, mine.config) == (site.trains, tiny_config())
        assert mine.patients == {e.id: e.id for e in (*site.training, *site.held_out)}


def test_changed_sites_are_those_with_other_scans_or_another_division(
    build, data, tiny_config, tmp_path
):
    cohort = build()
    write_sites(cohort, tmp_path / "sites", tiny_config())
    assert changed_sites(build(), tmp_path / "sites") == []
    assert changed_sites(build("split.hold_out=[site-06]"), tmp_path / "sites") == ["site-06"]
    a, b = sorted(ids(cohort)["site-13"][0])[:2]
    everybody = ids(cohort)
    for number in range(9):  # until the new patient is on the side where both were
        listed(data, {a: f"P{number}", b: f"P{number}"})
        if ids(build()) == everybody:
            break
    assert ids(build()) == everybody
    assert changed_sites(build(), tmp_path / "sites") == ["site-13"], "the same division"
    (data / "patients.csv").unlink()
    for path in (data / a).iterdir():  # the scan of another, under the old name
        shutil.copy(data / b / path.name.replace(a, b), path)
    shutil.rmtree(data / b)
    assert changed_sites(build(), tmp_path / "sites") == ["site-13"]
