"""Plateau learning-rate decay and early stopping on the federation's validation loss.

Both are pure functions of the losses so far, so a resumed run decides exactly as an uninterrupted
one and there is no further state to keep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.config import Rounds

LEAST_STEP = 1e-8  # a rate that would be lowered by less stays, as torch has it


def learning_rate(start: float, losses: Sequence[float], rounds: Rounds) -> float:
    """The rate of the next round, as by torch's ReduceLROnPlateau over the losses so far.

    With its threshold at 0, as in `should_stop`: any lower loss is better. Not by torch itself, whose
    scheduler needs an optimizer, for which torch loads its compiler: a second for six lines.
    """
    if rounds.plateau_patience is None:
        return start
    rate, best, waited = start, math.inf, 0
    for loss in losses:
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited > rounds.plateau_patience:
            lower, waited = rate * rounds.plateau_factor, 0
            if rate - lower > LEAST_STEP:
                rate = lower
    return rate


def should_stop(losses: Sequence[float], rounds: Rounds) -> bool:
    """True once the best loss lies `stop_patience` or more rounds back."""
    if rounds.stop_patience is None or not losses:
        return False
    best = min(range(len(losses)), key=lambda index: losses[index])
    return len(losses) - 1 - best >= rounds.stop_patience
