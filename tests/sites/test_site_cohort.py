"""One site's subjects: each is used once, and who is held out does not depend on who prepares."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sites.holdout import divide
from sites.institutions import grades_of
from sites.site_cohort import SiteCohort, prepare_site
from sites.subject import Subject, discover


@pytest.fixture(scope="module")
def subjects(cohort_data) -> list[Subject]:
    return list(discover(cohort_data).subjects)


@pytest.fixture(scope="module")
def prepare(subjects, cohort_data, cohort_cache, tiny_config):
    """A function: further options, `assign` for the configuration, ids of `one` patient -> a
    prepared site."""

    def make(
        *assign: str, chosen=None, cache: Path = cohort_cache, one=frozenset(), **options
    ) -> SiteCohort:
        chosen = subjects if chosen is None else chosen
        grades = grades_of(chosen, cohort_data)
        patients = {s.id: "P" if s.id in one else s.id for s in chosen}
        config = tiny_config(*assign)
        return prepare_site("site", chosen, grades, patients, config, cache, **options)

    return make


def ids(entries) -> list[str]:
    return [entry.id for entry in entries]


def test_every_subject_is_in_one_part(prepare, subjects, cohort_data, tiny_config):
    site = prepare()
    config = tiny_config()
    names = [s.id for s in subjects]
    alone = {name: name for name in names}
    training, held_out = divide(
        names, grades_of(subjects, cohort_data), alone, seed=config.seed, fraction=0.3
    )
    assert (ids(site.training), ids(site.held_out)) == (list(training), list(held_out))
    assert sorted(ids(site.training) + ids(site.held_out)) == sorted(names)
    assert (site.name, site.trains) == ("site", True)
    assert site.held_out


def test_the_order_of_the_subjects_does_not_matter(prepare, subjects):
    forward, backward = prepare(), prepare(chosen=subjects[::-1])
    assert set(ids(forward.held_out)) == set(ids(backward.held_out))


def test_a_patient_is_on_one_side_and_nobody_else_moves(prepare):
    apart = prepare()
    one = {*ids(apart.training)[:2], *ids(apart.held_out)[:2]}
    sides = set()
    for seed in range(8):
        apart, together = prepare(f"seed={seed}"), prepare(f"seed={seed}", one=one)
        held_out = set(ids(together.held_out))
        assert held_out & one in (set(), one)
        assert held_out - one == set(ids(apart.held_out)) - one
        sides.add(one <= held_out)
    assert sides == {True, False}


def test_another_seed_holds_out_others(prepare):
    held = {tuple(sorted(ids(prepare(f"seed={seed}").held_out))) for seed in range(5)}
    assert len(held) > 1


def test_who_only_evaluates_holds_out_everybody(prepare, subjects):
    for options in ({"only_evaluates": True}, {"min_subjects": len(subjects) + 1}):
        site = prepare(**options)
        assert site.training == ()
        assert not site.trains
        assert sorted(ids(site.held_out)) == sorted(s.id for s in subjects)
    assert prepare(min_subjects=len(subjects)).trains


def test_who_cannot_be_used_counts_for_nothing(prepare, subjects, tmp_path):
    """The minimum is of usable subjects, and findings say who is not."""
    spoilt = []
    for subject in subjects[:6]:
        folder = shutil.copytree(subject.folder, tmp_path / subject.folder.name)
        spoilt += [
            found for found in discover(folder.parent).subjects if found.folder.name == folder.name
        ]
    bad = spoilt[0]
    next(bad.folder.glob("*_seg.nii*")).write_bytes(b"no scan")
    cache = tmp_path / "cache"
    site = prepare(chosen=spoilt, cache=cache, min_subjects=5)
    assert {f.subject for f in site.findings if f.severity == "error"} == {bad.id}
    assert bad.id not in ids(site.training) + ids(site.held_out)
    assert len(site.training) + len(site.held_out) == 5
    assert site.trains
    assert not prepare(chosen=spoilt, cache=cache, min_subjects=6).trains
    without = prepare(chosen=spoilt[1:], cache=cache)
    assert replace(site, findings=(), patients={}) == replace(without, findings=(), patients={})


def test_no_subject_is_an_empty_site(prepare):
    site = prepare(chosen=[])
    assert (site.trains, site.training, site.held_out) == (False, (), ())


def test_a_scan_that_is_left_out_still_tells_who_is_one_person(prepare, subjects, tmp_path):
    """One patient under two names, one of them with a second scan, must not be two patients."""
    folders = [shutil.copytree(s.folder, tmp_path / s.folder.name) for s in subjects[:5]]
    copy = tmp_path / "BraTS20_Training_999"
    copy.mkdir()
    for path in folders[0].iterdir():
        shutil.copy(path, copy / path.name.replace(folders[0].name, copy.name))
    chosen = list(discover(tmp_path).subjects)
    second = chosen[1].id
    site = prepare(chosen=chosen, cache=tmp_path / "cache", one={second, copy.name})
    assert copy.name not in ids(site.training) + ids(site.held_out)
    assert site.patients[second] == site.patients[folders[0].name]
    assert len(set(site.patients.values())) == 4
    parts = [set(ids(side)) & {second, folders[0].name} for side in (site.training, site.held_out)]
    assert sorted(map(len, parts)) == [0, 2]
