"""Weights arrive exactly, a change within its documented error, and damaged bytes as BadWeights."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

from common.weights import BadWeights, Weights, check_update
from common.wire import LARGEST_HEADER, decode, encode, encode_change

RELATIVE = 2.0**-11  # of a value's own change
OF_LARGEST = 2.0**-39  # of the largest change in its tensor
FP32 = 2.0**-24  # of the received value: half a unit in its last place


def raw(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Type, shape and bits: -0.0 is not 0.0 here, and NaN equals itself."""
    plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), plain.numpy().tobytes()


def normal(*shape: int, seed: int = 1, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def block(header: Any, body: bytes = b"") -> bytes:
    """A safetensors block by hand: 8 bytes of length, the JSON header, the values."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


# ---------------------------------------------------------------------------------------- exactly

EVERY_TYPE = {
    "float32": torch.tensor([-0.0, 0.0, 1e-45, -1.1754942e-38, 3.4028235e38, math.pi]),
    "float64": torch.tensor([math.pi, 5e-324, -0.0]).double(),
    "float16": torch.tensor([65504.0, 6e-8, -0.0]).half(),
    "bfloat16": torch.tensor([math.pi, -0.0, 3e38]).bfloat16(),
    "not finite": torch.tensor([math.nan, math.inf, -math.inf]),
    "int64": torch.tensor([2**63 - 1, -(2**63), 2**53 + 1]),
    "int32": torch.tensor([2**31 - 1, -1], dtype=torch.int32),
    "uint8": torch.arange(256, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "counter": torch.tensor(2**60 + 1),
    "0-d": torch.tensor(-0.0),
    "no value": torch.zeros(0, 3),
    "channels last": normal(3, 2, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "transposed": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "expanded": torch.ones(1).expand(4),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "name with ü and \"quotes\" and \n": torch.ones(1),
}  # fmt: skip


def test_every_type_and_layout_arrives_bit_by_bit():
    received = decode(encode(EVERY_TYPE))
    assert received.keys() == EVERY_TYPE.keys()
    for name, tensor in EVERY_TYPE.items():
        assert raw(received[name]) == raw(tensor), name
        assert received[name].is_contiguous()
        assert not received[name].requires_grad


def test_names_come_in_sorted_order():
    """safetensors gives them in another order each time; what is said of an update shall not differ."""
    weights = {f"layer.{number}": torch.ones(1) for number in (3, 20, 1, 4, 11, 5)}
    assert list(decode(encode(weights))) == sorted(weights)
    assert list(decode(encode_change(weights, weights), weights)) == sorted(weights)


def test_whole_weights_need_no_base_and_do_not_mind_one():
    received = decode(encode(EVERY_TYPE), base={"float32": torch.zeros(6)})
    assert raw(received["float32"]) == raw(EVERY_TYPE["float32"])


def test_no_tensor_at_all():
    assert decode(encode({})) == {}
    assert decode(encode_change({}, {}), {}) == {}


def test_received_weights_are_the_receivers_own():
    data = encode({"w": torch.ones(3)})
    decode(data)["w"].zero_()
    assert torch.equal(decode(data)["w"], torch.ones(3))


def test_the_same_weights_are_the_same_bytes():
    assert encode(EVERY_TYPE) == encode(dict(reversed(EVERY_TYPE.items())))


# --------------------------------------------------------------------------------------- a change


def assert_within_bound(weights: Mapping[str, torch.Tensor], base: Weights) -> Weights:
    """The error that the module documents, worked out in float64 and without its code."""
    received = decode(encode_change(weights, base), base)
    assert received.keys() == weights.keys()
    for name, tensor in weights.items():
        assert received[name].dtype == tensor.dtype, name
        assert received[name].shape == tensor.shape, name
        if not tensor.numel():
            continue
        sent, since, got = (
            t.detach().double().numpy() for t in (tensor, base[name], received[name])
        )
        change = np.abs(sent - since)
        rounding = FP32 * np.abs(got) + 2.0**-149  # the latter: where fp32 has no finer step
        bound = np.maximum(RELATIVE * change, OF_LARGEST * change.max()) + rounding
        assert (np.abs(got - sent) <= bound).all(), name
    return received


MAGNITUDES = [1e-45, 1e-40, 1e-38, 1e-36, 1e-30, 1e-20, 1e-12, 1e-7, 1e-3, 1.0, 6e4, 1e10, 1e37]


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("of_base", [0.0, 1.0])
def test_a_change_of_any_magnitude_arrives_within_the_documented_error(magnitude, of_base):
    base = {"w": normal(40, 50, scale=of_base * magnitude)}
    change = (normal(40, 50, seed=2).double() * magnitude).float()
    assert_within_bound({"w": base["w"] + change}, base)


def test_changes_far_below_the_weights_arrive():
    """A late round with a low rate: 1e-7 and less on weights of about 1, where fp16 itself ends."""
    base = {"w": normal(5000)}
    for size in (1e-5, 1e-6, 3e-7, 1e-7):
        weights = {"w": base["w"] + normal(5000, seed=2, scale=size)}
        received = assert_within_bound(weights, base)
        moved = weights["w"] != base["w"]
        assert 0.2 < moved.double().mean() <= 1, "the case is not empty"
        # there the changes are few units in the last place, so they even arrive exactly
        coarse = torch.minimum(weights["w"].abs(), base["w"].abs()) > 0.5
        assert torch.equal(received["w"][coarse], weights["w"][coarse])


def test_mixed_magnitudes_in_one_tensor():
    exponents = torch.linspace(-140, 120, 5200).double()
    signs = torch.where(torch.arange(5200) % 3 == 0, -1.0, 1.0)
    weights = {"w": (torch.exp2(exponents) * signs * 1.37).float()}
    received = assert_within_bound(weights, {"w": torch.zeros(5200)})["w"]
    small = weights["w"].abs() < 2.0**-40 * weights["w"].abs().max()
    assert not received[small].any(), "below the documented step nothing is left"


def test_each_tensor_has_its_own_scale():
    base = {"large": torch.zeros(9), "small": torch.zeros(9)}
    weights = {"large": normal(9, scale=1e30), "small": normal(9, scale=1e-30)}
    received = assert_within_bound(weights, base)
    for name in base:
        torch.testing.assert_close(received[name], weights[name], rtol=RELATIVE, atol=0)


@pytest.mark.parametrize("largest", [1.0, 1.0 - 2**-24, 1.0 + 2**-23, 2.0**-149, 2.0**127])
def test_the_bound_holds_at_its_edges(largest):
    """Powers of two and their neighbours, with the smallest steps that are kept and are not."""
    steps = [
        factor * 2.0**-exponent
        for exponent in (11, 12, 23, 24, 29, 30, 37, 38, 39, 40, 41)
        for factor in (0.5, 0.75, 1 - 2**-20, 1.0, 1 + 2**-20, 1.25, 1.5)
    ]
    values = torch.tensor([largest, *(largest * step for step in steps)], dtype=torch.float64)
    assert_within_bound({"w": values.float()}, {"w": torch.zeros(len(values))})


def test_the_documented_step_is_not_too_large_a_claim():
    """The worst case is met: half of the step that remains below a largest change of 2^14 x 2^n."""
    weights = {"w": torch.tensor([1.0, 2.0**-39])}
    received = decode(encode_change(weights, {"w": torch.zeros(2)}), {"w": torch.zeros(2)})
    assert received["w"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_half_precision(dtype):
    base = {"w": normal(1000).to(dtype)}
    weights = {"w": (base["w"].float() * 1.01).to(dtype)}
    received = decode(encode_change(weights, base), base)["w"]
    assert received.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(received.double(), weights["w"].double(), rtol=step, atol=0)


def test_no_change_is_no_change():
    base = {"w": normal(3, 2, 4, 5, 6), "n": torch.tensor(7), "e": torch.zeros(0, 3)}
    received = decode(encode_change(base, base), base)
    assert all(raw(received[name]) == raw(tensor) for name, tensor in base.items())


def test_layouts_zero_size_and_single_values():
    base: Weights = {
        "last": normal(3, 2, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        "plain": normal(3, 2, 4, 5, 6),
        "0-d": torch.tensor(0.5),
        "none": torch.zeros(0, 4),
    }
    weights = {name: tensor + 0.01 for name, tensor in base.items()}
    weights["plain"] = weights["plain"].to(memory_format=torch.channels_last_3d)
    assert_within_bound(weights, base)


def test_counters_travel_whole():
    base = {"n": torch.tensor(0), "flags": torch.tensor([True, False])}
    weights = {"n": torch.tensor(2**62 + 1), "flags": torch.tensor([False, False])}
    received = decode(encode_change(weights, base), base)
    assert all(raw(received[name]) == raw(tensor) for name, tensor in weights.items())


def test_a_change_is_half_the_bytes():
    base = {"w": normal(100, 1000)}
    weights = {"w": base["w"] + 1e-3}
    whole, change = len(encode(weights)), len(encode_change(weights, base))
    assert whole >= 400_000
    assert 200_000 <= change < 200_400
    assert change < 0.501 * whole


def test_neither_weights_nor_base_are_changed():
    base, weights = {"w": normal(20)}, {"w": normal(20, seed=2)}
    before = raw(base["w"]), raw(weights["w"])
    decode(encode_change(weights, base), base)["w"].zero_()
    assert (raw(base["w"]), raw(weights["w"])) == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weights", "base"])
def test_what_is_not_finite_is_refused_by_name(value, where):
    base = {"good": normal(5), "layer.2.bias": normal(5), "n": torch.tensor(1)}
    bad = base | {"layer.2.bias": torch.tensor([0, 0, value, 0, 0])}
    pair = (bad, base) if where == "weights" else (base, bad)
    with pytest.raises(BadWeights, match=r"tensor layer\.2\.bias holds values that are not finite"):
        encode_change(*pair)


# ----------------------------------------------------------------------------------- from outside

MODEL: Weights = {
    "conv.weight": normal(4, 2, 3, 3, 3),
    "norm.bias": normal(4, seed=2),
    "norm.count": torch.tensor(12),
}
UPDATE = {name: tensor + 1 for name, tensor in MODEL.items()}
WHOLE, CHANGE = encode(UPDATE), encode_change(UPDATE, MODEL)


def receive(data: bytes, base: Weights | None = MODEL) -> Weights:
    """As the server does: decode, then see whether it fits."""
    weights = decode(data, base)
    check_update(weights, MODEL)
    return weights


def refused(data: bytes, base: Weights | None = MODEL) -> str:
    with pytest.raises(BadWeights) as caught:
        receive(data, base)
    return str(caught.value)


@pytest.mark.parametrize("data", [WHOLE, CHANGE], ids=["whole", "change"])
def test_undamaged_blocks_are_received(data):
    receive(data)


@pytest.mark.parametrize("data", [WHOLE, CHANGE], ids=["whole", "change"])
def test_a_block_cut_short_or_with_more_behind_is_refused(data):
    for length in range(len(data)):
        refused(data[:length])
    for more in (b"\0", b"more", data):
        refused(data + more)


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 9, 2**24, 2**31, 2**32, 2**63, 2**64 - 1])
def test_a_header_of_another_length_is_refused(size):
    for data in (WHOLE, CHANGE):
        refused(size.to_bytes(8, "little") + data[8:])
        refused(size.to_bytes(8, "little"))


def test_a_header_beyond_all_need_is_refused_before_it_is_read():
    text = b'{"__metadata__":{"encoding":"fp32"}}'
    padded = text + b" " * (LARGEST_HEADER + 8 - len(text))
    assert "not a safetensors block" in refused(block(padded))
    decode(block(text + b" " * (LARGEST_HEADER - len(text))))


def with_scales(text: str | None, encoding: str = "fp16-change") -> bytes:
    header, body = parts(CHANGE)
    header["__metadata__"] = {"encoding": encoding} | ({} if text is None else {"scales": text})
    return block(header, body)


DEEP = "[" * 100_000


def with_tensor(text: str) -> bytes:
    return f'{{"__metadata__":{{"encoding":"fp32"}},"a":{text}}}'.encode()


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"[]", b"3", b"null", b'"text"', b"\xff\xfe\xfd", b"\xff\xfe{\0}\0", b"NaN",
        b'{"__metadata__":[]}', b'{"__metadata__":null}', b'{"__metadata__":{"encoding":3}}',
        b'{"__metadata__":{"encoding":{"a":[]}}}', b'{"__metadata__":{"encoding":"pickle"}}',
        with_tensor("3"), with_tensor("[]"), with_tensor("{}"), with_tensor(DEEP),
        with_tensor('{"dtype":"F32","shape":[1],"data_offsets":[0,9]}'),
        with_tensor('{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}'),
        with_tensor('{"dtype":"F32","shape":[0.5],"data_offsets":[0,0]}'),
        with_tensor('{"dtype":"F4","shape":[4],"data_offsets":[0,2]}'),
        with_tensor('{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}'),
        with_tensor('{"dtype":"F32","shape":[0,9223372036854775807,9],"data_offsets":[0,0]}'),
        b'{"a":' + b"9" * 10_000 + b"}",
        DEEP.encode(), b'{"a":' * 100_000, b'{"__metadata__":' + DEEP.encode(),
        b'{"__metadata__":{"encoding":' + DEEP.encode() + b"]" * 100_000 + b"}}",
        b'{"__metadata__":{"encoding":"' + b"x" * 100_000 + b'"}}',
        b'{"__metadata__":{"encoding":"\\ud800"}}',
    ],
    ids=range(31),
)  # fmt: skip
def test_a_header_that_is_none_is_refused_in_few_words(header):
    assert len(refused(block(header, bytes(8)))) < 200
    assert len(refused(block(header))) < 200


@pytest.mark.parametrize(
    "scales",
    [
        None, "", "{", "[]", "3", "null", '"text"', "NaN", DEEP, '{"conv.weight":' + DEEP,
        '{"conv.weight": 1.0, "norm.bias": 1}', '{"conv.weight": true, "norm.bias": 1}',
        '{"conv.weight": "1", "norm.bias": 1}', '{"conv.weight": null, "norm.bias": 1}',
        '{"conv.weight": [1], "norm.bias": 1}', '{"conv.weight": NaN, "norm.bias": 1}',
        '{"conv.weight": 300, "norm.bias": 1}', '{"conv.weight": -300, "norm.bias": 1}',
        '{"conv.weight": 1e3, "norm.bias": 1}', '{"conv.weight": %s, "norm.bias": 1}' % ("9" * 5000),
        '{"conv.weight": %s, "norm.bias": 1}' % ("9" * 4000),
        '{"conv.weight": 1, "norm.bias": 1, "unknown": 1.5}',
    ],
    ids=range(22),
)  # fmt: skip
def test_scales_that_are_no_whole_numbers_are_refused(scales):
    assert "scales" in refused(with_scales(scales))


def test_a_tensor_without_its_scale_is_refused_by_name():
    assert "conv.weight" in refused(with_scales('{"norm.bias": 1}'))
    assert "norm.bias" in refused(with_scales('{"conv.weight": 1, "unknown": 1}'))
    assert "conv.weight" in refused(with_scales("{}"))


def with_tensors(**tensors: torch.Tensor) -> bytes:
    """A change in which some tensors, which have scales, are others."""
    halves = {name: torch.ones(t.shape).half() for name, t in MODEL.items()}
    halves["norm.count"] = MODEL["norm.count"]
    sent = halves | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    header, body = parts(encode(sent))
    about = {"encoding": "fp16-change", "scales": json.dumps(dict.fromkeys(MODEL, 0))}
    return block(header | {"__metadata__": about}, body)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.complex64])
def test_a_change_of_another_type_than_fp16_is_refused(dtype):
    assert torch.equal(receive(with_tensors())["norm.bias"], MODEL["norm.bias"] + 1)
    text = refused(with_tensors(norm__bias=torch.ones(4, dtype=dtype)))
    assert f"norm.bias is {dtype}" in text


def test_a_counter_cannot_come_as_a_change():
    text = refused(with_tensors(norm__count=torch.tensor(1.0).half()))
    assert "norm.count is torch.float16" in text


def test_scales_of_unknown_names_do_not_matter():
    scales = json.loads(parts(CHANGE)[0]["__metadata__"]["scales"])
    received = receive(with_scales(json.dumps(scales | {"unknown": 3, "": -299})))
    expected = receive(CHANGE)
    assert all(raw(received[name]) == raw(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("scale", [-299, 299])
def test_scales_that_make_nonsense_of_a_change_do_no_more(scale):
    data = with_scales(json.dumps({"conv.weight": scale, "norm.bias": scale}))
    if scale < 0:
        assert "not finite" in refused(data)
    else:
        assert torch.equal(receive(data)["conv.weight"], MODEL["conv.weight"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_change_that_is_not_finite_is_refused_on_arrival(value):
    header, body = parts(CHANGE)
    start = header["norm.bias"]["data_offsets"][0]
    spoilt = body[:start] + np.float16(value).tobytes() + body[start + 2 :]
    assert "norm.bias holds values that are not finite" in refused(block(header, spoilt))


def test_a_change_without_a_base_is_refused():
    assert "came as a change" in refused(CHANGE, base=None)
    with pytest.raises(BadWeights, match="came as a change"):
        decode(encode_change({}, {}))


def test_an_unknown_encoding_is_refused_and_named():
    scales = parts(CHANGE)[0]["__metadata__"]["scales"]
    assert "unknown encoding 'int4'" in refused(with_scales(scales, "int4"))
    header, body = parts(WHOLE)
    del header["__metadata__"]
    assert "unknown encoding 'None'" in refused(block(header, body))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w | {"norm.bias": w["norm.bias"][:3]}, "norm.bias"),
        (lambda w: w | {"norm.bias": w["norm.bias"][None]}, "norm.bias"),
        (lambda w: w | {"conv.weight": w["conv.weight"].reshape(2, 4, 3, 3, 3)}, "conv.weight"),
        (lambda w: w | {"norm.count": w["norm.count"][None]}, "norm.count"),
        (lambda w: w | {"norm.count": w["norm.count"].float()}, "norm.count"),
        (lambda w: w | {"more": torch.ones(2)}, "more"),
        (lambda w: {n: t for n, t in w.items() if n != "norm.bias"}, "norm.bias"),
    ],
)
def test_a_change_of_another_model_is_refused_by_name(change, named):
    other = change(MODEL)
    data = encode_change({name: tensor + 1 for name, tensor in other.items()}, other)
    assert named in refused(data)


def test_a_whole_fp16_model_is_not_taken_for_a_change():
    halves = {n: t.half() if t.is_floating_point() else t for n, t in UPDATE.items()}
    assert "torch.float16" in refused(encode(halves))


# ------------------------------------------------------------------------------- thousands of them

Mutation = Callable[[random.Random, bytes], bytes]
WORDS = [
    None, True, -1, 0, 1, 2, 3, 9, 2**31, 2**63, 2**64, -(2**63), 1.5, 1e300, "", "F32", "F16", "BF16",
    "F64", "I64", "U8", "BOOL", "C64", "F8_E4M3", "F8_E8M0", "F4", "fp32", "fp16-change", "{}", "[]",
    '{"conv.weight":1}', [], [0], [0, 0], [0, 2], [4], [1, 4], [2**40, 2**40], {}, {"encoding": "fp32"},
]  # fmt: skip
KEYS = ["conv.weight", "norm.bias", "norm.count", "__metadata__", "dtype", "shape", "data_offsets"]
KEYS += ["encoding", "scales", "new"]


def flipped(rng: random.Random, data: bytes) -> bytes:
    """A few bytes anywhere, more often in the length and the header."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        end = rng.choice([8, len(data) - len(parts(data)[1]), len(data)])
        result[rng.randrange(end)] = rng.choice([0, 1, 0x22, 0x7B, 0xFF, rng.randrange(256)])
    return bytes(result)


def spliced(rng: random.Random, data: bytes) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice(
        [data[:a] + data[b:], data[:b] + data[a:], data[:a] + rng.randbytes(rng.randint(1, 9))]
    )


def reworded(rng: random.Random, data: bytes) -> bytes:
    """A valid block whose header says something else, at any depth."""
    header, body = parts(data)
    for _ in range(rng.randint(1, 3)):
        target = header
        while (inner := [v for v in target.values() if isinstance(v, dict)]) and rng.random() < 0.7:
            target = rng.choice(inner)
        key = rng.choice([*target, *KEYS])
        if rng.random() < 0.15:
            target.pop(key, None)
        elif isinstance(number := target.get(key), list) and number and rng.random() < 0.5:
            target[key] = [n + rng.choice([-1, 0, 1, 2]) if type(n) is int else n for n in number]
        else:
            chosen = rng.choice([*WORDS, *header.values(), {key: rng.choice(WORDS)}])
            target[key] = deepcopy(chosen)
    return block(header, rng.choice([body, body, body[:-2], b""]))


def rescaled(rng: random.Random, data: bytes) -> bytes:
    header, body = parts(data)
    scales = {rng.choice(KEYS): rng.choice([*WORDS, 299, -299]) for _ in range(3)}
    names = dict.fromkeys(MODEL, rng.choice([0, 14, 150, -150, 299, -299]))
    about = {"encoding": "fp16-change", "scales": json.dumps(names | scales)}
    return block(header | {"__metadata__": about}, body)


def retyped(rng: random.Random, data: bytes) -> bytes:
    """A tensor with a scale, of the right shape, of whatever type there is."""
    names = ["conv.weight", "norm.bias", "norm.count"]
    dtypes = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1, "I16": 2, "U16": 2}
    dtypes |= {"I32": 4, "U32": 4, "I64": 8, "U64": 8, "BOOL": 1, "C64": 8, "F8_E4M3": 1}
    dtypes |= {"F8_E5M2": 1, "F8_E8M0": 1}
    header: dict[str, Any] = {}
    body = b""
    for name in names:
        dtype, width = rng.choice(list(dtypes.items()))
        values = rng.randbytes(width * MODEL[name].numel())
        offsets = [len(body), len(body) + len(values)]
        shape = list(MODEL[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += values
    scales = json.dumps(dict.fromkeys(names, rng.choice([0, 20, 299, -299])))
    header["__metadata__"] = {"encoding": "fp16-change", "scales": scales}
    return block(header, body)


@pytest.mark.parametrize("mutation", [flipped, spliced, reworded, rescaled, retyped])
@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_comes_is_received_or_refused(mutation: Mutation, seed: int):
    """Any other exception would end the server's run; what is received fits and is finite."""
    rng = random.Random(f"{mutation.__name__} {seed}")
    good = 0
    for number in range(500):
        data = mutation(rng, (WHOLE, CHANGE)[number % 2])
        try:
            receive(data)
            good += 1
        except BadWeights:
            pass
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error}\n{data!r}")
    assert good < 500, "the mutations do damage"


def test_random_bytes_are_refused():
    rng = random.Random(3)
    for _ in range(1000):
        refused(rng.randbytes(rng.randrange(200)))
        refused(block(rng.randbytes(rng.randrange(60)), rng.randbytes(8)))
