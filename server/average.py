"""FedAvg: the mean of the sites' weights, weighted by their numbers of training subjects.

    w = sum_k n_k w_k / sum_k n_k        (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1)

Updates are added one at a time and can be forgotten at once, so memory is the running sum plus one
update, whatever the number of sites. The sum is kept in float64: its error stays far below fp32's
own rounding, and the order of the sites matters only to the last bit (the caller fixes the order).
"""

from __future__ import annotations

from dataclasses import dataclass

from common.weights import Weights


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
        sums = {name: tensor.double().mul_(weight) for name, tensor in weights.items()}
        return WeightedSum(sums, weight)
    for name, tensor in weights.items():
        running.sums[name].add_(tensor.double(), alpha=weight)
    running.total += weight
    return running


def mean(running: WeightedSum, like: Weights) -> Weights:
    """The weighted mean, each tensor with the type it has in `like`.

    Integer buffers (BatchNorm's counters) are rounded, not turned into floats.
    """
    result: Weights = {}
    for name, total in running.sums.items():
        average = total / running.total
        dtype = like[name].dtype
        result[name] = (average if dtype.is_floating_point else average.round()).to(dtype)
    return result
