"""Faults that an audit must find, put into the client of this process for a while."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

import client.patient_optimizer
import client.privacy
from client.patient_optimizer import PatientOptimizer
from client.privacy import Gradient

Fault = tuple[object, str, Callable[..., Any]]  # whose attribute, its name, what to put there


def _no_noise(seed: int) -> list[Fault]:
    return [(client.patient_optimizer, "add_system_gaussian", lambda values, deviation: None)]


def _half_noise(seed: int) -> list[Fault]:
    real = client.patient_optimizer.add_system_gaussian
    half = lambda values, deviation: real(values, deviation / 2)  # noqa: E731
    return [(client.patient_optimizer, "add_system_gaussian", half)]


def _seeded_noise(seed: int) -> list[Fault]:
    generator, steps = torch.Generator(), client.privacy.take_steps

    def take_steps(*arguments: Any, **more: Any) -> None:
        generator.manual_seed(seed)
        steps(*arguments, **more)

    def add(values: torch.Tensor, deviation: float) -> None:
        values.add_(torch.randn(values.shape, generator=generator), alpha=deviation)

    return [
        (client.privacy, "take_steps", take_steps),
        (client.patient_optimizer, "add_system_gaussian", add),
    ]


def _broken_clipping(seed: int) -> list[Fault]:
    real = PatientOptimizer.take

    def take(optimizer: PatientOptimizer, gradient: Gradient) -> None:
        # the noise goes by the norm that was asked for
        optimizer.max_grad_norm = optimizer._limit = math.inf
        real(optimizer, gradient)

    return [(PatientOptimizer, "take", take)]


PLANTS: dict[str, Callable[[int], list[Fault]]] = {
    "no-noise": _no_noise,
    "seeded-noise": _seeded_noise,
    "broken-clipping": _broken_clipping,
    "half-noise": _half_noise,
}
"""Faults by name: the federation's seed -> what to put in whose place in the client."""


@contextmanager
def planted(bug: str | None, seed: int) -> Iterator[None]:
    """Put a fault into the client for as long as the block runs: one of PLANTS, or None."""
    with ExitStack() as stack:
        if bug is not None:
            for owner, name, faulty in PLANTS[bug](seed):
                stack.enter_context(patch.object(owner, name, faulty))
        yield
