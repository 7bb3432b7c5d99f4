"""The commands beside `run`: what they print, and that they answer at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from common.config_file import load_config
from server.history import Contribution, History, RoundRecord
from simulation.cli import app
from simulation.run import _results_csv


def fed_sim(*arguments: str):
    return CliRunner().invoke(app, arguments)


def words(text: str) -> str:
    """Without the frame and the line breaks that typer draws around an error."""
    return " ".join(text.replace("│", " ").split())


def test_help_loads_nothing_heavy():
    program = (
        "import sys; import simulation.cli;"
        "print({'torch', 'monai', 'flwr', 'numpy', 'nibabel'} & set(sys.modules))"
    )
    done = subprocess.run(
        (sys.executable, "-c", program), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_every_command_explains_itself():
    for command in ("run", "phantom", "split", "results", "config"):
        assert command in fed_sim("--help").output
        assert fed_sim(command, "--help").exit_code == 0


# ---------------------------------------------------------------------------------------- phantom


def test_phantom_writes_a_cohort_that_split_understands(tmp_path: Path):
    done = fed_sim(
        "phantom", str(tmp_path), "--sites", "2", "--subjects", "2", "--grid", "32", "32", "20"
    )
    assert done.exit_code == 0, done.output
    assert "4 synthetic subjects" in done.output
    document = json.loads(fed_sim("split", str(tmp_path), "--json").output)
    assert [len(s["training"] + s["held_out"]) for s in document["sites"].values()] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--grid", "8", "8", "8"), "8x8x8 is too small"),
        (("--sites", "18"), "1 to 17"),
        (("--heterogeneity", "3"), "heterogeneity must be"),
    ],
)
def test_a_phantom_that_cannot_be_is_wrong_usage(tmp_path: Path, arguments, text):
    failed = fed_sim("phantom", str(tmp_path / "out"), *arguments)
    assert failed.exit_code == 2
    assert text in words(failed.output)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ split


def test_split_shows_every_site_and_adds_up(cohort_data: Path):
    table = fed_sim("split", str(cohort_data)).output
    document = json.loads(fed_sim("split", str(cohort_data), "--json").output)
    assert sorted(document["sites"]) == ["site-01", "site-06", "site-13"]
    for name, site in document["sites"].items():
        (row,) = (line for line in table.splitlines() if name in line)
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        n = (len(site["training"]), len(site["held_out"]))
        assert cells == [
            name, site["role"], str(sum(n)), str(site["HGG"]), str(site["LGG"]), *map(str, n)
        ]  # fmt: skip
        assert sum(n) == 6


def test_a_site_may_be_called_what_rich_takes_for_markup(cohort_data: Path, tmp_path: Path):
    ids = sorted(path.name for path in cohort_data.iterdir() if path.is_dir())
    lines = ["Partition_ID,Subject_ID", *(f"Haus [red],{subject}" for subject in ids)]
    (tmp_path / "parts.csv").write_text("\n".join(lines))
    keys = ("--set", "split.by=csv", "--set", f"split.file={tmp_path / 'parts.csv'}")
    assert "Haus [red]" in fed_sim("split", str(cohort_data), *keys).output


def test_split_lists_who_has_no_site(cohort_data: Path, tmp_path: Path):
    data = Path(shutil.copytree(cohort_data, tmp_path / "data"))
    like = next(path for path in data.iterdir() if path.is_dir())
    like.rename(data / "Hospital_X_1")
    for path in (data / "Hospital_X_1").iterdir():
        path.rename(path.with_name(path.name.replace(like.name, "Hospital_X_1")))
    assert "no site: Hospital_X_1" in fed_sim("split", str(data)).output
    assert json.loads(fed_sim("split", str(data), "--json").output)["unmapped"] == ["Hospital_X_1"]


def test_a_split_that_cannot_be_is_said(cohort_data: Path):
    failed = fed_sim("split", str(cohort_data), "--set", "split.hold_out=[site-6]")
    assert failed.exit_code == 1
    assert "did you mean 'site-06'?" in failed.output
    assert fed_sim("split", str(cohort_data), "--set", "split.by=magic").exit_code == 2
    assert fed_sim("split", "/nowhere").exit_code == 2


# ---------------------------------------------------------------------------------------- results


def test_results_repeats_what_the_run_recorded(finished_run):
    document = json.loads(fed_sim("results", str(finished_run.folder), "--json").output)
    full = json.loads((finished_run.folder / "results.json").read_text())
    assert document == {key: full[key] for key in document}
    assert {"rounds", "final", "verdict", "sites"} <= document.keys()
    text = fed_sim("results", str(finished_run.folder)).output
    for number in (1, 2, 3):
        assert f"Round {number}:" in text
    assert "site-13 contributed to every round." in text


def test_results_of_a_run_whose_sites_keep_their_metrics(tmp_path: Path):
    withheld = {"a": "withheld"}
    with History(tmp_path / "history.sqlite") as history:
        record = RoundRecord(1, 0.1, 1.0, None, "c", "s", (Contribution("a", True),), {})
        history.record_round(replace(record, released=withheld, unmeasured={"a": "it withholds"}))
        history.record_final(1, {}, {"a": "it withholds"}, withheld)
        assert _results_csv(history).splitlines() == ["stage,round,site,metric,mean,subjects"]
    text = fed_sim("results", str(tmp_path)).output
    assert "Round 1: no site releases its metrics" in text
    assert "a withholds its metrics." in text
    document = json.loads(
        fed_sim("results", str(tmp_path), "--json").output, parse_constant=pytest.fail
    )
    assert document["rounds"][0]["mean_dice"] is None
    assert document["verdict"]["everyone"] is True


def test_results_of_no_run_is_wrong_usage(tmp_path: Path):
    failed = fed_sim("results", str(tmp_path))
    assert failed.exit_code == 2
    assert "holds no run" in words(failed.output)
    assert list(tmp_path.iterdir()) == [], "looking leaves no trace"


def test_results_of_a_damaged_history_is_said(finished_run, tmp_path: Path):
    shutil.copy(finished_run.folder / "history.sqlite", tmp_path / "history.sqlite")
    os.truncate(tmp_path / "history.sqlite", 5000)
    failed = fed_sim("results", str(tmp_path))
    assert failed.exit_code == 1
    assert "history.sqlite" in failed.output


# ----------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("preset", ["quick", "default", "reference"])
def test_config_prints_a_file_that_gives_the_same_configuration(preset: str, tmp_path: Path):
    text = fed_sim("config", "--preset", preset, "--set", "rounds.number=7").output
    (tmp_path / "federation.yaml").write_text(text)
    expected = load_config(preset=preset, assign=["rounds.number=7"])
    assert load_config(tmp_path / "federation.yaml") == expected
    assert yaml.safe_load(text)["rounds"]["number"] == 7
