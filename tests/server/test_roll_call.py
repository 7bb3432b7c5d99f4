"""Nobody trains before it is certain who takes part and that all agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
from flwr.app import RecordDict

from common.messages import SiteCard
from server.roll_call import FederationFailed, call_roll, wait_for_nodes


def roll_of(federation, **more):
    found = []
    federation.serve(lambda grid: found.append(call_roll(grid, federation.config)), **more)
    return found[0]


def test_roll_is_sorted_by_site_name_whatever_the_node_numbers(federation):
    roll = roll_of(federation(), nodes={7: "ccc", 3: "bb", 5: "a"})
    assert list(roll.cards) == ["a", "bb", "ccc"]
    assert roll.nodes == {"a": 5, "bb": 3, "ccc": 7}
    assert roll.cards["bb"].n_training == 10


def test_who_trains_and_who_evaluates(federation):
    f = federation()
    f.sites["bb"] = replace(f.sites["bb"], trains=False, n_training=0)
    f.sites["a"] = replace(f.sites["a"], n_held_out=0)
    roll = roll_of(f)
    assert roll.training == ["a", "ccc"]
    assert roll.evaluating == ["bb", "ccc"]


def test_two_nodes_of_one_name_are_refused(federation):
    with pytest.raises(FederationFailed, match="two nodes say that they are site bb"):
        roll_of(federation(), nodes={1: "a", 2: "bb", 3: "bb"})


def test_every_problem_is_listed_at_once(federation):
    f = federation()
    f.sites["d"] = SiteCard("d", True, 1, 1, 0, "other")
    f.spoil["query", "bb", 0] = lambda card: "no federation.yaml was accepted here"
    f.spoil["query", "ccc", 0] = lambda card: RecordDict()
    with pytest.raises(FederationFailed) as caught:
        roll_of(f)
    text = str(caught.value)
    assert "node 2: no federation.yaml was accepted here" in text
    assert "node 3: its reply cannot be used: the message has no ConfigRecord" in text
    assert "d: holds another configuration than the server" in text


def test_a_card_with_impossible_numbers_is_named(federation):
    f = federation()
    f.sites["bb"] = replace(f.sites["bb"], n_training=0)  # and says that it trains
    with pytest.raises(FederationFailed, match=r"node 2: .*trains, on no subject"):
        roll_of(f)


def test_too_few_to_begin(federation):
    with pytest.raises(FederationFailed, match="3 sites can train, 4 are needed"):
        roll_of(federation("rounds.min_sites=4"))
    f = federation()
    f.sites = {s: replace(c, trains=False, n_training=0) for s, c in f.sites.items()}
    with pytest.raises(FederationFailed, match="0 sites can train, 1 are needed"):
        roll_of(f)
    with pytest.raises(FederationFailed, match="0 sites can train"):
        roll_of(federation(sites={}))


def test_nothing_to_measure_with(federation):
    f = federation()
    f.sites = {s: replace(c, n_held_out=0) for s, c in f.sites.items()}
    with pytest.raises(FederationFailed, match="No site holds out a subject"):
        roll_of(f)


def test_waiting_ends_when_all_are_there_or_time_is_up(federation):
    federation().serve(lambda grid: wait_for_nodes(grid, 3, 0.0))
    with pytest.raises(FederationFailed, match="Only 3 of 4 sites connected"):
        federation().serve(lambda grid: wait_for_nodes(grid, 4, 0.1))
