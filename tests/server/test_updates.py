"""Rounds with a bad site among five: what the model becomes, who is named, and what stays on disk."""

from __future__ import annotations

import errno
import logging
import math
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from common.messages import SiteCard, SiteUpdate
from common.model import initial_weights
from common.statement import Signed, Statement
from common.weights import Weights, save_weights
from server import spool
from server.checkpoint import load_checkpoint
from server.history import History
from server.roll_call import FederationFailed, Roll
from tests.server.conftest import TRAIN, trained

SITES = {"a": 3, "bb": 10, "ccc": 1, "dddd": 4, "eeeee": 7}
ROBUST = ("trimmed_mean", "median", "krum")
ONE_ROUND = ("rounds.number=1", "training.learning_rate=0.001")


@pytest.fixture
def five(federation):
    """A function: further settings -> a federation of five sites that train."""

    def make(*assign: str, folder: str = "run"):
        f = federation(*ONE_ROUND, *assign, folder=folder, sites={})
        for site, n in SITES.items():
            f.sites[site] = SiteCard(site, True, n, 2, 0, f.config.fingerprint())
        return f

    return make


def away(start: Weights, factor: float) -> Callable[[SiteUpdate], SiteUpdate]:
    """The site's change since `start`, times `factor`."""

    def spoil(update: SiteUpdate) -> SiteUpdate:
        weights = {
            name: start[name] + factor * (t - start[name]) if t.is_floating_point() else t
            for name, t in update.weights.items()
        }
        return replace(update, weights=weights)

    return spoil


def honest(f, *without: str) -> dict[str, Weights]:
    start = initial_weights(f.config)
    rate = f.config.training.learning_rate
    return {s: trained(start, s, 1, rate) for s in SITES if s not in without}


def fedavg_of(updates: dict[str, Weights], name: str) -> np.ndarray:
    values = [u[name].double().numpy() for u in updates.values()]
    return np.average(values, axis=0, weights=[SITES[s] for s in updates])


def model_of(f, number: int = 1) -> Weights:
    return load_checkpoint(f.folder, number, f.rounds()[number - 1].sha256)


def contributions(f, number: int = 1) -> dict[str, Any]:
    return {c.site: c for c in f.rounds()[number - 1].contributions}


def times_the_median(f, site: str, factor: float) -> float:
    """How large this site's change is, multiplied by `factor`, beside the others'."""
    start = initial_weights(f.config)
    sizes = {
        s: np.sqrt(sum(float((t - start[n]).double().square().sum()) for n, t in u.items()
                       if t.is_floating_point()))
        for s, u in honest(f).items()
    }  # fmt: skip
    sizes[site] *= factor
    return sizes[site] / float(np.median(list(sizes.values())))


def farthest_from(f, updates: dict[str, Weights]) -> float:
    """The largest distance of a weight of the model from the range of these updates."""
    worst = 0.0
    for name, tensor in model_of(f).items():
        if tensor.is_floating_point() and tensor.numel():
            values = torch.stack([u[name] for u in updates.values()])
            beyond = torch.maximum(tensor - values.amax(0), values.amin(0) - tensor)
            worst = max(worst, float(beyond.max()))
    return worst


@pytest.mark.parametrize("updates", ["fp16", "fp32"])
@pytest.mark.parametrize("factor", [1e3, -1e3])
def test_a_bad_site_spoils_fedavg_and_no_robust_aggregation(five, updates, factor):
    settings = (f"rounds.updates={updates}", "rounds.outlier_factor=null")
    for aggregation in ("fedavg", *ROBUST):
        f = five(*settings, f"rounds.aggregation={aggregation}", folder=aggregation)
        f.spoil[TRAIN, "bb", 1] = away(initial_weights(f.config), factor)
        f.run()
        assert all(c.trained for c in contributions(f).values()), "all were weighed"
        far = farthest_from(f, honest(f, "bb"))
        assert far > 0.1 if aggregation == "fedavg" else far < 1e-5, aggregation


def test_the_model_is_the_median_of_the_sites_whatever_their_numbers_of_subjects(five):
    f = five("rounds.aggregation=median")
    f.run()
    updates = honest(f)
    for name, tensor in model_of(f).items():
        exact = np.sort([u[name].double().numpy() for u in updates.values()], axis=0)[2]
        np.testing.assert_array_equal(tensor, exact.astype(tensor.numpy().dtype), err_msg=name)


