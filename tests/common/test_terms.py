"""A hospital says yes to a hash; it must cover all that was agreed, and a difference must be shown."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from common.config import PRESETS
from common.config_file import load_config
from common.terms import BadTerms, Terms, changes, terms_from
from tests.common.conftest import every_change, leaves

TERMS = Terms("3f" * 16, "ab" * 32, load_config())


def refusal(document: dict[str, Any]) -> str:
    with pytest.raises(BadTerms) as caught:
        terms_from(document)
    return str(caught.value)


def with_config(**sections: Any) -> dict[str, Any]:
    document = TERMS.document()
    return document | {"config": document["config"] | sections}


def in_section(section: str, **values: Any) -> dict[str, Any]:
    return with_config(**{section: TERMS.document()["config"][section] | values})


def test_the_hash_covers_every_agreed_value():
    hashes = {TERMS.hash()}
    for key, config in every_change(TERMS.config):
        if key.startswith("server."):
            continue
        changed = replace(TERMS, config=config).hash()
        assert changed not in hashes, key
        hashes.add(changed)
    for other in (replace(TERMS, federation="4f" * 16), replace(TERMS, code_hash="cd" * 32)):
        assert other.hash() not in hashes
        hashes.add(other.hash())
    assert len(hashes) > 40


def test_the_hash_covers_nothing_else():
    for key, config in every_change(TERMS.config):
        if key.startswith("server."):
            assert replace(TERMS, config=config).hash() == TERMS.hash(), key
    split = load_config(assign=["split.by=folders", "split.hold_out=[a]"])
    assert replace(TERMS, config=split).hash() == TERMS.hash()


def test_the_hash_is_sha256_of_the_document_as_compact_json():
    text = json.dumps(TERMS.document(), sort_keys=True, separators=(",", ":"))
    assert TERMS.hash() == hashlib.sha256(text.encode()).hexdigest()


def test_what_goes_from_one_part_to_another_is_another_hash():
    assert replace(TERMS, federation="a", code_hash="b").hash() != (
        replace(TERMS, federation="b", code_hash="a").hash()
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_the_document_states_the_terms(preset):
    config = load_config(preset=preset, assign=["loss.alpha=[1, 2, 3, 4]", "rounds.min_sites=3"])
    terms = replace(TERMS, config=config)
    document = json.loads(json.dumps(terms.document(), allow_nan=False))
    assert terms_from(document) == terms
    assert terms_from(document).hash() == terms.hash()
    reordered = json.loads(json.dumps(terms.document(), sort_keys=True))
    assert terms_from(reordered).hash() == terms.hash()
    assert document.keys() == {"federation", "code_hash", "config", "roster"}
    assert not {"server", "split"} & document["config"].keys()


def test_values_written_otherwise_are_the_same_terms():
    document = in_section("training", learning_rate=1e-4, batch_size=2.0)
    assert terms_from(document).hash() == TERMS.hash()


@pytest.mark.parametrize("key", ["federation", "code_hash", "config"])
@pytest.mark.parametrize("wrong", [None, 3, True, [], ["x"], b"x", 1.5])
def test_a_part_that_is_missing_or_of_another_type_is_said(key, wrong):
    document = TERMS.document()
    del document[key]
    assert "the terms lack" in refusal(document)
    assert "the terms lack" in refusal(document | {key: wrong})


@pytest.mark.parametrize(
    ("document", "key"),
    [
        (with_config(unheard_of=1), "unheard_of"),
        (with_config(seed="many"), "seed"),
        (with_config(seed=None), "seed"),
        (with_config(modalities=["t1", "pet"]), "modalities"),
        (with_config(training=[]), "training"),
        (in_section("training", epoch=1), r"training.epoch"),
        (in_section("training", epochs=0), "training.epochs"),
        (in_section("training", epochs=1.5), "training.epochs"),
        (in_section("training", augment={"flips": True}), "training.augment.flips"),
        (in_section("rounds", updates="int4"), "rounds.updates"),
        (in_section("rounds", max_change=float("inf")), "rounds.max_change"),
        (in_section("network", name="vnet"), "network.name"),
        (in_section("loss", alpha=[1, 2]), "loss.alpha"),
    ],
)
def test_a_configuration_of_another_version_is_refused_by_its_key(document, key):
    text = refusal(document)
    assert f"({key}" in text
    assert text.endswith("both sides need the same version of fedbrats.")
    assert "\n" not in text
    assert "pydantic" not in text


def test_equal_terms_have_no_changes():
    assert changes(TERMS, TERMS) == []
    assert changes(TERMS, terms_from(TERMS.document())) == []


def test_each_change_is_listed_with_both_values():
    old = leaves(TERMS.document())
    for key, config in every_change(TERMS.config):
        after = replace(TERMS, config=config)
        new = leaves(after.document())
        expected = [
            (name.removeprefix("config."), old[name], new[name])
            for name in old
            if old[name] != new[name]
        ]
        assert changes(TERMS, after) == expected, key
        assert changes(after, TERMS) == [(k, b, a) for k, a, b in expected]
        if key.startswith("server."):
            assert expected == []
        elif key != "preset":  # which other defaults come with
            assert [name for name, _, _ in expected] == [key]


def test_changes_are_exactly_what_differs():
    assign = [
        "name=other",
        "rounds.min_sites=2",
        "training.augment.flip=false",
        "loss.alpha=[1,1,1,1]",
    ]
    after = Terms("00" * 16, "cd" * 32, load_config(assign=[*assign, "server.port=1"]))
    assert changes(TERMS, after) == [
        ("federation", "3f" * 16, "00" * 16),
        ("code_hash", "ab" * 32, "cd" * 32),
        ("name", "brats", "other"),
        ("loss.alpha", 0.25, [1.0, 1.0, 1.0, 1.0]),
        ("training.augment.flip", True, False),
        ("rounds.min_sites", None, 2),
    ]


def test_terms_differ_in_their_hash_exactly_if_changes_are_listed():
    for _, config in every_change(TERMS.config):
        after = replace(TERMS, config=config)
        assert bool(changes(TERMS, after)) == (after.hash() != TERMS.hash())


ROSTER = tuple(f"SHA256:{letter * 43}" for letter in "CAB")


def test_the_roster_is_part_of_what_is_agreed_to_under_secure_aggregation_only():
    secure = replace(TERMS, config=TERMS.config.model_copy(update={"secure_aggregation": True}))
    with_roster = replace(secure, roster=ROSTER)
    assert with_roster.hash() != secure.hash()
    assert with_roster.hash() == replace(secure, roster=ROSTER[::-1]).hash(), "in whatever order"
    assert terms_from(with_roster.document()).hash() == with_roster.hash()
    assert changes(secure, with_roster) == [("roster", [], sorted(ROSTER))]
    assert replace(TERMS, roster=ROSTER).hash() == TERMS.hash(), "else nobody agrees to it"


@pytest.mark.parametrize("roster", ["SHA256:x", [5], ["\x1b[2J"], ["SHA256:" + "A" * 42], {"a": 1}])
def test_a_roster_that_is_none_is_refused(roster):
    with pytest.raises(BadTerms, match="roster"):
        terms_from(TERMS.document() | {"roster": roster})
