"""The report's part about an evaluation, from documents in every state."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.evaluation_document import evaluation_document
from simulation.report_evaluation import DAMAGED, evaluation_section, held_out_grades
from tests.common.made_results import RESULTS


def document(results=RESULTS):
    return evaluation_document(
        results,
        model={"file": "m", "sha256": "0"},
        of="held-out",
        segmentation={},
        label_coding="auto",
        confidence=0.9,
        remarks=["Remember."],
    )


def test_grades_of_each_site_are_counted_and_nothing_is_said_where_none_is_known():
    assert held_out_grades(document()) == {
        "a": {"LGG": 1, "unknown": 1},
        "b": {"HGG": 2, "LGG": 1},
        "c": {"HGG": 1},
    }
    assert held_out_grades(document([replace(r, grade=None) for r in RESULTS])) == {}
    assert held_out_grades(None) == {}
    assert held_out_grades({"subjects": [3]}) == {}


def test_one_subject_has_no_interval_and_one_site_no_spread():
    section = evaluation_section(document(RESULTS[:1]))
    assert section.tables[0].rows[0] == ["Dice WT", "0.900", "-", "1", "0.900", "-", "1"]
    assert section.text[0] == "Only one site: no spread between sites."
    assert "90%" in section.tables[0].caption
    assert section.remarks[-1] == "Remember."


@pytest.mark.parametrize(
    "damage", [{"over_sites": {}}, {"fairness": None}, {"confidence": "x"}, {"remarks": None}]
)
def test_a_damaged_evaluation_is_said(damage):
    section = evaluation_section(document() | damage)
    assert list(section.text) == [DAMAGED]
    assert not section.tables
