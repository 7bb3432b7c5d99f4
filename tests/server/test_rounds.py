"""Rounds with scripted hospitals: who counts, what is averaged, and what a restart continues."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.app.error import Error
from rich.console import Console

from common.config_file import ConfigError
from common.message_words import BUDGET_SPENT, NOISED, POLICY_REFUSED, WITHHELD
from common.messages import SiteReport, SiteUpdate, pack_site_update
from common.metrics import SiteMetrics, mean_dice
from common.model import initial_weights
from common.statement import Signed, Statement
from common.weights import BadWeights, Weights, file_sha256, load_weights, save_weights
from common.wire import encode, encode_change
from server.checkpoint import load_checkpoint, load_to_continue
from server.exchange import PolicyRefused
from server.history import FINAL as AT_THE_END
from server.history import METRICS, TRAINING, History
from server.roll_call import FederationFailed, Roll
from server.tables import results_json, round_table, verdict
from tests.server.conftest import EVALUATE, FINAL, TRAIN, measured, trained


def expected_rounds(federation, rounds: int, absent: frozenset[tuple[str, int]] = frozenset()):
    """The global weights after each round, by a float64 mean written out."""
    weights = initial_weights(federation.config)
    after: list[Weights] = []
    rate = federation.config.training.learning_rate
    for number in range(1, rounds + 1):
        present = [card for s, card in federation.sites.items() if (s, number) not in absent]
        total = sum(card.n_training for card in present)
        updates = [(c.n_training, trained(weights, c.site, number, rate)) for c in present]
        mean = {}
        for name, tensor in weights.items():
            exact = torch.zeros(tensor.shape, dtype=torch.float64)
            for n, update in updates:
                exact += update[name].double() * n / total
            mean[name] = (exact if tensor.is_floating_point() else exact.round()).to(tensor.dtype)
        weights = mean
        after.append(weights)
    return after


def saved_bytes(federation) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(federation.folder.path.rglob("*.safetensors"))
    }


def every_checkpoint(federation, on_round=lambda record: None) -> list[str]:
    """Run, and return each round's sha256 as recorded."""
    federation.run(on_round)
    return [record.sha256 for record in federation.rounds()]


def in_history(federation, ask: Callable[[History], Any]) -> Any:
    with History(federation.folder.history) as history:
        return ask(history)


def without_times(federation) -> str:
    return repr([replace(record, seconds=0.0) for record in federation.rounds()])


def test_rounds_are_fedavg_and_all_of_it_is_recorded(federation):
    f = federation()
    seen = []
    f.run(lambda record: seen.append((record.round, load_round(f, record))))
    for (number, weights), exact in zip(seen, expected_rounds(f, 3), strict=True):
        for name, tensor in exact.items():
            assert weights[name].dtype == tensor.dtype, name
            np.testing.assert_allclose(weights[name], tensor, rtol=0, atol=1e-6, err_msg=name)
        record = f.rounds()[number - 1]
        assert [c.site for c in record.contributions] == ["a", "bb", "ccc"]
        assert all(c.trained and c.train_loss == 0.25 for c in record.contributions)
        assert {c.bytes for c in record.contributions} == {len(encode(weights))}
        for site, n in {"a": 2, "bb": 1, "ccc": 4}.items():
            assert record.metrics[site].means == measured(weights, site, n, final=False).means
        losses = [(m.means["loss"], m.n) for m in record.metrics.values()]
        assert record.loss == pytest.approx(sum(loss * n for loss, n in losses) / 7)
    counter = next(name for name in weights if name.endswith("num_batches_tracked"))
    assert weights[counter].dtype == torch.int64
    assert int(weights[counter]) > 0


def load_round(federation, record) -> Weights:
    return load_checkpoint(federation.folder, record.round, record.sha256)


def test_the_end_measures_the_chosen_model_with_surface_distances(federation):
    f = federation()
    f.run()
    number, metrics = in_history(f, lambda history: history.final())
    records = f.rounds()
    assert number == max(records, key=lambda r: r.mean_dice).round
    weights, about = load_weights(f.folder.model)
    assert about["round"] == number
    assert about["sites"] == ["a", "bb", "ccc"]
    for site, n in {"a": 2, "bb": 1, "ccc": 4}.items():
        expected = measured(weights, site, n, final=True)
        assert repr(metrics[site]) == repr(expected)
    assert metrics["a"].means["hd95/WT"] > 0
    _, worst = load_weights(f.folder.model_worst_site)
    assert worst["round"] == max(records, key=lambda r: r.worst[1]).round
    assert in_history(f, verdict).everyone


def test_the_order_of_nodes_does_not_matter(federation):
    orders = (["a", "bb", "ccc"], ["ccc", "a", "bb"], ["bb", "ccc", "a"])
    runs = []
    for n, order in enumerate(orders):
        f = federation(folder=f"run{n}")
        f.run(nodes=dict(enumerate(order, start=10)))
        runs.append((saved_bytes(f), without_times(f)))
    assert runs[0] == runs[1] == runs[2]


def with_first(update: SiteUpdate, change: Callable[[torch.Tensor], torch.Tensor]) -> SiteUpdate:
    name = min(name for name, t in update.weights.items() if t.is_floating_point())
    return replace(update, weights={**update.weights, name: change(update.weights[name])})


def with_block(update: SiteUpdate, block: bytes) -> RecordDict:
    """An update whose weights are these bytes."""
    content = pack_site_update(update)
    content["weights"] = ArrayRecord({"weights": Array("uint8", (9,), "safetensors", block)})
    return content


def garbled(update: SiteUpdate) -> RecordDict:
    return with_block(update, encode(update.weights)[:-9])


def changed_by(update: SiteUpdate, factor: float) -> SiteUpdate:
    """Far away from what it was, all values finite."""
    weights = {n: t * factor if t.is_floating_point() else t for n, t in update.weights.items()}
    return replace(update, weights=weights)


def stating(answer: Any, **changes: Any) -> Any:
    """The update or report with a privacy statement of its own site and round, except for `changes`."""
    about = {"site": answer.site, "round": answer.round, "private": True, "metrics": "exact"}
    stated = Statement("3f" * 16, code="c0de", at="2026-11-25", **about | changes)
    return replace(answer, statement=Signed(stated.text(), b"a signature"))


BAD_UPDATES: dict[str, tuple[Callable[[SiteUpdate], Any], str]] = {
    "error": (lambda u: "CUDA out of memory", "CUDA out of memory"),
    "error without reason": (lambda u: Error(code=3), "failed without a reason"),
    "NaN": (lambda u: with_first(u, lambda t: t * math.nan), "not finite"),
    "infinite": (lambda u: with_first(u, lambda t: t / 0), "not finite"),
    "shape": (lambda u: with_first(u, lambda t: t[None]), "expected torch.float32"),
    "dtype": (lambda u: with_first(u, lambda t: t.double()), "torch.float64"),
    "missing tensor": (lambda u: replace(u, weights=dict([*u.weights.items()][1:])), "lacks 1"),
    "another site": (lambda u: replace(u, site="a"), "from a for round"),
    "another round": (lambda u: replace(u, round=u.round + 1), "for round"),
    "more subjects": (lambda u: replace(u, n_training=1000), "1000 subjects but announced 10"),
    "NaN loss": (lambda u: replace(u, loss=math.nan), "loss"),
    "infinite loss": (lambda u: replace(u, loss=math.inf), "loss"),
    "infinite time": (lambda u: replace(u, seconds=math.inf), "time"),
    "statement of another site": (
        lambda u: stating(u, site="a"),
        "its privacy statement is from a for round",
    ),
    "statement of another round": (lambda u: stating(u, round=99), "for round 99"),
    "no statement": (lambda u: replace(u, statement=Signed("{}")), "privacy statement"),
    "empty": (lambda u: RecordDict(), "no ConfigRecord"),
    "garbled": (garbled, "cannot be decoded"),
    "huge": (lambda u: changed_by(u, 1e6), "times as large as the model (limit: 100)"),
    "largest": (lambda u: changed_by(u, 1e37), "times as large as the model (limit: 100)"),
}


