"""FedAvg: the mean of the sites' weights, weighted by their numbers of training subjects.

    w = sum_k n_k w_k / sum_k n_k        (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1)

Updates are added one at a time and can be forgotten at once, so memory is the running sum plus one
update, whatever the number of sites. The sum is kept in float64: its error stays far below fp32's
own rounding, and the order of the sites matters only to the last bit (the caller fixes the order).

`moving` averages the rounds' models over time, which evens out the noise of private updates. It sees
nothing but those models, so it costs no privacy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.weights import Weights

BLOCK = 16_384  # values converted to float64 at a time: in the cache, and too few for torch to start threads


@dataclass
class WeightedSum:
    """Running state: float64 sums by tensor name, and the total weight so far."""

    sums: Weights
    total: float


def add(running: WeightedSum | None, weights: Weights, weight: float) -> WeightedSum:
    """Add one site's weights; returns the running state (changed in place).

    Raises:
        ValueError: the weight is not positive.
    """
    if not weight > 0:
        raise ValueError(f"a site's weight must be positive, found {weight}.")
    if running is None:
        zeros = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in weights.items()}
        running = WeightedSum(zeros, 0.0)
    block = torch.empty(BLOCK, dtype=torch.float64)
    for name, tensor in weights.items():
        into, values = running.sums[name].view(-1).split(BLOCK), tensor.reshape(-1).split(BLOCK)
        for total, part in zip(into, values, strict=True):
            total.add_(block[: len(part)].copy_(part), alpha=weight)
    running.total += weight
    return running


def mean(running: WeightedSum, like: Weights) -> Weights:
    """The weighted mean, each tensor with the type it has in `like`.

    Integer buffers (BatchNorm's counters) are rounded, not turned into floats. The running state is
    used up: each sum is released as soon as its mean is there.
    """
    result: Weights = {}
    for name in list(running.sums):
        average = running.sums.pop(name).div_(running.total)
        dtype = like[name].dtype
        result[name] = (average if dtype.is_floating_point else average.round_()).to(dtype)
    return result


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