def test_krum_takes_one_update_and_says_and_records_whose(five, caplog):
    caplog.set_level(logging.INFO, "fedbrats")
    f = five("rounds.aggregation=krum")
    f.run()
    (record,) = f.rounds()
    assert record.chosen in SITES
    for name, tensor in honest(f)[record.chosen].items():
        assert torch.equal(model_of(f)[name], tensor), name
    assert f"of 5 updates {record.chosen}'s is the nearest to the others" in caplog.text
    assert all(c.trained for c in record.contributions)


def test_of_an_average_no_site_is_recorded_as_chosen(five):
    f = five()
    f.run()
    assert f.rounds()[0].chosen is None


def test_an_outlier_fails_the_round_by_default_and_is_named(five):
    f = five()
    f.spoil[TRAIN, "ccc", 1] = away(initial_weights(f.config), 50)
    with pytest.raises(FederationFailed) as caught:
        f.run()
    assert "4 sites could train, 5 are needed.\n" in str(caught.value)
    said = "times the median of the round's (limit for its 1 subject: 10)."
    assert f"ccc: its change is {times_the_median(f, 'ccc', 50):.3g} {said}" in str(caught.value)
    assert not f.folder.updates.exists()


def test_with_min_sites_the_round_is_fedavg_of_the_others(five, caplog):
    f = five("rounds.min_sites=4")
    f.spoil[TRAIN, "ccc", 1] = away(initial_weights(f.config), -50)
    f.run()
    of = contributions(f)
    assert [s for s in SITES if not of[s].trained] == ["ccc"]
    assert of["ccc"].reason.startswith(f"its change is {times_the_median(f, 'ccc', 50):.3g} times")
    assert f"round 1: ccc did not contribute: {of['ccc'].reason}" in caplog.text
    updates = honest(f, "ccc")
    for name, tensor in model_of(f).items():
        exact = fedavg_of(updates, name)
        if not tensor.is_floating_point():
            exact = np.rint(exact)
        np.testing.assert_allclose(tensor, exact, rtol=0, atol=1e-6, err_msg=name)


def test_what_an_outlier_states_about_privacy_is_of_no_answer_that_counts(five):
    """As of any refused update; the others' statements are kept."""
    f = five("rounds.min_sites=4")

    def stating(update: SiteUpdate) -> SiteUpdate:
        about = {"site": update.site, "round": 1, "private": True, "metrics": "exact"}
        stated = Statement("3f" * 16, code="c0de", at="2026-11-25", **about)
        return replace(update, statement=Signed(stated.text(), b"a signature"))

    far = away(initial_weights(f.config), 50)
    f.spoil[TRAIN, "a", 1] = stating
    f.spoil[TRAIN, "ccc", 1] = lambda update: stating(far(update))
    f.run()
    with History(f.folder.history) as history:
        assert [s.site for s in history.statements()] == ["a"]


def test_without_the_comparison_the_same_outlier_spoils_the_model(five):
    f = five("rounds.min_sites=4", "rounds.outlier_factor=null")
    f.spoil[TRAIN, "ccc", 1] = away(initial_weights(f.config), -50)
    f.run()
    assert contributions(f)["ccc"].trained
    assert farthest_from(f, honest(f, "ccc")) > 1e-3


@pytest.mark.parametrize("aggregation", ["fedavg", *ROBUST])
def test_values_that_are_not_finite_are_named_with_every_aggregation(five, aggregation):
    f = five("rounds.min_sites=4", f"rounds.aggregation={aggregation}", "rounds.bad_sites=0",
             "rounds.trim=0.25")  # fmt: skip

    def spoil(update: SiteUpdate) -> SiteUpdate:
        name = max(n for n, t in update.weights.items() if t.is_floating_point())
        return replace(update, weights={**update.weights, name: update.weights[name] * math.nan})

    f.spoil[TRAIN, "dddd", 1] = spoil
    f.run()
    of = contributions(f)
    assert [s for s in SITES if not of[s].trained] == ["dddd"]
    assert "holds values that are not finite" in of["dddd"].reason
    assert farthest_from(f, honest(f, "dddd")) < 1e-5


@pytest.mark.parametrize("updates", ["fp16", "fp32"])
def test_comparing_the_updates_changes_no_bit_of_fedavg(five, updates):
    models = []
    for setting in ("10", "null"):
        f = five(
            f"rounds.outlier_factor={setting}", f"rounds.updates={updates}", "rounds.number=3",
            folder=setting,
        )  # fmt: skip
        f.run()
        models.append([model_of(f, r.round) for r in f.rounds() if r.round == 3])
    for name, tensor in models[0][0].items():
        assert torch.equal(tensor, models[1][0][name]), name


