"""The cryptography of secure aggregation, for one round: keys, masks, shares. No messages here.

The protocol is that of Bonawitz et al. 2017 (doi:10.1145/3133956.3133982) with keys signed by the
enrolled site keys, and its rounds of agreement against a server that tells sites different things.
Each site makes two X25519 key pairs and a random seed for the round. Every two sites derive a mask
that one adds and the other subtracts, so that masks cancel in the sum; each site adds a mask from its
own seed, too, so that a late vector of a site that was given up reveals nothing. Seed and masking key
are split among the sites (Shamir, over GF(2^128), PyCryptodome): of a site that contributed the seed
is put together again, of one that dropped out the key, of none both.

Every derived key depends on all adverts of the round (`context`): sites that were shown different
lists get masks that do not cancel and shares that do not open.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.config import FederationConfig
from common.keys import BadKey, fingerprint, parse_public_key, public_line
from common.statement import Signed, is_signed_by, sign

FEWEST_SITES = 3  # in a sum: with two, each would know the other's update
PRESENT, SURVIVORS = "present", "survivors"  # lists that sites agree on: masked towards, in the sum
KEYS = "sealing", "masking", "seed_hash"  # of an advert: two public keys and a commitment
SECRET = 32  # bytes of a seed and of an X25519 private key
CHUNK = 16  # bytes: what Shamir's scheme over GF(2^128) splits at a time
BLOCK = 1 << 16  # values of a mask at a time


class BadRound(ValueError):
    """What somebody sent does not belong to an honest round; the text says what is wrong."""


def threshold(sites: int) -> int:
    """How many of the `sites` in the roster must help to unmask: more than two thirds of them.

    A site signs one list of contributing sites a round and reveals its shares only for a list that so
    many have signed. Two lists would need 2 t signatures, of which only colluding sites give two: with
    c colluders, n + c < 2 t leaves one list, so one sum, a round, however many attempts are made.
    """
    return max(2 * sites // 3 + 1, FEWEST_SITES)


def fewest_in_sum(config: FederationConfig, sites: int) -> int:
    """Of how many of the `sites` in the roster a sum must be at least."""
    return max(threshold(sites), config.rounds.min_sites or 0)


def most_dropouts(sites: int) -> int:
    """How many of the roster's sites may be missing from a round, from whatever stage on."""
    return sites - threshold(sites)


def most_colluders(sites: int) -> int:
    """How many sites, together with a server that breaks the protocol, still learn no other's update
    from a round: there is one sum (`threshold`), and two sites in it do not collude."""
    return min(2 * threshold(sites) - sites - 1, threshold(sites) - 2)


# ----------------------------------------------------------------------------------------- keys


@dataclass(frozen=True)
class RoundSecrets:
    """A site's secrets of one round, never used again: 32 bytes each."""

    sealing: bytes
    masking: bytes
    seed: bytes


def new_secrets() -> RoundSecrets:
    """From the operating system's entropy."""
    private = X25519PrivateKey.generate
    return RoundSecrets(
        private().private_bytes_raw(), private().private_bytes_raw(), os.urandom(SECRET)
    )


@dataclass(frozen=True)
class About:
    """What a round is, in the words that every site signs.

    `session` is the server's random name of this attempt, `task` the hash of everything the site was
    asked (`common.messages.task_hash`: another model sent to another site would show here), `roster`
    that of the keys that the site accepted, `sites` how many were asked.
    """

    federation: str
    round: int
    session: str
    task: str
    roster: str
    sites: int


@dataclass(frozen=True)
class Advert:
    """A site's public keys of the round: `text` is JSON, signed by the key that it names."""

    text: str
    signature: bytes


@dataclass(frozen=True)
class Member:
    """A site of the round whose advert was checked; `site` is the fingerprint of its `key`."""

    site: str
    key: ec.EllipticCurvePublicKey
    sealing: bytes
    masking: bytes
    seed_hash: bytes


def roster_hash(roster: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(sorted(roster)).encode()).hexdigest()


def advertise(about: About, secrets: RoundSecrets, key: ec.EllipticCurvePrivateKey) -> Advert:
    document = {
        **vars(about),
        "key": public_line(key.public_key(), ""),
        "sealing": _public(secrets.sealing).hex(),
        "masking": _public(secrets.masking).hex(),
        "seed_hash": hashlib.sha256(secrets.seed).hexdigest(),
    }
    text = json.dumps(document, sort_keys=True)
    return Advert(text, sign(text, key))


