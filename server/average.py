"""FedAvg: the mean of the sites' weights, weighted by their numbers of training subjects.

    w = sum_k n_k w_k / sum_k n_k        (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1)

Updates are added one at a time and can be forgotten at once, so memory is one model whatever the
number of sites. What is kept is the mean of the changes d_k = w_k - w_0 since the round's model, in
the weights' own precision (fp16 and bf16: fp32), and each update moves it by n_k / n of the way: no
sum grows, nothing overflows, and equal updates stay as they are. With e = 2^-24 the result is within

    e |w| + (K + 8) e max_k |d_k|

of the exact mean: its own rounding, and K + 8 roundings of what the round has changed, which is far
smaller than the weights. In the last term only the order of the sites matters (the caller fixes it).
Integers (BatchNorm's counters) are summed exactly in float64.

`moving` averages the rounds' models over time, which evens out the noise of private updates. It sees
nothing but those models, so it costs no privacy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.weights import BLOCK, Weights


@dataclass
class WeightedMean:
    """Running state by tensor name: mean changes of floats, sums of integers; the weight so far."""

    changes: Weights
    total: float


def add(
    running: WeightedMean | None, weights: Weights, weight: float, since: Weights
) -> WeightedMean:
    """Take in one site's weights; returns the running state (changed in place).

    Args:
        since: the model that all sites began from.

    Raises:
        ValueError: the weight is not positive.
    """
    if not weight > 0:
        raise ValueError(f"a site's weight must be positive, found {weight}.")
    if running is None:
        zeros = {n: torch.zeros(t.shape, dtype=_precision(t.dtype)) for n, t in weights.items()}
        running = WeightedMean(zeros, 0.0)
    running.total += weight
    part = weight / running.total
    for name, tensor in weights.items():
        into = running.changes[name]
        if not tensor.is_floating_point():
            into.add_(tensor.double(), alpha=weight)
            continue
        block = torch.empty(min(BLOCK, tensor.numel()), dtype=into.dtype)
        for mean_change, new, old in _blocks(into, tensor, since[name]):
            mean_change.lerp_(torch.sub(new.to(into.dtype), old, out=block[: len(new)]), part)
    return running


def mean(running: WeightedMean, since: Weights) -> Weights:
    """The weighted mean, each tensor with the type it has in `since`, the model of `add`.

    Integers are rounded, not turned into floats. The running state is used up: it becomes the result.
    """
    result: Weights = {}
    for name in list(running.changes):
        change, model = running.changes.pop(name), since[name]
        if model.is_floating_point():
            result[name] = change.add_(model).to(model.dtype)
        else:
            result[name] = change.div_(running.total).round_().to(model.dtype)
    return result


def _precision(dtype: torch.dtype) -> torch.dtype:
    """In which changes are kept, or integers summed."""
    small = dtype.is_floating_point and dtype.itemsize <= 4
    return torch.float32 if small else torch.float64


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(tensor.reshape(-1).split(BLOCK) for tensor in tensors), strict=True)


def moving(average: Weights, newest: Weights, decay: float) -> Weights:
    """The exponential moving average, one round on: decay * average + (1 - decay) * newest.

    Integer buffers (BatchNorm's counters) are the newest model's.
    """
    return {
        name: (average[name].double() * decay + tensor.double() * (1 - decay)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in newest.items()
    }