@pytest.mark.parametrize("kind", ["error", "NaN", "more subjects", "garbled"])
def test_by_default_one_bad_update_fails_the_round_and_keeps_those_before(federation, kind):
    spoil, said = BAD_UPDATES[kind]
    f = federation("rounds.number=2")
    f.spoil[TRAIN, "bb", 2] = spoil
    with pytest.raises(FederationFailed) as caught:
        f.run()
    assert "Round 2 failed: 2 sites could train, 3 are needed" in str(caught.value)
    assert "bb: " in str(caught.value)
    assert said in str(caught.value)
    assert "  a: " not in str(caught.value)
    assert [record.round for record in f.rounds()] == [1]
    assert list(saved_bytes(f)) == ["round-0001.safetensors"]
    judged = in_history(f, verdict)
    assert not judged.complete
    assert [(n, site) for n, site, _ in judged.stopped] == [(2, "bb")]
    assert said in judged.stopped[0][2]


def test_with_min_sites_the_others_go_on_and_the_verdict_says_so(federation):
    """One run, in each round of which bb sends another bad update; in the last a good one."""
    bad = list(BAD_UPDATES.values())
    last = len(bad) + 1
    f = federation("rounds.min_sites=2", f"rounds.number={last}", "rounds.plateau_patience=null")
    for number, (spoil, _) in enumerate(bad, start=1):
        f.spoil[TRAIN, "bb", number] = spoil
    after: list[Weights] = []
    f.run(lambda record: after.append(load_round(f, record)))
    absent = frozenset(("bb", number) for number in range(1, last))
    for weights, exact in zip(after, expected_rounds(f, last, absent), strict=True):
        for name, tensor in exact.items():
            np.testing.assert_allclose(weights[name], tensor, rtol=0, atol=1e-5, err_msg=name)
    judged = in_history(f, verdict)
    assert judged.complete
    assert not judged.everyone
    everything = tuple(range(1, last + 1))
    assert judged.contributed == {"a": everything, "bb": (last,), "ccc": everything}
    for (number, site, reason), (_, said) in zip(judged.absent, bad, strict=True):
        assert (site, judged.absent[number - 1][2]) == ("bb", reason)
        assert said in reason
        assert f"  Round {number}: without bb: {reason}" in judged.lines()


SPENT = "its privacy budget is spent: epsilon 7.9 of 8."


def spent(answer: Any) -> Error:
    return Error(code=BUDGET_SPENT, reason=SPENT)


def test_a_site_that_can_pay_no_more_rests_and_the_round_goes_on_without_it(federation):
    f = federation("rounds.number=2")
    f.spoil[TRAIN, "bb", 2] = spent
    f.run()
    judged = in_history(f, verdict)
    assert judged.complete
    assert judged.contributed == {"a": (1, 2), "bb": (1,), "ccc": (1, 2)}
    assert judged.absent == ((2, "bb", SPENT),)
    assert "bb" in f.rounds()[1].metrics, "it goes on evaluating"


RULE = "bb: policy rule `max_hours`: the task took longer than 2 hours."


def test_a_site_that_refuses_by_its_policy_is_shown_and_the_federation_goes_on(federation):
    f = federation("rounds.number=3", "rounds.plateau_patience=null")
    refused = Error(code=POLICY_REFUSED, reason=RULE)
    f.spoil[TRAIN, "bb", 2] = f.spoil[EVALUATE, "bb", 2] = lambda answer: refused
    for number in (1, 2, 3):
        f.spoil[FINAL, "ccc", number] = lambda answer: refused
    f.run()
    judged = in_history(f, verdict)
    assert judged.complete
    assert judged.contributed == {"a": (1, 2, 3), "bb": (1, 3), "ccc": (1, 2, 3)}
    assert judged.absent[0] == (2, "bb", RULE)
    second = f.rounds()[1]
    assert [(c.trained, c.reason) for c in second.contributions if c.site == "bb"] == [
        (False, RULE)
    ]
    assert second.unmeasured["bb"] == RULE
    assert "ccc" not in in_history(f, lambda history: history.final())[1]


def test_a_policy_does_not_lower_a_number_of_sites_nor_leave_nobody(federation):
    f = federation("rounds.number=1", "rounds.min_sites=3")
    refused = Error(code=POLICY_REFUSED, reason=RULE)
    f.spoil[TRAIN, "bb", 1] = lambda answer: refused
    with pytest.raises(FederationFailed, match="2 sites could train, 3 are needed"):
        f.run()
    g = federation("rounds.number=1", folder="two")
    for site in ("a", "bb", "ccc"):
        g.spoil[TRAIN, site, 1] = lambda answer: refused
    with pytest.raises(FederationFailed, match="0 sites could train, 1 are needed"):
        g.run()


def test_a_run_in_which_a_site_rests_can_be_continued_any_number_of_times(federation):
    f = federation("rounds.number=2")
    f.spoil[TRAIN, "a", 2] = lambda update: "the disk is full"
    with pytest.raises(FederationFailed, match="the disk is full"):
        f.run()
    f.spoil.clear()
    f.sites["bb"] = replace(f.sites["bb"], trains=False, resting=SPENT)
    for _ in range(3):
        f.run()
    assert in_history(f, verdict).contributed == {"a": (1, 2), "bb": (1,), "ccc": (1, 2)}


def test_a_site_that_rests_is_none_of_the_least_number_of_sites(federation):
    f = federation("rounds.number=2", "rounds.min_sites=3")
    f.spoil[TRAIN, "bb", 2] = spent
    with pytest.raises(FederationFailed) as caught:
        f.run()
    assert "Round 2 failed: 2 sites could train, 3 are needed" in str(caught.value)
    assert f"bb: {SPENT}" in str(caught.value)
    g = federation("rounds.number=2", "rounds.min_sites=2", folder="two")
    g.spoil[TRAIN, "bb", 2] = spent
    g.run()
    assert len(g.rounds()) == 2


def test_when_nobody_can_pay_any_more_the_rounds_so_far_are_the_result(federation, caplog):
    f = federation("rounds.number=4")
    for site in ("a", "bb", "ccc"):
        f.spoil[TRAIN, site, 3] = spent
    f.run()
    assert [record.round for record in f.rounds()] == [1, 2]
    assert f.folder.model.exists()
    judged = in_history(f, verdict)
    said = "every site that could train has spent its privacy budget"
    assert judged.complete
    assert judged.lines()[0] == f"Training complete: 2 rounds. It ended there: {said}."
    assert "training ends after round 2 of 4" in caplog.text
    assert f"bb: {SPENT}" in caplog.text
    before = saved_bytes(f)
    f.spoil.clear()  # a finished run stays as it is, also if budgets were raised
    f.run()
    assert [record.round for record in f.rounds()] == [1, 2]
    assert saved_bytes(f) == before


def test_when_too_few_can_pay_for_the_aggregation_the_rounds_so_far_are_the_result(federation):
    f = federation("rounds.number=3", "rounds.aggregation=median")
    f.spoil[TRAIN, "bb", 2] = spent
    with pytest.raises(FederationFailed, match=r"needed for rounds\.aggregation: median"):
        f.run()
    f.spoil.clear()
    f.sites["bb"] = replace(f.sites["bb"], trains=False, resting=SPENT)
    f.run()
    assert [record.round for record in f.rounds()] == [1]
    assert f.folder.model.exists()
    said = "fewer than the 3 sites that are needed have a privacy budget left"
    assert f"It ended there: {said}." in in_history(f, verdict).lines()[0]


def test_an_end_that_was_not_reached_is_forgotten_when_budgets_are_raised(federation):
    f = federation("rounds.number=4")
    for site in ("a", "bb", "ccc"):
        f.spoil[TRAIN, site, 3] = spent
    f.spoil[FINAL, "a", 2] = f.spoil[FINAL, "a", 1] = lambda report: "the disk is full"
    with pytest.raises(FederationFailed, match="the disk is full"):
        f.run()
    assert "It ended there" in in_history(f, verdict).lines()[0]
    f.spoil.clear()
    f.run()
    assert in_history(f, verdict).lines()[0] == "Training complete: 4 rounds."


