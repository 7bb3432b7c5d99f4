"""What is promised to a patient, in bounds on any attack and in plain words: by an (epsilon, delta),
and by secure aggregation.

Only what the pair itself implies. What has been spent is `client.privacy_report`'s to say, and what
no epsilon says anything about is in `client.not_covered`.
"""

from __future__ import annotations

import math

from common.masking import fewest_in_sum, most_colluders
from common.terms import Terms

FALSE_ALARMS = 0.01  # of the test in `found_at_most`


def right_at_most(epsilon: float, delta: float) -> float:
    """How often a guess can be right at best whether a patient took part, if both are equally likely.

    From the bound that (epsilon, delta) sets to any hypothesis test (Kairouz, Oh, Viswanath 2015,
    arXiv:1311.0776): false alarms + e^epsilon misses >= 1 - delta, and the same exchanged.
    """
    return min(1.0, 1 - (1 - delta) / (1 + _exp(epsilon)))


def found_at_most(epsilon: float, delta: float, false_alarms: float = FALSE_ALARMS) -> float:
    """Share of those who took part that a test can find which errs on `false_alarms` of the others."""
    misses = (1 - delta - false_alarms) / _exp(epsilon)
    return max(0.0, min(1.0, _exp(epsilon) * false_alarms + delta, 1 - misses))


def _exp(epsilon: float) -> float:
    return math.exp(min(epsilon, 700.0))  # beyond, no float holds it


def in_words(epsilon: float, delta: float) -> list[str]:
    """What (epsilon, delta) lets anybody find out, and how much that is worth."""
    if epsilon <= 1:
        worth = "a strong guarantee."
    elif epsilon <= 3:
        worth = "a moderate guarantee."
    elif epsilon <= 10:
        worth = (
            "a weak worst-case guarantee: alone it does not rule out that participation can be told "
            "in most cases."
        )
    else:
        worth = (
            "next to no guarantee by itself: in the worst case participation could be told almost "
            "for sure."
        )
    guesses = (
        "Somebody for whom it is a toss-up beforehand (50 %) whether a certain patient took part, and "
        "who then sees everything that this site released with privacy and knows all other patients, "
        f"is right about it afterwards in at most {percent(right_at_most(epsilon, delta))} of cases. "
        f"A test with {FALSE_ALARMS:.0%} false alarms finds at most "
        f"{percent(found_at_most(epsilon, delta))} of those who took part."
    )
    attacks = (
        "Attacks that people have tried on models trained with noise usually find far less than such "
        "bounds allow. That is experience, not a guarantee: the bound also holds for attacks that "
        "nobody has tried yet. A smaller epsilon is stronger."
    )
    rest = (
        f"Delta {delta:.3g} is the probability for which the above promises nothing. It should be "
        "well below one in the number of patients; by default it is a tenth of that."
    )
    return [guesses, f"An epsilon of {epsilon:.3g} is {worth}", attacks, rest]


def of_aggregation(terms: Terms | None, *, private: bool) -> str:
    """Who sees what of this site's updates, and what of it holds if others do not keep to it."""
    holds = (
        "Epsilon is this site's own and does not rest on it: the whole noise is added here. So it holds "
        "as it is against a coordinator that sees the update, and whoever colludes with it."
        if private
        else "Without differential privacy nothing limits what the model itself tells about patients."
    )
    if terms is None or not terms.config.secure_aggregation:
        return (
            "Secure aggregation is off: the coordinator sees this site's own update of every round. "
            + holds
        )
    sites = len(terms.roster)
    return (
        "Secure aggregation is on: in each round the coordinator learns the sum of the updates, with "
        f"the number of training subjects, of at least {fewest_in_sum(terms.config, sites)} of the "
        f"{sites} sites that were agreed on, and no single one, as long as no more than "
        f"{most_colluders(sites)} of them collude with it. If more do, they can find out this site's own "
        "update, as if it were off. It hides who in the sum contributed what, not what the sum tells; a "
        "dishonest coordinator that compares rounds, or sends models made for the purpose, can learn "
        "more (docs/security.md). " + holds
    )


def percent(share: float) -> str:
    """Rounded up, as befits a bound, but not to certainty."""
    digits = 2 if share > 0.99 else 1
    up = math.ceil(share * 10 ** (2 + digits)) / 10**digits
    return "nearly 100 %" if share < 1 and up >= 100 else f"{up:.{digits}f} %"
