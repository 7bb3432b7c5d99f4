"""Heads in messages: packed, read back, and what a step back is called."""

from __future__ import annotations

import hashlib

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.audit_heads import (
    Heads,
    attach_heads,
    attached_heads,
    gone_back,
    round_of,
    weights_in,
)
from common.audit_log import EMPTY, Head
from common.messages import EvaluateTask, pack_evaluate_task, task_hash
from common.records import BadMessage


def one(number: int, digit: str = "a") -> Head:
    return Head(number, digit * 64)


def test_heads_travel_and_replace_earlier_ones():
    content = RecordDict()
    assert attached_heads(content) is None
    attach_heads(content, Heads(one(1), one(2, "b")))
    attach_heads(content, Heads(one(3), EMPTY))
    assert attached_heads(content) == Heads(one(3), EMPTY)


def test_the_same_task_with_other_heads_is_the_same_question():
    content = pack_evaluate_task(EvaluateTask(1, "c0ffee", False, {}))
    before = task_hash(content)
    attach_heads(content, Heads(one(3), EMPTY))
    assert task_hash(content) == before


GOOD = {"number": 1, "hash": "a" * 64, "heard_number": 0, "heard_hash": "0" * 64}


@pytest.mark.parametrize(
    "wrong",
    [
        {"number": -1},
        {"number": True},
        {"number": "1"},
        {"hash": "A" * 64},
        {"hash": "a" * 63},
        {"heard_hash": 5},
        {"heard_number": -7},
    ],
)
def test_heads_of_another_form_are_refused(wrong):
    with pytest.raises(BadMessage):
        attached_heads(RecordDict({"audit": ConfigRecord({**GOOD, **wrong})}))
    with pytest.raises(BadMessage):
        attached_heads(RecordDict({"audit": ArrayRecord()}))
    assert attached_heads(RecordDict({"audit": ConfigRecord(GOOD)}))


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (EMPTY, None, ""),
        (EMPTY, one(1), ""),
        (one(2), one(2), ""),
        (one(2), one(3, "b"), ""),
        (one(2), one(1), "of 1 entries, and it had 2"),
        (one(2), EMPTY, "of 0 entries, and it had 2"),
        (one(2), one(2, "b"), "another entry 2"),
        (one(2), None, "told nothing"),
    ],
)
def test_a_step_back_is_named(before, now, said):
    words = gone_back(before, None if now is None else Heads(now, EMPTY))
    assert said in words
    assert bool(words) == bool(said)


def test_the_weights_of_a_message_are_counted():
    array = Array("uint8", (3,), "safetensors", b"abc")
    content = RecordDict(
        {"weights": ArrayRecord({"w": array}), "about": ConfigRecord({"round": 4})}
    )
    assert weights_in(content) == {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert round_of(content) == 4
    assert weights_in(RecordDict()) == {"bytes": 0, "sha256": ""}
    assert round_of(RecordDict()) is None
