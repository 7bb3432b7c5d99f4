"""`fed-sim split` must tell exactly what a run then does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

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


def test_no_scan_is_read(cohort_data: Path, tiny_config, tmp_path: Path):
    data = Path(shutil.copytree(cohort_data, tmp_path / "data"))
    expected = describe(data, tiny_config())
    for path in data.rglob("*.nii.gz"):
        os.truncate(path, 0)
    assert describe(data, tiny_config()) == expected