# ------------------------------------------------------------------------------ too few to weigh


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        (("rounds.aggregation=krum", "rounds.bad_sites=2"), 7),
        (("rounds.aggregation=trimmed_mean", "rounds.trim=0.1"), 10),
    ],
)
def test_with_too_few_sites_nobody_trains_in_vain(five, settings, needed):
    f = five(*settings)
    said = f"5 sites could train, {needed} are needed for rounds.{settings[0][7:]}".replace(
        "=", ": "
    )
    with pytest.raises(FederationFailed, match=said):
        f.run()
    assert not [task for task, _, _ in f.asked if task == TRAIN]


@pytest.mark.parametrize("how", ["fails", "is an outlier", "is absent"])
def test_with_one_missing_krum_cannot_say_who_is_bad(five, how):
    f = five("rounds.aggregation=krum", "rounds.min_sites=2")
    attend = None
    if how == "fails":
        f.spoil[TRAIN, "bb", 1] = lambda update: "out of memory"
    elif how == "is an outlier":
        f.spoil[TRAIN, "bb", 1] = away(initial_weights(f.config), 1e3)
    else:
        nodes = dict(zip(SITES, range(1, 6), strict=True))
        del nodes["bb"]
        cards = {s: f.sites[s] for s in nodes}
        attend = lambda history, number: Roll(cards, nodes, absent={"bb": "its line is down"})  # noqa: E731
    with pytest.raises(FederationFailed) as caught:
        f.run(attend=attend)
    assert "4 sites could train, 5 are needed for rounds.aggregation: krum." in str(caught.value)
    assert "bb: " in str(caught.value)
    assert f.rounds() == []


# --------------------------------------------------------------------------------- what is on disk


def test_updates_are_on_disk_only_while_the_round_lasts_and_for_the_server_alone(five):
    f = five()
    seen = {}

    def look(update: SiteUpdate) -> SiteUpdate:
        seen[update.site] = len(list(f.folder.updates.iterdir()))
        assert stat.S_IMODE(f.folder.updates.stat().st_mode) == 0o700
        return update

    for site in SITES:
        f.spoil[TRAIN, site, 1] = look
    f.run()
    assert max(seen.values()) > 0
    assert not f.folder.updates.exists()


def test_without_a_comparison_nothing_is_written(five):
    f = five("rounds.outlier_factor=null")

    def look(update: SiteUpdate) -> SiteUpdate:
        assert not f.folder.updates.exists()
        return update

    f.spoil[TRAIN, "eeeee", 1] = look
    f.run()
    assert f.rounds()[0].contributions[4].trained


@pytest.mark.parametrize("aggregation", ["fedavg", "median"])
def test_what_a_killed_server_left_is_not_taken_into_the_next_round(five, aggregation):
    clean = five(f"rounds.aggregation={aggregation}", folder="clean")
    clean.run()
    f = five(f"rounds.aggregation={aggregation}")
    f.folder.updates.mkdir()
    stale = {n: torch.full_like(t, 7) for n, t in initial_weights(f.config).items()}
    for number in range(9):
        save_weights(f.folder.updates / f"{number:04d}.safetensors", stale, {})
    f.run()
    assert f.rounds()[0].sha256 == clean.rounds()[0].sha256
    assert not f.folder.updates.exists()


def test_a_full_disk_stops_the_run_in_words_and_the_next_start_goes_on(five, monkeypatch):
    whole = five("rounds.number=2", folder="whole")
    whole.run()
    f = five("rounds.number=2")
    real, written = spool.safetensors_parts, []

    def full(tensors: Any, about: Any) -> Any:
        written.append(tensors)
        if len(written) > 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(tensors, about)

    monkeypatch.setattr(spool, "safetensors_parts", full)
    with pytest.raises(
        OSError, match=r"updates/0002\.safetensors: cannot be written .*No space left"
    ):
        f.run()
    assert [r.round for r in f.rounds()] == [1]
    assert not f.folder.updates.exists(), "the space is given back"
    monkeypatch.setattr(spool, "safetensors_parts", real)
    f.run()
    assert [r.sha256 for r in f.rounds()] == [r.sha256 for r in whole.rounds()]
