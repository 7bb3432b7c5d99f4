"""Plateau learning-rate decay and early stopping on the federation's validation loss.

Both are pure functions of the losses so far, so a resumed run decides exactly as an uninterrupted
one and there is no further state to keep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.config import Rounds


def learning_rate(start: float, losses: Sequence[float], rounds: Rounds) -> float:
    """The rate of the next round, by replaying torch's ReduceLROnPlateau over the losses so far."""
    if rounds.plateau_patience is None:
        return start
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=start)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser,
        factor=rounds.plateau_factor,
        patience=rounds.plateau_patience,
        threshold=0.0,  # as in `should_stop`: any lower loss is better
    )
    for loss in losses:
        plateau.step(loss)
    return float(optimiser.param_groups[0]["lr"])


def should_stop(losses: Sequence[float], rounds: Rounds) -> bool:
    """True once the best loss lies `stop_patience` or more rounds back."""
    if rounds.stop_patience is None or not losses:
        return False
    best = min(range(len(losses)), key=lambda index: losses[index])
    return len(losses) - 1 - best >= rounds.stop_patience
