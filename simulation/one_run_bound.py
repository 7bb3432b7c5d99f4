"""What right guesses about canaries prove of epsilon: the statistics of a one-run privacy audit.

Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, theorem 5.2. Who is guessed about, and from what,
is `simulation.privacy_audit`.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binom

CONFIDENCE = 0.95  # of the lower bound


def lower_bound(
    guesses: int, right: int, canaries: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """The largest epsilon that `right` of `guesses` exclude: at least so much is lost, at `delta`.

    Theorem 5.2 of Steinke, Nasr and Jagielski 2023; 0 if the guesses exclude nothing.
    """
    low, high = 0.0, 1.0
    if p_value(guesses, right, canaries, low, delta) >= 1 - confidence:
        return 0.0
    while p_value(guesses, right, canaries, high, delta) < 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        if p_value(guesses, right, canaries, middle, delta) < 1 - confidence:
            low = middle
        else:
            high = middle
    return low


def p_value(guesses: int, right: int, canaries: int, epsilon: float, delta: float) -> float:
    """At most the chance of that many right guesses if training were (epsilon, delta)-private.

    Theorem 5.2 of Steinke, Nasr and Jagielski 2023: P[B >= v] + 2 m delta max_i P[v > B >= v - i] / i
    for B ~ Binomial(r, 1 / (1 + e^-epsilon)), v right of r guesses about m canaries.
    """
    chance = 1 / (1 + math.exp(-epsilon))
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))
    steepest = float((below / np.arange(1, right + 1)).max(initial=0.0))
    enough = float(binom.sf(right - 1, guesses, chance))
    return min(1.0, enough + 2 * canaries * delta * steepest)


def right_guesses(scores: np.ndarray, inside: np.ndarray, guesses: int) -> int:
    """Of the guesses that the highest `guesses`/2 scores took part and as many lowest did not: the right."""
    order = np.argsort(scores)
    half = guesses // 2
    return int(inside[order[-half:]].sum() + (~inside[order[:half]]).sum())
