"""What a block of weights can hold beside its tensors does not leave; the tensors leave unchanged."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from client.blocks import UnknownBlock, rebuilt
from common.message_words import BLOCK, FP16_CHANGE, FP32
from common.secure_messages import Masked, pack_masked
from common.wire import decode, encode, encode_change

MARK = "patient-0042"
TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ABOUT = {"encoding": FP32}
BYTES = bytes(range(8))


def block(header: dict[str, Any] | bytes, data: bytes = BYTES) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(**changes: Any) -> bytes:
    return block({"__metadata__": ABOUT, "a": {**TENSOR, **changes}})


def scaled(scales: str) -> bytes:
    return block({"__metadata__": {"encoding": FP16_CHANGE, "scales": scales}, "a": TENSOR})


TWICE = f'"a":{{"dtype":"{MARK}"}},"a":{json.dumps(TENSOR)},"__metadata__":{json.dumps(ABOUT)}'

SPOILT = {
    "a text as a name": block({"__metadata__": ABOUT, "Anna Muster 1950": TENSOR}),
    "a long name": block({"__metadata__": ABOUT, "a" * 201: TENSOR}),
    "no name": block({"__metadata__": ABOUT, "": TENSOR}),
    "a text as a type": tensor(dtype=MARK),
    "a list as a type": tensor(dtype=["F32"]),
    "a text as a shape": tensor(shape=[MARK]),
    "a shape of another size": tensor(shape=[3]),
    "a shape of truths": tensor(shape=[True, 2]),
    "a shape of fractions": tensor(shape=[2.0]),
    "a shape of many ones": tensor(shape=[2, *[1] * 50]),
    "a huge shape": tensor(shape=[10**400, 2]),
    "a negative shape": tensor(shape=[-1, -2]),
    "places that are no list": tensor(data_offsets=MARK),
    "a huge place": tensor(data_offsets=[0, 10**4000]),
    "a remark beside a tensor": tensor(note=MARK),
    "a key twice": block(b"{" + TWICE.encode() + b"}"),
    "remarks twice": block(
        f'{{"__metadata__":{{"note":"{MARK}"}},"__metadata__":{json.dumps(ABOUT)},'
        f'"a":{json.dumps(TENSOR)}}}'.encode()
    ),
    "an empty tensor": block(
        {"__metadata__": ABOUT, "a": TENSOR, "b": {**TENSOR, "shape": [0], "data_offsets": [8, 8]}}
    ),
    "no tensor": block({"__metadata__": ABOUT}, b""),
    "bytes between tensors": block(
        {
            "__metadata__": ABOUT,
            "a": {**TENSOR, "shape": [1], "data_offsets": [0, 4]},
            "b": {**TENSOR, "shape": [1], "data_offsets": [8, 12]},
        },
        bytes(12),
    ),
    "a long scale": scaled(json.dumps({"a": int("7" * 4000)})),
    "a scale twice": scaled(f'{{"a":1,"a":2,"a":{300 - 1}}}'),
    "a scale of nothing": scaled('{"b":1}'),
    "scales that are none": scaled(f'["{MARK}"]'),
    "scales of whole weights": block({"__metadata__": {**ABOUT, "scales": "{}"}, "a": TENSOR}),
    "a masked vector as weights": block({"__metadata__": ABOUT, "masked": TENSOR}),
    "a deep header": block(b"[" * 100_000),
    "a header beyond the end": (10**6).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("data", SPOILT.values(), ids=SPOILT)
def test_what_is_no_tensor_of_a_network_is_refused(data):
    with pytest.raises(UnknownBlock):
        rebuilt(data, masked=False)


def test_white_space_and_order_do_not_leave():
    """They could spell anything; the bytes of the tensors stay as they are."""
    header = json.dumps({"a": {k: TENSOR[k] for k in reversed(TENSOR)}, "__metadata__": ABOUT})
    padded = block(header.encode() + b" \t\n" * 50_000)
    other = block(f" {header}".encode())
    left = rebuilt(padded, masked=False)
    assert left == rebuilt(other, masked=False)
    assert len(left) < 200
    assert left.endswith(BYTES)
    assert decode(left).keys() == {"a"}
    assert rebuilt(left, masked=False) is left, "and is not copied again"


def test_weights_and_changes_are_the_same_afterwards():
    generator = torch.Generator().manual_seed(3)
    base = {f"conv{n}.weight": torch.randn(4, 3, 3, generator=generator) for n in range(20)}
    base["norm.count"] = torch.tensor(7)
    new = {name: value + 1 if value.ndim else value for name, value in base.items()}
    for data, since in ((encode(new), None), (encode_change(new, base), base)):
        left = rebuilt(data, masked=False)
        size = sum(t.numel() * t.element_size() for t in safetensors.torch.load(data).values())
        assert left[-size:] == data[-size:]
        before, after = decode(data, since), decode(left, since)
        assert before.keys() == after.keys() == new.keys()
        assert all(torch.equal(before[name], after[name]) for name in new)


def test_a_masked_vector_is_the_same_afterwards_and_nothing_else_is_one():
    content = pack_masked(Masked(1, "ab", np.arange(1000, dtype=np.uint32), b""))
    data = content["masked"][BLOCK].data
    assert rebuilt(data, masked=True) == data
    vector = {"dtype": "U32", "shape": [2], "data_offsets": [0, 8]}
    for header in (
        {"masked": {**vector, "dtype": "F32"}},
        {"masked": {**vector, "shape": [2, 1]}},
        {"masked": vector, "__metadata__": ABOUT},
        {"other": vector},
    ):
        with pytest.raises(UnknownBlock):
            rebuilt(block(header), masked=True)
