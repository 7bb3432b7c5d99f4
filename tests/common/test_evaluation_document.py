"""An evaluation as files and on a terminal: nothing is lost, nothing is NaN, no name draws."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from common.evaluation_document import (
    FORMAT,
    EvaluationError,
    evaluation_document,
    read_evaluation,
    results_in,
    subjects_csv,
    summary_csv,
    write_evaluation,
)
from common.evaluation_table import evaluation_tables
from tests.common.made_results import RESULTS, result

MODEL = {"file": "model.safetensors", "sha256": "ab" * 32}


def document(results=RESULTS, **more):
    plain = {"flips": False, "postprocess": {"fill_holes": False}}
    settings = {"model": MODEL, "of": "held-out", "confidence": 0.95, "segmentation": plain}
    settings["label_coding"] = "auto"
    return evaluation_document(results, **{**settings, **more})


@pytest.fixture(scope="module")
def whole():
    return document()


def shown(of) -> str:
    console = Console(width=10_000, file=io.StringIO(), highlight=False)
    console.print(evaluation_tables(of))
    return console.file.getvalue()


def test_what_is_written_is_read_back(tmp_path):
    written = document(remarks=["A remark."], left_out=[{"site": "a", "subject": "x", "why": "y"}])
    paths = write_evaluation(written, tmp_path / "new" / "out")
    assert [path.name for path in paths] == ["evaluation.json", "subjects.csv", "summary.csv"]
    read = read_evaluation(paths[0])
    assert read == written
    assert read["format"] == FORMAT
    assert "not a medical device" in read["note"]
    # NaN differs from itself, so the texts are compared
    assert repr(results_in(read)) == repr(RESULTS)
    assert "NaN" not in paths[0].read_text()


def test_undefined_is_null_and_an_empty_cell(whole):
    of = whole
    [a1] = [s for s in of["subjects"] if s["subject"] == "a1"]
    assert a1["scores"]["ET"]["precision"] is None
    rows = list(csv.DictReader(io.StringIO(subjects_csv(of))))
    [cell] = [
        row["value"]
        for row in rows
        if (row["subject"], row["structure"], row["metric"]) == ("a1", "ET", "precision")
    ]
    assert cell == ""


def test_the_tables_hold_every_number_of_the_document(whole):
    of = whole
    rows = list(csv.DictReader(io.StringIO(subjects_csv(of))))
    assert len(rows) == len(RESULTS) * (5 * 6 + 3 * 2)
    assert rows[0].keys() == {
        *("site", "subject", "patient", "grade", "tumour_ml", "structure", "metric", "value")
    }
    for row in rows:
        [subject] = [s for s in of["subjects"] if s["subject"] == row["subject"]]
        value = subject["scores"][row["structure"]][row["metric"]]
        assert row["value"] == ("" if value is None else str(value))
    summary = list(csv.DictReader(io.StringIO(summary_csv(of))))
    groups = {(row["group"], row["name"]) for row in summary}
    assert groups == {
        *(("site", site) for site in "abc"),
        *(("pooled", ""), ("over_sites", "")),
        *(("grade", grade) for grade in ("HGG", "LGG", "unknown")),
        *(("size", size) for size in ("small", "medium", "large")),
    }
    [row] = [r for r in summary if (r["name"], r["structure"], r["metric"]) == ("b", "WT", "dice")]
    assert float(row["ci_high"]) == of["sites"]["b"]["WT"]["dice"]["ci_high"]


def test_a_terminal_says_it_all_in_words(whole):
    text = shown({**whole, "left_out": [{"site": "a", "subject": "x", "why": "is damaged"}]})
    assert "│ b │ 0.700 (0.50–0.90) │" in " ".join(text.split())
    assert "Worst site by Dice WT: a 0.500; best c 0.800; spread 0.300" in text
    assert "Grade LGG: Dice WT 0.650, TC 0.550, ET 0.450 (2 subjects)." in text
    assert "(large): Dice WT 0.750" in text
    assert "Left out: x of a: is damaged." in text
    assert "For research; not a medical device." in text
    alone = shown(document(RESULTS[:3]))
    assert "Only one site" in alone
    assert "mean over sites" not in alone


def test_names_are_shown_as_they_are_and_cannot_draw():
    of = document([result("[red]x[/red]", "s\x1b[2J", 0.5), result("[/]", "\n", 0.5)])
    text = shown(of)
    assert "[red]x[/red]" in text
    assert "\x1b" not in text
    assert json.loads(json.dumps(of, allow_nan=False))["sites"].keys() == {"[red]x[/red]", "[/]"}
    rows = list(csv.DictReader(io.StringIO(subjects_csv(of))))
    assert {row["subject"] for row in rows} == {"s?[2J", "?"}


def test_no_name_is_a_formula_in_a_spreadsheet_and_numbers_stay_numbers():
    names = ["=HYPERLINK(1)", "+1", "@x", "-x", "a=b", "pat\udcff", " =1"]
    of = document(
        [replace(result(n, n, 0.1, patient=n, grade="=G"), tumour_ml=-1.5) for n in names]
    )
    shown_as = {"'=HYPERLINK(1)", "'+1", "'@x", "'-x", "a=b", "pat?", "' =1"}
    rows = list(csv.DictReader(io.StringIO(subjects_csv(of))))
    for column in ("site", "subject", "patient"):
        assert {row[column] for row in rows} == shown_as
    assert {row["grade"] for row in rows} == {"'=G"}
    assert {row["tumour_ml"] for row in rows} == {"-1.5"}
    assert min(float(row["value"]) for row in rows) == pytest.approx(0.1 - 0.2)
    summary = list(csv.DictReader(io.StringIO(summary_csv(of))))
    assert {row["name"] for row in summary if row["group"] == "site"} == shown_as
    assert subjects_csv(of).encode()  # no half character is left


def test_a_score_that_nobody_has_is_a_dash():
    results = [result("a", "a1", 0.5, hd95=math.nan)]
    assert "- │" in shown(document(results))


def test_what_is_no_evaluation_is_refused_in_words(tmp_path):
    for text in ("", "{}", '{"format": "other/1"}', "[1]"):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(EvaluationError, match="evaluate again"):
            read_evaluation(tmp_path / "evaluation.json")
    with pytest.raises(EvaluationError, match="No such file"):
        read_evaluation(tmp_path / "gone.json")