def test_when_nobody_can_pay_for_the_first_round_it_fails(federation):
    f = federation()
    for site in ("a", "bb", "ccc"):
        f.spoil[TRAIN, site, 1] = spent
    with pytest.raises(FederationFailed, match=r"No site can train: a: its privacy budget"):
        f.run()


def test_one_spent_and_one_missing_is_a_failed_round(federation):
    f = federation()
    f.spoil[TRAIN, "a", 1] = f.spoil[TRAIN, "bb", 1] = spent
    f.spoil[TRAIN, "ccc", 1] = lambda update: "the disk is full"
    with pytest.raises(FederationFailed, match=r"0 sites could train, 1 are needed"):
        f.run()


def test_fewer_than_min_sites_fail_and_every_one_is_named(federation):
    f = federation("rounds.min_sites=2")
    f.spoil[TRAIN, "a", 1] = f.spoil[TRAIN, "ccc", 1] = lambda update: "the disk is full"
    with pytest.raises(FederationFailed) as caught:
        f.run()
    assert "1 sites could train, 2 are needed" in str(caught.value)
    assert "a: the disk is full" in str(caught.value)
    assert "ccc: the disk is full" in str(caught.value)
    assert f.rounds() == []


def with_means(report: SiteReport, **means: float) -> SiteReport:
    changed = report.metrics.means | {k.replace("__", "/"): v for k, v in means.items()}
    return replace(report, metrics=SiteMetrics(report.metrics.n, changed, report.metrics.defined))


def without(report: SiteReport, key: str) -> SiteReport:
    means = {k: v for k, v in report.metrics.means.items() if k != key}
    return replace(report, metrics=SiteMetrics(report.metrics.n, means, report.metrics.defined))


def with_n(report: SiteReport, n: int) -> SiteReport:
    defined = {key: min(count, n) for key, count in report.metrics.defined.items()}
    return replace(report, metrics=SiteMetrics(n, report.metrics.means, defined))


def noised(report: SiteReport) -> SiteReport:
    means = {key: v for key, v in report.metrics.means.items() if key.startswith("dice/")}
    metrics = SiteMetrics(report.metrics.n, means, report.metrics.defined)
    return replace(report, metrics=metrics, released=NOISED, seconds=None)


def withheld(report: SiteReport) -> SiteReport:
    metrics = SiteMetrics(report.metrics.n, {}, {})
    return replace(report, metrics=metrics, released=WITHHELD, seconds=None)


BAD_REPORTS: dict[str, tuple[Callable[[SiteReport], Any], str]] = {
    "error": (lambda r: "CUDA out of memory", "CUDA out of memory"),
    "NaN loss": (lambda r: with_means(r, loss=math.nan), "validation loss"),
    "NaN Dice": (lambda r: with_means(r, dice__WT=math.nan), "metrics"),
    "no Dice": (lambda r: without(r, "dice/TC"), "metrics"),
    "Dice of 5": (lambda r: with_means(r, dice__WT=5.0), "metrics"),
    "infinite HD95": (lambda r: with_means(r, iou__WT=math.inf), "metrics"),
    "other subjects": (lambda r: with_n(r, 40), "40 subjects but announced 4"),
    "another site": (lambda r: replace(r, site="a"), "from a for round"),
    "another round": (lambda r: replace(r, round=99), "for round 99"),
    "empty": (lambda r: RecordDict(), "no ConfigRecord"),
    "noised and more": (lambda r: replace(r, released=NOISED), "noised metrics are not dice/ET"),
    "noised, too few": (lambda r: without(noised(r), "dice/ET"), "noised metrics are not dice/ET"),
    "noised above 1": (lambda r: with_means(noised(r), dice__WT=1.01), "between 0 and 1"),
    "noised below 0": (lambda r: with_means(noised(r), dice__WT=-0.01), "between 0 and 1"),
    "noised NaN": (lambda r: with_means(noised(r), dice__TC=math.nan), "between 0 and 1"),
    "noised, other subjects": (lambda r: with_n(noised(r), 3), "3 subjects but announced 4"),
    "withheld, other subjects": (lambda r: with_n(withheld(r), 3), "3 subjects but announced 4"),
    "withheld, some told": (
        lambda r: replace(r, released=WITHHELD),
        "not released in one of the agreed ways",
    ),
    "statement of another site": (lambda r: stating(r, site="a"), "statement is from a for round"),
    "statement of another round": (lambda r: stating(withheld(r), round=99), "for round 99"),
}


@pytest.mark.parametrize("kind", ["error", "NaN loss"])
def test_by_default_one_bad_report_fails_the_round(federation, kind):
    spoil, said = BAD_REPORTS[kind]
    f = federation()
    f.spoil[EVALUATE, "ccc", 2] = spoil
    with pytest.raises(FederationFailed) as caught:
        f.run()
    assert "Round 2 failed: 2 sites could evaluate, 3 are needed" in str(caught.value)
    assert "ccc: " in str(caught.value)
    assert said in str(caught.value)
    assert [record.round for record in f.rounds()] == [1]


def test_with_min_sites_a_bad_report_is_left_out_and_told(federation):
    bad = list(BAD_REPORTS.values())
    f = federation("rounds.min_sites=2", f"rounds.number={len(bad) + 1}")
    for number, (spoil, _) in enumerate(bad, start=1):
        f.spoil[EVALUATE, "ccc", number] = spoil
    f.run()
    reporting = [sorted(record.metrics) for record in f.rounds()]
    assert reporting == [["a", "bb"]] * len(bad) + [["a", "bb", "ccc"]]
    judged = in_history(f, verdict)
    assert [(n, site) for n, site, _ in judged.absent] == [
        (n, "ccc") for n in range(1, len(bad) + 1)
    ]
    for (_, _, reason), (_, said) in zip(judged.absent, bad, strict=True):
        assert said in reason
    assert not judged.everyone


def test_a_round_without_the_worst_site_is_not_chosen_for_looking_better(federation):
    f = federation("rounds.min_sites=2")
    dices = {"a": 0.8, "bb": 0.8, "ccc": 0.1}
    for (site, dice), number in ((pair, n) for pair in dices.items() for n in (1, 2, 3)):
        value = dice + number / 100
        f.spoil[EVALUATE, site, number] = lambda r, value=value: with_means(
            r, dice__WT=value, dice__TC=value, dice__ET=value
        )
    f.spoil[EVALUATE, "ccc", 2] = lambda report: "the machine is off"
    f.run()
    assert max(f.rounds(), key=lambda r: r.mean_dice).round == 2
    assert load_weights(f.folder.model)[1]["round"] == 3
    assert load_weights(f.folder.model_worst_site)[1]["round"] == 3


def test_best_by_mean_and_by_worst_site_are_kept_and_the_rest_is_pruned(federation):
    f = federation("rounds.number=5")
    by_round = {1: (0.5, 0.5), 2: (0.9, 0.2), 3: (0.4, 0.6), 4: (0.9, 0.2), 5: (0.3, 0.3)}
    for number, (of_a, of_others) in by_round.items():
        for site in f.sites:
            value = of_a if site == "a" else of_others
            f.spoil[EVALUATE, site, number] = lambda r, value=value: with_means(
                r, dice__WT=value, dice__TC=value, dice__ET=value
            )
    kept = []
    f.run(lambda record: kept.append(sorted(p.name for p in f.folder.path.glob("checkpoints/*"))))
    # mean over sites: 0.5, 0.433, 0.533, 0.433, 0.3; worst: 0.5, 0.2, 0.4, 0.2, 0.3
    rounds = [[int(name[6:10]) for name in names] for names in kept]
    assert rounds == [[1], [1, 2], [1, 3], [1, 3, 4], [1, 3, 5]]
    assert load_weights(f.folder.model)[1]["round"] == 3
    assert load_weights(f.folder.model_worst_site)[1]["round"] == 1
    assert in_history(f, lambda history: history.final())[0] == 3


def crash(answer: object) -> object:
    raise KeyboardInterrupt


