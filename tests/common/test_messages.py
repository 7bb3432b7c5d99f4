"""Every message survives Flower's wire format, and a malformed one is a BadMessage, whatever is wrong."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from common.messages import (
    BadMessage,
    EvaluateTask,
    SiteCard,
    SiteReport,
    SiteUpdate,
    TrainTask,
    pack_evaluate_task,
    pack_site_card,
    pack_site_report,
    pack_site_update,
    pack_train_task,
    task_hash,
    unpack_evaluate_task,
    unpack_site_card,
    unpack_site_report,
    unpack_site_update,
    unpack_train_task,
    weight_bytes,
)
from common.metrics import SiteMetrics
from common.statement import Signed, Statement
from common.weights import BadWeights
from common.wire import encode, encode_change

WEIGHTS = {
    "conv.weight": torch.randn(4, 2, 3, 3, 3).to(memory_format=torch.channels_last_3d),
    "norm.num_batches_tracked": torch.tensor(2**40),
    "norm.running_var": torch.tensor([1e-38, 3.4e38, -0.0]),
    "half": torch.randn(3).half(),
    "none": torch.zeros(0, 2),
}
CARD = SiteCard("Köln-1", True, 12, 3, 1, "ab" * 32)
RESTING = replace(CARD, trains=False, resting="Köln-1: its privacy budget is spent.")
TRAIN = TrainTask(3, "ab" * 32, 1e-4, WEIGHTS)
UPDATE = SiteUpdate("Köln-1", 3, 12, WEIGHTS, 0.1 + 0.2, 12.5, 3.25)
EVALUATE = EvaluateTask(3, "ab" * 32, True, WEIGHTS)
MEANS = {"loss": 1 / 3, "dice/WT": 1.0, "hd95/ET": math.nan}
REPORT = SiteReport(
    "Köln-1", 3, SiteMetrics(5, MEANS, {"loss": 5, "dice/WT": 5, "hd95/ET": 0}), 0.5
)
STATED = Signed(
    Statement("3f" * 16, "Köln-1", 3, "c0de", "2026-01-01", private=False, metrics="exact").text(),
    b"\x00\xff",
)
WITHHELD = replace(REPORT, metrics=SiteMetrics(5, {}, {}), released="withheld", seconds=None)
MAY_BE_KEPT = ("loss", "seconds", "samples_per_second")  # by a site that protects its patients
ALL: list[tuple[Any, Callable[[Any], RecordDict], Callable[[RecordDict], Any]]] = [
    (CARD, pack_site_card, unpack_site_card),
    (replace(CARD, trains=False, n_training=0), pack_site_card, unpack_site_card),
    (TRAIN, pack_train_task, unpack_train_task),
    (UPDATE, pack_site_update, unpack_site_update),
    (EVALUATE, pack_evaluate_task, unpack_evaluate_task),
    (REPORT, pack_site_report, unpack_site_report),
    (replace(UPDATE, loss=None, seconds=None), pack_site_update, unpack_site_update),
    (replace(UPDATE, statement=STATED), pack_site_update, unpack_site_update),
    (replace(REPORT, statement=STATED, released="noised"), pack_site_report, unpack_site_report),
    (WITHHELD, pack_site_report, unpack_site_report),
    (RESTING, pack_site_card, unpack_site_card),
]
each_message = pytest.mark.parametrize(
    ("message", "pack", "unpack"), ALL, ids=[type(message).__name__ for message, _, _ in ALL]
)


def over_the_wire(content: RecordDict) -> RecordDict:
    """Through the bytes that a real network would carry."""
    proto = recorddict_to_proto(content)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))


def plain(message: Any) -> Any:
    """Tensors and NaN do not compare with ==."""
    values = dict(vars(message))
    weights = values.pop("weights", {})
    values["tensors"] = {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().numpy().tobytes())
        for name, tensor in sorted(weights.items())
    }
    return repr(values)


@each_message
@pytest.mark.parametrize("carried", [lambda content: content, over_the_wire], ids=["same", "wire"])
def test_what_is_sent_arrives(message, pack, unpack, carried):
    received = unpack(carried(pack(message)))
    assert type(received) is type(message)
    assert plain(received) == plain(message)


def test_received_weights_can_be_trained_on():
    weights = unpack_train_task(over_the_wire(pack_train_task(TRAIN))).weights
    weights["norm.running_var"].mul_(2)
    assert torch.equal(WEIGHTS["norm.running_var"][:1] * 2, weights["norm.running_var"][:1])


@each_message
def test_missing_records_and_values_are_named(message, pack, unpack):
    whole = pack(message)
    for name in whole:
        for wrong in (None, ConfigRecord({"other": 1}), MetricRecord({"other": 1})):
            content = pack(message)
            del content[name]
            if wrong is not None:
                content[name] = wrong
            elif name == "privacy":
                assert unpack(content).statement is None
                continue
            with pytest.raises(BadMessage):
                unpack(content)
    with pytest.raises(BadMessage, match="no ConfigRecord called"):
        unpack(RecordDict())
    first = next(name for name in whole if isinstance(whole[name], ConfigRecord))
    for key in list(whole[first]):
        content = pack(message)
        del content[first][key]
        if key in MAY_BE_KEPT or (key == "n_training" and isinstance(message, SiteCard)):
            assert getattr(unpack(content), key) is None
            continue
        with pytest.raises(BadMessage, match=key):
            unpack(content)


@each_message
def test_values_of_another_type_are_named(message, pack, unpack):
    first = next(n for n, record in pack(message).items() if isinstance(record, ConfigRecord))
    for key, right in pack(message)[first].items():
        for wrong in (True, 1, 1.5, "1", b"1", [1], [1.0]):
            if type(wrong) is type(right):
                continue
            content = pack(message)
            content[first][key] = wrong
            with pytest.raises(BadMessage, match=f"'{key}' must be of type {type(right).__name__}"):
                unpack(content)


def with_block(content: RecordDict, data: bytes, stype: str = "safetensors") -> RecordDict:
    content["weights"] = ArrayRecord({"weights": Array("uint8", (len(data),), stype, data)})
    return content


GOOD = encode(WEIGHTS)
weights_messages = pytest.mark.parametrize(
    ("message", "pack", "unpack"),
    [one for one in ALL[:6] if hasattr(one[0], "weights")],
    ids=["TrainTask", "SiteUpdate", "EvaluateTask"],
)


@weights_messages
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a safetensors block"),
        (b"junk", "not a safetensors block"),
        (GOOD[:20], "not a safetensors block"),
        (GOOD[:-3], "cannot be decoded"),
        (GOOD + b"more", "cannot be decoded"),
        (GOOD.replace(b'"dtype":"I64"', b'"dtype":"I46"'), "cannot be decoded"),
        (GOOD.replace(b"[3]", b"[9]"), "cannot be decoded"),
        (GOOD.replace(b'"fp32"', b'"fp23"'), "unknown encoding 'fp23'"),
        (b"\x80\x04K\x01." + bytes(20), "not a safetensors block"),  # a pickle
    ],
    ids=range(9),
)
def test_blocks_that_cannot_be_decoded_are_named(message, pack, unpack, data, said):
    with pytest.raises(BadMessage, match=said):
        unpack(with_block(pack(message), data))
    with pytest.raises(BadMessage, match=said):
        unpack(over_the_wire(with_block(pack(message), data)))


@weights_messages
def test_weights_in_flowers_own_form_are_refused_unread(message, pack, unpack):
    """Flower's arrays are numpy files, and of those some are pickles."""
    content = pack(message)
    content["weights"] = ArrayRecord(torch_state_dict=OrderedDict(WEIGHTS))
    with pytest.raises(BadMessage, match="no block of weights"):
        unpack(content)
    for stype in ("numpy.ndarray", "pickle", "", "SAFETENSORS"):
        with pytest.raises(BadMessage, match="no block of weights"):
            unpack(with_block(pack(message), GOOD, stype))


