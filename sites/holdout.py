"""Which of a site's own subjects are kept out of training, to measure on.

Decides per subject, from nothing but its id, its grade and the seed, so a site can decide alone and
a subject never changes sides when others are added or removed. Does not decide which whole sites
are held out: that is `sites.institutions.roles`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b


def is_held_out(subject_id: str, grade: str | None, *, seed: int, fraction: float) -> bool:
    """True when the subject's keyed hash (BLAKE2b of seed, grade and id) falls below `fraction`.

    The price of never moving a subject: every subject is an independent draw, so the number held
    out varies around `fraction * n` (standard deviation sqrt(n * fraction * (1 - fraction)), within
    each grade too), and a small site may hold out nobody. Raises ValueError for a fraction outside
    0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the held-out fraction is {fraction}: choose one between 0 and 1")
    # NUL cannot occur in a folder name, so no two (seed, grade, id) share a key.
    key = f"{seed}\0{grade or ''}\0{subject_id}".encode()
    drawn = int.from_bytes(blake2b(key, digest_size=8, person=b"holdout").digest(), "big")
    return drawn < fraction * 2**64


def divide(
    subject_ids: Iterable[str], grades: Mapping[str, str], *, seed: int, fraction: float
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training ids and held-out ids, each sorted; a subject absent from `grades` has no grade."""
    training: list[str] = []
    held_out: list[str] = []
    for subject_id in sorted(subject_ids):
        out = is_held_out(subject_id, grades.get(subject_id), seed=seed, fraction=fraction)
        (held_out if out else training).append(subject_id)
    return tuple(training), tuple(held_out)
