"""Opacus' optimizer, fed one patient at a time, with noise from the operating system.

In `no_op` mode of Opacus, which works for every network and holds one patient's activations: each
patient's gradient is clipped and added up, then the noise is added once (`client.privacy`).
"""

from __future__ import annotations

import math

import torch
from opacus.optimizers import DPOptimizer

from client.system_noise import add_system_gaussian

ROUNDING = 1e-6
"""By how much less than C gradients are clipped: more than scaling them in fp32 can add."""


class PatientOptimizer(DPOptimizer):
    """Opacus' optimizer with noise from the operating system in place of a seeded generator's."""

    def __init__(
        self, optimiser: torch.optim.Optimizer, *, sigma: float, clip: float, expected_batch: float
    ) -> None:
        super().__init__(
            optimiser,
            noise_multiplier=sigma,
            max_grad_norm=clip,
            expected_batch_size=expected_batch,
        )
        self._deviation, self._limit = sigma * clip, clip * (1 - ROUNDING)

    def add_noise(self) -> None:
        for p in self.params:
            p.grad, p.summed_grad = p.summed_grad.as_strided(p.shape, p.stride()), None
            add_system_gaussian(p.grad, self._deviation)

    def take(self, gradient: list[torch.Tensor]) -> None:
        """Clip one patient's gradient and add it to the sum; one that is not finite counts as zero.

        By its norm in float64: Opacus' own, in fp32, is wrong by up to 1 % for large tensors.
        """
        parts = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradient]
        norm = float(torch.linalg.vector_norm(torch.stack(parts)))
        if not math.isfinite(norm):  # to stop would tell about this patient
            return
        if norm > self._limit:
            gradient = [g * (self._limit / norm) for g in gradient]
        self._hand_over([_flat(g, p) for g, p in zip(gradient, self.params, strict=True)])
        self.signal_skip_step(True)
        self.step()
        self.zero_grad(set_to_none=True)

    def finish(self) -> None:
        """Add the noise, divide by the expected number of patients, and step; with whoever was taken."""
        # nobody more: Opacus then steps with the sum so far, also if it is empty
        self._hand_over([torch.zeros(0, p.numel(), device=p.device) for p in self.params])
        self.signal_skip_step(False)
        self.step()
        self.zero_grad(set_to_none=True)

    def _hand_over(self, gradients: list[torch.Tensor]) -> None:
        for p, g in zip(self.params, gradients, strict=True):
            p.grad_sample = g


def _flat(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(1, values) in the order in which `like` lies in memory: Opacus then copies nothing, which for
    channels_last it does twice."""
    if gradient.stride() != like.stride():
        gradient = torch.empty_like(like).copy_(gradient)
    return gradient.as_strided((1, like.numel()), (like.numel(), 1))