@pytest.mark.parametrize("updates", ["fp16", "fp32"])
@pytest.mark.parametrize("decay", [0, 0.7])
@pytest.mark.parametrize(
    ("task", "site", "number"),
    [
        (TRAIN, "a", 1),
        (TRAIN, "bb", 3),
        (EVALUATE, "a", 3),  # the checkpoint of round 3 is not written yet
        (EVALUATE, "ccc", 3),
        (FINAL, "bb", None),
    ],
)
def test_a_restart_ends_as_if_nothing_had_happened(federation, task, site, number, updates, decay):
    assign = (
        "rounds.number=4", f"rounds.updates={updates}", f"rounds.average_decay={decay}",
        "training.learning_rate=0.5",
    )  # fmt: skip
    whole = federation(*assign, folder="whole")
    whole.run()
    broken = federation(*assign, folder="broken")
    best = in_history(whole, lambda history: history.final())[0]
    broken.spoil[task, site, number or best] = crash
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    done = len(broken.rounds())
    assert done == (4 if task == FINAL else (number or 0) - 1)
    broken.spoil.clear()
    broken.asked.clear()
    broken.run()
    assert {n for kind, _, n in broken.asked if kind == TRAIN} == set(range(done + 1, 5))
    assert saved_bytes(broken) == saved_bytes(whole)
    assert without_times(broken) == without_times(whole)
    ends = [repr(in_history(f, lambda history: history.final())) for f in (broken, whole)]
    assert ends[0] == ends[1]


def test_a_restart_after_a_crash_between_recording_and_pruning(federation):
    whole = federation(folder="whole")
    whole.run()
    broken = federation(folder="broken")

    def stop(record) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.run(stop)
    assert len(broken.rounds()) == 2
    # as if killed before pruning, and in the middle of writing the next
    left = broken.folder.checkpoint(1)
    left.write_bytes(b"an older round")
    (left.parent / ".round-0003.safetensors.77.tmp").write_bytes(b"half")
    left.with_name("round-0003.safetensors").write_bytes(b"written, but never recorded")
    broken.run()
    assert without_times(broken) == without_times(whole)
    assert broken.folder.model.read_bytes() == whole.folder.model.read_bytes()
    assert not list(left.parent.glob(".*"))


def test_a_failed_round_succeeds_when_the_site_is_back(federation):
    whole = federation(folder="whole")
    expected = every_checkpoint(whole)
    f = federation()
    f.spoil[TRAIN, "bb", 2] = lambda update: "the disk is full"
    with pytest.raises(FederationFailed):
        f.run()
    f.spoil.clear()
    assert every_checkpoint(f) == expected
    judged = in_history(f, verdict)
    assert judged.complete
    assert judged.everyone
    assert judged.stopped == ()


def test_a_complete_run_does_nothing_more(federation):
    f = federation()
    f.run()
    before, judged = saved_bytes(f), in_history(f, verdict)
    f.asked.clear()
    f.run()
    assert {kind for kind, _, _ in f.asked} == {"query"}
    assert saved_bytes(f) == before
    assert in_history(f, verdict) == judged


def test_a_failing_final_evaluation_keeps_all_rounds_and_can_be_repeated(federation):
    f = federation()
    for number in (1, 2, 3):
        f.spoil[FINAL, "a", number] = lambda report: "the machine is off"
    with pytest.raises(FederationFailed, match="a: the machine is off"):
        f.run()
    assert len(f.rounds()) == 3
    assert not in_history(f, verdict).complete
    f.spoil.clear()
    f.run()
    judged = in_history(f, verdict)
    assert judged.complete
    assert judged.everyone


def test_a_final_evaluation_without_everybody_is_told(federation):
    f = federation("rounds.min_sites=2")
    for number in (1, 2, 3):
        f.spoil[FINAL, "a", number] = lambda report: "the machine is off"
    f.run()
    judged = in_history(f, verdict)
    assert judged.complete
    assert not judged.everyone
    assert [(site, why.endswith("the machine is off")) for _, site, why in judged.absent] == [
        ("a", True)
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda sites: sites.pop("bb"), "bb"),
        (lambda sites: sites.update(d=replace(sites["a"], site="d")), "d"),
        (lambda sites: sites.update(a=replace(sites["a"], n_training=4)), "a"),
        (lambda sites: sites.update(a=replace(sites["a"], n_held_out=3)), "a"),
        (lambda sites: sites.update(ccc=replace(sites["ccc"], trains=False, n_training=0)), "ccc"),
    ],
)
def test_a_run_is_not_continued_with_other_sites_or_subjects(federation, change, named):
    f = federation()
    f.spoil[TRAIN, "a", 2] = crash
    with pytest.raises(KeyboardInterrupt):
        f.run()
    f.spoil.clear()
    before = dict(f.sites)
    change(f.sites)
    with pytest.raises(FederationFailed, match=f"other sites or subjects; changed: {named}. "):
        f.run()
    f.sites = before
    f.run()
    assert len(f.rounds()) == 3


def test_before_the_first_complete_round_sites_may_still_change(federation):
    f = federation()
    f.spoil[TRAIN, "bb", 1] = lambda update: "the disk is full"
    with pytest.raises(FederationFailed):
        f.run()
    del f.sites["bb"]
    f.run()
    judged = in_history(f, verdict)
    assert judged.contributed == {"a": (1, 2, 3), "ccc": (1, 2, 3)}


def test_a_run_is_not_continued_with_another_configuration(federation):
    f = federation()
    f.spoil[TRAIN, "a", 2] = crash
    with pytest.raises(KeyboardInterrupt):
        f.run()
    other = federation("seed=5")
    with pytest.raises(FederationFailed, match="another configuration"):
        other.run()


def test_a_damaged_checkpoint_is_refused_and_not_trained_on(federation):
    f = federation()
    f.spoil[TRAIN, "a", 3] = crash
    with pytest.raises(KeyboardInterrupt):
        f.run()
    f.spoil.clear()
    f.asked.clear()
    path = f.folder.checkpoint(2)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadWeights, match="round 2 was recorded"):
        f.run()
    assert {kind for kind, _, _ in f.asked} == {"query"}


def scripted_losses(federation, losses: list[float]) -> None:
    for site in federation.sites:
        for number, loss in enumerate(losses, start=1):
            federation.spoil[EVALUATE, site, number] = lambda r, loss=loss: with_means(r, loss=loss)


def test_training_ends_early_and_stays_ended(federation):
    f = federation("rounds.number=9", "rounds.stop_patience=2")
    scripted_losses(f, [1.0, 0.5, 0.6, 0.7, 0.1])
    f.run()
    assert len(f.rounds()) == 4
    assert in_history(f, verdict).complete
    f.run()
    assert len(f.rounds()) == 4


def test_sites_are_told_the_lowered_rate_also_after_a_restart(federation):
    assign = ("rounds.number=6", "rounds.plateau_patience=1", "rounds.plateau_factor=0.1")
    losses = [1.0, 0.9, 0.95, 0.96, 0.97, 0.98]
    f = federation(*assign, "training.learning_rate=0.01")
    scripted_losses(f, losses)
    f.spoil[TRAIN, "bb", 5] = crash
    with pytest.raises(KeyboardInterrupt):
        f.run()
    del f.spoil[TRAIN, "bb", 5]
    f.run()
    assert f.rates == pytest.approx({1: 0.01, 2: 0.01, 3: 0.01, 4: 0.01, 5: 0.001, 6: 0.001})
    assert [record.learning_rate for record in f.rounds()] == list(f.rates.values())


def test_each_site_is_asked_only_for_what_it_can_do(federation):
    f = federation("rounds.number=1")
    f.sites["bb"] = replace(f.sites["bb"], trains=False, n_training=0)
    f.sites["ccc"] = replace(f.sites["ccc"], n_held_out=0)
    f.run()
    assert f.asked == [
        *(("query", site, 0) for site in f.sites),
        (TRAIN, "a", 1),
        (TRAIN, "ccc", 1),
        (EVALUATE, "a", 1),
        (EVALUATE, "bb", 1),
        (FINAL, "a", 1),
        (FINAL, "bb", 1),
    ]
    assert "bb" not in in_history(f, verdict).contributed