def check_advert(
    advert: Advert, about: Mapping[str, object], roster: Collection[str] | None
) -> Member:
    """The site behind an advert of this very round.

    Args:
        about: of `About` what is known; the advert must say the same.
        roster: whose keys count; None: anybody's.

    Raises:
        BadRound: another round, task or roster; a key that is not in the roster; a false signature.
    """
    document = _document(advert.text)
    try:
        key = parse_public_key(str(document.pop("key", ""))).key
    except BadKey as error:
        raise BadRound(f"an advert's site key cannot be used: {error}") from error
    site = fingerprint(key)
    if roster is not None and site not in roster:
        raise BadRound(f"{site} is not among the sites that were accepted.")
    if not is_signed_by(Signed(advert.text, advert.signature), key):
        raise BadRound(f"the keys said to be those of {site} are not signed by it.")
    try:
        keys = {n: bytes.fromhex(document.pop(n)) for n in KEYS}
        if any(len(key) != SECRET for key in keys.values()):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise BadRound(f"the keys of {site} for this round are none.") from error
    for name, value in about.items():
        if document.get(name) != value:
            raise BadRound(f"{site} signed its keys for another {name}.")
    for name in ("sealing", "masking"):  # here, where its owner can be named
        _exchange(X25519PrivateKey.generate().private_bytes_raw(), keys[name])
    return Member(site, key, **keys)


def members_of(
    adverts: Sequence[Advert], about: About, roster: Collection[str] | None, fewest: int
) -> list[Member]:
    """The sites of a round, in the order of their fingerprints.

    Raises:
        BadRound: an advert is bad, a site is there twice, or there are too few or too many.
    """
    members = [check_advert(advert, vars(about), roster) for advert in adverts]
    if len({member.site for member in members}) != len(members):
        raise BadRound("a site is in the round twice.")
    if len({key for m in members for key in (m.sealing, m.masking)}) != 2 * len(members):
        raise BadRound("two keys of the round are the same.")
    if not fewest <= len(members) <= about.sites:
        raise BadRound(f"{len(members)} of {about.sites} sites are in the round; {fewest} must be.")
    return sorted(members, key=lambda member: member.site)


def context_of(adverts: Sequence[Advert]) -> bytes:
    """32 bytes that stand for all adverts of a round, in whatever order they came."""
    return hashlib.sha256(json.dumps(sorted(a.text for a in adverts)).encode()).digest()


def sign_list(
    what: str, sites: Collection[str], context: bytes, key: ec.EllipticCurvePrivateKey
) -> bytes:
    """A site's word, for this round, that these are the sites that are `what` (PRESENT, SURVIVORS)."""
    return sign(_list(what, sites, context), key)


def has_signed_list(
    signature: bytes, what: str, sites: Collection[str], context: bytes, member: Member
) -> bool:
    return is_signed_by(Signed(_list(what, sites, context), signature), member.key)


def _list(what: str, sites: Collection[str], context: bytes) -> str:
    return json.dumps(["fedbrats", what, context.hex(), sorted(sites)])


# ---------------------------------------------------------------------------------------- masks


def pair_seed(masking: bytes, own: str, other: Member, context: bytes) -> bytes:
    """The seed of the mask that two sites share; `masking` is the private key of site `own`."""
    low, high = sorted((own, other.site))
    return _agreed(masking, other.masking, "mask", context, low, high)


def add_mask(vector: np.ndarray, seed: bytes, *, subtract: bool = False) -> None:
    """Add the seed's mask to a uint32 vector in place, mod 2^32: AES-256 in counter mode."""
    stream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(4 * min(BLOCK, len(vector)))
    drawn = bytearray(len(zeros) + 16)  # the cipher wants room for one of its blocks more
    for begin in range(0, len(vector), BLOCK):
        part = vector[begin : begin + BLOCK]
        stream.update_into(zeros[: 4 * len(part)], drawn)
        mask = np.frombuffer(drawn, dtype="<u4", count=len(part))
        if subtract:
            part -= mask
        else:
            part += mask


