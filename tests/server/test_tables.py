"""What people read: every number in a table is the one in the history, and nothing is glossed over."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console, Group
from rich.table import Table

from common.messages import SiteCard
from common.metrics import SiteMetrics
from server.history import Contribution, History, RoundRecord
from server.tables import (
    Verdict,
    average,
    final_table,
    number,
    results_document,
    round_table,
    spans,
    verdict,
)

NAN = math.nan
KEYS = [f"{metric}/{region}" for metric in ("dice", "iou", "hd95") for region in ("WT", "TC", "ET")]


def metrics(n: int, **values: float) -> SiteMetrics:
    """Means by region, `dice_wt=0.5`; those not given count down from 0.9."""
    means = {"loss": 0.4} | {key: 0.9 - i / 100 for i, key in enumerate(KEYS)}
    for name, value in values.items():
        metric, region = name.split("_")
        means[f"{metric}/{region.upper()}"] = value
    return SiteMetrics(n, means, {key: 0 if math.isnan(v) else n for key, v in means.items()})


def a_round(number: int, trained: str, absent: str = "", **more) -> RoundRecord:
    contributions = [Contribution(site, True, "", 0.5, 1.0, 2.0, 100) for site in trained]
    contributions += [Contribution(site, False, f"{site} was off") for site in absent]
    values = {"metrics": {site: metrics(2) for site in trained + absent}} | more
    return RoundRecord(number, 1e-4, 1.5, 0.4, "c", "s", tuple(contributions), **values)


def cells(group: Group) -> list[list[str]]:
    table = group.renderables[-1]
    assert isinstance(table, Table)
    return [list(column) for column in zip(*(c.cells for c in table.columns), strict=True)]


def printed(table: Group) -> str:
    text = StringIO()
    Console(file=text, width=200).print(table)
    return text.getvalue()


def history_of(path, rounds, *, sites="abc", final=None, unmeasured=None) -> History:
    history = History(path / "h")
    history.record_sites([SiteCard(site, True, 5, 2, 0, "f") for site in sites])
    for record in rounds:
        history.record_round(record)
    if final is not None:
        history.record_final(1, final, unmeasured or {})
    return history


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], "none"),
        ([4], "4"),
        ([1, 2], "1-2"),
        ([1, 2, 3, 5, 7, 8], "1-3, 5, 7-8"),
        ([1, 3, 5], "1, 3, 5"),
        ([9, 10, 11], "9-11"),
    ],
)
def test_spans(numbers, text):
    assert spans(numbers) == text


def test_verdict_of_a_complete_run_with_everybody(tmp_path):
    rounds = [a_round(n, "abc") for n in (1, 2)]
    with history_of(tmp_path, rounds, final={"a": metrics(2)}) as history:
        judged = verdict(history)
    assert judged.everyone
    assert judged.lines() == [
        "Training complete: 2 rounds.",
        "  a contributed to every round.",
        "  b contributed to every round.",
        "  c contributed to every round.",
    ]


def test_verdict_names_every_absence_and_its_reason(tmp_path):
    rounds = [
        a_round(1, "ab", "c"),
        a_round(2, "ab", "c", unmeasured={"b": "no answer"}),
        a_round(3, "a", "bc"),
    ]
    unmeasured = {"a": "too slow"}
    with history_of(tmp_path, rounds, final={"b": metrics(2)}, unmeasured=unmeasured) as history:
        judged = verdict(history)
    assert not judged.everyone
    assert judged.lines() == [
        "Training complete: 3 rounds.",
        "  a contributed to every round.",
        "  b contributed to rounds 1-2.",
        "  c contributed to no round.",
        "  Round 1: without c: c was off",
        "  Round 2: without c: c was off",
        "  Round 2: without b: not evaluated: no answer",
        "  Round 3: without b: b was off",
        "  Round 3: without c: c was off",
        "  Round 1: without a: final model not evaluated: too slow",
    ]


def test_verdict_of_a_run_that_stopped_says_where_and_why(tmp_path):
    with history_of(tmp_path, [a_round(1, "abc")]) as history:
        history.record_failure(2, {"b": "the disk is full"})
        lines = verdict(history).lines()
    assert lines[0] == "Training NOT complete: 1 rounds."
    assert lines[-1] == "  Round 2 failed: b: the disk is full"


def test_a_site_with_nothing_to_train_on_or_to_measure_is_named(tmp_path):
    with history_of(tmp_path, [a_round(1, "ab")]) as history:
        cards = {card.site: card for card in history.sites()}
        cards["c"] = replace(cards["c"], trains=False, n_training=0, n_held_out=0)
        history.record_sites(list(cards.values()))
        judged = verdict(history)
    assert judged.idle == ("c",)
    assert list(judged.contributed) == ["a", "b"]
    assert any(line.startswith("  c took no part: nothing to train on") for line in judged.lines())


def test_nobody_contributed_to_every_one_of_no_rounds(tmp_path):
    with history_of(tmp_path, []) as history:
        judged = verdict(history)
    assert judged == Verdict(False, 0, {"a": (), "b": (), "c": ()}, ())
    assert "  a contributed to no round." in judged.lines()


def test_averages_by_hand():
    found = {
        "large": metrics(8, dice_wt=0.9, hd95_et=NAN),
        "small": metrics(2, dice_wt=0.4, hd95_et=6.0),
    }
    assert average(found, "dice/WT", by_subject=False) == pytest.approx((0.9 + 0.4) / 2)
    assert average(found, "dice/WT", by_subject=True) == pytest.approx((8 * 0.9 + 2 * 0.4) / 10)
    # undefined at one site: the other alone
    assert average(found, "hd95/ET", by_subject=False) == pytest.approx(6.0)
    assert average(found, "hd95/ET", by_subject=True) == pytest.approx(6.0)
    assert math.isnan(average(found, "nothing", by_subject=True))
    assert math.isnan(average({}, "dice/WT", by_subject=False))


def test_an_average_over_subjects_counts_those_for_which_it_is_defined():
    """Sensitivity is undefined where a subject has no such tumour: 8 subjects, but 2 defined."""
    found = {
        "a": SiteMetrics(8, {"sensitivity/ET": 0.5}, {"sensitivity/ET": 2}),
        "b": SiteMetrics(2, {"sensitivity/ET": 0.8}, {"sensitivity/ET": 2}),
    }
    assert average(found, "sensitivity/ET", by_subject=True) == pytest.approx(0.65)


def test_final_table_shows_each_site_and_both_means():
    found = {"a": metrics(3, dice_wt=0.9, hd95_et=NAN), "b": metrics(1, dice_wt=0.5, hd95_tc=12.34)}
    rows = {row[0]: row[1:] for row in cells(final_table(7, found))}
    assert rows["a"][0] == "0.900"
    assert rows["a"][8] == "-"  # HD95 of ET
    assert rows["b"][7] == "12.3"
    assert rows["a"][-1] == "3"
    assert rows["mean over sites"][0] == "0.700"
    assert rows["mean over subjects"][0] == "0.800"
    assert rows["mean over subjects"][-1] == "4"
    assert "round 7" in printed(final_table(7, found))
    assert "mean over sites" in printed(final_table(7, {}))


def test_round_table_shows_who_trained_who_did_not_and_who_only_measures():
    record = a_round(
        4,
        "a",
        "b",
        metrics={"a": metrics(2, dice_wt=0.5, dice_tc=0.5, dice_et=0.5), "c": metrics(9)},
    )
    rows = {row[0]: row[1:] for row in cells(round_table(record))}
    assert rows["a"][:2] == ["0.500", "0.500"]
    assert rows["b"][0] == "absent"
    assert rows["b"][1:7] == ["-"] * 6
    assert rows["b"][-2] == "0"
    assert rows["c"][0] == "-"
    assert rows["c"][1] == "0.900"
    text = printed(round_table(record))
    assert "Round 4: Dice 0.695 (mean over sites), worst 0.500 at a" in text


def test_names_are_printed_as_they_are():
    """Square brackets are rich's mark-up: a folder may be called so, and must not break the table."""
    odd = "[/red] site [bold]1"
    record = a_round(1, "", metrics={odd: metrics(2)})
    assert printed(round_table(record)).count(odd) == 2
    assert odd in printed(final_table(1, {odd: metrics(2)}))