@pytest.mark.parametrize("updates", ["fp16", "fp32"])
def test_the_server_holds_no_update_while_the_next_site_works(federation, updates):
    """Peak memory is flat in the number of sites: no model lies about while another is trained."""
    f = federation("rounds.number=1", f"rounds.updates={updates}")
    numbers = {site: replace(f.sites["a"], site=site) for site in "abcd"}
    f.sites = numbers
    shape = max((t.shape for t in initial_weights(f.config).values()), key=math.prod)
    alive = {}

    def count(update: SiteUpdate) -> SiteUpdate:
        found = gc.get_objects()
        tensors = sum(
            type(o) is torch.Tensor and o.shape == shape and o.dtype == torch.float32 for o in found
        )
        arrays = sum(type(o) is Array and o.stype == "safetensors" for o in found)
        alive[update.site] = (tensors, arrays)
        return update

    for site in f.sites:
        f.spoil[TRAIN, site, 1] = count
    f.run()
    (tensors, arrays), *later = alive.values()
    # the mean so far, which is one tensor of that shape, is there from the first update on
    assert set(later) == {(tensors + 1, arrays)}, alive
    assert min(tensors, arrays) >= 1, alive  # the count does see tensors and arrays


def test_mean_dice_of_a_record_is_that_of_its_sites(federation):
    f = federation("rounds.number=1")
    f.run()
    (record,) = f.rounds()
    dices = [mean_dice(metrics) for metrics in record.metrics.values()]
    assert record.mean_dice == pytest.approx(sum(dices) / 3)
    assert record.worst[1] == min(dices)


# ------------------------------------------------------------------------------ updates as a change


def test_updates_as_fp16_change_are_averaged_within_the_documented_error(federation):
    """Round by round from the recorded weights, by a float64 mean of the exact updates."""
    f = federation("rounds.updates=fp16")
    after: list[Weights] = []
    f.run(lambda record: after.append(load_round(f, record)))
    total = sum(card.n_training for card in f.sites.values())
    before = initial_weights(f.config)
    differs = False
    for number, weights in enumerate(after, start=1):
        rate = f.rates[number]
        for name, since in before.items():
            exact = np.zeros(since.shape)
            bound = np.zeros(since.shape)
            for card in f.sites.values():
                update = trained(before, card.site, number, rate)[name].double().numpy()
                change = np.abs(update - since.double().numpy())
                share = card.n_training / total
                exact += share * update
                error = np.maximum(2.0**-11 * change, 2.0**-39 * change.max(initial=0))
                bound += share * (error + 2.0**-24 * (np.abs(update) + error))
            got = weights[name].double().numpy()
            if not since.is_floating_point():
                np.testing.assert_array_equal(got, np.round(exact), err_msg=name)
                continue
            bound += 2.0**-24 * np.abs(got)  # the mean is kept in fp32
            assert (np.abs(got - exact) <= bound).all(), name
            differs = differs or bool((np.abs(got - exact) > 2.0**-22 * np.abs(got)).any())
        before = weights
    assert differs, "they did travel as fp16"


def test_fp16_gives_nearly_the_same_model_and_metrics_with_fewer_bytes(federation):
    runs = {}
    for updates in ("fp16", "fp32"):
        f = federation(f"rounds.updates={updates}", "rounds.number=1", folder=updates)
        f.run()
        runs[updates] = (f.rounds()[0], load_round(f, f.rounds()[0]), initial_weights(f.config))
    half, weights, start = runs["fp16"]
    full, expected, _ = runs["fp32"]
    for name, tensor in expected.items():
        change = (tensor - start[name]).abs().max()
        np.testing.assert_allclose(weights[name], tensor, rtol=0, atol=2e-3 * change, err_msg=name)
    assert half.sha256 != full.sha256
    assert half.mean_dice == pytest.approx(full.mean_dice, abs=0.05)
    values = sum(4 * t.numel() for t in expected.values() if t.is_floating_point())
    for c16, c32 in zip(half.contributions, full.contributions, strict=True):
        names = 40 * len(expected)  # a change names each scale
        assert values / 2 - names <= c32.bytes - c16.bytes <= values / 2


def as_change(kind: str, since: Weights) -> Callable[[SiteUpdate], RecordDict]:
    def spoil(update: SiteUpdate) -> RecordDict:
        weights, base = update.weights, since
        name = min(n for n, t in weights.items() if t.is_floating_point() and len(t.shape) > 1)
        if kind == "shape":
            weights = weights | {name: weights[name][:1]}
            base = base | {name: base[name][:1]}
        if kind == "of another base":
            base = {n: t * 1e9 if t.is_floating_point() else t for n, t in base.items()}
        block = encode_change(weights, base)
        if kind == "garbled":
            block = block[:-1]
        if kind == "no scales":
            block = block.replace(b'"scales"', b'"scalez"')
        if kind == "NaN":
            block = block[:-2] + np.float16(np.nan).tobytes()
        return with_block(update, block)

    return spoil


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("NaN", "not finite"),
        ("of another base", "times as large as the model"),
        ("garbled", "cannot be decoded"),
        ("no scales", "without its scales"),
        ("shape", "expected torch.float32"),
    ],
)
def test_a_bad_change_is_refused_and_the_others_go_on(federation, kind, said):
    f = federation("rounds.updates=fp16", "rounds.min_sites=2", "rounds.number=1")
    f.spoil[TRAIN, "bb", 1] = as_change(kind, initial_weights(f.config))
    f.run()
    judged = in_history(f, verdict)
    assert judged.contributed == {"a": (1,), "bb": (), "ccc": (1,)}
    ((number, site, reason),) = judged.absent
    assert (number, site) == (1, "bb")
    assert said in reason


@pytest.mark.parametrize("updates", ["fp16", "fp32"])
@pytest.mark.parametrize("whole", [True, False])
def test_an_update_is_understood_in_either_form(federation, updates, whole):
    """What was agreed tells the site what to send; the server reads what the block says it is."""
    f = federation(f"rounds.updates={updates}", "rounds.number=1")
    start = initial_weights(f.config)
    f.spoil[TRAIN, "bb", 1] = lambda u: pack_site_update(u, None if whole else start)
    f.run()
    (exact,) = expected_rounds(f, 1)
    for name, tensor in load_round(f, f.rounds()[0]).items():
        np.testing.assert_allclose(tensor, exact[name], rtol=0, atol=1e-4, err_msg=name)


# ---------------------------------------------------------------------------- how large a change is


@pytest.mark.parametrize("updates", ["fp16", "fp32"])
@pytest.mark.parametrize(("factor", "averaged"), [(1.49, True), (1.51, False), (-0.6, False)])
def test_the_largest_change_that_is_averaged(federation, updates, factor, averaged):
    """The site returns the round's model times `factor`: a change of |factor - 1| models."""
    f = federation(
        "rounds.max_change=0.5", "rounds.min_sites=2", "rounds.number=1",
        f"rounds.updates={updates}", "training.learning_rate=0.001", "rounds.outlier_factor=null",
    )  # fmt: skip
    start = initial_weights(f.config)
    f.spoil[TRAIN, "bb", 1] = lambda u: changed_by(replace(u, weights=start), factor)
    f.run()
    (record,) = f.rounds()
    (contribution,) = (c for c in record.contributions if c.site == "bb")
    assert contribution.trained == averaged
    absent = frozenset() if averaged else frozenset({("bb", 1)})
    if not averaged:
        assert f"its change is {abs(factor - 1):.2g}" in contribution.reason
        assert "as large as the model (limit: 0.5)." in contribution.reason
        (exact,) = expected_rounds(f, 1, absent)
        for name, tensor in load_round(f, record).items():
            np.testing.assert_allclose(tensor, exact[name], rtol=0, atol=1e-5, err_msg=name)


def test_a_change_that_is_too_large_fails_the_round_by_default(federation):
    f = federation("rounds.number=1")
    f.spoil[TRAIN, "bb", 1] = lambda u: changed_by(u, 1e6)
    with pytest.raises(FederationFailed, match=r"bb: its change is [0-9.]+e\+06 times as large"):
        f.run()
    assert f.rounds() == []


# ------------------------------------------------------------------------------------ once more


