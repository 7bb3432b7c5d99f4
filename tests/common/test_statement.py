"""A privacy statement comes back as it was, and only the holder of the key could have signed it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from common.keys import new_private_key
from common.statement import BadStatement, Signed, Statement, is_signed_by, read_statement, sign

STATEMENT = Statement(
    federation="3f" * 16,
    site="Oslo",
    round=3,
    code="ab" * 32,
    at="2026-11-25T02:00:00+00:00",
    private=True,
    metrics="withheld",
    epsilon=1.25,
    delta=0.01,
    budget=8.0,
    noise_multiplier=2.0,
    sampling_rate=1.0,
    clip=1.0,
    steps=1,
    patients=10,
    accountant="PRV",
    ledger="00" * 16,
    entries=4,
    head="cd" * 32,
)


def test_a_statement_comes_back_as_it_was():
    assert read_statement(STATEMENT.text()) == STATEMENT
    whole = STATEMENT.text().replace("8.0", "8")  # as another JSON writer has it
    assert read_statement(whole) == STATEMENT


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", "small"),
        ("epsilon", True),
        ("private", 1),
        ("steps", 1.5),
        ("site", None),
        ("entries", "4"),
        ("epsilon", 10**400),
        ("entries", 10**400),
        ("epsilon", math.nan),
        ("delta", math.inf),
        ("round", -(10**30)),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value):
    text = json.dumps(asdict(STATEMENT) | {name: value})
    with pytest.raises(BadStatement, match=name):
        read_statement(text)


def test_only_the_key_that_signed_a_text_has_signed_it():
    key, other = new_private_key(), new_private_key()
    text = STATEMENT.text()
    signed = Signed(text, sign(text, key))
    assert is_signed_by(signed, key.public_key())
    assert not is_signed_by(signed, other.public_key())
    assert not is_signed_by(
        Signed(text.replace("1.25", "0.25"), signed.signature), key.public_key()
    )
    assert not is_signed_by(Signed(text), key.public_key()), "unsigned is nobody's word"