CHANGED = WEIGHTS | {
    "conv.weight": WEIGHTS["conv.weight"] + 0.125,
    "norm.num_batches_tracked": torch.tensor(2**40 + 1),
}


def test_an_update_may_travel_as_a_change_since_the_tasks_weights():
    update = replace(UPDATE, weights=CHANGED)
    content = over_the_wire(pack_site_update(update, since=WEIGHTS))
    assert weight_bytes(content) < weight_bytes(pack_site_update(update))
    received = unpack_site_update(content, since=WEIGHTS)
    assert plain(replace(received, weights={})) == plain(replace(update, weights={}))
    assert received.weights.keys() == CHANGED.keys()
    for name, tensor in CHANGED.items():
        assert received.weights[name].dtype == tensor.dtype
        torch.testing.assert_close(received.weights[name], tensor, rtol=0, atol=1e-4)
    with pytest.raises(BadMessage, match="came as a change"):
        unpack_site_update(content)


def test_a_whole_update_is_understood_whatever_was_agreed():
    received = unpack_site_update(over_the_wire(pack_site_update(UPDATE)), since=CHANGED)
    assert plain(received) == plain(UPDATE)


@pytest.mark.parametrize(
    ("message", "pack", "unpack"),
    [(TRAIN, pack_train_task, unpack_train_task), ALL[4]],
    ids=["TrainTask", "EvaluateTask"],
)
def test_a_task_never_comes_as_a_change(message, pack, unpack):
    with pytest.raises(BadMessage, match="came as a change"):
        unpack(with_block(pack(message), encode_change(CHANGED, WEIGHTS)))


