"""Which of a site's own patients are kept out of training, to measure on.

Decides per patient, from nothing but its id, its grade and the seed, so a site can decide alone, a
patient never changes sides when others are added or removed, and all time points of a patient are
on one side. Which subjects are one patient is for `sites.patients`; which whole sites are held out,
for `sites.institutions.roles`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b


def is_held_out(patient_id: str, grade: str | None, *, seed: int, fraction: float) -> bool:
    """True when the patient's keyed hash (BLAKE2b of seed, grade and id) falls below `fraction`.

    The price of never moving a patient: every patient is an independent draw, so the number held
    out varies around `fraction * n` (standard deviation sqrt(n * fraction * (1 - fraction)), within
    each grade too), and a small site may hold out nobody. Raises ValueError for a fraction outside
    0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the held-out fraction is {fraction}: choose one between 0 and 1")
    # NUL can occur neither in a folder name nor in a Patient_ID, so no two (seed, grade, id) share
    # a key.
    key = f"{seed}\0{grade or ''}\0{patient_id}".encode()
    drawn = int.from_bytes(blake2b(key, digest_size=8, person=b"holdout").digest(), "big")
    return drawn < fraction * 2**64


def divide(
    subject_ids: Iterable[str],
    grades: Mapping[str, str],
    patients: Mapping[str, str],
    *,
    seed: int,
    fraction: float,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training ids and held-out ids of subjects, each sorted; a subject absent from `grades` has no
    grade. `patients` (subject id -> patient id) must name every subject.

    The grade of the subject that bears the patient's id counts, whether or not it is among those to
    divide; a patient after whom no subject is named has none. Time points may differ in grade, and
    any rule that chose among those present would move the patient when one is added or spoilt.
    """
    training: list[str] = []
    held_out: list[str] = []
    for subject_id in sorted(subject_ids):
        patient = patients[subject_id]
        out = is_held_out(patient, grades.get(patient), seed=seed, fraction=fraction)
        (held_out if out else training).append(subject_id)
    return tuple(training), tuple(held_out)
