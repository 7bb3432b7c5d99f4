"""Keys, masks and shares, against other libraries and by counting."""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import replace

import numpy as np
import pytest
from Crypto.Cipher import AES
from Crypto.Protocol.DH import (
    import_x25519_private_key,
    import_x25519_public_key,
    key_agreement,
)

from common.config import FederationConfig, Rounds
from common.keys import fingerprint, new_private_key
from common.masking import (
    FEWEST_SITES,
    PRESENT,
    SURVIVORS,
    About,
    Advert,
    BadRound,
    Member,
    RoundSecrets,
    add_mask,
    advertise,
    check_advert,
    combine_shares,
    context_of,
    fewest_in_sum,
    has_signed_list,
    is_masking_key_of,
    is_seed_of,
    mask_vector,
    members_of,
    most_colluders,
    most_dropouts,
    new_secrets,
    pair_seed,
    roster_hash,
    seal,
    sign_list,
    split_secrets,
    threshold,
    unmask_sum,
    unseal,
)
from common.statement import sign

ABOUT = About("f0", 3, "5e55", "7a5c", roster_hash(["SHA256:x"]), 5)


class Party:
    """A site with keys of its own."""

    def __init__(self, about: About = ABOUT) -> None:
        self.key = new_private_key()
        self.mark = fingerprint(self.key.public_key())
        self.secrets = new_secrets()
        self.advert = advertise(about, self.secrets, self.key)


@pytest.fixture(scope="module")
def parties() -> list[Party]:
    return sorted((Party() for _ in range(5)), key=lambda party: party.mark)


def roster(parties: list[Party]) -> list[str]:
    return [party.mark for party in parties]


def members(parties: list[Party]) -> list[Member]:
    return members_of([p.advert for p in parties], ABOUT, roster(parties), 3)


def test_secrets_have_256_bits_and_are_never_the_same() -> None:
    drawn = [part for _ in range(50) for part in vars(new_secrets()).values()]
    assert {len(part) for part in drawn} == {32}
    assert len(set(drawn)) == 150
    counts = np.bincount(np.frombuffer(b"".join(drawn), np.uint8), minlength=256)
    assert counts.max() < 60, "4800 bytes of 256 values: about 19 of each"


def test_thresholds_leave_no_way_to_two_lists_of_a_round() -> None:
    """By counting: how many signatures a server that lies can have, with so many sites on its side."""
    for n in range(FEWEST_SITES, 60):
        t, c = threshold(n), most_colluders(n)
        assert FEWEST_SITES <= t <= n
        assert most_dropouts(n) == n - t
        assert 3 * t > 2 * n
        # every honest site signs one list, each colluding one both: t for each cannot be had
        assert (n - c) + 2 * c < 2 * t
        assert c <= t - 2, "two sites of every sum do not collude"
        assert (n - (c + 1)) + 2 * (c + 1) >= 2 * t or c + 1 > t - 2, "and it is no understatement"
    assert [most_dropouts(n) for n in (3, 4, 10, 23)] == [0, 1, 3, 7]
    assert [most_colluders(n) for n in (3, 4, 10, 23)] == [1, 1, 3, 8]


def test_a_sum_is_of_two_thirds_of_the_roster_and_of_the_agreed_minimum() -> None:
    for given, sites, expected in ((None, 3, 3), (2, 3, 3), (None, 10, 7), (9, 10, 9), (4, 23, 16)):
        config = FederationConfig(rounds=Rounds(min_sites=given))
        assert fewest_in_sum(config, sites) == expected


def test_a_list_is_signed_for_one_purpose_and_one_round(parties: list[Party]) -> None:
    member, party, context = members(parties)[0], parties[0], bytes(32)
    signed = sign_list(PRESENT, ["b", "a"], context, party.key)
    assert has_signed_list(signed, PRESENT, ["a", "b"], context, member), "in whatever order"
    for what, sites, about, who in (
        (SURVIVORS, ["a", "b"], context, member),
        (PRESENT, ["a"], context, member),
        (PRESENT, ["a", "b"], b"x" * 32, member),
        (PRESENT, ["a", "b"], context, members(parties)[1]),
    ):
        assert not has_signed_list(signed, what, sites, about, who)
    assert not has_signed_list(b"", PRESENT, ["a", "b"], context, member)


def test_a_mask_is_aes_in_counter_mode() -> None:
    seed = bytes(range(32))
    vector = np.arange(200_003, dtype=np.uint32)
    add_mask(vector, seed)
    stream = AES.new(seed, AES.MODE_CTR, nonce=b"", initial_value=0).encrypt(bytes(4 * 200_003))
    expected = (np.arange(200_003, dtype=np.uint64) + np.frombuffer(stream, "<u4")) % 2**32
    assert np.array_equal(vector, expected.astype(np.uint32))
    add_mask(vector, seed, subtract=True)
    assert np.array_equal(vector, np.arange(200_003, dtype=np.uint32))