def test_a_change_that_is_not_finite_is_not_packed():
    spoilt = WEIGHTS | {"half": torch.full((3,), torch.nan).half()}
    with pytest.raises(BadWeights, match="tensor half holds values that are not finite"):
        pack_site_update(replace(UPDATE, weights=spoilt), since=WEIGHTS)


def test_weight_bytes_are_those_that_travel():
    for pack, message in ((pack_train_task, TRAIN), (pack_site_update, UPDATE)):
        assert weight_bytes(pack(message)) == len(GOOD)
    with pytest.raises(BadMessage):
        weight_bytes(RecordDict())


def test_training_on_received_weights_does_not_change_the_message():
    """In a simulation all sites are handed the same bytes."""
    content = pack_train_task(TRAIN)
    for tensor in unpack_train_task(content).weights.values():
        tensor.zero_()
    assert plain(unpack_train_task(content)) == plain(TRAIN)


@pytest.mark.parametrize(
    "wrong",
    [
        {"trains": True, "n_training": 0},
        {"n_training": -1},
        {"n_held_out": -1},
        {"n_left_out": -1},
    ],
)
def test_a_card_with_impossible_numbers_is_refused(wrong):
    with pytest.raises(BadMessage):
        unpack_site_card(pack_site_card(replace(CARD, **wrong)))


@pytest.mark.parametrize(
    ("record", "key", "value"),
    [
        ("means", "loss", [1.0]),
        ("means", "loss", 1),
        ("defined", "loss", [5]),
        ("defined", "loss", 1.5),
        ("defined", "loss", -1),
        ("defined", "loss", 6),  # of 5 subjects
        ("defined", "n", 2.5),
        ("defined", "n", 0),
    ],
)
def test_a_report_with_impossible_numbers_is_refused(record, key, value):
    content = pack_site_report(REPORT)
    content[record][key] = value
    with pytest.raises(BadMessage):
        unpack_site_report(content)


def test_a_report_must_count_the_subjects_behind_each_mean():
    content = pack_site_report(REPORT)
    del content["defined"]["dice/WT"]
    with pytest.raises(BadMessage, match="dice/WT"):
        unpack_site_report(content)


def test_withheld_metrics_hold_none_and_nothing_else_is_a_way_to_release_them():
    content = pack_site_report(replace(WITHHELD, metrics=REPORT.metrics))
    with pytest.raises(BadMessage, match="not released in one of the agreed ways"):
        unpack_site_report(content)
    content = pack_site_report(replace(REPORT, released="secretly"))
    with pytest.raises(BadMessage, match="not released in one of the agreed ways"):
        unpack_site_report(content)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"site": "x"}', "[" * 9000, "x" * 20_000])
def test_a_statement_of_another_form_is_a_bad_message(text):
    content = pack_site_update(replace(UPDATE, statement=Signed(text)))
    with pytest.raises(BadMessage, match="privacy statement"):
        unpack_site_update(content)


def test_a_site_does_not_train_and_rest_at_once():
    with pytest.raises(BadMessage, match="why it does not"):
        unpack_site_card(pack_site_card(replace(RESTING, trains=True)))


def test_the_same_question_is_the_same_whichever_server_process_asks_it():
    """A restarted server has another nonce; what a site has paid for must be known again."""
    task = TrainTask(3, "ab", 0.01, {"w": torch.zeros(2)})
    content = pack_train_task(task)
    hash_ = task_hash(content)
    content["about"]["nonce"] = "another"
    assert task_hash(content) == hash_
    content["about"]["more"] = 1
    assert task_hash(content) != hash_, "but nothing else is overlooked"
    other = pack_train_task(replace(task, weights={"w": torch.ones(2)}))
    assert task_hash(other) != hash_
