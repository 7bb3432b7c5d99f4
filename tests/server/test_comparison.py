"""Rounds are compared over the sites that both have, whoever joins, leaves or misses one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.metrics import SiteMetrics
from server.comparison import best_rounds, comparable_losses
from server.history import RoundRecord


def record(number: int, sites: dict[str, tuple[float, float, int]]) -> RoundRecord:
    """Site -> (dice, loss, n)."""
    metrics = {
        site: SiteMetrics(n, {**{f"dice/{r}": dice for r in ("WT", "TC", "ET")}, "loss": loss}, {})
        for site, (dice, loss, n) in sites.items()
    }
    total = sum(n for _, _, n in sites.values())
    pooled = sum(loss * n for _, loss, n in sites.values()) / total
    return RoundRecord(number, 1e-4, 1.0, pooled, "", "", (), metrics)


def test_with_the_same_sites_these_are_the_losses_and_the_first_best():
    losses = [0.9, 0.7000000001, 0.7, 0.8, 0.7]
    records = [
        record(i, {"a": (1 - loss, loss, 3), "b": (0.5, loss, 1)})
        for i, loss in enumerate(losses, start=1)
    ]
    assert comparable_losses(records) == [r.loss for r in records]
    assert best_rounds(records)[0].round == 3


def test_a_round_without_the_worst_site_does_not_look_better():
    records = [
        record(1, {"easy": (0.8, 0.2, 5), "hard": (0.2, 0.8, 5)}),
        record(2, {"easy": (0.7, 0.3, 5)}),
    ]
    by_mean, by_worst = best_rounds(records)
    assert (by_mean.round, by_worst.round) == (1, 1)
    assert comparable_losses(records) == [0.5, pytest.approx(0.6)]


def test_a_hard_site_that_joins_does_not_end_or_reset_anything():
    """The plateau would otherwise see a jump, or begin anew with the first learning rate."""
    records = [record(i, {"a": (0.1 * i, 1 - 0.1 * i, 4)}) for i in (1, 2, 3)]
    records += [record(i, {"a": (0.1 * i, 1 - 0.1 * i, 4), "new": (0.0, 5.0, 4)}) for i in (4, 5)]
    losses = comparable_losses(records)
    assert losses[:3] == [r.loss for r in records[:3]]
    assert losses == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.55])  # the fall at "a", over two sites
    assert best_rounds(records)[0].round == 5


def test_a_site_that_leaves_for_good_does_not_freeze_the_choice():
    records = [record(i, {"a": (0.1 * i, 1.0, 1), "b": (0.9, 0.1, 1)}) for i in (1, 2)]
    records += [record(i, {"a": (0.1 * i, 1 - 0.1 * i, 1)}) for i in (3, 4)]
    assert best_rounds(records)[0].round == 4
    assert len(comparable_losses(records)) == 4


def test_a_round_that_shares_no_site_with_the_best_says_nothing():
    records = [record(1, {"a": (0.5, 0.5, 1)}), record(2, {"b": (0.9, 0.1, 1)})]
    assert comparable_losses(records) == [0.5]
    assert best_rounds(records)[0].round == 1


def only_dice(number: int, **dice: float) -> RoundRecord:
    """A round whose sites tell Dice and no loss, as those that noise their metrics do."""
    metrics = {
        site: SiteMetrics(3, {f"dice/{r}": value for r in ("WT", "TC", "ET")}, {})
        for site, value in dice.items()
    }
    return RoundRecord(number, 1e-4, 1.0, None, "", "", (), metrics)


def test_without_any_metrics_the_last_round_is_chosen():
    records = [only_dice(number) for number in (1, 2, 3)]
    assert [r.round for r in best_rounds(records)] == [3, 3]
    assert comparable_losses(records) == []


def test_rounds_without_metrics_are_never_chosen_over_one_with_some():
    records = [only_dice(1), only_dice(2, a=0.2), only_dice(3, a=0.1), only_dice(4)]
    assert [r.round for r in best_rounds(records)] == [2, 2]


def test_dice_without_a_loss_chooses_the_round_and_leaves_the_rate_alone():
    records = [only_dice(1, a=0.2, b=0.3), only_dice(2, a=0.3, b=0.3), only_dice(3, a=0.9, b=0.1)]
    assert [r.round for r in best_rounds(records)] == [3, 2]
    assert comparable_losses(records) == []


def test_losses_are_compared_over_the_sites_that_tell_one():
    """`a` tells its Dice throughout, its loss in the second round only."""
    first = record(1, {"b": (0.5, 0.4, 1)})
    second = record(2, {"a": (0.5, 9.0, 3), "b": (0.5, 0.3, 1)})
    third = only_dice(3, a=0.5)
    told = {"a": only_dice(1, a=0.5).metrics["a"]}
    first = replace(first, metrics={**told, **first.metrics})
    assert comparable_losses([first, second, third]) == pytest.approx([0.4, 0.3])
    fourth = record(4, {"b": (0.5, 0.25, 1)})
    fourth = replace(fourth, metrics={**told, **fourth.metrics})
    assert comparable_losses([first, third, fourth]) == pytest.approx([0.4, 0.25])
