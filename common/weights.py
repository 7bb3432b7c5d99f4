"""A model's weights as a plain dict of name -> CPU tensor, at rest as safetensors (never pickle)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from common.files import write_atomically

Weights = dict[str, torch.Tensor]
BLOCK = 32_768  # values at a time: in the cache, and the most for which torch starts no threads

DTYPES = {  # safetensors' names, in the order in which it stores tensors
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class BadWeights(ValueError):
    """A weights file or an update does not fit; the text says which tensor and why."""


def weights_of(network: torch.nn.Module) -> Weights:
    """A copy of the network's parameters and buffers on the CPU, in the ordinary memory layout."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in network.state_dict().items()
    }


def save_weights(
    path: Path, weights: Mapping[str, torch.Tensor], about: Mapping[str, object]
) -> str:
    """Write atomically; returns the file's sha256 (hex). `about` is stored beside the tensors.

    Raises:
        OSError: the disk is full or not writable; `path` is then as it was before.
    """
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    metadata = {"fedbrats": json.dumps(about, sort_keys=True)}
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error}). Free disk space there.") from error
    return file_sha256(path)


def load_weights(path: Path) -> tuple[Weights, dict[str, object]]:
    """The tensors and the `about` of `save_weights`.

    Raises:
        BadWeights: the file is missing, damaged or not a weights file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(metadata.get("fedbrats", "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise BadWeights(
            f"{path}: is not a readable safetensors file ({type(error).__name__})."
        ) from error
    if not isinstance(about, dict):
        raise BadWeights(f"{path}: what it says about itself is not a JSON object.")
    return weights, about


def safetensors_parts(
    tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]
) -> list[bytes | memoryview]:
    """The bytes of `safetensors.torch.save`, in pieces: the values are the tensors' own memory.

    That function copies them three times, which takes five times as long as all the rest.
    """
    rank = list(DTYPES)
    if any(tensor.dtype not in DTYPES for tensor in tensors.values()):
        rare = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return [save(rare, dict(about) or None)]
    header: dict[str, object] = {"__metadata__": about} if about else {}
    parts: list[bytes | memoryview] = []
    end = 0
    for name in sorted(tensors, key=lambda name: (rank.index(tensors[name].dtype), name)):
        values = tensors[name].detach().contiguous().reshape(-1)
        start, end = end, end + values.nbytes
        header[name] = {
            "dtype": DTYPES[values.dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
        parts.append(values.view(torch.uint8).numpy().data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *parts]


def check_update(update: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor]) -> None:
    """Refuse an update that cannot be averaged into `model`.

    Raises:
        BadWeights: names, shapes or types differ, or a value is not finite; the text says where.
    """
    missing, extra = model.keys() - update.keys(), update.keys() - model.keys()
    if missing or extra:
        raise BadWeights(f"the update lacks {_named(missing)} and adds {_named(extra)}.")
    for name, tensor in model.items():
        got = update[name]
        if got.shape != tensor.shape or got.dtype != tensor.dtype:
            raise BadWeights(
                f"tensor {name} is {got.dtype} {tuple(got.shape)}, "
                f"expected {tensor.dtype} {tuple(tensor.shape)}."
            )
        if not _is_finite(got):
            raise BadWeights(f"tensor {name} holds values that are not finite.")


def relative_change(
    update: Mapping[str, torch.Tensor],
    model: Mapping[str, torch.Tensor],
    model_norm: float | None = None,
) -> float:
    """The Euclidean norm of `update - model` over that of `model`, over all floating tensors.

    Args:
        model_norm: `norm(model)`, for who asks about many updates of one model.
    """
    names = [name for name, tensor in model.items() if tensor.is_floating_point()]
    change = math.sqrt(math.fsum(_square_sum(update[name], model[name]) for name in names))
    length = norm(model) if model_norm is None else model_norm
    return change / length if length else math.inf * change if change else 0.0


def norm(weights: Mapping[str, torch.Tensor]) -> float:
    """The Euclidean norm over all floating tensors."""
    squares = [_square_sum(tensor) for tensor in weights.values() if tensor.is_floating_point()]
    return math.sqrt(math.fsum(squares))


def _square_sum(values: torch.Tensor, minus: torch.Tensor | None = None) -> float:
    """In float64, which no square of a finite fp32 number leaves, and block by block."""
    block, total = torch.empty(min(BLOCK, values.numel()), dtype=torch.float64), 0.0
    subtracted = None if minus is None else minus.reshape(-1).split(BLOCK)
    for number, part in enumerate(values.reshape(-1).split(BLOCK)):
        difference = block[: len(part)].copy_(part)
        if subtracted is not None:
            difference.sub_(subtracted[number])
        total += float(difference @ difference)
    return total


def _is_finite(values: torch.Tensor) -> bool:
    """By the extremes, which a NaN is both of: ten times as fast as asking of each value."""
    if not values.is_floating_point() or not values.numel():
        return True
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(values))


def _named(tensors: Collection[str]) -> str:
    shown = [*sorted(tensors)[:3], *(["..."] if len(tensors) > 3 else [])]
    return f"{len(tensors)} tensors ({', '.join(shown)})" if tensors else "no tensor"


def byte_count(weights: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
