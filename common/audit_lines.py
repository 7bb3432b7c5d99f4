"""The lines of an audit log: how an entry is written and signed, and what makes a line the next one.

A line holds its number, time (UTC), kind and details, the sha256 of the whole line before it (with
its signature and line break, so `sha256sum` recomputes the chain), the fingerprint of the key that
signs it, and the signature over the rest of the line. Keys stand in the log itself: entries of kind
`key`. One that puts a new key in the place of another holds the other's word for it too, a second
signature, unless that key was lost. Lines are canonical JSON, and there is one way to write each:
every byte counts. The file they stand in is `common.audit_log`'s business.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from common.keys import BadKey, fingerprint, parse_public_key, public_line

KEY, REPAIRED = "key", "repaired"  # kinds of entries that are written by themselves
VOUCHED = "vouched"  # in the details of a `key` entry: the signature of the key before it
FIELDS = {"at", "before", "details", "key", "kind", "number", "signature"}
ALGORITHM = ec.ECDSA(hashes.SHA384())
ORDER = int(  # of the group of P-384 (FIPS 186-4, D.1.2.4)
    "ffffffffffffffffffffffffffffffffffffffffffffffff"
    "c7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    16,
)


@dataclass(frozen=True)
class Head:
    """A log's last entry, or an earlier one: its number, from 1, and the sha256 of its line (hex)."""

    number: int
    hash: str


EMPTY = Head(0, "0" * 64)


@dataclass(frozen=True)
class Entry:
    """One line. `hash` is its own, as the next entry names it."""

    number: int
    at: str
    kind: str
    details: dict[str, Any]
    before: str
    key: str
    signature: str
    hash: str

    @property
    def head(self) -> Head:
        return Head(self.number, self.hash)


@dataclass(frozen=True)
class Signer:
    """The key that the last `key` entry introduced; None if there was none."""

    key: ec.EllipticCurvePublicKey | None = None
    fingerprint: str = ""


NOBODY = Signer()


class Broken(ValueError):
    """A line is not the next entry; the text says why."""


# ---------------------------------------------------------------------------------------- writing


def signed(
    before: Head, kind: str, details: dict[str, Any], key: ec.EllipticCurvePrivateKey
) -> tuple[Entry, bytes]:
    """The entry after `before`, and its line. Raises ValueError: `details` are not plain JSON."""
    document = {
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "before": before.hash,
        "details": details,
        "key": fingerprint(key.public_key()),
        "kind": kind,
        "number": before.number + 1,
    }
    try:
        signature = _signature(key, canonical(document))
    except TypeError as error:
        raise ValueError(str(error)) from error
    line = canonical({**document, "signature": signature}) + b"\n"
    return Entry(**document, signature=signature, hash=line_hash(line)), line  # type: ignore[arg-type]


def introduction(
    before: Head,
    key: ec.EllipticCurvePublicKey,
    former: ec.EllipticCurvePrivateKey | None,
) -> dict[str, Any]:
    """The details of the `key` entry after `before`; `former`, the key it replaces, vouches for it."""
    details = {"public_key": public_line(key, ""), "fingerprint": fingerprint(key)}
    if former is not None:
        details[VOUCHED] = _signature(former, _word(before, details["fingerprint"]))
    return details


def _word(before: Head, key: str) -> bytes:
    """What a key signs to vouch for the next one: good at this place in this log only."""
    return canonical({"before": before.hash, "next_key": key, "number": before.number + 1})


def _signature(key: ec.EllipticCurvePrivateKey, content: bytes) -> str:
    """Of an ECDSA signature (r, s), (r, n - s) is one too; the lower counts, so that there is one."""
    r, s = decode_dss_signature(key.sign(content, ALGORITHM))
    return encode_dss_signature(r, min(s, ORDER - s)).hex()


# ---------------------------------------------------------------------------------------- reading