def failing(times: int) -> Callable[[Any], Any]:
    """A site that gives no answer so many times, then its good one."""
    left = [times]

    def spoil(answer: Any) -> Any:
        left[0] -= 1
        return "the line is down" if left[0] >= 0 else answer

    return spoil


@pytest.mark.parametrize("stage", [TRAIN, EVALUATE])
def test_a_round_with_too_few_replies_is_tried_again(federation, stage):
    whole = federation(folder="whole")
    whole.run()
    f = federation()
    f.spoil[stage, "bb", 2] = failing(1)
    f.run(attempts=2)
    assert f.asked.count((stage, "bb", 2)) == 2
    assert f.asked.count((TRAIN, "a", 2)) == 2, "all of the round is done again"
    assert f.asked.count((TRAIN, "a", 3)) == 1
    assert in_history(f, lambda history: history.failures()) == []
    judged = in_history(f, verdict)
    assert judged.complete
    assert judged.everyone
    assert judged.stopped == ()
    assert saved_bytes(f) == saved_bytes(whole)
    assert without_times(f) == without_times(whole)


def test_each_round_has_all_its_attempts(federation):
    f = federation()
    for number in (1, 2, 3):
        f.spoil[TRAIN, "ccc", number] = failing(2)
    f.run(attempts=3)
    assert [f.asked.count((TRAIN, "ccc", number)) for number in (1, 2, 3)] == [3, 3, 3]
    assert len(f.rounds()) == 3
    assert in_history(f, verdict).everyone


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_with_its_attempts_used_up_the_run_fails_and_goes_on_when_started_again(
    federation, attempts
):
    f = federation()
    f.spoil[TRAIN, "bb", 2] = failing(attempts)
    with pytest.raises(FederationFailed, match="Round 2 failed: 2 sites could train, 3 are needed"):
        f.run(attempts=attempts)
    assert f.asked.count((TRAIN, "bb", 2)) == attempts
    assert [record.round for record in f.rounds()] == [1]
    judged = in_history(f, verdict)
    assert judged.stopped == ((2, "bb", "the line is down"),)
    f.run(attempts=attempts)
    assert in_history(f, verdict).stopped == ()
    assert len(f.rounds()) == 3


def test_the_final_evaluation_is_tried_again_too(federation):
    f = federation()
    for number in (1, 2, 3):
        f.spoil[FINAL, "a", number] = failing(1)
    f.run(attempts=2)
    judged = in_history(f, verdict)
    assert judged.complete
    assert judged.everyone
    assert in_history(f, lambda history: history.failures()) == []
    final = [(kind, site) for kind, site, _ in f.asked if kind == FINAL]
    assert final == [(FINAL, "a"), (FINAL, "bb"), (FINAL, "ccc")] * 2
    g = federation(folder="used up")
    for number in (1, 2, 3):
        g.spoil[FINAL, "a", number] = failing(2)
    with pytest.raises(FederationFailed, match="a: the line is down"):
        g.run(attempts=2)
    assert not in_history(g, verdict).complete


# ------------------------------------------------------------------- who takes part in which round

FINALLY = 0  # the number under which a test says who is away when the chosen model is measured


def attendance(
    f, away: Mapping[int, Mapping[str, str]], calls: list[int] | None = None
) -> Callable[[History, int], Roll]:
    """All sites, but in each round without those that are away; a reason of "" is: not yet there.

    A round's entry under a negative number holds for its first attempt only.
    """
    nodes = {site: node for node, site in enumerate(f.sites, start=1)}
    tried: set[int] = set()

    def attend(history: History, number: int) -> Roll:
        if calls is not None:
            calls.append(number)
        round_ = FINALLY if len(history.rounds()) >= f.config.rounds.number else number
        missing = away.get(round_, {}) if -round_ in tried else away.get(-round_, {})
        missing = missing or away.get(round_, {})
        tried.add(-round_)
        cards = {site: card for site, card in f.sites.items() if site not in missing}
        known = {card.site: card for card in history.sites()} | cards
        history.record_sites([known[site] for site in sorted(known)])
        absent = {site: why for site, why in missing.items() if why}
        return Roll(cards, {site: nodes[site] for site in cards}, absent)

    return attend


def test_who_takes_part_is_asked_before_every_round_and_at_the_end(federation):
    f = federation()
    calls: list[int] = []
    f.run(attend=attendance(f, {}, calls))
    final = in_history(f, lambda history: history.final())[0]
    assert calls == [1, 2, 3, final]
    assert not [kind for kind, _, _ in f.asked if kind == "query"], "asking is the caller's affair"
    assert in_history(f, verdict).everyone


def test_the_same_roll_each_time_is_the_run_without_one(federation):
    plain = federation(folder="plain")
    plain.run()
    f = federation()
    f.run(attend=attendance(f, {}))
    assert saved_bytes(f) == saved_bytes(plain)
    assert without_times(f) == without_times(plain)


def test_a_late_joiner_contributes_from_its_round_on(federation):
    f = federation("rounds.number=4")
    later = {"bb": ""}
    after: list[Weights] = []
    f.run(
        lambda record: after.append(load_round(f, record)),
        attend=attendance(f, {1: later, 2: later}),
    )
    assert [(s, n) for kind, s, n in f.asked if kind == TRAIN and s == "bb"] == [
        ("bb", 3),
        ("bb", 4),
    ]
    exact = expected_rounds(f, 4, frozenset({("bb", 1), ("bb", 2)}))
    for weights, expected in zip(after, exact, strict=True):
        for name, tensor in expected.items():
            np.testing.assert_allclose(weights[name], tensor, rtol=0, atol=1e-5, err_msg=name)
    records = f.rounds()
    assert [[c.site for c in r.contributions] for r in records] == [["a", "ccc"]] * 2 + [
        ["a", "bb", "ccc"]
    ] * 2
    assert [sorted(r.metrics) for r in records] == [["a", "ccc"]] * 2 + [["a", "bb", "ccc"]] * 2
    judged = in_history(f, verdict)
    assert judged.contributed == {"a": (1, 2, 3, 4), "bb": (3, 4), "ccc": (1, 2, 3, 4)}
    assert judged.everyone, "before it joined nobody missed it"
    _, about = load_weights(f.folder.model)
    assert about["sites"] == ["a", "bb", "ccc"]
    assert about["round"] >= 3, "measured at all sites"


def test_an_absent_site_is_told_with_its_reason(federation):
    f = federation("rounds.min_sites=2", "rounds.number=3")
    why = "not connected for 5 minutes."
    f.run(attend=attendance(f, {2: {"bb": why}}))
    second = f.rounds()[1]
    assert [(c.site, c.trained, c.reason) for c in second.contributions] == [
        ("a", True, ""),
        ("bb", False, why),
        ("ccc", True, ""),
    ]
    assert not {(TRAIN, "bb", 2), (EVALUATE, "bb", 2)} & set(f.asked)
    assert sorted(second.metrics) == ["a", "ccc"]
    judged = in_history(f, verdict)
    assert judged.contributed == {"a": (1, 2, 3), "bb": (1, 3), "ccc": (1, 2, 3)}
    assert judged.absent == ((2, "bb", why),)
    assert not judged.everyone
    assert f"  Round 2: without bb: {why}" in judged.lines()


def test_by_default_nobody_may_be_absent(federation):
    f = federation()
    why = "not connected for 5 minutes."
    with pytest.raises(FederationFailed) as caught:
        f.run(attend=attendance(f, {2: {"bb": why}}))
    assert "Round 2 failed: 2 sites could train, 3 are needed" in str(caught.value)
    assert f"bb: {why}" in str(caught.value)
    assert [record.round for record in f.rounds()] == [1]


def test_an_absent_site_and_a_failing_one_count_together(federation):
    f = federation("rounds.min_sites=2")
    f.spoil[TRAIN, "ccc", 2] = lambda update: "the disk is full"
    with pytest.raises(FederationFailed) as caught:
        f.run(attend=attendance(f, {2: {"bb": "not connected."}}))
    assert "1 sites could train, 2 are needed" in str(caught.value)
    assert "bb: not connected." in str(caught.value)
    assert "ccc: the disk is full" in str(caught.value)