def mask_vector(
    vector: np.ndarray,
    secrets: RoundSecrets,
    own: str,
    members: Sequence[Member],
    context: bytes,
) -> None:
    """Mask a site's uint32 vector in place, towards every other of `members`."""
    add_mask(vector, secrets.seed)
    for other in members:
        if other.site != own:
            seed = pair_seed(secrets.masking, own, other, context)
            add_mask(vector, seed, subtract=own > other.site)


def unmask_sum(
    total: np.ndarray,
    members: Sequence[Member],
    context: bytes,
    seeds: Mapping[str, bytes],
    keys: Mapping[str, bytes],
) -> None:
    """Take off, in place, what does not cancel in the sum of the contributing sites' vectors.

    Args:
        members: all towards whom the vectors were masked.
        seeds: of each site in the sum its seed.
        keys: of each member that is not in the sum its masking private key.
    """
    by_site = {member.site: member for member in members}
    for seed in seeds.values():
        add_mask(total, seed, subtract=True)
    for gone, key in keys.items():
        for site in seeds:
            # what `site` added towards the one that is gone
            seed = pair_seed(key, gone, by_site[site], context)
            add_mask(total, seed, subtract=site < gone)


# --------------------------------------------------------------------------------------- shares


@dataclass(frozen=True)
class Shares:
    """What one site holds of another's two secrets: 32 bytes each."""

    seed: bytes
    key: bytes


def split_secrets(secrets: RoundSecrets, sites: int, needed: int) -> list[Shares]:
    """One site's secrets in `sites` shares, any `needed` of which tell them and fewer nothing."""
    chunks = [
        [share for _, share in Shamir.split(needed, sites, secret[begin : begin + CHUNK], False)]
        for secret in (secrets.seed, secrets.masking)
        for begin in (0, CHUNK)
    ]
    return [Shares(a + b, c + d) for a, b, c, d in zip(*chunks, strict=True)]


def combine_shares(shares: Mapping[int, bytes]) -> bytes:
    """The secret of 32 bytes; `shares` are as many as are needed, by the place (from 0) of their
    holders among the members."""
    parts = [
        Shamir.combine(
            [(place + 1, share[b : b + CHUNK]) for place, share in shares.items()], False
        )
        for b in (0, CHUNK)
    ]
    return b"".join(parts)


def is_seed_of(seed: bytes, member: Member) -> bool:
    return hashlib.sha256(seed).digest() == member.seed_hash


def is_masking_key_of(key: bytes, member: Member) -> bool:
    return _public(key) == member.masking


def seal(shares: Shares, sealing: bytes, own: str, to: Member, context: bytes) -> bytes:
    """Shares that only `to` can open, from site `own` with the private key `sealing`."""
    key = _agreed(sealing, to.sealing, "seal", context, own, to.site)
    # each key seals one message, so the nonce may be constant
    return ChaCha20Poly1305(key).encrypt(bytes(12), shares.seed + shares.key, context)


def unseal(sealed: bytes, sealing: bytes, own: str, sender: Member, context: bytes) -> Shares:
    """Raises:
    BadRound: it is not what `sender` sealed for site `own` in this round.
    """
    key = _agreed(sealing, sender.sealing, "seal", context, sender.site, own)
    try:
        opened = ChaCha20Poly1305(key).decrypt(bytes(12), sealed, context)
    except InvalidTag as error:
        raise BadRound(f"the shares from {sender.site} were changed on their way.") from error
    if len(opened) != 2 * SECRET:
        raise BadRound(f"the shares from {sender.site} have another length.")
    return Shares(opened[:SECRET], opened[SECRET:])


def _public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _agreed(private: bytes, public: bytes, purpose: str, context: bytes, *names: str) -> bytes:
    """32 bytes that only the owners of the two keys can derive, for one purpose."""
    shared = _exchange(private, public)
    info = json.dumps(["fedbrats", purpose, *names]).encode()
    return HKDF(hashes.SHA256(), length=32, salt=context, info=info).derive(shared)


def _exchange(private: bytes, public: bytes) -> bytes:
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError as error:  # a point of small order: the result would be known to everybody
        raise BadRound("a key of the round is not a proper X25519 key.") from error


def _document(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRound("an advert is no JSON.") from error
    if not isinstance(document, dict):
        raise BadRound("an advert is no JSON object.")
    return document