def split(content: bytes) -> list[bytes]:
    """Lines with their line breaks; the last may have none."""
    lines = content.split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + [lines[-1]] * bool(lines[-1])


def next_entry(line: bytes, before: Head, signer: Signer) -> tuple[Entry, Signer]:
    """The entry after `before`, signed by `signer` or by the key that it introduces. Raises Broken."""
    entry = parsed(line)
    if entry.number != before.number + 1:
        raise Broken(f"is missing or not in its place (number {entry.number} stands there).")
    if entry.before != before.hash:
        raise Broken("does not follow the one before it, which was changed.")
    if entry.kind == KEY:
        word = entry.details.get(VOUCHED)
        if word is not None and signer.key is None:
            raise Broken("holds the word of a key that the log has not introduced.")
        introduced = _introduced(entry)
        if word is not None and signer.key is not None:
            _require_signed(signer.key, word, _word(before, introduced.fingerprint))
        signer = introduced
    if signer.key is None or entry.key != signer.fingerprint:
        raise Broken("is signed by a key that the log has not introduced.")
    content = line.rpartition(b',"signature":')[0] + b"}"  # the last of the sorted names
    _require_signed(signer.key, entry.signature, content)
    return entry, signer


def _require_signed(key: ec.EllipticCurvePublicKey, signature: object, content: bytes) -> None:
    try:
        if not isinstance(signature, str) or not re.fullmatch("([0-9a-f]{2})+", signature):
            raise ValueError("no hexadecimal number in small letters")
        raw = bytes.fromhex(signature)
        r, s = decode_dss_signature(raw)
        if 2 * s > ORDER or encode_dss_signature(r, s) != raw:
            raise ValueError("another way to write the same signature")
        key.verify(raw, content, ALGORITHM)
    except (InvalidSignature, ValueError) as error:
        raise Broken("was changed: its signature is not good.") from error


def whole_entries(
    rest: bytes, before: Head, signer: Signer, ours: str = ""
) -> Iterator[tuple[Entry, bytes]]:
    """As many entries as are whole and good, each with its line.

    A new key needs the word of the one before it here, but for the key `ours` and a log's first:
    nobody has acknowledged these entries yet.
    """
    for line in split(rest):
        try:
            entry, then = next_entry(line, before, signer)
        except Broken:
            return
        alone = entry.kind == KEY and signer.key is not None and VOUCHED not in entry.details
        first = not signer.fingerprint and ours not in ("", entry.key)
        if first or (alone and entry.key != ours):
            return
        yield entry, line
        before, signer = entry.head, then


def last_signer(entries: list[Entry]) -> Signer:
    return next((_introduced(e) for e in reversed(entries) if e.kind == KEY), NOBODY)


def _introduced(entry: Entry) -> Signer:
    try:
        key = parse_public_key(str(entry.details.get("public_key"))).key
    except BadKey as error:
        raise Broken("holds no public key.") from error
    signer = Signer(key, fingerprint(key))
    if entry.details.get("fingerprint") != signer.fingerprint:
        raise Broken("holds another key than it says.")
    return signer


def parsed(line: bytes) -> Entry:
    """Any whole line, whatever it is worth. Raises Broken."""
    try:
        document = json.loads(line.decode("ascii"))
        good = isinstance(document, dict) and document.keys() == FIELDS
        if not good or canonical(document) + b"\n" != line:
            raise ValueError("not as it was written")
    except (ValueError, RecursionError) as error:
        raise Broken("was changed: it is not as an entry is written.") from error
    texts = "at", "before", "key", "kind", "signature"
    if (
        not all(isinstance(document[name], str) for name in texts)
        or not isinstance(document["details"], dict)
        or type(document["number"]) is not int
    ):
        raise Broken("was changed: a value is of another type.")
    return Entry(**document, hash=line_hash(line))


def canonical(document: dict[str, Any]) -> bytes:
    text = json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


def line_hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
