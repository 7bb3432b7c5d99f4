"""What a site says, with its signature, about the privacy of its patients in one round.

Travels beside a site's update and beside its metrics; the server keeps it as it came. A statement is
the site's word: the signature shows who gave it and that nobody changed it, not that it is true.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args, get_type_hints

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, RecordDict

from common.records import BadMessage, value_of

RECORD = "privacy"  # its name in a message
LONGEST = 10_000  # characters
LARGEST = 1e15  # of a number


class BadStatement(ValueError):
    """A text is no statement; it says why."""


@dataclass(frozen=True)
class Statement:
    """`private` is False for a site that trained without differential privacy; then the numbers are None.

    `epsilon` is what the most affected patient has spent in all, this round included, at `delta`;
    `budget` is the site's limit. `noise_multiplier` (sigma), `sampling_rate` (q), `clip` (C) and
    `steps` are this round's; None beside metrics. `metrics` is the site's choice about its held-out
    patients: withheld, noised or exact. `ledger` is its random id, `entries` and `head` tell how
    long it was and the hash of its last entry.
    """

    federation: str
    site: str
    round: int
    code: str
    at: str
    private: bool
    metrics: str
    epsilon: float | None = None
    delta: float | None = None
    budget: float | None = None
    noise_multiplier: float | None = None
    sampling_rate: float | None = None
    clip: float | None = None
    steps: int | None = None
    patients: int | None = None
    accountant: str = ""
    ledger: str = ""
    entries: int = 0
    head: str = ""

    def text(self) -> str:
        """One line of JSON; equal statements give equal texts."""
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False)


@dataclass(frozen=True)
class Signed:
    """A statement's text as it came; without a signature it is nobody's word (a simulation)."""

    text: str
    signature: bytes = b""


def read_statement(text: str) -> Statement:
    """Raises:
    BadStatement: the text is not that of a statement of this version.
    """
    if len(text) > LONGEST:
        raise BadStatement(f"a privacy statement has more than {LONGEST} characters.")
    try:
        stated: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadStatement("a privacy statement is no JSON.") from error
    names = {field.name for field in fields(Statement)}
    if not isinstance(stated, dict) or stated.keys() != names:
        raise BadStatement("a privacy statement has other entries than this version's.")
    for name, kind in get_type_hints(Statement).items():
        kinds = get_args(kind) or (kind,)
        value = stated[name]
        if float in kinds and type(value) is int and abs(value) <= LARGEST:
            stated[name] = value = float(value)
        number = type(value) in (int, float)  # exactly: a bool is no number here
        if type(value) not in kinds or (number and not abs(value) <= LARGEST):  # or is not finite
            raise BadStatement(f"{name} of a privacy statement has an impossible value.")
    return Statement(**stated)


def sign(text: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """ECDSA with SHA-384 over the text's UTF-8 bytes, as DER."""
    return key.sign(text.encode(), ec.ECDSA(hashes.SHA384()))


def is_signed_by(signed: Signed, key: ec.EllipticCurvePublicKey) -> bool:
    try:
        key.verify(signed.signature, signed.text.encode(), ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def attach(content: RecordDict, signed: Signed | None) -> None:
    """Put a statement into an answer, in place of one that is there."""
    if signed is not None:
        values = {"statement": signed.text, "signature": signed.signature}
        content[RECORD] = ConfigRecord(values)


def attached(content: RecordDict) -> Signed | None:
    """The statement in an answer, if there is one.

    Raises:
        BadMessage: it has not the agreed form.
    """
    record = content.get(RECORD)
    if record is None:
        return None
    if not isinstance(record, ConfigRecord):
        raise BadMessage(f"the message's {RECORD!r} is no ConfigRecord.")
    signed = Signed(value_of(record, "statement", str), value_of(record, "signature", bytes))
    try:
        read_statement(signed.text)
    except BadStatement as error:
        raise BadMessage(str(error)) from error
    return signed
