"""`fed-sim split` must tell exactly what a run then does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from simulation.cli import app
from simulation.cohort import assemble
from simulation.split import describe


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("split.hold_out=[site-06]",),
        ("split.min_subjects=7", "split.by=iid", "split.parts=2"),
        (
            "split.by=iid",
            "split.parts=18",
            "held_out_fraction=0.5",
        ),  # some sites hold out their one
    ],
)
def test_the_description_is_what_a_run_does(cohort_data: Path, tiny_config, cohort_cache, keys):
    config = tiny_config(*keys)
    described = describe(cohort_data, config)["sites"]
    cohort = assemble(cohort_data, config, cohort_cache)
    assert described.keys() == {site.name for site in cohort.sites}
    for site in cohort.sites:
        one = described[site.name]
        assert one["role"] == ("trains" if site.trains else "evaluates")
        assert one["training"] == [entry.id for entry in site.training]
        assert one["held_out"] == [entry.id for entry in site.held_out]
        assert one["HGG"] + one["LGG"] == len(site.training) + len(site.held_out)
    if "split.parts=18" in keys:
        assert {one["role"] for one in described.values()} == {"trains", "evaluates"}


def test_a_patient_is_on_one_side_in_the_description_and_in_a_run(
    cohort_data: Path, tiny_config, cohort_cache, tmp_path: Path
):
    data = Path(shutil.copytree(cohort_data, tmp_path / "data"))
    before = describe(data, tiny_config())["sites"]
    one = {before["site-01"]["training"][0], before["site-01"]["held_out"][0]}
    rows = "".join(f"{subject},P\n" for subject in one)
    (data / "patients.csv").write_text("Subject_ID,Patient_ID\n" + rows)
    sides = describe(data, tiny_config())["sites"]["site-01"]
    assert one & set(sides["held_out"]) in (set(), one)
    (site, *_) = assemble(data, tiny_config(), cohort_cache).sites
    assert [entry.id for entry in site.held_out] == sides["held_out"]


@pytest.mark.usefixtures("undisturbed_log")
def test_a_list_of_patients_that_cannot_be_followed_is_one_sentence(
    cohort_data: Path, tmp_path: Path
):
    data = Path(shutil.copytree(cohort_data, tmp_path / "data"))
    (data / "patients.csv").write_text("Subject_ID;Patient_ID\n")
    done = CliRunner().invoke(app, ["split", str(data)])
    assert done.exit_code == 1
    assert "patients.csv, line 1: no column Subject_ID" in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_no_scan_is_read(cohort_data: Path, tiny_config, tmp_path: Path):
    data = Path(shutil.copytree(cohort_data, tmp_path / "data"))
    expected = describe(data, tiny_config())
    for path in data.rglob("*.nii.gz"):
        os.truncate(path, 0)
    assert describe(data, tiny_config()) == expected
