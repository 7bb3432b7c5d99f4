"""How weights travel: one block of safetensors bytes, exact, or as fp16 change since a known model.

The change of a tensor, d = w - w0, is multiplied by a power of two that brings its largest magnitude
to between 2^14 and 2^15, rounded to fp16 (11 significant bits) and added to w0 by the receiver in
fp32. So the error of a received weight is at most 2^-11 of its own change, or 2^-39 of the largest
change in its tensor where that is more, and the fp32 rounding of the sum. Integer tensors travel
whole. Nothing is compressed further, and bytes from outside are never unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch

from common.message_words import FP16_CHANGE, FP32
from common.weights import BadWeights, Weights, safetensors_parts

LARGEST_HEADER = 2**24  # bytes; a network of ten thousand tensors needs less than 2 MiB
EXACT_SCALE = 120  # fp32 holds 2 to this power and its inverse
TARGET = 15  # the largest magnitude becomes less than 2^15; fp16 ends at 65504


def encode(weights: Mapping[str, torch.Tensor]) -> bytes:
    """Names, types, shapes and values exactly as they are."""
    return _encoded(weights, {"encoding": FP32})


def encode_change(weights: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> bytes:
    """Half the bytes of `encode`: what changed since `base`, which has the same names and shapes.

    Raises:
        BadWeights: a value is not finite; the text names the tensor.
    """
    tensors: dict[str, torch.Tensor] = {}
    scales: dict[str, int] = {}
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            tensors[name] = tensor
            continue
        change = torch.sub(tensor.float(), base[name].float())
        largest = _largest(change)
        if not math.isfinite(largest):
            raise BadWeights(f"tensor {name} holds values that are not finite.")
        scales[name] = TARGET - math.frexp(largest)[1] if largest > 0 else 0
        tensors[name] = _scaled_(change, scales[name]).half()
    return _encoded(tensors, {"encoding": FP16_CHANGE, "scales": json.dumps(scales)})


def decode(data: bytes, base: Mapping[str, torch.Tensor] | None = None) -> Weights:
    """The weights in `data`; `base` is the model that a change was taken from.

    Whether they fit the model is not checked here (`common.weights.check_update`): a tensor whose
    change does not fit `base` stays as it came.

    Raises:
        BadWeights: the bytes are not safetensors, of an unknown encoding, or a change without a base.
    """
    about = _about(data)
    try:
        tensors = dict(sorted(safetensors.torch.load(data).items()))  # it has no order of its own
    except Exception as error:  # from outside: whatever is wrong with them, say so
        raise BadWeights(f"the weights cannot be decoded ({type(error).__name__}).") from error
    encoding = about.get("encoding")
    if encoding == FP32:
        return tensors
    if encoding != FP16_CHANGE:
        raise BadWeights(f"the weights have the unknown encoding {str(encoding)[:40]!r}.")
    if base is None:
        raise BadWeights("the weights came as a change, where whole ones are expected.")
    scales = _scales(about)
    return {
        name: _restored(tensor, base[name], scales[name])
        if name in scales and name in base and _fits(tensor, base[name])
        else tensor
        for name, tensor in tensors.items()
    }


def _fits(change: torch.Tensor, base: torch.Tensor) -> bool:
    half = change.dtype == torch.float16 and base.is_floating_point()
    return half and change.shape == base.shape


def _restored(change: torch.Tensor, base: torch.Tensor, scale: int) -> torch.Tensor:
    return _scaled_(change.float(), -scale).add_(base).to(base.dtype)


def _largest(values: torch.Tensor) -> float:
    """The largest magnitude; NaN or infinite if any is. Of nothing 0."""
    if not values.numel():
        return 0.0
    lowest, highest = (float(extreme) for extreme in torch.aminmax(values))
    return max(-lowest, highest)


def _scaled_(values: torch.Tensor, scale: int) -> torch.Tensor:
    """fp32 `values` times 2^scale, in their place if that can be; exact where fp32 can hold the result."""
    if abs(scale) <= EXACT_SCALE:
        return values.mul_(2.0**scale)
    return torch.ldexp(values.double(), torch.tensor(scale)).float()


def _encoded(tensors: Mapping[str, torch.Tensor], about: dict[str, str]) -> bytes:
    return b"".join(safetensors_parts(tensors, about))


def _about(data: bytes) -> dict[str, Any]:
    """The metadata of a safetensors block: 8 bytes of length, then a JSON header."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, LARGEST_HEADER):
        raise BadWeights("the weights are not a safetensors block.")
    try:
        about = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadWeights("the weights' header is not readable.") from error
    return about if isinstance(about, dict) else {}


def _scales(about: Mapping[str, Any]) -> dict[str, int]:
    try:
        scales = json.loads(about["scales"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadWeights("the weights came as a change without its scales.") from error
    if not isinstance(scales, dict) or not all(
        type(scale) is int and -300 < scale < 300 for scale in scales.values()
    ):
        raise BadWeights("the scales of the change are not whole numbers.")
    return scales
