"""Which terms and tasks a hospital's policy refuses, and that each refusal names its rule."""

from __future__ import annotations

from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest

from client.policy import Policy
from client.refusals import Refusal, broken_by_running, broken_by_task, broken_by_terms

TRAIN, EVALUATE, QUERY = "train", "evaluate", "query"
NOON = datetime(2026, 6, 1, 12, 0)  # a Monday
NIGHTS = Policy(train_when=("mon-fri 20:00-06:00",))


def broken(policy, terms, invitation, private=False) -> dict[str, str]:
    found = broken_by_terms(policy, terms, invitation, private=private)
    return {refusal.rule: refusal.why for refusal in found}


def test_the_default_policy_refuses_no_terms(terms, invitation):
    assert broken(Policy(), terms, invitation) == {}


@pytest.mark.parametrize(
    ("breaking", "keeping", "why"),
    [
        ({"federation": "ee" * 16}, {"federation": "3f" * 16}, f"found {'3f' * 16}, allowed"),
        (
            {"networks": ("segresnet", "dynunet")},
            {"networks": ("unet",)},
            "found unet, allowed seg",
        ),
        ({"recipes": ("patches",)}, {"recipes": ("resample",)}, "found resample, allowed patches"),
        ({"max_rounds": 2}, {"max_rounds": 3}, "found 3, allowed at most 2"),
        ({"max_epochs": 1}, {"max_epochs": 2}, "found 2, allowed at most 1"),
        ({"require_privacy": True}, {}, "`privacy` is off"),
        ({"require_secure_aggregation": True}, {}, "not masked"),
    ],
)
def test_terms_that_break_a_rule_are_told_which(
    terms, invitation, tiny_config, breaking, keeping, why
):
    from dataclasses import replace

    terms = replace(terms, config=tiny_config("training.epochs=2"))
    (rule,) = breaking
    found = broken(Policy(**breaking), terms, invitation)
    assert found.keys() == {rule}
    assert why in found[rule]
    assert broken(Policy(**keeping), terms, invitation) == {}


def test_every_broken_rule_is_told(terms, invitation):
    policy = Policy(max_rounds=1, networks=("dynunet",), require_privacy=True)
    assert broken(policy, terms, invitation).keys() == {"max_rounds", "networks", "require_privacy"}
    assert str(Refusal("networks", "found x")) == "policy rule `networks`: found x"


def test_the_coordinator_is_known_by_its_ca(terms, invitation):
    for good in (invitation.ca_fingerprint(), invitation.ca_digits()):
        assert broken(Policy(coordinator=good), terms, invitation) == {}
    for bad in ("ab" * 32, "12345" * 8):
        assert broken(Policy(coordinator=bad), terms, invitation).keys() == {"coordinator"}


def test_protection_that_is_there_is_enough(terms, invitation):
    policy = Policy(require_privacy=True)
    assert broken(policy, terms, invitation, private=True) == {}
    # nothing that would have to be protected leaves a site that only evaluates
    both = Policy(require_privacy=True, require_secure_aggregation=True, send_updates=False)
    assert broken(both, terms, invitation) == {}


def test_masked_updates_are_known_by_the_configuration(terms, invitation):
    config = SimpleNamespace(**{**dict(terms.config), "secure_aggregation": True})
    masked = SimpleNamespace(federation=terms.federation, config=config)
    assert broken(Policy(require_secure_aggregation=True), masked, invitation) == {}


# ---------------------------------------------------------------------------------------- tasks


def rule(policy: Policy, kind: str, round_: int | None, n: int = 12, now: datetime = NOON) -> str:
    found = broken_by_task(policy, kind, round_, n, now)
    return found.rule if found else ""


def test_tasks_within_the_policy_are_done():
    for kind in (TRAIN, EVALUATE, QUERY):
        assert rule(Policy(), kind, None if kind == QUERY else 1) == ""


@pytest.mark.parametrize(
    ("policy", "kind", "round_", "n", "expected"),
    [
        (Policy(max_rounds=3), TRAIN, 4, 12, "max_rounds"),
        (Policy(max_rounds=3), EVALUATE, 4, 12, "max_rounds"),
        (Policy(max_rounds=3), TRAIN, 3, 12, ""),
        (Policy(send_updates=False), TRAIN, 1, 12, "send_updates"),
        (Policy(send_updates=False), EVALUATE, 1, 12, ""),
        (Policy(min_subjects=13), TRAIN, 1, 12, "min_subjects"),
        (Policy(min_subjects=13), EVALUATE, 1, 12, ""),
        (Policy(min_subjects=12), TRAIN, 1, 12, ""),
        (NIGHTS, TRAIN, 1, 12, "train_when"),
        (NIGHTS, QUERY, None, 12, "train_when"),
        (NIGHTS, EVALUATE, 1, 12, ""),  # what it has trained is measured
        (NIGHTS, QUERY, None, 4, ""),  # it never trains, so it may evaluate at any time
    ],
)
def test_a_task_against_a_rule_is_refused_by_it(policy, kind, round_, n, expected):
    assert rule(policy, kind, round_, n) == expected


def test_within_the_hours_it_trains():
    assert rule(NIGHTS, TRAIN, 1, now=NOON + timedelta(hours=8)) == ""
    assert rule(NIGHTS, QUERY, None, now=NOON + timedelta(hours=8)) == ""


def test_the_words_are_the_same_all_day():
    """So that neither side's log says them anew every minute."""
    first, later = (
        broken_by_task(NIGHTS, TRAIN, 1, 12, NOON + timedelta(minutes=step)) for step in (0, 90)
    )
    assert str(first) == str(later)
    assert str(first).startswith("policy rule `train_when`: allowed mon-fri 20:00-06:00")


def test_a_task_that_runs_too_long_or_out_of_its_hours_ends():
    assert broken_by_running(Policy(), TRAIN, 10**9, NOON) is None
    limited = Policy(max_hours=2)
    assert broken_by_running(limited, EVALUATE, 7199, NOON) is None
    assert broken_by_running(limited, EVALUATE, 7201, NOON).rule == "max_hours"
    assert broken_by_running(NIGHTS, TRAIN, 60, NOON).rule == "train_when"
    assert broken_by_running(NIGHTS, EVALUATE, 60, NOON) is None
