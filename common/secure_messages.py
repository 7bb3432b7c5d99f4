"""What server and sites say in a round of secure aggregation: five questions and their answers.

1. The train task, with the round's session beside it; a site that has trained answers with its keys
   of the round (`Trained`), and keeps its update.
2. `SHARES`: everybody's keys; the answer is a sealed piece of the site's secrets for each other site.
3. `MASKED`: the pieces sealed for this site; the answer is its masked vector, with its signature over
   the list of sites towards which it is masked.
4. `AGREE`: whose vectors are in the sum, with their signatures of 3; the answer is a signature over
   this list, of which a site gives one a round.
5. `UNMASK`: the signatures of 4; the answer is, of each site in the sum, the share of its seed, of
   each that dropped out, that of its masking key.

Values and one Flower form each, as in `common.messages`. Who may ask what when is `client.secure_round`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.masking import Advert
from common.message_words import BLOCK, STYPE
from common.records import BadMessage, record_of, value_of
from common.statement import Signed, attach, attached

SHARES = f"{MessageType.TRAIN}.shares"
MASKED = f"{MessageType.TRAIN}.masked"
AGREE = f"{MessageType.TRAIN}.agree"
UNMASK = f"{MessageType.TRAIN}.unmask"
STAGES = SHARES, MASKED, AGREE, UNMASK
SESSION = "session"  # the record beside a train task
VECTOR = "masked"  # the one tensor of a masked block
LONGEST_LIST = 2**20  # bytes of JSON: thousands of sites

Value = TypeVar("Value")


@dataclass(frozen=True)
class Session:
    """One attempt to aggregate a round: `id` is random, `sites` is how many are asked."""

    id: str
    sites: int


@dataclass(frozen=True)
class Trained:
    """A site has trained, and would take part in the sum with these keys. No weights."""

    site: str
    round: int
    advert: Advert
    loss: float | None = None
    seconds: float | None = None  # without the throughput, for the two tell the number of subjects
    statement: Signed | None = None


@dataclass(frozen=True)
class Stage:
    """A question of a later stage, or the answer to one: `about` says of which round and session."""

    round: int
    session: str


@dataclass(frozen=True)
class Adverts(Stage):
    """To every site: the keys of all."""

    adverts: tuple[Advert, ...]


@dataclass(frozen=True)
class Sealed(Stage):
    """From a site, by recipient; to a site, by sender: shares that only the recipient can open."""

    shares: Mapping[str, bytes]


@dataclass(frozen=True)
class Masked(Stage):
    """`signature` is over the list of sites towards which the vector is masked."""

    vector: np.ndarray
    signature: bytes


@dataclass(frozen=True)
class Survivors(Stage):
    """To a site: whose vectors are in the sum, with the signature that came with each."""

    signatures: Mapping[str, bytes]


@dataclass(frozen=True)
class Agreed(Stage):
    """From a site: its signature over the list of survivors."""

    signature: bytes


@dataclass(frozen=True)
class Agreement(Stage):
    """To a site: the survivors' signatures over their list."""

    signatures: Mapping[str, bytes]


@dataclass(frozen=True)
class Revealed(Stage):
    """From a site: 32 bytes for each member of the round."""

    shares: Mapping[str, bytes]


def action_of(stage: str) -> str:
    """Flower's name of a stage's handler."""
    return stage.partition(".")[2]


def put_session(content: RecordDict, session: Session) -> None:
    content[SESSION] = ConfigRecord({"id": session.id, "sites": session.sites})


def session_of(content: RecordDict) -> Session | None:
    """Raises:
    BadMessage: it has not the agreed form.
    """
    if SESSION not in content:
        return None
    record = record_of(content, SESSION, ConfigRecord)
    return Session(value_of(record, "id", str), value_of(record, "sites", int))


def pack_trained(trained: Trained) -> RecordDict:
    told = {"site": trained.site, "round": trained.round}
    numbers = {name: getattr(trained, name) for name in ("loss", "seconds")}
    told |= {name: value for name, value in numbers.items() if value is not None}
    keys = {"advert": trained.advert.text, "signature": trained.advert.signature}
    content = RecordDict({"about": ConfigRecord(told), "keys": ConfigRecord(keys)})
    attach(content, trained.statement)
    return content


def unpack_trained(content: RecordDict) -> Trained:
    about = record_of(content, "about", ConfigRecord)
    keys = record_of(content, "keys", ConfigRecord)

    def told(name: str) -> float | None:
        return value_of(about, name, float) if name in about else None

    return Trained(
        site=value_of(about, "site", str),
        round=value_of(about, "round", int),
        advert=Advert(_short(keys, "advert"), value_of(keys, "signature", bytes)),
        loss=told("loss"),
        seconds=told("seconds"),
        statement=attached(content),
    )