def test_everybody_absent_is_a_failed_round(federation):
    f = federation("rounds.min_sites=1")
    with pytest.raises(FederationFailed, match="0 sites could train, 1 are needed"):
        f.run(attend=attendance(f, {1: dict.fromkeys(f.sites, "not connected.")}))


def test_who_is_back_at_the_second_attempt_takes_part_in_it(federation):
    whole = federation(folder="whole")
    whole.run()
    f = federation()
    f.run(attend=attendance(f, {-2: {"bb": "not connected."}}), attempts=2)
    assert f.asked.count((TRAIN, "a", 2)) == 2
    assert in_history(f, verdict).everyone
    assert saved_bytes(f) == saved_bytes(whole)
    assert without_times(f) == without_times(whole)


def test_a_site_that_is_absent_at_the_end_is_told_or_fails_it(federation):
    """Else the final metrics would be of fewer sites than trained, and nobody would know."""
    away = {FINALLY: {"bb": "not connected."}}
    f = federation("rounds.min_sites=2")
    f.run(attend=attendance(f, away))
    judged = in_history(f, verdict)
    assert judged.complete
    ((_, site, why),) = judged.absent
    assert (site, why) == ("bb", "final model not evaluated: not connected.")
    g = federation(folder="all needed")
    with pytest.raises(FederationFailed, match=r"2 sites could evaluate, 3 are needed"):
        g.run(attend=attendance(g, away))
    g.run(attend=attendance(g, {}), attempts=1)
    assert in_history(g, verdict).everyone


CHANGING = {  # bb joins in round 2, ccc is away in round 4 and a in round 6
    1: {"bb": ""},
    4: {"ccc": "not connected."},
    6: {"a": "not connected."},
}


@pytest.mark.parametrize("updates", ["fp16", "fp32"])
@pytest.mark.parametrize("stopped", range(1, 10))
def test_decisions_after_a_restart_are_those_of_an_uninterrupted_run_whoever_was_there(
    federation, stopped, updates
):
    """Rate and end follow from the recorded rounds, not from who happens to be there now."""
    assign = (
        "rounds.number=12", "rounds.min_sites=1", "rounds.plateau_patience=1",
        "rounds.plateau_factor=0.1", "rounds.stop_patience=5", f"rounds.updates={updates}",
    )  # fmt: skip
    losses = [1.2, 0.9, 0.95, 0.2, 0.96, 0.3, 0.97, 0.98, 0.99, 1.0, 1.1, 1.2]
    whole = federation(*assign, folder="whole")
    scripted_losses(whole, losses)
    whole.run(attend=attendance(whole, CHANGING))
    assert len(whole.rounds()) == 9, "round 4, which one site missed, is the best: it ends early"
    assert len(set(whole.rates.values())) > 2, "the rate does change"

    broken = federation(*assign, folder="broken")
    scripted_losses(broken, losses)
    site = next(s for s in broken.sites if s not in CHANGING.get(stopped, {}))
    good = broken.spoil[EVALUATE, site, stopped]
    broken.spoil[EVALUATE, site, stopped] = crash
    with pytest.raises(KeyboardInterrupt):
        broken.run(attend=attendance(broken, CHANGING))
    assert len(broken.rounds()) == stopped - 1
    broken.spoil[EVALUATE, site, stopped] = good
    broken.run(attend=attendance(broken, CHANGING))
    assert broken.rates == whole.rates
    assert without_times(broken) == without_times(whole)
    assert saved_bytes(broken) == saved_bytes(whole)
    assert in_history(broken, verdict) == in_history(whole, verdict)


# ------------------------------------------------------------- metrics that a site keeps or noises


def for_all(federation, spoil: Callable[[SiteReport], SiteReport], *sites: str) -> None:
    for site in sites:
        for number in range(1, federation.config.rounds.number + 1):
            federation.spoil[EVALUATE, site, number] = spoil
            federation.spoil[FINAL, site, number] = spoil


def strict(text: str) -> dict[str, Any]:
    return json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_when_every_site_withholds_its_metrics_the_last_round_is_chosen(federation, caplog):
    f = federation("rounds.stop_patience=1", "rounds.plateau_patience=1")
    for_all(f, withheld, *f.sites)
    with caplog.at_level("INFO", "fedbrats"):
        f.run()
    assert "did not evaluate" not in caplog.text
    for site in f.sites:
        assert caplog.text.count(f"{site} withholds its metrics") == 1, "once a run"
    records = f.rounds()
    assert len(records) == 3, "nothing ends or slows the training without a loss"
    assert [record.learning_rate for record in records] == [records[0].learning_rate] * 3
    for record in records:
        assert (record.loss, record.mean_dice, record.worst, record.metrics) == (None,) * 3 + ({},)
        assert record.released == dict.fromkeys(f.sites, WITHHELD)
        assert set(record.unmeasured) == set(f.sites)
        assert all("withholds its metrics" in why for why in record.unmeasured.values())
    for model in (f.folder.model, f.folder.model_worst_site):
        assert load_weights(model)[1]["round"] == 3
    assert in_history(f, lambda history: history.final()) == (3, {})
    judged = in_history(f, verdict)
    assert judged.complete
    assert judged.everyone
    assert judged.absent == ()
    assert [line for line in judged.lines() if "withholds" in line] == [
        f"  {site} withholds its metrics." for site in f.sites
    ]
    document = strict(in_history(f, results_json))
    assert document["rounds"][0]["loss"] is document["rounds"][0]["worst_dice"] is None
    f.asked.clear()
    f.run()
    assert {kind for kind, _, _ in f.asked} == {"query"}, "it is complete, without any metric"


def test_the_round_is_chosen_by_the_sites_that_tell_and_the_loss_is_theirs(federation):
    f = federation()
    dices = {"a": (0.1, 0.2, 0.3), "bb": (0.9, 0.5, 0.1), "ccc": (0.5, 0.9, 0.8)}
    losses = {"a": 9.0, "bb": 0.4, "ccc": 0.7}
    ways = {"a": withheld, "bb": noised, "ccc": lambda report: report}
    for site, way in ways.items():
        for number, dice in enumerate(dices[site], start=1):
            f.spoil[EVALUATE, site, number] = lambda r, site=site, dice=dice, way=way: way(
                with_means(r, dice__WT=dice, dice__TC=dice, dice__ET=dice, loss=losses[site])
            )
    f.run()
    records = f.rounds()
    # mean of bb and ccc: 0.7, 0.7, 0.45; worst: 0.5, 0.5, 0.1
    assert [record.mean_dice for record in records] == pytest.approx([0.7, 0.7, 0.45])
    assert [record.loss for record in records] == [0.7] * 3, "that of ccc alone"
    assert [sorted(record.metrics) for record in records] == [["bb", "ccc"]] * 3
    assert records[0].released == {"a": WITHHELD, "bb": NOISED}
    assert set(records[0].metrics["bb"].means) == {"dice/WT", "dice/TC", "dice/ET"}
    assert load_weights(f.folder.model)[1]["round"] == 1
    judged = in_history(f, verdict)
    assert judged.everyone
    assert (judged.withheld, judged.noised) == (("a",), ("bb",))


def test_a_site_that_withholds_counts_and_one_that_is_missing_does_not(federation):
    """Both have no metrics; only one of them did what was asked."""
    f = federation("rounds.min_sites=2", "rounds.number=1")
    for_all(f, withheld, "a")
    f.spoil[EVALUATE, "bb", 1] = lambda report: "the machine is off"
    f.run()
    judged = in_history(f, verdict)
    assert judged.absent == ((1, "bb", "not evaluated: the machine is off"),)
    assert not judged.everyone
    g = federation("rounds.min_sites=2", "rounds.number=1", folder="too few")
    for_all(g, withheld, "a")
    for site in ("bb", "ccc"):
        g.spoil[EVALUATE, site, 1] = lambda report: "the machine is off"
    with pytest.raises(FederationFailed, match="1 sites could evaluate, 2 are needed"):
        g.run()


