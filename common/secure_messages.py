"""What server and sites say in a round of secure aggregation: four questions and their answers.

1. The train task, with the round's session beside it; a site that has trained answers with its keys
   of the round (`Trained`), and keeps its update.
2. `SHARES`: everybody's keys; the answer is a sealed piece of the site's secrets for each other site.
3. `MASKED`: the pieces sealed for this site; the answer is its masked vector.
4. `UNMASK`: who contributed; the answer is, of each of them, the site's share of the seed, of each
   that dropped out, that of the masking key.

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
from common.messages import BLOCK, STYPE
from common.records import BadMessage, record_of, value_of
from common.statement import Signed, attach, attached

SHARES = f"{MessageType.TRAIN}.shares"
MASKED = f"{MessageType.TRAIN}.masked"
UNMASK = f"{MessageType.TRAIN}.unmask"
STAGES = SHARES, MASKED, UNMASK
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
    seconds: float | None = None
    samples_per_second: float | None = None
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
    vector: np.ndarray


@dataclass(frozen=True)
class Survivors(Stage):
    """To a site: whose vectors are in the sum."""

    sites: tuple[str, ...]


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
    numbers = {n: getattr(trained, n) for n in ("loss", "seconds", "samples_per_second")}
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
        samples_per_second=told("samples_per_second"),
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
    return RecordDict({"about": _about(stage), "masked": ArrayRecord({BLOCK: array})})


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
    return Masked(*_stage(content), vector)


def masked_bytes(content: RecordDict) -> int:
    """How many bytes a masked vector has, as it travels."""
    array = record_of(content, "masked", ArrayRecord)[BLOCK]
    return len(array.data)


def pack_survivors(stage: Survivors) -> RecordDict:
    return RecordDict({"about": _about(stage), "survivors": _listed(sorted(stage.sites))})


def unpack_survivors(content: RecordDict) -> Survivors:
    sites = _read(content, "survivors", lambda stored: tuple(str(site) for site in stored))
    return Survivors(*_stage(content), sites)


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
