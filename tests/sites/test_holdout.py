"""A patient's side must depend on that patient alone, and the sides must have the asked sizes."""

from __future__ import annotations

import math

import pytest

from sites.holdout import divide, is_held_out

IDS = [f"BraTS20_Training_{number:03d}" for number in range(1, 370)]
GRADES = {subject_id: "LGG" if n % 5 == 0 else "HGG" for n, subject_id in enumerate(IDS)}
ALONE = {subject_id: subject_id for subject_id in IDS}  # each a patient by itself


def test_every_subject_is_on_exactly_one_side():
    training, held_out = divide(reversed(IDS), GRADES, ALONE, seed=1, fraction=0.2)
    assert sorted(training + held_out) == IDS
    assert list(training) == sorted(training)
    assert list(held_out) == sorted(held_out)


def test_a_subject_never_moves_when_others_come_or_go():
    whole = set(divide(IDS, GRADES, ALONE, seed=3, fraction=0.2)[1])
    half = set(divide(IDS[::2], GRADES, ALONE, seed=3, fraction=0.2)[1])
    assert half == whole & set(IDS[::2])


def test_a_larger_fraction_only_adds_subjects():
    smaller = set(divide(IDS, GRADES, ALONE, seed=3, fraction=0.2)[1])
    larger = set(divide(IDS, GRADES, ALONE, seed=3, fraction=0.3)[1])
    assert smaller < larger


# A published split must be the same in the next release: these were computed once, by hand, with
# int.from_bytes(blake2b(b"0\0HGG\0" + id, digest_size=8, person=b"holdout").digest(), "big").
def test_the_split_of_seed_0_is_fixed_for_good():
    held_out = [i for i in IDS[:30] if is_held_out(i, "HGG", seed=0, fraction=0.2)]
    assert [i[-3:] for i in held_out] == ["005", "008", "011", "013", "015"]


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_the_number_held_out_is_binomial_around_the_fraction(fraction):
    sizes = [len(divide(IDS, GRADES, ALONE, seed=seed, fraction=fraction)[1]) for seed in range(60)]
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
    assert divide(IDS, GRADES, ALONE, seed=0, fraction=0.0)[1] == ()
    assert divide(IDS, GRADES, ALONE, seed=0, fraction=1.0)[0] == ()
    with pytest.raises(ValueError, match="between 0 and 1"):
        is_held_out(IDS[0], "HGG", seed=0, fraction=20)


def test_an_unknown_grade_is_a_grade_of_its_own():
    assert divide(IDS, {}, ALONE, seed=0, fraction=0.5) == divide(
        IDS, dict.fromkeys(IDS, ""), ALONE, seed=0, fraction=0.5
    )


# ---------------------------------------------------------------------- several subjects of a patient

LONG_IDS = [f"BraTS-GLI-{number:05d}-{point:03d}" for number in range(100) for point in range(3)]
PATIENT = {subject_id: subject_id[:15] for subject_id in LONG_IDS}


# Computed with the release that decided by subject: runs that it began must go on.
@pytest.mark.parametrize(
    ("ids", "grades", "held_out"),
    [
        ([f"BraTS20_Training_{n:03d}" for n in range(1, 31)], True, "016 017 028"),
        (
            [f"BraTS2021_{n:05d}" for n in range(30)],
            False,
            "00000 00001 00002 00009 00013 00022 00027",
        ),
        (
            [
                *(f"Brats18_TCIA{n:02d}_{100 + n}_1" for n in range(1, 14)),
                *("Brats18_2013_7_1", "BraTS19_CBICA_AAB_1", "BraTS19_CBICA_ABE_1"),
            ],
            True,
            "CBICA_AAB_1 TCIA02_102_1 TCIA04_104_1",
        ),
    ],
    ids=["2020", "2021", "2018-2019"],
)
def test_whoever_has_one_subject_of_the_same_name_stays_where_he_was(ids, grades, held_out):
    graded = {i: "HGG" if n % 3 else "LGG" for n, i in enumerate(ids)} if grades else {}
    found = divide(ids, graded, {i: i for i in ids}, seed=42, fraction=0.2)[1]
    assert [i.split("_", 1)[1].removeprefix("Training_") for i in found] == held_out.split()


def test_time_points_are_never_on_both_sides():
    grades = {i: ("HGG", "LGG", "")[n % 3] for n, i in enumerate(LONG_IDS)}  # one of each
    training, held_out = divide(LONG_IDS, grades, PATIENT, seed=0, fraction=0.3)
    assert sorted(training + held_out) == LONG_IDS
    sides = [{PATIENT[i] for i in side} for side in (training, held_out)]
    assert sides[0].isdisjoint(sides[1])
    assert 15 < len(sides[1]) < 45, "a fraction of the patients"


def test_a_patient_never_moves_when_a_time_point_comes_or_goes():
    grades = {i: ("HGG", "LGG", "")[n % 3] for n, i in enumerate(LONG_IDS)}

    def side(ids: list[str]) -> set[str]:
        known = {i: grades[i] for i in ids}
        return {PATIENT[i] for i in divide(ids, known, PATIENT, seed=0, fraction=0.3)[1]}

    for point in range(3):
        assert side(LONG_IDS[point::3]) == side(LONG_IDS)


def test_a_second_scan_joins_the_side_of_the_subject_after_whom_the_patient_is_called():
    more = [f"again_{i}" for i in IDS]
    patients = ALONE | dict(zip(more, IDS, strict=True))
    grades = GRADES | dict.fromkeys(more, "LGG")
    alone = divide(IDS, GRADES, ALONE, seed=3, fraction=0.3)[1]
    both = divide([*more, *IDS], grades, patients, seed=3, fraction=0.3)[1]
    assert set(both) == {*alone, *(f"again_{i}" for i in alone)}
    # also while that subject itself cannot be used
    assert divide(more, grades, patients, seed=3, fraction=0.3)[1] == tuple(
        f"again_{i}" for i in alone
    )
