"""The plan as a table and as a figure: nothing of the document is missing from them."""

from __future__ import annotations

import pytest

from client import privacy_plan
from client.plan_display import plan_table, write_plot
from client.privacy_plan import DROWNS, Cohort, Recipe, plan_document
from common.config_file import load_config
from tests.client.test_privacy_page import printed


@pytest.fixture(scope="module")
def document():
    def quick(patients: int, recipe: Recipe) -> list[Recipe]:
        return [one for one in recipes(patients, recipe) if one.batch is None]

    recipes = privacy_plan._recipes  # small batches take seconds
    recipe = Recipe("this plan", 6, 1, None, 10_000)
    config = load_config(preset="private")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(privacy_plan, "_recipes", quick)
        return plan_document(Cohort(8, 3, "as given"), config, recipe, [8.0, 3.0], None, 8.0)


def test_the_table_has_every_plan(document):
    text = printed(plan_table(document, terminal=False))
    assert text.startswith("8 patients train (as given, 3 more held out), delta 0.0125; 6 rounds")
    for plan in (*document["plans"], *document["compared"]):
        assert f"{plan['noise_to_signal']:.3g}" in text
    assert all(text_ in text for text_ in document["advice"])
    assert max(map(len, text.splitlines())) < 400


@pytest.mark.parametrize(("name", "begins"), [("plan.svg", b"<?xml"), ("plan.PNG", b"\x89PNG")])
def test_plots(document, tmp_path, name, begins):
    write_plot(document, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(begins)
    if name.endswith("svg"):
        assert b"may learn from scratch" in content
        assert b"preset private" in content


def test_what_no_noise_can_pay_for_is_a_row_of_its_own(document):
    numbers = "noise_multiplier", "noise_per_coordinate", "noise_to_signal"
    none = {**dict.fromkeys((*numbers, "noise_to_signal_of_run")), "verdict": DROWNS, "course": []}
    unpaid = {**document["plans"][0], **none, "epsilon": 0.1}
    lines = printed(
        plan_table({**document, "plans": [unpaid], "compared": []}, terminal=False)
    ).splitlines()
    [row] = [line for line in lines if DROWNS in line]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["0.1", *"----", DROWNS]
