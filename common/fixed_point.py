"""Weighted changes of a model as whole numbers mod 2^32, so that sums under masks are exact.

A site's vector is, tensor by tensor in the order of names, round(n s (w - w0)): its change since the
round's model w0, times its number of training subjects n (it sends pre-weighted updates, so that n
stays hidden) and a scale s; the last entry is n itself. s is a power of two that both sides derive
from w0 and the number of sites K alone. It is chosen so that K vectors with the largest values there
can be (n = 1024 and every change at the bound) still add up to less than 2^31: a sum never wraps.

The mean that the server decodes differs from the plain one by at most K / (2 s N) a value, N being the
sum of all n (each site rounds once), and by the float type's own rounding. A change beyond the bound
is cut off there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from common.weights import BadWeights, Weights

MOST_COUNTED = 1024  # subjects: a site with more weighs as much as one with so many
SMALLEST_BOUND = 1.0  # of a change; a bias begins at 0 and must be free to move
COUNTER_BOUND = 2.0**16  # of whole numbers (BatchNorm's batches): they grow by the steps of a round
BLOCK = 1 << 16  # values at a time


@dataclass(frozen=True)
class Encoded:
    """`vector`: uint32, one value for each of the model's and the weight at the end. `cut`: how many
    changes were beyond the bound."""

    vector: np.ndarray
    cut: int


def vector_length(model: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in model.values()) + 1


def bound(tensor: torch.Tensor) -> float:
    """The largest change of a value of this tensor (of the round's model) that is told."""
    if not tensor.is_floating_point():
        return COUNTER_BOUND
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    return max(SMALLEST_BOUND, 2 * largest)


def scale(tensor: torch.Tensor, sites: int) -> float:
    """The power of two by which changes of this tensor are multiplied in a round of `sites` sites."""
    room = (2**31 - 1) / sites - 1  # one site's share, less what rounding adds
    return 2.0 ** math.floor(math.log2(room / (MOST_COUNTED * bound(tensor))))


def encode_vector(
    update: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor], subjects: int, sites: int
) -> Encoded:
    """A site's vector. `update` has the names, shapes and types of `model`.

    Raises:
        ValueError: there is no subject or no site.
        BadWeights: a value is not finite; the text names the tensor.
    """
    if subjects < 1 or sites < 1:
        raise ValueError(f"{subjects} subjects at one of {sites} sites cannot be encoded.")
    weight = min(subjects, MOST_COUNTED)
    vector = np.empty(vector_length(model), np.uint32)
    begin = cut = 0
    for name in sorted(model):
        limit, factor = bound(model[name]), scale(model[name], sites)
        blocks = zip(_blocks(update[name]), _blocks(model[name]), strict=True)
        for ours, theirs in blocks:
            change = ours.double() - theirs.double()
            if not bool(torch.isfinite(change).all()):
                raise BadWeights(f"tensor {name} holds values that are not finite.")
            cut += int((change.abs() > limit).sum())
            whole = change.clamp_(-limit, limit).mul_(weight * factor).round_().to(torch.int32)
            vector[begin : begin + len(whole)] = whole.numpy().view(np.uint32)
            begin += len(whole)
    vector[begin] = weight
    return Encoded(vector, cut)


def decode_sum(
    total: np.ndarray, model: Mapping[str, torch.Tensor], sites: int
) -> tuple[Weights, int]:
    """The mean model of a sum (mod 2^32) of vectors, and the sum of their weights.

    `sites` is the number that the vectors were encoded for, however many of them are in the sum.

    Raises:
        BadWeights: it is not the sum of such vectors.
    """
    if total.shape != (vector_length(model),) or total.dtype != np.uint32:
        raise BadWeights("the sum has another length than the model.")
    weight = int(total[-1])
    if not 1 <= weight <= sites * MOST_COUNTED:
        raise BadWeights("the sum is not one of the sites' updates: their weights are impossible.")
    mean: Weights = {}
    begin = 0
    for name in sorted(model):
        tensor = model[name]
        whole = total[begin : begin + tensor.numel()].view(np.int32)
        begin += tensor.numel()
        change = torch.from_numpy(whole.astype(np.float64)).div_(weight * scale(tensor, sites))
        value = change.view(tensor.shape).add_(tensor.double())
        mean[name] = (value if tensor.is_floating_point() else value.round_()).to(tensor.dtype)
    return mean, weight


def _blocks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensor.reshape(-1).split(BLOCK)
