"""A block of weights as it may leave: the same tensors under a header that is written anew.

A safetensors block is 8 bytes of length, a JSON header and the tensors' bytes. Whatever a header can
hold beside names, types and shapes is refused or lost here. The tensors' bytes are not looked at:
nothing can tell what a weight reveals. Which tensors the network has is not known here either, so a
name is only held to the form of one.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from common.message_words import FP16_CHANGE, FP32
from common.secure_messages import VECTOR

LENGTH = 8  # bytes, before the header
ALIGNED = 8  # to so many bytes safetensors fills up its header, with spaces
NAME = re.compile(r"[A-Za-z0-9._/-]{1,200}")
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MASKED_BYTES = {"U32": 4}
MOST_DIMENSIONS = 8
LARGEST_SCALE = 300  # a power of two, as in common.wire


class UnknownBlock(ValueError):
    """A block holds something that is no tensor of a network."""


def rebuilt(data: bytes, *, masked: bool) -> bytes:
    """The block with a header in the one way in which this program writes it.

    `masked`: a block of secure aggregation, which holds one vector and says nothing else.

    Raises:
        UnknownBlock
    """
    begin = LENGTH + int.from_bytes(data[:LENGTH], "little")
    if len(data) < LENGTH or begin > len(data):
        raise UnknownBlock("the header is longer than the block.")
    header = _strictly_read(data[LENGTH:begin])
    about = header.pop("__metadata__", {})
    tensors = _tensors(header, len(data) - begin, MASKED_BYTES if masked else BYTES)
    if masked:
        if about or set(tensors) != {VECTOR} or len(tensors[VECTOR]["shape"]) != 1:
            raise UnknownBlock("it is no masked vector.")
        document: dict[str, Any] = tensors
    else:
        document = {"__metadata__": _about(about, tensors), **tensors}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    if text == data[LENGTH:begin]:  # the usual case: no copy of some 20 MB
        return data
    return b"".join((len(text).to_bytes(LENGTH, "little"), text, memoryview(data)[begin:]))


def _strictly_read(text: bytes | str) -> dict[str, Any]:
    """A JSON object without a key that is there twice, of which a reader sees only the last."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise UnknownBlock("a key is there twice.")
        return found

    try:
        read = json.loads(text, object_pairs_hook=once)
    except UnknownBlock:
        raise
    except (ValueError, RecursionError) as error:
        raise UnknownBlock("the header is no JSON.") from error
    if not isinstance(read, dict):
        raise UnknownBlock("the header is no JSON object.")
    return read


def _tensors(header: dict[str, Any], size: int, known: dict[str, int]) -> dict[str, Any]:
    """The tensors in the order of their bytes, which they fill without a gap."""
    found = []
    for name, tensor in header.items():
        if not NAME.fullmatch(name) or not isinstance(tensor, dict):
            raise UnknownBlock("a name is none of a tensor.")
        if tensor.keys() != {"dtype", "shape", "data_offsets"}:
            raise UnknownBlock("a tensor says more or less than its type, shape and place.")
        dtype, shape, place = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
        if not isinstance(dtype, str) or dtype not in known:
            raise UnknownBlock("a tensor is of an unknown type.")
        if not _whole(shape) or not _whole(place):
            raise UnknownBlock("a shape or place is not of whole numbers.")
        if len(shape) > MOST_DIMENSIONS or len(place) != 2:
            raise UnknownBlock("a shape or place has too many numbers.")
        begin, end = place
        if not 0 <= begin < end <= size or min(shape, default=1) < 1 or max(shape, default=1) > end:
            raise UnknownBlock("a tensor is empty, or beyond the end.")
        if math.prod(shape) * known[dtype] != end - begin:
            raise UnknownBlock("a tensor's shape is not that of its bytes.")
        found.append((begin, end, name, {"dtype": dtype, "shape": shape, "data_offsets": place}))
    found.sort(key=lambda tensor: tensor[:2])
    ends = [0, *(end for _, end, _, _ in found)]
    gapless = all(begin == end for (begin, *_), end in zip(found, ends[:-1], strict=True))
    if not found or not gapless or ends[-1] != size:
        raise UnknownBlock("there are bytes that are none of a tensor.")
    return {name: tensor for _, _, name, tensor in found}


def _about(about: Any, tensors: dict[str, Any]) -> dict[str, str]:
    """How the tensors are encoded (`common.wire`)."""
    if about == {"encoding": FP32} and VECTOR not in tensors:
        return {"encoding": FP32}
    if not isinstance(about, dict) or about.keys() != {"encoding", "scales"}:
        raise UnknownBlock("it says something else than how it is encoded.")
    if about["encoding"] != FP16_CHANGE or not isinstance(about["scales"], str):
        raise UnknownBlock("it is of an unknown encoding.")
    scales = _strictly_read(about["scales"])
    good = all(type(s) is int and abs(s) < LARGEST_SCALE for s in scales.values())
    if not good or not scales.keys() <= tensors.keys() or VECTOR in tensors:
        raise UnknownBlock("a scale is none of a tensor.")
    ordered = {name: scales[name] for name in tensors if name in scales}
    return {"encoding": FP16_CHANGE, "scales": json.dumps(ordered)}


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)