def test_two_sites_derive_the_same_seed_and_others_another(parties: list[Party]) -> None:
    everybody = members(parties)
    context = context_of([p.advert for p in parties])
    seeds = {}
    for a, party in enumerate(parties):
        for b, other in enumerate(everybody):
            if a != b:
                seeds[a, b] = pair_seed(party.secrets.masking, party.mark, other, context)
    assert all(seeds[a, b] == seeds[b, a] for a, b in seeds)
    assert len(set(seeds.values())) == 10
    changed = pair_seed(parties[0].secrets.masking, parties[0].mark, everybody[1], bytes(32))
    assert changed != seeds[0, 1], "and another in every round"


def test_a_seed_is_hkdf_of_the_x25519_secret(parties: list[Party]) -> None:
    """The curve by PyCryptodome, HKDF by hand."""
    a, b = parties[:2]
    theirs = members(parties)[1]
    secret = key_agreement(
        static_priv=import_x25519_private_key(a.secrets.masking),
        static_pub=import_x25519_public_key(theirs.masking),
        kdf=lambda shared: shared,
    )
    info = json.dumps(["fedbrats", "mask", *sorted((a.mark, b.mark))]).encode()
    assert pair_seed(a.secrets.masking, a.mark, theirs, b"c" * 32) == hkdf(secret, b"c" * 32, info)


def test_masks_cancel_in_the_sum_of_all_and_in_no_other(parties: list[Party]) -> None:
    everybody, context = members(parties), context_of([p.advert for p in parties])
    plain = [np.arange(50, dtype=np.uint32) * (k + 1) for k in range(5)]
    masked = []
    for party, vector in zip(parties, plain, strict=True):
        own = vector.copy()
        mask_vector(own, party.secrets, party.mark, everybody, context)
        assert int((own == vector).sum()) <= 1
        masked.append(own)
    total = sum(masked[1:], masked[0].copy())
    seeds = {p.mark: p.secrets.seed for p in parties}
    unmask_sum(total, everybody, context, seeds, {})
    assert np.array_equal(total, np.arange(50, dtype=np.uint32) * 15)


@pytest.mark.parametrize("gone", [[0], [2], [4], [0, 3], [1, 2, 4]])
def test_masks_towards_sites_that_vanished_are_taken_off(
    parties: list[Party], gone: list[int]
) -> None:
    everybody, context = members(parties), context_of([p.advert for p in parties])
    total = np.zeros(50, np.uint32)
    for k, party in enumerate(parties):
        if k not in gone:
            own = np.full(50, k + 1, np.uint32)
            mask_vector(own, party.secrets, party.mark, everybody, context)
            total += own
    seeds = {p.mark: p.secrets.seed for k, p in enumerate(parties) if k not in gone}
    keys = {p.mark: p.secrets.masking for k, p in enumerate(parties) if k in gone}
    without_keys = total.copy()
    unmask_sum(without_keys, everybody, context, seeds, {})
    expected = sum(k + 1 for k in range(5) if k not in gone)
    assert not np.any(without_keys == expected)
    unmask_sum(total, everybody, context, seeds, keys)
    assert np.all(total == expected)


@pytest.mark.parametrize("sites", [3, 4, 10, 23])
def test_any_threshold_of_shares_tells_the_secrets_and_fewer_do_not(sites: int) -> None:
    secrets, t = new_secrets(), threshold(sites)
    shares = split_secrets(secrets, sites, t)
    assert len(shares) == sites
    for begin in range(sites - t + 1):
        held = {place: shares[place] for place in range(begin, begin + t)}
        assert combine_shares({p: s.seed for p, s in held.items()}) == secrets.seed
        assert combine_shares({p: s.key for p, s in held.items()}) == secrets.masking
        held.pop(begin)
        assert combine_shares({p: s.seed for p, s in held.items()}) != secrets.seed
        assert combine_shares({p: s.key for p, s in held.items()}) != secrets.masking


