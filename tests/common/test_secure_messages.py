"""Each question and answer of secure aggregation survives the way, and nothing else is taken for one."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.numpy import save

from common.masking import Advert
from common.message_words import BLOCK, STYPE
from common.messages import BadMessage
from common.secure_messages import (
    Adverts,
    Agreed,
    Agreement,
    Masked,
    Revealed,
    Sealed,
    Session,
    Survivors,
    Trained,
    masked_bytes,
    pack_adverts,
    pack_agreed,
    pack_agreement,
    pack_masked,
    pack_revealed,
    pack_sealed,
    pack_survivors,
    pack_trained,
    put_session,
    session_of,
    unpack_adverts,
    unpack_agreed,
    unpack_agreement,
    unpack_masked,
    unpack_revealed,
    unpack_sealed,
    unpack_survivors,
    unpack_trained,
)

STAGE = 3, "5e55"
ADVERTS = Advert("{}", b"\x00\xff"), Advert("text", b"")
EACH = [
    (Trained("Oslo", 3, ADVERTS[0], loss=0.5, seconds=2.0), pack_trained, unpack_trained),
    (Trained("Oslo", 3, ADVERTS[0]), pack_trained, unpack_trained),
    (Adverts(*STAGE, ADVERTS), pack_adverts, unpack_adverts),
    (Sealed(*STAGE, {"a": b"\x01", "b": b""}), pack_sealed, unpack_sealed),
    (Survivors(*STAGE, {"a": b"x", "b": b""}), pack_survivors, unpack_survivors),
    (Agreed(*STAGE, b"signed"), pack_agreed, unpack_agreed),
    (Agreement(*STAGE, {"a": b"x"}), pack_agreement, unpack_agreement),
    (Revealed(*STAGE, {"a": bytes(32)}), pack_revealed, unpack_revealed),
]
each = pytest.mark.parametrize(("value", "pack", "unpack"), EACH)


@each
def test_what_is_packed_is_unpacked(value, pack, unpack):
    assert unpack(pack(value)) == value


def test_a_masked_vector_keeps_every_value_and_tells_its_size():
    vector = np.array([0, 1, 2**31, 2**32 - 1], np.uint32)
    content = pack_masked(Masked(*STAGE, vector, b"signed"))
    got = unpack_masked(content)
    assert (got.round, got.session, got.signature) == (*STAGE, b"signed")
    assert got.vector.dtype == np.uint32
    assert got.vector.tolist() == vector.tolist()
    assert masked_bytes(content) == len(save({"masked": vector}))


def test_a_session_is_beside_the_task_and_changes_no_record_of_it():
    content = RecordDict({"about": ConfigRecord({"round": 1})})
    assert session_of(content) is None
    put_session(content, Session("5e55", 4))
    assert session_of(content) == Session("5e55", 4)
    assert dict(content["about"]) == {"round": 1}
    content["session"] = ConfigRecord({"id": 5, "sites": 4})
    with pytest.raises(BadMessage, match="id"):
        session_of(content)


@each
def test_missing_records_are_named(value, pack, unpack):
    for name in pack(value):
        content = pack(value)
        del content[name]
        with pytest.raises(BadMessage):
            unpack(content)


@pytest.mark.parametrize("text", ["", "5", "null", "[[]]", '[["a"]]', '{"a": 5}', "[" * 50_000])
@pytest.mark.parametrize("name", ["adverts", "sealed", "revealed"])
def test_lists_of_another_form_are_refused(name, text):
    unpack = {"adverts": unpack_adverts, "sealed": unpack_sealed, "revealed": unpack_revealed}
    pack = {
        "adverts": lambda: pack_adverts(Adverts(*STAGE, ADVERTS)),
        "sealed": lambda: pack_sealed(Sealed(*STAGE, {})),
        "revealed": lambda: pack_revealed(Revealed(*STAGE, {})),
    }
    content = pack[name]()
    content[name] = ConfigRecord({"json": text})
    with pytest.raises(BadMessage):
        unpack[name](content)


def test_a_list_without_end_is_refused():
    content = pack_survivors(Survivors(*STAGE, {}))
    content["survivors"] = ConfigRecord({"json": "[" + '"a",' * 400_000 + '"a"]'})
    with pytest.raises(BadMessage, match="longer"):
        unpack_survivors(content)


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"junk" * 10,
        save({"masked": np.zeros(3, np.int32)}),
        save({"masked": np.zeros((3, 1), np.uint32)}),
        save({"other": np.zeros(3, np.uint32)}),
        save({"masked": np.zeros(3, np.uint32), "more": np.zeros(1, np.uint32)}),
    ],
)
def test_what_is_no_masked_vector_is_refused(block):
    content = pack_masked(Masked(*STAGE, np.zeros(3, np.uint32), b""))
    content["masked"] = ArrayRecord({BLOCK: Array("uint8", (len(block),), STYPE, block)})
    with pytest.raises(BadMessage):
        unpack_masked(content)