def test_numbers():
    assert [number(v) for v in (0.12345, None, NAN, 0.0)] == ["0.123", "-", "-", "0.000"]
    assert number(12.35, 1) == "12.3"


def strict(document: object) -> dict:
    return json.loads(json.dumps(document, allow_nan=False))


def test_results_document_is_json_and_holds_what_the_history_holds(tmp_path):
    rounds = [
        a_round(1, "ab", "c", metrics={"a": metrics(2, hd95_et=NAN), "b": metrics(1)}),
        a_round(2, "abc", unmeasured={"b": "no answer"}),
    ]
    final = {"a": metrics(2, hd95_et=NAN)}
    with history_of(tmp_path, rounds, final=final) as history:
        document = strict(results_document(history))
    assert document["verdict"]["complete"] is True
    assert document["verdict"]["everyone"] is False
    assert document["verdict"]["contributed"] == {"a": [1, 2], "b": [1, 2], "c": [2]}
    assert document["verdict"]["absent"][0] == [1, "c", "c was off"]
    assert [site["site"] for site in document["sites"]] == ["a", "b", "c"]
    first = document["rounds"][0]
    assert first["metrics"]["a"]["means"]["hd95/ET"] is None
    assert first["metrics"]["a"]["defined"]["hd95/ET"] == 0
    assert first["metrics"]["b"]["means"]["hd95/ET"] == pytest.approx(0.82)
    assert first["mean_dice"] == pytest.approx(0.89)
    assert first["worst_site"] in ("a", "b")
    assert first["contributions"][2]["reason"] == "c was off"
    assert document["rounds"][1]["unmeasured"] == {"b": "no answer"}
    assert document["final"]["round"] == 1
    assert document["final"]["mean_dice"] == {"a": pytest.approx(0.89)}
    assert document["final"]["metrics"]["a"]["means"]["hd95/ET"] is None


