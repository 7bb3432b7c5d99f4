"""A hospital's policy: what its keys mean, when training may run, and that nothing else leaves.

The property tests make up policies and answers, real ones and spoilt ones, and look at every value
that would leave: each must be one of the few that the policy allows, however it got there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from datetime import datetime
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from client.accounting import accountant_name
from client.permitted import NotPermitted, Own, permitted
from client.policy import FAMILIES, Policy, may_train_at
from common.brats import STRUCTURES
from common.message_words import EXACT, NOISED, STYPE, WITHHELD
from common.messages import (
    SiteCard,
    SiteReport,
    SiteUpdate,
    pack_site_card,
    pack_site_report,
    pack_site_update,
    unpack_site_card,
    unpack_site_report,
    unpack_site_update,
)
from common.metrics import SiteMetrics, SubjectMetrics, summarise
from common.secure_messages import (
    Agreed,
    Masked,
    Revealed,
    Sealed,
    pack_agreed,
    pack_masked,
    pack_revealed,
    pack_sealed,
)
from common.statement import Signed, Statement, read_statement
from common.wire import encode

OSLO = Own("Oslo", n_training=12, training_patients=12, held_out_patients=12)
PRIVATE = dataclasses.replace(OSLO, privacy=EXACT)
MARK = "patient-0042"  # stands for whatever must not leave
HEX = "ab" * 32
OPEN = Policy(min_subjects=1, decimals=None, metrics=FAMILIES, show_name=True)
WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
STATED = Statement(
    *("3f" * 16, "Oslo", 3, HEX, "2026-01-01T00:00:00+00:00", True, EXACT),
    **{"epsilon": 2.5, "delta": 1e-5, "budget": 8.0, "noise_multiplier": 1.5},
    **{"sampling_rate": 0.5, "clip": 1.0, "steps": 10},
)
NAMES = [
    "loss",
    "voxel_accuracy",
    *(
        f"{family}/{s}"
        for family in FAMILIES
        if family not in ("loss", "voxel_accuracy")
        for s in STRUCTURES
    ),
]
DICE = ["dice/WT", "dice/TC", "dice/ET"]


def card(**changes: Any) -> RecordDict:
    return pack_site_card(dataclasses.replace(SiteCard("Oslo", True, 12, 5, 1, HEX), **changes))


def update(n: int = 12, *, private: bool = False) -> RecordDict:
    signed = Signed(dataclasses.replace(STATED, private=private).text(), b"")
    return pack_site_update(SiteUpdate("Oslo", 3, n, WEIGHTS, 0.123456, 2.5, 4.87654321, signed))


def report(
    means: dict[str, float], n: int = 9, defined: dict[str, int] | None = None
) -> RecordDict:
    counts = defined if defined is not None else dict.fromkeys(means, n)
    return pack_site_report(
        SiteReport(
            "Oslo", 3, SiteMetrics(n, means, counts), 1.23456, statement=Signed(STATED.text(), b"")
        )
    )


FULL = dict.fromkeys(NAMES, 0.123456789)


def leaving(content: RecordDict, policy: Policy) -> RecordDict:
    return permitted(content, policy, OSLO)


def refusal(content: RecordDict, policy: Policy) -> str:
    with pytest.raises(NotPermitted) as caught:
        leaving(content, policy)
    return str(caught.value)


# ----------------------------------------------------------------------------- the keys' values


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"metrics": ["iou"]}, "must hold dice"),
        ({"metrics": ["recall"]}, "dice"),
        ({"networks": ["resnet"]}, "must be any, or a list of unet"),
        ({"networks": []}, "must be any"),
        ({"recipes": ["resize"]}, "must be any, or a list of patches, resample"),
        ({"min_subjects": 0}, "greater than 0"),
        *[
            ({name: truth}, "must be a number, not yes or no")
            for name in ("min_subjects", "decimals", "max_rounds", "max_epochs", "max_hours")
            for truth in (True, False)
        ],
        ({"max_gpu_memory_gb": True}, "must be a number"),
        ({"decimals": -1}, "greater than or equal to 0"),
        ({"federation": 12345}, "write it in quotes"),
        ({"federation": "xyz"}, "32 of 0-9 a-f"),
        ({"coordinator": 1234567890}, "write it in quotes"),
        ({"coordinator": "12345"}, "40 digits"),
        ({"max_hours": 0}, "greater than 0"),
        ({"surprise": 1}, "Extra inputs"),
    ],
)
def test_what_is_no_policy_is_refused(values, said):
    with pytest.raises(ValidationError, match=said):
        Policy(**values)


def test_a_fingerprint_is_the_same_in_any_way_of_writing():
    digits = " ".join(["12345"] * 8)
    assert Policy(coordinator=digits).coordinator == "12345" * 8
    colons = ":".join(["ab"] * 32)
    assert Policy(coordinator=colons).coordinator == "AB" * 32


def test_the_families_are_those_that_a_site_can_report():
    scores = dict.fromkeys(set(FAMILIES) - {"loss", "voxel_accuracy"}, 0.5)
    subject = SubjectMetrics("s", dict.fromkeys(STRUCTURES, scores), 0.9, 0.5)
    assert {name.partition("/")[0] for name in summarise([subject]).means} == set(FAMILIES)
    assert set(summarise([subject]).means) == set(NAMES)


# --------------------------------------------------------------------------------- days and hours


def at(day: int, time: str) -> datetime:
    """2026-06-01 is a Monday."""
    return datetime.fromisoformat(f"2026-06-{1 + day:02d}T{time}")


@pytest.mark.parametrize(
    ("windows", "moment", "open_"),
    [
        ((), at(3, "12:00"), True),
        (("mon-fri 20:00-06:00",), at(0, "19:59"), False),
        (("mon-fri 20:00-06:00",), at(0, "20:00"), True),
        (("mon-fri 20:00-06:00",), at(0, "05:59"), False),  # Sunday's night is no window
        (("mon-fri 20:00-06:00",), at(1, "05:59"), True),
        (("mon-fri 20:00-06:00",), at(1, "06:00"), False),
        (("mon-fri 20:00-06:00",), at(5, "05:59"), True),  # Friday's night ends on Saturday
        (("mon-fri 20:00-06:00",), at(5, "20:00"), False),
        (("sat-mon 08:00-09:00",), at(0, "08:30"), True),  # across the week's end
        (("sat-mon 08:00-09:00",), at(1, "08:30"), False),
        (("sat,sun 00:00-24:00",), at(6, "23:59"), True),
        (("sat,sun 00:00-24:00",), at(7, "00:00"), False),
        (("mon 08:00-09:00", "tue 10:00-11:00"), at(1, "10:30"), True),
        (("mon 08:00-09:00", "tue 10:00-11:00"), at(1, "08:30"), False),
        (("sun 22:00-02:00",), at(0, "01:00"), True),
    ],
)
def test_windows_are_open_when_they_say(windows, moment, open_):
    assert may_train_at(Policy(train_when=windows), moment) is open_


@pytest.mark.parametrize(
    "text",
    [
        *("", "mon", "20:00-06:00", "mon 8:00-9:00", "Mon 08:00-09:00", "mon 08:00-08:00"),
        *("mon 24:00-06:00", "mon 08:60-09:00", "mon 08:00-25:00", "mon 08:00-24:01"),
        *("mon-xyz 08:00-09:00", "mon, 08:00-09:00", "-mon 08:00-09:00", "mon  08:00-09:00"),
        *("mon 08:00-09:00 ", "mon-wed-fri 08:00-09:00"),
    ],
)
def test_a_window_that_could_be_misread_is_refused(text):
    with pytest.raises(ValidationError, match="not of the form"):
        Policy(train_when=(text,))


@given(st.integers(0, 6), st.integers(0, 1439), st.integers(1, 1440), st.integers(0, 10079))
def test_a_window_is_as_long_as_it_says(day, start, stop, minute):
    """Counted minute by minute over a week, which the implementation does not do."""
    if start == stop:
        return
    text = f"{['mon', 'tue', 'wed', 'thu', 'fri', 'sat', 'sun'][day]} {start // 60:02d}:{start % 60:02d}-"
    policy = Policy(train_when=(text + f"{stop // 60:02d}:{stop % 60:02d}",))
    length = stop - start if stop > start else stop + 1440 - start
    opened = {(1440 * day + start + step) % 10080 for step in range(length)}
    moment = at(minute // 1440, f"{minute % 1440 // 60:02d}:{minute % 60:02d}")
    assert may_train_at(policy, moment) is (minute in opened)


# ------------------------------------------------------------------------------- what may leave


def test_an_open_policy_changes_nothing():
    for content in (
        card(),
        card(trains=False, n_training=0),
        update(),
        report(FULL),
        report({**FULL, "hd95/ET": math.nan}, defined={**dict.fromkeys(FULL, 9), "hd95/ET": 0}),
        farewell(),
    ):
        assert told(leaving(content, OPEN)) == told(content)


def test_numbers_are_rounded_and_training_numbers_can_stay():
    about = leaving(update(), Policy())["about"]
    assert (about["loss"], about["samples_per_second"]) == (0.123, 4.877)
    about = leaving(update(), Policy(training_numbers=False))["about"]
    assert dict(about.items()) == {"site": "Oslo", "round": 3, "n_training": 12}
    means = leaving(report(FULL), Policy(decimals=1))["means"]
    assert set(means.values()) == {0.1}
    about = leaving(report(FULL), Policy(training_numbers=False))["about"]
    assert set(about) == {"site", "round", "released"}


def test_only_the_chosen_metrics_leave():
    means = leaving(report(FULL), Policy(metrics=("dice", "loss")))["means"]
    assert set(means) == {"loss", *(f"dice/{s}" for s in STRUCTURES)}


@pytest.mark.parametrize(
    "policy",
    [Policy(metrics=()), Policy(min_subjects=10), Policy(metrics=("dice",), min_subjects=10)],
)
def test_without_dice_a_report_withholds_everything(policy):
    report_ = unpack_site_report(leaving(report(FULL), policy))
    assert report_.released == WITHHELD
    assert report_.metrics == SiteMetrics(9, {}, {})
    assert report_.statement is not None
    assert read_statement(report_.statement.text).metrics == WITHHELD, "no contradiction"


def test_a_mean_over_few_of_many_subjects_stays():
    defined = {**dict.fromkeys(FULL, 9), "precision/ET": 4, "precision/TC": 5}
    policy = OPEN.model_copy(update={"min_subjects": 5})
    kept = unpack_site_report(leaving(report(FULL, defined=defined), policy))
    assert set(kept.metrics.means) == set(FULL) - {"precision/ET"}
    assert kept.metrics.defined["precision/TC"] == 5


def test_who_may_not_train_says_so():
    for policy in (Policy(send_updates=False), Policy(min_subjects=13)):
        told_ = unpack_site_card(leaving(card(resting="spent"), policy))
        assert (told_.trains, told_.n_training, told_.n_held_out, told_.resting) == (
            False,
            0,
            5,
            "",
        )
    assert unpack_site_card(leaving(card(), Policy(min_subjects=12))).trains


def test_updates_that_may_not_leave_name_the_rule():
    assert "`send_updates`" in refusal(update(), Policy(send_updates=False))
    assert "`min_subjects`" in refusal(update(4), Policy())
    assert "`require_privacy`" in refusal(update(), Policy(require_privacy=True))
    assert "`require_secure_aggregation`" in refusal(
        update(), Policy(require_secure_aggregation=True)
    )
    private = permitted(update(private=True), Policy(require_privacy=True), PRIVATE)
    kept = unpack_site_update(private)
    assert all(torch.equal(kept.weights[name], WEIGHTS[name]) for name in WEIGHTS)


def test_that_it_is_private_has_to_be_said_with_numbers_and_by_a_site_that_has_a_budget():
    policy = Policy(require_privacy=True)
    assert "`require_privacy`" in refusal(update(private=True), policy), "there is no budget"
    for name in ("epsilon", "noise_multiplier", "steps"):
        content = update(private=True)
        stated = dataclasses.replace(STATED, **{name: None})
        content["privacy"]["statement"] = stated.text()
        with pytest.raises(NotPermitted, match="`require_privacy`"):
            permitted(content, policy, PRIVATE)


def test_patients_are_counted_and_not_their_scans():
    """Twelve scans of three patients."""
    few = dataclasses.replace(OSLO, training_patients=3, held_out_patients=3)
    for content in (update(), *secure_answers().values()):
        with pytest.raises(NotPermitted, match="`min_subjects`"):
            permitted(content, Policy(min_subjects=4), few)
        assert permitted(content, Policy(min_subjects=3), few)
    assert permitted(card(), Policy(min_subjects=4), few)["card"]["trains"] is False
    assert permitted(card(), Policy(min_subjects=3), few)["card"]["trains"] is True
    assert len(permitted(report(FULL), Policy(min_subjects=4), few)["means"]) == 0
    assert len(permitted(report(FULL), Policy(min_subjects=3), few)["means"]) > 0


def secure_answers() -> dict[str, RecordDict]:
    vector = Masked(1, "ab", np.arange(5, dtype=np.uint32), b"signed")
    return {
        "sealed": pack_sealed(Sealed(1, "ab", {})),
        "agreed": pack_agreed(Agreed(1, "ab", b"signed")),
        "revealed": pack_revealed(Revealed(1, "ab", {})),
        "masked": pack_masked(vector),
    }


@pytest.mark.parametrize("step", secure_answers())
def test_every_step_of_a_masked_update_keeps_to_the_policy(step):
    content = secure_answers()[step]
    assert step in leaving(content, Policy(require_secure_aggregation=True))
    assert "`send_updates`" in refusal(content, Policy(send_updates=False))
    assert "`min_subjects`" in refusal(content, Policy(min_subjects=13))
    assert "`require_privacy`" in refusal(content, Policy(require_privacy=True))
    assert step in permitted(content, Policy(require_privacy=True), PRIVATE)


def test_with_a_budget_no_number_of_the_training_leaves():
    about = permitted(update(), OPEN, PRIVATE)["about"]
    assert dict(about.items()) == {"site": "Oslo", "round": 3, "n_training": 12}
    assert "seconds" not in permitted(report(FULL), OPEN, PRIVATE)["about"]


def test_how_a_budget_releases_metrics_is_kept_to_at_the_gate():
    def left(way: str, released: str) -> RecordDict:
        content = report(FULL)
        content["about"]["released"] = released
        return permitted(content, OPEN, dataclasses.replace(OSLO, privacy=way))

    for way, released in ((WITHHELD, EXACT), (WITHHELD, NOISED), (NOISED, EXACT)):
        content = left(way, released)
        assert len(content["means"]) == 0
        assert content["about"]["released"] == WITHHELD
    assert set(left(NOISED, NOISED)["means"]) == set(DICE), "only these are noised"
    assert set(left(EXACT, EXACT)["means"]) == set(NAMES)


def test_without_metrics_the_time_that_they_took_stays_too():
    assert "seconds" not in leaving(report(FULL), Policy(metrics=()))["about"]
    assert "seconds" in leaving(report(FULL), Policy())["about"]


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "Anna Muster"},
        {"accountant": "A" * 9000},
        {"accountant": "Anna\nMuster"},
        {"at": MARK},
        {"code": MARK},
        {"head": MARK},
        {"ledger": "Anna"},
        {"metrics": MARK},
        {"federation": MARK},
        {"entries": -5},
    ],
)
def test_the_texts_of_a_statement_are_those_of_one(changes):
    content = update()
    content["privacy"]["statement"] = dataclasses.replace(STATED, **changes).text()
    if "site" in changes:
        assert "another site's name" in refusal(content, OPEN)
    else:
        assert "privacy" not in leaving(content, OPEN)


def test_a_real_statement_leaves():
    content = update()
    real = dataclasses.replace(STATED, accountant=accountant_name(), ledger=HEX[:32], head=HEX)
    content["privacy"]["statement"] = real.text()
    assert leaving(content, OPEN)["privacy"]["statement"] == real.text()


def test_numbers_that_nobody_thought_of_do_not_leave_and_are_no_crash():
    content = report(FULL)
    content["means"]["loss"] = 10**400
    assert "loss" not in leaving(content, OPEN)["means"]
    hidden = struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000000 | 0x123456789AB))[0]
    content = report({**FULL, "hd95/ET": hidden}, defined={**dict.fromkeys(FULL, 9), "hd95/ET": 0})
    left = leaving(content, OPEN)["means"]["hd95/ET"]
    assert struct.pack("<d", left) == struct.pack("<d", math.nan)
    content = card()
    content["audit"] = ConfigRecord(
        {"number": 10**60, "hash": HEX, "heard_number": 0, "heard_hash": ""}
    )
    assert "audit" not in leaving(content, OPEN)


def test_a_statement_leaves_without_the_signature_that_it_came_with():
    content = update()
    content["privacy"]["signature"] = MARK.encode()
    assert leaving(content, OPEN)["privacy"]["signature"] == b""
    content["privacy"]["statement"] = json.dumps({"anything": MARK})
    assert "privacy" not in leaving(content, OPEN)


def test_another_name_than_the_sites_own_does_not_leave():
    for content in (
        card(site=MARK),
        RecordDict({**update(), "about": ConfigRecord({"site": MARK})}),
    ):
        assert "another site's name" in refusal(content, OPEN)


def spoilt_blocks() -> dict[str, bytes]:
    block = encode(WEIGHTS)
    return {
        "nothing": b"",
        "no safetensors": MARK.encode() * 9,
        "more after the tensors": block + MARK.encode(),
        "a remark": safetensors.torch.save(WEIGHTS, {"encoding": "fp32", "note": MARK}),
        "another encoding": safetensors.torch.save(WEIGHTS, {"encoding": MARK}),
        "a remark among the scales": safetensors.torch.save(
            WEIGHTS, {"encoding": "fp32", "scales": json.dumps({MARK: 1})}
        ),
        "a scale that is none": safetensors.torch.save(
            WEIGHTS, {"encoding": "fp32", "scales": json.dumps({"w": MARK})}
        ),
    }


@pytest.mark.parametrize("spoilt", spoilt_blocks())
def test_a_block_with_anything_beside_the_tensors_does_not_leave(spoilt):
    data = spoilt_blocks()[spoilt]
    content = update()
    content["weights"] = ArrayRecord({"weights": Array("uint8", (len(data),), STYPE, data)})
    assert "cannot be accounted for" in refusal(content, OPEN)


def test_a_block_under_another_name_or_of_another_kind_does_not_leave():
    data = encode(WEIGHTS)
    for name, kind in (("other", STYPE), ("weights", "numpy.ndarray")):
        content = update()
        content["weights"] = ArrayRecord({name: Array("uint8", (len(data),), kind, data)})
        assert "cannot be accounted for" in refusal(content, OPEN)


# --------------------------------------------------------------------------------- properties

policies = st.builds(
    Policy,
    send_updates=st.booleans(),
    metrics=st.lists(st.sampled_from(FAMILIES), unique=True).map(
        lambda chosen: tuple({*chosen, "dice"}) if chosen else ()
    ),
    decimals=st.none() | st.integers(0, 4),
    training_numbers=st.booleans(),
    min_subjects=st.integers(1, 12),
    show_name=st.booleans(),
    require_privacy=st.booleans(),
    require_secure_aggregation=st.booleans(),
)
floats = st.floats(-1e3, 1e3) | st.just(math.nan)
junk_value = st.sampled_from(
    [MARK, [MARK], MARK.encode(), 4242424242, 0.4242424242, [0.4242424242], True]
)
junk_key = st.sampled_from(
    [MARK, "subject", "seed", "path", "note", "dice/XX", "recall/WT", "n_subjects"]
)
junk_record = st.one_of(
    st.dictionaries(junk_key, junk_value, max_size=3).map(ConfigRecord),
    st.dictionaries(junk_key, st.just(0.4242424242), max_size=3).map(MetricRecord),
    st.just(ArrayRecord({MARK: Array("uint8", (12,), "raw", MARK.encode())})),
)


@st.composite
def reports(draw: st.DrawFn) -> RecordDict:
    n = draw(st.integers(0, 12))
    means = draw(st.dictionaries(st.sampled_from(NAMES), floats))
    if draw(st.booleans()):
        means |= dict.fromkeys(DICE, 0.87654321)
    defined = {name: draw(st.integers(0, 14) | st.just(n)) for name in means}
    content = report(means, n, defined)
    content["about"]["released"] = draw(st.sampled_from([EXACT, NOISED, WITHHELD, MARK]))
    return content


def farewell() -> RecordDict:
    return RecordDict({"farewell": ConfigRecord({"received": True})})


answers = st.one_of(
    st.builds(card, trains=st.booleans(), n_training=st.integers(1, 12), shows_name=st.booleans()),
    st.builds(update, st.integers(0, 12), private=st.booleans()),
    reports(),
    st.builds(farewell),
)


@st.composite
def spoilt(draw: st.DrawFn) -> RecordDict:
    """A real answer with things in it that nobody has agreed to, in new records and old ones."""
    content = RecordDict(dict(draw(answers).items()))
    names = st.sampled_from(
        ["about", "card", "means", "privacy", "defined", "weights", "junk", MARK]
    )
    for name, record in draw(st.dictionaries(names, junk_record, max_size=2)).items():
        if name not in content or draw(st.booleans()):
            content[name] = record
    for record in content.values():
        if isinstance(record, ConfigRecord):
            for key, value in draw(st.dictionaries(junk_key, junk_value, max_size=2)).items():
                record[key] = value
            for key in draw(st.sets(st.sampled_from(sorted(record)), max_size=2)) if record else ():
                if key not in ("site", "resting", "config_fingerprint") and draw(st.booleans()):
                    record[key] = draw(junk_value)
        elif isinstance(record, MetricRecord) and draw(st.booleans()):
            record[draw(junk_key)] = 0.4242424242
    return content


def told(content: RecordDict) -> dict[str, dict[str, Any]]:
    """Every value of every record; a NaN, which is unlike itself, as a word."""
    return {
        name: {
            key: value.data if isinstance(value, Array) else "NaN" if value != value else value
            for key, value in record.items()
        }
        for name, record in content.items()
    }


@settings(max_examples=400, deadline=None)
@given(spoilt(), policies)
def test_nothing_outside_the_policy_leaves(content, policy):
    try:
        left = told(permitted(content, policy, OSLO))
    except NotPermitted:
        return
    assert MARK not in repr(left)
    about = left.get("about", {})
    told_times = {"loss", "seconds", "samples_per_second"}  # a number there is none of a stranger's
    others = {**left, "about": {k: v for k, v in about.items() if k not in told_times}}
    assert "4242424242" not in repr(others)
    if "weights" in left:
        assert left.keys() <= {"about", "weights", "privacy"}
        assert about.keys() <= {
            "site",
            "round",
            "n_training",
            "loss",
            "seconds",
            "samples_per_second",
        }
        assert policy.send_updates
        assert not policy.require_secure_aggregation
        assert about["n_training"] >= policy.min_subjects
        if policy.require_privacy:
            assert json.loads(left["privacy"]["statement"])["private"] is True
    elif "means" in left:
        assert left.keys() <= {"about", "means", "defined", "privacy"}
        assert about.keys() <= {"site", "round", "seconds", "released"}
        check_means(left, policy)
    elif "card" in left:
        assert left.keys() == {"card"}
        assert left["card"].keys() <= {f.name for f in dataclasses.fields(SiteCard)}
        assert left["card"]["shows_name"] is policy.show_name
        if not policy.send_updates or left["card"].get("n_training", 12) < policy.min_subjects:
            assert left["card"]["trains"] is False
    else:
        assert left == {"farewell": {"received": True}} or left == {"farewell": {}}
    training = told_times & about.keys()
    assert policy.training_numbers or not training
    numbers = [about[key] for key in training] + list(left.get("means", {}).values())
    if policy.decimals is not None:
        for value in numbers:
            assert value == "NaN" or abs(value * 10**policy.decimals % 1 - 0.5) > 0.49, value


def check_means(left: dict[str, dict[str, Any]], policy: Policy) -> None:
    means, defined = left["means"], left["defined"]
    assert defined.keys() == {"n", *means}
    for name, mean in means.items():
        assert name in NAMES
        assert name.partition("/")[0] in policy.metrics
        behind = defined["n"] if mean == "NaN" and defined[name] == 0 else defined[name]
        assert policy.min_subjects <= behind <= defined["n"]
    assert not means or set(DICE) <= means.keys()
    if left["about"].get("released") == WITHHELD:
        assert not means
        if "privacy" in left:
            assert json.loads(left["privacy"]["statement"])["metrics"] == WITHHELD
    else:
        assert means


@settings(max_examples=200, deadline=None)
@given(answers, policies)
def test_the_policy_keeps_back_no_more_than_it_says(content, policy):
    """Applied again, nothing more is kept back; and what is kept back has its reason."""
    try:
        once = permitted(content, policy, OSLO)
    except NotPermitted:
        assert "weights" in content
        return
    assert told(permitted(once, policy, OSLO)) == told(once)
    if "means" not in content:
        return
    n = content["defined"]["n"]
    allowed = {
        name
        for name, mean in content["means"].items()
        if (
            name.partition("/")[0] in policy.metrics
            and n >= content["defined"][name] >= policy.min_subjects
        )
        or (
            (math.isnan(mean) and content["defined"][name] == 0 and n >= policy.min_subjects)
            and name.partition("/")[0] in policy.metrics
        )
    }
    said = content["about"]["released"]
    expected = allowed if set(DICE) <= allowed and said != WITHHELD else set()
    assert set(once["means"]) == expected
