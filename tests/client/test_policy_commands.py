"""`fed-client policy explain` as typed: what it tells, and the terms that it finds refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from client import consent
from client.cli import app
from common.invitation import write_invitation

pytestmark = pytest.mark.usefixtures("undisturbed_log")


def explained(hospital, *options: str) -> Result:
    return CliRunner().invoke(app, ["policy", "explain", str(hospital.path), *options])


def document(hospital) -> dict[str, Any]:
    return json.loads(explained(hospital, "--json").stdout)


def with_policy(hospital, text: str) -> None:
    hospital.config.write_text(hospital.config.read_text() + f"policy: {{{text}}}\n")


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("send_updates: false", "no model update: this site only evaluates"),
        ("metrics: [dice]", "behind each: dice; none over"),
        ("decimals: null", "not rounded"),
        ("training_numbers: false", "no loss, time or throughput"),
        ("min_subjects: 9", "none over fewer than 9 subjects"),
        ("show_name: true", "which other sites may read too"),
        (f"federation: {'ab' * 16}", f"the federation with this id: {'ab' * 16}"),
        (f"coordinator: {'ab' * 32}", f"with this CA: {'AB' * 32}"),
        ("networks: [dynunet]", "accepts the networks dynunet"),
        ("recipes: [patches]", "the recipes patches of preprocessing"),
        ("max_rounds: 44", "at most 44 rounds"),
        ("max_epochs: 1", "at most 1 epoch"),
        ("max_hours: 2.5", "stops a task after 2.5 hours"),
        ("max_gpu_memory_gb: 11", "takes at most 11 GB"),
        ("train_when: [mon 20:00-21:00]", "trains only mon 20:00-21:00"),
        ("require_privacy: true", "trains only with differential privacy"),
        ("require_secure_aggregation: true", "only through secure aggregation"),
    ],
)
def test_every_key_is_told_in_words(hospital, key, said):
    before = explained(hospital)
    assert before.exit_code == 0
    assert said not in words(before.stdout)
    with_policy(hospital, key)
    after = explained(hospital)
    assert after.exit_code == 0
    assert said in words(after.stdout)
    assert "no terms yet" in after.stdout


@pytest.mark.parametrize(
    "what",
    [
        "number and hash of the last entry of this site's audit log",
        "this site's keys for a round, sealed shares of its secrets",
        "the shares of theirs that unmask the sum",
        "this machine's address, when it is connected, this site's public key",
        "the versions of the programs, and the fingerprint of the configuration",
        "the text of an error or refusal",
        "the farewell was heard",
    ],
)
def test_the_list_of_what_leaves_is_whole(hospital, what):
    leaving = words(explained(hospital).stdout).partition("What never leaves")[0]
    assert what in leaving


def test_every_key_is_in_the_test_above():
    from client.policy import Policy

    (mark,) = (m for m in test_every_key_is_told_in_words.pytestmark if m.name == "parametrize")
    assert {key.partition(":")[0] for key, _ in mark.args[1]} == set(Policy.model_fields)


def test_what_privacy_changes_is_told(hospital):
    hospital.config.write_text(
        hospital.config.read_text() + "privacy: {epsilon: 8, metrics: noised}\n"
    )
    text = words(explained(hospital).stdout)
    assert "noised mean Dice" in text
    assert "epsilon 8" in text
    assert "no loss, time or throughput" in text


def test_terms_that_break_it_are_named_with_the_rules(hospital, invitation, terms, tiny_config):
    write_invitation(hospital.invitation, invitation)
    (told,) = document(hospital)["terms"]
    assert told == {"terms": "invited", "hash": terms.hash(), "broken": []}
    assert "keep to this policy" in explained(hospital).stdout

    with_policy(hospital, "max_rounds: 5")
    consent.accept(hospital, terms, terms.hash())
    other = replace(terms, config=tiny_config("rounds.number=9"))
    consent.propose(hospital, other)
    accepted, proposed = document(hospital)["terms"]
    assert accepted == {"terms": "accepted", "hash": terms.hash(), "broken": []}
    assert proposed["hash"] == other.hash()
    assert proposed["broken"] == [{"rule": "max_rounds", "why": "found 9, allowed at most 5"}]
    result = explained(hospital)
    assert result.exit_code == 1
    assert "policy rule `max_rounds`: found 9, allowed at most 5" in words(result.stdout)


def test_a_policy_that_cannot_be_read_is_wrong_usage(hospital):
    with_policy(hospital, "trian_when: []")
    result = explained(hospital)
    assert result.exit_code == 2
    assert "did you mean `train_when`?" in result.stderr
