"""What noisy steps cost: epsilon of a history of steps, and the noise that keeps within a budget.

Every step is a Gaussian mechanism on a Poisson sample of the patients (Abadi et al. 2016,
arXiv:1607.00133), neighbours differ by one patient added or removed. Epsilon is an upper bound by
numerical composition of privacy random variables (Gopi et al. 2021, arXiv:2106.02848; Opacus' PRV
accountant), never a sum of the epsilons of parts. Who has taken which steps is `client.ledger`.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

EPSILON_ERROR = 0.001  # of PRV's numerical composition; its upper bound includes it
LARGEST_FINE = 100.0  # epsilon above which PRV takes minutes: RDP's looser upper bound then
MOST_NOISE = 100.0  # noise multiplier; nothing useful is learned beyond, so a budget is spent
LEAST_NOISE = 0.3  # with less, whoever is drawn stands out of the noise, however rarely that is
STRIDE = 1.2
PRECISION = 1e-3  # relative, of a calibrated noise multiplier


@dataclass(frozen=True)
class Steps:
    """`steps` noisy steps: noise of standard deviation `noise_multiplier` times the clipping norm, on
    patients each drawn with probability `sampling_rate`."""

    noise_multiplier: float
    sampling_rate: float
    steps: int


class NotAffordable(ValueError):
    """No noise keeps the steps within the budget, or only one that drowns everything."""


def accountant_name() -> str:
    """For reports: which accountant, which version, which error."""
    return (
        f"PRV (Opacus {version('opacus')}), upper bound, error {EPSILON_ERROR}; RDP's looser one above "
        f"epsilon {LARGEST_FINE:g} and for deltas that PRV cannot resolve"
    )


def epsilon(history: Iterable[Steps], delta: float, error: float = EPSILON_ERROR) -> float:
    """The smallest epsilon at `delta`, rounded up, of all these steps together; at most `error` too much."""
    return _epsilon(tuple(_together(history)), delta, error)


@functools.lru_cache(maxsize=256)
def _epsilon(together: tuple[tuple[float, float, int], ...], delta: float, error: float) -> float:
    if not together:
        return 0.0
    # imported where it is used, as every hospital imports this module and few account: it takes a second
    from opacus.accountants import PRVAccountant

    loose = _rdp(together, delta)
    if not loose <= LARGEST_FINE:
        return loose
    accountant = PRVAccountant()
    accountant.history = list(together)
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # log(1 - q) of a full batch
        warnings.simplefilter("ignore")  # it too asks RDP first
        try:
            fine = float(accountant.get_epsilon(delta, eps_error=error))
        except (ValueError, RuntimeError):  # a delta of 1e-13 or near 1: its grid ends before
            return max(0.0, loose)
    return max(0.0, min(loose, fine) if fine > 0 else loose)


def noise_multiplier(
    budget: float,
    delta: float,
    *,
    sampling_rate: float,
    steps: int,
    before: Iterable[Steps] = (),
) -> float:
    """The least noise with which `steps` more steps, after those of `before`, stay within `budget`.

    Raises:
        NotAffordable: even noise of MOST_NOISE times the clipping norm would exceed it.
    """
    taken = tuple(before)

    def history(sigma: float) -> tuple[Steps, ...]:
        return (*taken, Steps(sigma, sampling_rate, steps))

    def spent(sigma: float) -> float:
        return epsilon(history(sigma), delta)

    def estimated(sigma: float) -> float:  # ten times as quick
        return epsilon(history(sigma), delta, 10 * EPSILON_ERROR) - 9 * EPSILON_ERROR

    if not spent(MOST_NOISE) <= budget:
        raise NotAffordable(
            f"{steps} further steps would need noise of more than {MOST_NOISE:g} times the "
            f"clipping norm (spent so far: epsilon {epsilon(taken, delta):.3f} of {budget:g})."
        )
    enough = MOST_NOISE
    while enough > LEAST_NOISE and _rdp(_together(history(enough / STRIDE)), delta) <= budget:
        enough /= STRIDE  # RDP is quick and errs on the safe side
    too_little = enough / STRIDE
    while too_little > LEAST_NOISE and estimated(too_little) <= budget:
        enough, too_little = too_little, too_little / STRIDE
    if too_little <= LEAST_NOISE:
        return max(enough, LEAST_NOISE)
    from scipy.optimize import brentq

    excess = lambda sigma: estimated(sigma) - budget  # noqa: E731
    root = enough
    if excess(enough) < 0:
        root = float(brentq(excess, too_little, enough, rtol=PRECISION))
    while spent(root) > budget:  # the search may end on either side
        root *= 1 + PRECISION
    return root


def _together(history: Iterable[Steps]) -> list[tuple[float, float, int]]:
    """Opacus' form; equal steps counted together, in an order that does not depend on theirs."""
    counts: Counter[tuple[float, float]] = Counter()
    for part in history:
        counts[part.noise_multiplier, part.sampling_rate] += part.steps
    return [(sigma, q, steps) for (sigma, q), steps in sorted(counts.items()) if steps and q]


def _rdp(together: Sequence[tuple[float, float, int]], delta: float) -> float:
    """An upper bound by Renyi divergences (Mironov 2017): looser than PRV, and quick."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(together)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that other orders might give a tighter bound
        return float(accountant.get_epsilon(delta))
