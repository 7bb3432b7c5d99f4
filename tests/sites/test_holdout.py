"""A subject's side must depend on that subject alone, and the sides must have the asked sizes."""

from __future__ import annotations

import math

import pytest

from sites.holdout import divide, is_held_out

IDS = [f"BraTS20_Training_{number:03d}" for number in range(1, 370)]
GRADES = {subject_id: "LGG" if n % 5 == 0 else "HGG" for n, subject_id in enumerate(IDS)}


def test_every_subject_is_on_exactly_one_side():
    training, held_out = divide(reversed(IDS), GRADES, seed=1, fraction=0.2)
    assert sorted(training + held_out) == IDS
    assert list(training) == sorted(training)
    assert list(held_out) == sorted(held_out)


def test_a_subject_never_moves_when_others_come_or_go():
    whole = set(divide(IDS, GRADES, seed=3, fraction=0.2)[1])
    half = set(divide(IDS[::2], GRADES, seed=3, fraction=0.2)[1])
    assert half == whole & set(IDS[::2])


def test_a_larger_fraction_only_adds_subjects():
    smaller = set(divide(IDS, GRADES, seed=3, fraction=0.2)[1])
    larger = set(divide(IDS, GRADES, seed=3, fraction=0.3)[1])
    assert smaller < larger


# A published split must be the same in the next release: these were computed once, by hand, with
# int.from_bytes(blake2b(b"0\0HGG\0" + id, digest_size=8, person=b"holdout").digest(), "big").
def test_the_split_of_seed_0_is_fixed_for_good():
    held_out = [i for i in IDS[:30] if is_held_out(i, "HGG", seed=0, fraction=0.2)]
    assert [i[-3:] for i in held_out] == ["005", "008", "011", "013", "015"]


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_the_number_held_out_is_binomial_around_the_fraction(fraction):
    sizes = [len(divide(IDS, GRADES, seed=seed, fraction=fraction)[1]) for seed in range(60)]
    mean, variance = len(IDS) * fraction, len(IDS) * fraction * (1 - fraction)
    observed = sum(sizes) / len(sizes)
    assert abs(observed - mean) < 4 * math.sqrt(variance / len(sizes))
    spread = sum((size - observed) ** 2 for size in sizes) / (len(sizes) - 1)
    assert 0.4 < spread / variance < 2.0  # chi-square, 59 degrees of freedom: about 0.56 to 1.6


def test_seeds_and_grades_draw_anew():
    def side(seed: int, grade: str) -> set[str]:
        return {i for i in IDS if is_held_out(i, grade, seed=seed, fraction=0.5)}

    for other in (side(1, "HGG"), side(0, "LGG")):
        agreement = sum((i in other) == (i in side(0, "HGG")) for i in IDS) / len(IDS)
        assert 0.4 < agreement < 0.6


def test_the_ends_hold_out_nobody_and_everybody():
    assert divide(IDS, GRADES, seed=0, fraction=0.0)[1] == ()
    assert divide(IDS, GRADES, seed=0, fraction=1.0)[0] == ()
    with pytest.raises(ValueError, match="between 0 and 1"):
        is_held_out(IDS[0], "HGG", seed=0, fraction=20)


def test_an_unknown_grade_is_a_grade_of_its_own():
    assert divide(IDS, {}, seed=0, fraction=0.5) == divide(
        IDS, dict.fromkeys(IDS, ""), seed=0, fraction=0.5
    )