def pack_adverts(stage: Adverts) -> RecordDict:
    pairs = [[advert.text, advert.signature.hex()] for advert in stage.adverts]
    return RecordDict({"about": _about(stage), "adverts": _listed(pairs)})


def unpack_adverts(content: RecordDict) -> Adverts:
    def advert(pair: list[str]) -> Advert:
        text, signature = pair
        return Advert(str(text), bytes.fromhex(signature))

    pairs = _read(content, "adverts", lambda stored: tuple(advert(pair) for pair in stored))
    return Adverts(*_stage(content), pairs)


def pack_sealed(stage: Sealed) -> RecordDict:
    return RecordDict({"about": _about(stage), "sealed": _by_site(stage.shares)})


def unpack_sealed(content: RecordDict) -> Sealed:
    return Sealed(*_stage(content), _read(content, "sealed", _bytes_by_site))


def pack_masked(stage: Masked) -> RecordDict:
    block = save({VECTOR: stage.vector})
    array = Array("uint8", (len(block),), STYPE, block)
    signed = ConfigRecord({"signature": stage.signature})
    masked = ArrayRecord({BLOCK: array})
    return RecordDict({"about": _about(stage), "masked": masked, "present": signed})


def unpack_masked(content: RecordDict) -> Masked:
    array = record_of(content, "masked", ArrayRecord).get(BLOCK)
    if not isinstance(array, Array) or array.stype != STYPE:
        raise BadMessage("the message has no masked vector.")
    try:
        tensors = load(array.data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BadMessage("the masked vector cannot be decoded.") from error
    vector = tensors.get(VECTOR)
    if len(tensors) != 1 or vector is None or vector.dtype != np.uint32 or vector.ndim != 1:
        raise BadMessage("the message holds another tensor than a masked vector.")
    signed = record_of(content, "present", ConfigRecord)
    return Masked(*_stage(content), vector, value_of(signed, "signature", bytes))


def masked_bytes(content: RecordDict) -> int:
    """How many bytes a masked vector has, as it travels."""
    array = record_of(content, "masked", ArrayRecord)[BLOCK]
    return len(array.data)


def pack_survivors(stage: Survivors) -> RecordDict:
    return RecordDict({"about": _about(stage), "survivors": _by_site(stage.signatures)})


def unpack_survivors(content: RecordDict) -> Survivors:
    return Survivors(*_stage(content), _read(content, "survivors", _bytes_by_site))


def pack_agreed(stage: Agreed) -> RecordDict:
    signed = ConfigRecord({"signature": stage.signature})
    return RecordDict({"about": _about(stage), "agreed": signed})


def unpack_agreed(content: RecordDict) -> Agreed:
    signed = record_of(content, "agreed", ConfigRecord)
    return Agreed(*_stage(content), value_of(signed, "signature", bytes))


def pack_agreement(stage: Agreement) -> RecordDict:
    return RecordDict({"about": _about(stage), "agreement": _by_site(stage.signatures)})


def unpack_agreement(content: RecordDict) -> Agreement:
    return Agreement(*_stage(content), _read(content, "agreement", _bytes_by_site))


def pack_revealed(stage: Revealed) -> RecordDict:
    return RecordDict({"about": _about(stage), "revealed": _by_site(stage.shares)})


def unpack_revealed(content: RecordDict) -> Revealed:
    return Revealed(*_stage(content), _read(content, "revealed", _bytes_by_site))


def _about(stage: Stage) -> ConfigRecord:
    return ConfigRecord({"round": stage.round, "session": stage.session})


def _stage(content: RecordDict) -> tuple[int, str]:
    about = record_of(content, "about", ConfigRecord)
    return value_of(about, "round", int), value_of(about, "session", str)


def _listed(value: object) -> ConfigRecord:
    return ConfigRecord({"json": json.dumps(value)})


def _by_site(shares: Mapping[str, bytes]) -> ConfigRecord:
    return _listed({site: share.hex() for site, share in sorted(shares.items())})


def _bytes_by_site(stored: dict[str, str]) -> dict[str, bytes]:
    return {site: bytes.fromhex(share) for site, share in stored.items()}


def _read(content: RecordDict, name: str, form: Callable[..., Value]) -> Value:
    text = _short(record_of(content, name, ConfigRecord), "json")
    try:
        return form(json.loads(text))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadMessage(f"the message's {name!r} have not the agreed form.") from error


def _short(record: ConfigRecord, name: str) -> str:
    text = value_of(record, name, str)
    if len(text) > LONGEST_LIST:
        raise BadMessage(f"{name!r} is longer than {LONGEST_LIST} characters.")
    return str(text)