def test_results_document_of_a_run_that_stopped(tmp_path):
    with history_of(tmp_path, []) as history:
        history.record_failure(1, {"b": "the disk is full"})
        document = strict(results_document(history))
    assert document["final"] is None
    assert document["rounds"] == []
    assert document["verdict"]["stopped"] == [[1, "b", "the disk is full"]]


# --------------------------------------------------------------- metrics that a site keeps or noises

PRIVATE = {"a": "withheld", "b": "noised"}


def noised(n: int, dice: float) -> SiteMetrics:
    return SiteMetrics(n, {f"dice/{region}": dice for region in ("WT", "TC", "ET")}, {})


def a_private_round(number: int) -> RoundRecord:
    record = a_round(number, "abc", metrics={"b": noised(3, 0.25), "c": metrics(2)})
    return replace(record, unmeasured={"a": "it withholds"}, released=PRIVATE)


def test_who_withholds_is_said_once_and_is_no_absence(tmp_path):
    history = history_of(tmp_path, [a_private_round(1), a_private_round(2)])
    history.record_final(1, {}, {"c": "too slow", "a": "it withholds"}, {"a": "withheld"})
    with history:
        judged = verdict(history)
        document = strict(results_document(history))
    assert judged.absent == ((1, "c", "final model not evaluated: too slow"),)
    assert judged.lines() == [
        "Training complete: 2 rounds.",
        "  a contributed to every round.",
        "  b contributed to every round.",
        "  c contributed to every round.",
        "  a withholds its metrics.",
        "  b releases its metrics with noise.",
        "  Round 1: without c: final model not evaluated: too slow",
    ]
    assert document["verdict"]["withheld"] == ["a"]
    assert document["rounds"][0]["released"] == PRIVATE
    assert document["final"] == {
        "round": 1,
        "mean_dice": {},
        "metrics": {},
        "released": {"a": "withheld"},
    }


def test_who_withholds_at_the_end_only_is_no_absence_either(tmp_path):
    history = history_of(tmp_path, [a_round(1, "abc")])
    history.record_final(1, {"b": metrics(2)}, {"a": "it withholds"}, {"a": "withheld"})
    with history:
        judged = verdict(history)
    assert judged.everyone
    assert judged.withheld == ("a",)


def test_tables_show_what_is_withheld_or_noised():
    record = a_private_round(3)
    rows = {row[0]: row[1:] for row in cells(round_table(record))}
    assert rows["a"][1:-1] == ["-"] * 6 + ["withheld"]
    assert rows["b"][1:-1] == ["0.250"] * 3 + ["-"] * 3 + ["3 noised"]
    assert rows["c"][-2] == "2"
    final = {row[0]: row[1:] for row in cells(final_table(3, record.metrics, PRIVATE))}
    assert final["a"] == ["-"] * 9 + ["withheld"]
    assert final["b"] == ["0.250"] * 3 + ["-"] * 6 + ["3 noised"]
    assert final["mean over sites"][-1] == "5"


def test_a_round_of_which_nobody_tells_metrics_or_a_loss():
    record = replace(
        a_round(3, "ab", metrics={}), loss=None, released=dict.fromkeys("ab", "withheld")
    )
    text = printed(round_table(record))
    assert "Round 3: no site releases its metrics, 1.5 s" in text
    only_noised = replace(record, metrics={"a": noised(3, 0.25)})
    text = printed(round_table(only_noised))
    assert "Round 3: Dice 0.250 (mean over sites), worst 0.250 at a, 1.5 s" in text


def test_an_update_without_loss_and_time_is_shown_as_untold():
    record = replace(a_round(1, "a"), contributions=(Contribution("a", True),))
    (row,) = cells(round_table(record))
    assert (row[1], row[-1]) == ("-", "-")