def only_dice(report: SiteReport) -> SiteReport:
    means = {key: v for key, v in report.metrics.means.items() if key.startswith("dice/")}
    return replace(report, metrics=SiteMetrics(report.metrics.n, means, report.metrics.defined))


def test_a_site_may_tell_dice_and_nothing_else(federation):
    """Its policy keeps back the rest: it counts, and the loss is that of the others."""
    f = federation("rounds.number=2")
    for_all(f, only_dice, "bb")
    f.run()
    for record in f.rounds():
        assert set(record.metrics) == set(f.sites)
        assert record.released == {}, "what it tells is exact"
        assert all(key.startswith("dice/") for key in record.metrics["bb"].means)
        told = [record.metrics[site] for site in ("a", "ccc")]
        expected = sum(m.means["loss"] * m.n for m in told) / sum(m.n for m in told)
        assert record.loss == pytest.approx(expected)
        assert record.mean_dice is not None
    _number, final = in_history(f, lambda history: history.final())
    assert set(final) == set(f.sites)
    assert in_history(f, lambda history: len(history.rounds())) == 2


def test_nobody_needs_to_tell_a_loss(federation):
    f = federation("rounds.stop_patience=1", "rounds.plateau_patience=1")
    for_all(f, only_dice, *f.sites)
    f.run()
    assert [record.loss for record in f.rounds()] == [None] * 3
    assert all(record.mean_dice is not None for record in f.rounds())
    results = json.loads(in_history(f, results_json))
    assert results["rounds"][0]["loss"] is None
    for record in f.rounds():
        Console(file=StringIO()).print(round_table(record))


def test_the_model_names_no_site_that_hides_its_name(federation):
    f = federation("rounds.number=1")
    f.sites["bb"] = replace(f.sites["bb"], shows_name=False)
    f.run()
    for path in (f.folder.model, f.folder.model_worst_site):
        assert load_weights(path)[1]["sites"] == ["a", "another site", "ccc"]
    assert set(f.rounds()[0].metrics) == set(f.sites), "the coordinator knows them all"


def test_an_update_may_keep_its_loss_and_times(federation):
    f = federation("rounds.number=1")
    f.spoil[TRAIN, "bb", 1] = lambda u: replace(u, loss=None, seconds=None, samples_per_second=None)
    f.run()
    told = {c.site: (c.trained, c.train_loss, c.seconds) for c in f.rounds()[0].contributions}
    assert told == {"a": (True, 0.25, 1.5), "bb": (True, None, None), "ccc": (True, 0.25, 1.5)}
    assert in_history(f, verdict).everyone


def test_statements_are_kept_as_they_came_with_the_round_they_are_of(federation):
    f = federation("rounds.number=2")
    sent = []

    def keep(answer: Any) -> Any:
        sent.append(stating(answer, epsilon=0.1 + len(sent)))
        return sent[-1]

    for number in (1, 2):
        f.spoil[TRAIN, "a", number] = f.spoil[EVALUATE, "a", number] = keep
        f.spoil[FINAL, "ccc", number] = keep
    f.spoil[TRAIN, "ccc", 2] = lambda update: "the disk is full"
    with pytest.raises(FederationFailed):
        f.run()
    kept = in_history(f, lambda history: history.statements())
    assert [(g.round, g.site, g.stage) for g in kept] == [(1, "a", TRAINING), (1, "a", METRICS)]
    assert [g.signed for g in kept] == [answer.statement for answer in sent[:2]]
    del f.spoil[TRAIN, "ccc", 2], sent[2:]
    f.run()
    kept = in_history(f, lambda history: history.statements())
    chosen = in_history(f, lambda history: history.final())[0]
    assert [(g.round, g.site, g.stage) for g in kept] == [
        (1, "a", TRAINING),
        (1, "a", METRICS),
        (2, "a", TRAINING),
        (2, "a", METRICS),
        (chosen, "ccc", AT_THE_END),
    ]
    assert [g.signed for g in kept] == [answer.statement for answer in sent]


# ---------------------------------------------------------------- the average of the rounds' models


def test_the_moving_average_is_measured_and_kept_and_training_goes_on_from_the_models(federation):
    plain = federation("training.learning_rate=0.5", folder="plain")
    models: list[Weights] = []
    plain.run(lambda record: models.append(load_round(plain, record)))
    f = federation("rounds.average_decay=0.75", "training.learning_rate=0.5")
    pairs: list[tuple[Weights, Weights]] = []
    f.run(lambda r: pairs.append(load_to_continue(f.folder, r.round, r.sha256)))
    expected: Weights = {}
    for number, (record, model, (kept, raw)) in enumerate(
        zip(f.rounds(), models, pairs, strict=True)
    ):
        for name, tensor in model.items():
            assert torch.equal(raw[name], tensor), "as without the average"
            if number and tensor.is_floating_point():
                expected[name] = 0.75 * expected[name] + 0.25 * tensor.double()
            else:
                expected[name] = tensor.double()
            assert kept[name].dtype == tensor.dtype
            np.testing.assert_allclose(kept[name], expected[name], rtol=1e-6, atol=1e-7)
        assert record.metrics["a"].means == measured(kept, "a", 2, final=False).means
    chosen, metrics = in_history(f, lambda history: history.final())
    model, _ = load_weights(f.folder.model)
    assert model.keys() == pairs[0][0].keys(), "the file that is given away holds one model"
    assert all(torch.equal(model[name], pairs[chosen - 1][0][name]) for name in model)
    assert metrics["a"].means["dice/WT"] == measured(model, "a", 2, final=True).means["dice/WT"]


def test_without_a_decay_the_checkpoint_is_the_model_alone(federation):
    f = federation("rounds.average_decay=0")
    f.run()
    for path in f.folder.path.glob("checkpoints/*"):
        assert load_weights(path)[0].keys() == initial_weights(f.config).keys()


# ----------------------------------------------------------------------- weights to begin with


def begun_from(federation, path, folder: str = "run"):
    return federation(f"server.init_from={path}", "rounds.number=2", folder=folder)


def test_rounds_begin_from_the_given_weights_and_need_the_file_no_more_after_the_first(
    federation, tmp_path
):
    path = tmp_path / "model.safetensors"
    start = trained(initial_weights(federation().config), "elsewhere", 0, 0.1)
    digest = save_weights(path, start, {})
    f = begun_from(federation, path)
    seen = {}
    f.spoil[TRAIN, "a", 2] = crash
    f.spoil[TRAIN, "a", 1] = lambda u: seen.setdefault("a", u)
    with pytest.raises(KeyboardInterrupt):
        f.run()
    expected = trained(start, "a", 1, f.config.training.learning_rate)
    assert all(torch.equal(seen["a"].weights[name], t) for name, t in expected.items())
    assert in_history(f, lambda history: history.noted("init_from")) == digest == file_sha256(path)
    path.unlink()
    f.spoil.clear()
    f.run()
    assert in_history(f, verdict).complete
    assert in_history(f, lambda history: history.noted("init_from")) == digest


def test_weights_that_do_not_fit_are_refused_before_anybody_trains(federation, tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, dict([*initial_weights(federation().config).items()][1:]), {})
    f = begun_from(federation, path)
    with pytest.raises(ConfigError, match="the file lacks 1 tensors"):
        f.run()
    assert {kind for kind, _, _ in f.asked} <= {"query"}


def test_a_run_without_given_weights_says_so_even_if_one_was_tried_with_some(federation, tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, trained(initial_weights(federation().config), "x", 0, 0.1), {})
    f = begun_from(federation, path)
    f.spoil[TRAIN, "a", 1] = crash
    with pytest.raises(KeyboardInterrupt):
        f.run()
    f = federation("rounds.number=2")
    f.run()
    assert in_history(f, lambda history: history.noted("init_from")) is None


def test_who_refuses_the_roll_call_by_policy_is_shown_and_not_needed(federation):
    f = federation("rounds.number=2", "rounds.plateau_patience=null")
    f.run(attend=attendance(f, {2: {"bb": PolicyRefused(RULE)}}))
    judged = in_history(f, verdict)
    assert judged.contributed == {"a": (1, 2), "bb": (1,), "ccc": (1, 2)}
    assert (2, "bb", RULE) in judged.absent
