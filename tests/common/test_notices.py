"""The terms and the farewell survive Flower's wire format; anything else is a BadMessage in words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.config_file import load_config
from common.messages import SiteCard, pack_site_card
from common.notices import (
    Farewell,
    is_farewell,
    pack_farewell,
    pack_roll_call,
    unpack_farewell,
    unpack_roll_call,
)
from common.records import BadMessage
from common.terms import Terms
from tests.common.test_messages import over_the_wire

TERMS = Terms("3f" * 16, "ab" * 32, load_config(preset="quick", assign=["name=koeln-1", "seed=7"]))
FAREWELL = Farewell(True, "Training complete: 3 rounds.\n  Köln contributed to every round.")


def roll_call(document: Any) -> RecordDict:
    """With this document instead of the terms'; a text or bytes as they are."""
    text = document if isinstance(document, str) else json.dumps(document)
    return RecordDict({"terms": ConfigRecord({"document": text})})


def test_the_terms_arrive():
    received = unpack_roll_call(over_the_wire(pack_roll_call(TERMS)))
    assert received == TERMS
    assert received.hash() == TERMS.hash()
    assert received.config.fingerprint() == TERMS.config.fingerprint()


def test_what_the_sites_do_not_agree_on_stays_with_the_coordinator():
    own = ["server.address=10.1.2.3", "split.hold_out=[secret-site]"]
    config = load_config(preset="quick", assign=[*own, "name=koeln-1", "seed=7"])
    content = pack_roll_call(Terms(TERMS.federation, TERMS.code_hash, config))
    assert "10.1.2.3" not in str(content)
    assert "secret-site" not in str(content)
    assert unpack_roll_call(content).hash() == TERMS.hash()


@pytest.mark.parametrize("complete", [True, False])
def test_the_farewell_arrives(complete):
    farewell = Farewell(complete, FAREWELL.verdict)
    content = over_the_wire(pack_farewell(farewell))
    assert is_farewell(content)
    assert unpack_farewell(content) == farewell


def test_only_a_farewell_is_one():
    assert not is_farewell(pack_roll_call(TERMS))
    assert not is_farewell(pack_site_card(SiteCard("a", True, 1, 1, 0, "")))
    assert not is_farewell(RecordDict())


def test_missing_terms_are_said():
    with pytest.raises(BadMessage, match="no ConfigRecord called 'terms'"):
        unpack_roll_call(RecordDict())
    for wrong in (MetricRecord({"document": 1}), ArrayRecord()):
        with pytest.raises(BadMessage, match="no ConfigRecord called 'terms'"):
            unpack_roll_call(RecordDict({"terms": wrong}))
    with pytest.raises(BadMessage, match="'document' must be of type str"):
        unpack_roll_call(RecordDict({"terms": ConfigRecord()}))
    for value in (1, 1.5, True, b"{}", ["{}"]):
        with pytest.raises(BadMessage, match="'document' must be of type str"):
            unpack_roll_call(RecordDict({"terms": ConfigRecord({"document": value})}))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "nonsense", "[]", "3", "null", '"text"', "{}", "9" * 10_000, '{"a":' * 100_000,
        "[" * 100_000, '{"federation":"a","code_hash":"b","config":' + "[" * 100_000,
    ],
    ids=range(12),
)  # fmt: skip
def test_a_document_that_states_no_terms_is_refused(text):
    with pytest.raises(BadMessage) as caught:
        unpack_roll_call(roll_call(text))
    assert 0 < len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d | {"federation": 3}, "lack the federation's id"),
        (lambda d: {k: v for k, v in d.items() if k != "code_hash"}, "lack .* the code hash"),
        (lambda d: d | {"config": []}, "lack .* the configuration"),
        (lambda d: d | {"config": d["config"] | {"shape": 1}}, "same version of fedbrats"),
        (lambda d: d | {"config": d["config"] | {"seed": "x"}}, r"seed: .*same version"),
        (lambda d: d | {"config": d["config"] | {"rounds": {"number": 0}}}, r"rounds\.number: "),
    ],
)
def test_terms_that_this_version_does_not_understand_are_refused(change, said):
    with pytest.raises(BadMessage, match=said):
        unpack_roll_call(roll_call(change(TERMS.document())))


def test_a_malformed_farewell_is_refused():
    with pytest.raises(BadMessage, match="no ConfigRecord called 'farewell'"):
        unpack_farewell(RecordDict())
    for key, wrong in (("complete", 1), ("complete", "yes"), ("verdict", b"done"), ("verdict", 3)):
        content = pack_farewell(FAREWELL)
        content["farewell"][key] = wrong
        with pytest.raises(BadMessage, match=f"'{key}' must be of type"):
            unpack_farewell(content)
        del content["farewell"][key]
        with pytest.raises(BadMessage, match=f"'{key}' must be of type"):
            unpack_farewell(content)
    assert is_farewell(RecordDict({"farewell": MetricRecord()})), (
        "else it would be taken for a task"
    )
    with pytest.raises(BadMessage):
        unpack_farewell(RecordDict({"farewell": MetricRecord()}))


def test_notices_are_read_without_torch():
    """A hospital's connection lives in a process of its own and shall be small."""
    program = "import sys, common.notices; print(*sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root
    )
    assert not {"torch", "monai"} & set(done.stdout.split())
