"""`fed-sim report`: subjects, comparison and pictures are those of the run, and a gap is named."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from client.evaluation import evaluate
from client.prediction import load_model
from client.site import load_site
from client.subject_results import PLAIN, segmentation_of
from common.evaluation_document import FORMAT, write_evaluation
from common.evaluation_summary import SubjectResult, shown_subjects
from common.metrics import REGIONS
from common.weights import file_sha256
from server.history import History
from server.tables import number
from simulation.cli import app
from simulation.evaluation import evaluate_run, evaluation_folder
from simulation.report import (
    LOG,
    _comparison,
    _over_subjects,
    per_subject_document,
    simulations_report,
)
from tests.browser import chromium, complaints
from tests.server.test_report import Page, assert_self_contained


def report(*arguments: object):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def page(finished_run, tmp_path_factory) -> tuple[Page, Path]:
    """The report of the finished run, outside of its folder, which is read only."""
    out = tmp_path_factory.mktemp("report")
    done = report(finished_run.folder, "--out", out)
    assert done.exit_code == 0, done.output
    assert f"Page: {out / 'report.html'}" in done.stdout
    assert "Training is complete: 3 rounds." in done.stdout
    return Page((out / "report.html").read_text(encoding="utf-8")), out


@pytest.fixture
def copied(finished_run, tmp_path) -> Path:
    return shutil.copytree(finished_run.folder, tmp_path / "run")


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """Warnings of the report."""
    lines: list[str] = []
    monkeypatch.setattr(LOG, "warning", lines.append)
    return lines


def result(site: str, subject: str, dice: float, **more: float) -> SubjectResult:
    values = {"dice": dice, "iou": dice / 2} | more
    return SubjectResult(site, subject, subject, None, 1.0, dict.fromkeys(REGIONS, values))


def test_the_page_leads_nowhere_and_is_small(page):
    found, out = page
    assert_self_contained(found)
    assert len(found.source) < 3_000_000
    names = {path.name for path in (out / "report-figures").iterdir()}
    assert {"slices.png", "slices.svg", "tumour-in-space.png", "dice-over-subjects.svg"} <= names
    assert "tumour-in-space.svg" not in names
    assert found.tags.count("img") == 2, "slices and scene are made of pixels"


def test_a_browser_shows_the_page_without_a_complaint(page, tmp_path):
    _, out = page
    with chromium(tmp_path / "profile", width=1000) as browser:
        browser.get((out / "report.html").as_uri())
        shown = browser.execute_script(
            "return [[...document.images].map(i => i.naturalWidth), document.querySelectorAll('svg').length,"
            "document.documentElement.scrollWidth <= window.innerWidth,"
            "performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length]"
        )
        assert not complaints(browser)
    widths, figures, fits, fetched = shown
    assert len(widths) == 2
    assert min(widths) > 900
    assert figures > 5
    assert fits
    assert fetched == 0


def test_single_subjects_are_those_that_the_model_gives(finished_run):
    """Measured again, by the model file."""
    model = load_model(finished_run.folder / "model.safetensors")
    document = per_subject_document(finished_run.folder, "final")
    site = load_site(finished_run.folder / "sites" / "site-06")
    again = evaluate(
        model.network, site.held_out, model.config, what="", surface_distances=False,
        device=model.device,
    )  # fmt: skip
    kept = {s["subject"]: s["scores"] for s in document["subjects"] if s["site"] == "site-06"}
    assert kept.keys() == {m.subject for m in again} == {entry.id for entry in site.held_out}
    for measured in again:
        for region in REGIONS:
            dice = kept[measured.subject][region]["dice"]
            assert dice == pytest.approx(measured.scores[region]["dice"])


def test_best_and_worst_are_named_with_their_figures(page, finished_run):
    found, _ = page
    means = {}
    for path in (finished_run.folder / "sites").glob("*/evaluation/final.json"):
        for subject in json.loads(path.read_text()):
            dices = [subject["scores"][region]["dice"] for region in ("WT", "TC", "ET")]
            means[subject["subject"]] = sum(dices) / 3
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    [alt] = [v for n, v in found.attributes if n == "alt" and v.startswith("Slices of 3 subjects")]
    assert re.search(rf"best: {best} .*; median: .*; worst: {worst} ", alt)
    assert found.row(worst)[2] == number(means[worst])
    assert "Radiological convention" in found.text


def test_a_simulation_is_said_to_protect_nobody(page):
    found, _ = page
    assert "A simulation protects nobody" in found.text
    assert "No baselines were trained" in found.text
    assert "naive FLAIR threshold" in found.text
    assert "For research; not a medical device." in found.text
    assert "preset: quick" in found.text


def test_ranks_do_not_depend_on_the_order_and_are_told_apart():
    subjects = [result("a", f"s{n}", dice) for n, dice in enumerate((0.5, 0.1, 0.9, 0.3, 0.4))]
    for order in (subjects, subjects[::-1]):
        shown = shown_subjects(order)
        assert {rank: s.subject for rank, s in shown.items()} == {
            "best": "s2",
            "median": "s4",
            "worst": "s1",
        }
    assert list(shown_subjects(subjects[:2])) == ["best", "worst"]
    assert list(shown_subjects(subjects[:1])) == ["the only one"]
    assert shown_subjects([]) == {}


def test_the_lowest_subjects_come_first_and_every_point_is_drawn(finished_run):
    subjects = [result("site-01", f"s{n}", n / 20, hd95=float(n)) for n in range(20)]
    recorded = type("R", (), {"sites": ("site-01", "site-06")})()
    [section] = _over_subjects(subjects, recorded)
    [table] = section.tables
    assert [row[0] for row in table.rows] == [f"s{n}" for n in range(10)]
    assert table.rows[3] == ["s3", "site-01", "0.150", *["0.150"] * 3, *["3.0"] * 3]
    for plot, factor in zip(section.plots, (1, 0.5), strict=True):
        for axes in plot.figure.axes:
            [points] = axes.collections
            drawn = sorted(y for _, y in points.get_offsets())
            assert drawn == pytest.approx([n / 20 * factor for n in range(20)])


def test_the_comparison_has_each_way_at_its_place():
    found = {
        "local-only": {"a": {"dice": 0.2, "dice/WT": 0.3}},
        "federated": {"a": {"dice": 0.5, "dice/WT": 0.6}, "<b>$": {"dice": None, "dice/WT": 0.9}},
        "centralised": {"a": {"dice": 0.7, "dice/WT": 0.8}, "<b>$": {"dice": 0.1, "dice/WT": 0.2}},
    }
    [section] = _comparison({"comparison": found})
    [table] = section.tables
    assert table.rows == [
        ["<b>$", "-", "-", "0.100", "-", "0.900", "0.200"],
        ["a", "0.200", "0.500", "0.700", "0.300", "0.600", "0.800"],
        ["mean over sites", "0.200", "0.500", "0.700", "0.300", "0.600", "0.800"],
        ["worst site", "0.200", "0.500", "0.700", "0.300", "0.600", "0.800"],
    ]
    points = [set(scatter.get_offsets()[:, 0].compressed()) for scatter in
              section.plots[0].figure.axes[0].collections]  # fmt: skip
    assert points == [{0.2}, {0.5}, {0.7, 0.1}]


def test_a_comparison_that_is_not_whole_is_none():
    for results in ({}, {"comparison": None}, {"comparison": {"federated": {}}}):
        [section] = _comparison(results)
        assert "No baselines were trained" in section.text[0]


def test_a_run_without_its_cache_is_reported_with_the_reason_in_place_of_pictures(copied):
    for manifest in (copied / "sites").glob("*/site.json"):
        text = manifest.read_text()
        manifest.write_text(re.sub(r'"/[^"]*/(\w[^"/]*)"', r'"/gone/\1"', text))
    sections = {section.name: section for section in simulations_report(copied).sections}
    assert not sections["slices"].plots
    assert "There are no pictures: cache entry /gone/" in sections["slices"].text[0]
    assert sections["spread"].plots, "all else is there"


def test_an_unfinished_run_shows_its_last_rounds_model(copied):
    with sqlite3.connect(copied / "history.sqlite") as database:
        database.execute("DELETE FROM final")
    (copied / "model.safetensors").unlink()  # which only the end writes
    made = simulations_report(copied)
    assert made.state.startswith("NOT complete: 3 of 3 rounds so far")
    sections = {section.name: section for section in made.sections}
    assert "Model of round 3" in sections["slices"].text[0]
    with History(copied / "history.sqlite") as history:
        means = history.rounds()[-1].metrics["site-01"].means
    row = next(row for row in sections["final"].tables[0].rows if row[0] == "site-01")
    assert row[1] == f"{means['dice/WT']:.3f}"


def test_a_kept_evaluation_is_in_the_report_and_its_absence_is_said(copied, monkeypatch):
    monkeypatch.setattr("simulation.report._pictures", lambda *_: [])

    def sections():
        return {section.name: section for section in simulations_report(copied).sections}

    before = sections()
    assert "fed-sim evaluate RUN adds them" in before["evaluation"].text[0]
    assert not before["evaluation"].tables
    assert "held out by grade" not in before["cohort"].tables[0].headings

    document = evaluate_run(copied)
    write_evaluation(document, evaluation_folder(copied))
    assert per_subject_document(copied, "final") == document
    after = sections()
    [table] = after["evaluation"].tables
    rows = {row[0]: row[1:] for row in table.rows}
    assert len(rows) == 9
    values = [s["scores"]["TC"]["dice"] for s in document["subjects"]]
    assert rows["Dice TC"][3] == f"{np.mean(values):.3f}"
    assert rows["Dice TC"][5] == str(len(values))
    of = document["over_sites"]["WT"]["hd95"]
    interval = f"{of['ci_low']:.1f}–{of['ci_high']:.1f}"
    assert rows["HD95 WT"][:3] == [f"{of['mean']:.1f}", interval, "3"]
    assert "lesion-wise Dice ET" in rows
    text = " ".join([*after["evaluation"].text, *after["evaluation"].remarks])
    worst = document["fairness"]["sites"]["regions"]["worst"]
    assert f"{worst['site']} {worst['dice']:.3f}" in text
    assert "Grade HGG" in text
    assert "Tumours up to" in text
    assert document["remarks"][0] in text
    [cohort] = after["cohort"].tables
    grades = {row[0]: row[-1] for row in cohort.rows}
    n = {site: of["n"] for site, of in document["sites"].items()}
    assert grades["site-13"] == f"{n['site-13']} LGG"
    assert grades["all"] == f"{n['site-01'] + n['site-06']} HGG, {n['site-13']} LGG"
    same = before["spread"].tables[0].rows, after["spread"].tables[0].rows
    assert same[0] == same[1], "the subjects' scores are the run's own"


@pytest.mark.parametrize("damage", [None, [], [3], [{"site": "site-01"}], "lacks a region"])
def test_a_damaged_evaluation_leaves_the_subjects_of_the_sites_own_files(
    copied, monkeypatch, damage, log
):
    monkeypatch.setattr("simulation.report._pictures", lambda *_: [])

    def spread():
        sections = simulations_report(copied).sections
        return next(s for s in sections if s.name == "spread").tables[0].rows

    before = spread()
    document = {
        "format": FORMAT,
        "of": "held-out",
        "model": {"sha256": file_sha256(copied / "model.safetensors")},
        "segmentation": segmentation_of(PLAIN),
        "subjects": damage,
    }
    if damage == "lacks a region":
        entry = {"site": "site-01", "subject": "x", "scores": {"WT": {"dice": 1, "iou": 1}}}
        document["subjects"] = [entry]
    assert not log
    folder = evaluation_folder(copied)
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(document))
    assert spread() == before
    if damage != []:
        assert any("kept results of single subjects cannot be read" in line for line in log)


def test_no_run_is_said_in_a_line(tmp_path):
    done = report(tmp_path)
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        f"fed-sim: {tmp_path} holds no run; make one with: fed-sim run DATA --out {tmp_path}"
    ]
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    """Root may write everywhere, so that the answer is made up."""
    (closed := tmp_path / "closed").mkdir()
    monkeypatch.setattr("simulation.report.simulations_report", lambda run: pytest.fail("it began"))
    monkeypatch.setattr("common.files.os.access", lambda place, mode: place != closed)
    done = report(tmp_path, "--out", closed / "page.html")
    assert (done.exit_code, f"{closed}: Permission denied" in done.stderr) == (1, True)