def test_only_the_recipient_opens_shares_and_changes_show(parties: list[Party]) -> None:
    a, b, c = members(parties)[:3]
    first, second, third = parties[:3]
    context = context_of([p.advert for p in parties])
    shares = split_secrets(first.secrets, 5, 4)[1]
    sealed = seal(shares, first.secrets.sealing, first.mark, b, context)
    assert shares.seed not in sealed
    assert unseal(sealed, second.secrets.sealing, second.mark, a, context) == shares
    for byte in range(len(sealed)):
        spoilt = sealed[:byte] + bytes([sealed[byte] ^ 1]) + sealed[byte + 1 :]
        with pytest.raises(BadRound, match="changed on their way"):
            unseal(spoilt, second.secrets.sealing, second.mark, a, context)
    for key, own, sender, said in (
        (third.secrets.sealing, third.mark, a, context),
        (second.secrets.sealing, second.mark, c, context),
        (second.secrets.sealing, second.mark, a, bytes(32)),
    ):
        with pytest.raises(BadRound):
            unseal(sealed, key, own, sender, said)


def test_an_advert_is_checked_word_for_word(parties: list[Party]) -> None:
    party = parties[0]
    member = check_advert(party.advert, vars(ABOUT), roster(parties))
    assert member.site == party.mark
    assert is_masking_key_of(party.secrets.masking, member)
    assert is_seed_of(party.secrets.seed, member)
    assert not is_seed_of(party.secrets.sealing, member)
    others = {
        "federation": "f1",
        "round": 4,
        "session": "other",
        "task": "other",
        "roster": "other",
        "sites": 6,
    }
    for name, value in others.items():
        with pytest.raises(BadRound, match=f"another {name}"):
            check_advert(party.advert, vars(replace(ABOUT, **{name: value})), roster(parties))
    with pytest.raises(BadRound, match="not among the sites that were accepted"):
        check_advert(party.advert, vars(ABOUT), roster(parties[1:]))


def test_a_changed_advert_is_noticed(parties: list[Party]) -> None:
    advert, other = parties[0].advert, parties[1].advert
    document = json.loads(advert.text)
    for name in ("sealing", "masking", "seed_hash"):
        swapped = document | {name: json.loads(other.text)[name]}
        forged = Advert(json.dumps(swapped, sort_keys=True), advert.signature)
        with pytest.raises(BadRound, match="not signed by it"):
            check_advert(forged, vars(ABOUT), roster(parties))
    with pytest.raises(BadRound):
        check_advert(Advert(advert.text, b""), vars(ABOUT), roster(parties))


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "{}", "nonsense", '{"key": 5}', "[" * 100_000, '{"key": null}']
)
def test_what_is_no_advert_is_refused_in_words(text: str) -> None:
    with pytest.raises(BadRound):
        check_advert(Advert(text, b"x"), vars(ABOUT), None)


def test_a_round_is_of_different_sites_with_different_keys_and_enough_of_them(
    parties: list[Party],
) -> None:
    adverts, known = [p.advert for p in parties], roster(parties)
    assert [m.site for m in members_of(adverts[::-1], ABOUT, known, 3)] == known
    with pytest.raises(BadRound, match="twice"):
        members_of([*adverts[:3], adverts[0]], ABOUT, known, 3)
    with pytest.raises(BadRound, match="2 of 5"):
        members_of(adverts[:2], ABOUT, known, 3)
    with pytest.raises(BadRound, match="4 must be"):
        members_of(adverts[:3], ABOUT, known, 4)
    copied = Party()
    copied.secrets = RoundSecrets(
        parties[0].secrets.sealing, copied.secrets.masking, copied.secrets.seed
    )
    again = advertise(ABOUT, copied.secrets, copied.key)
    with pytest.raises(BadRound, match="the same"):
        members_of([*adverts[:3], again], ABOUT, [*known, copied.mark], 3)


def test_a_key_of_small_order_is_refused(parties: list[Party]) -> None:
    """Its secret with anybody is known to everybody: all zeros."""
    weak = Member("SHA256:weak", parties[1].key.public_key(), bytes(32), bytes(32), bytes(32))
    with pytest.raises(BadRound, match="proper"):
        pair_seed(parties[0].secrets.masking, parties[0].mark, weak, bytes(32))
    document = json.loads(parties[1].advert.text) | {"masking": bytes(32).hex()}
    text = json.dumps(document, sort_keys=True)
    forged = Advert(text, sign(text, parties[1].key))
    with pytest.raises(BadRound, match="proper"):  # at its owner's advert, so that it can be named
        check_advert(forged, vars(ABOUT), roster(parties))


def test_context_is_of_all_adverts_in_any_order(parties: list[Party]) -> None:
    adverts = [p.advert for p in parties]
    assert context_of(adverts) == context_of(adverts[::-1])
    assert context_of(adverts) != context_of(adverts[:4])


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, one block."""
    return hmac.new(
        hmac.new(salt, secret, hashlib.sha256).digest(), info + b"\x01", hashlib.sha256
    ).digest()
