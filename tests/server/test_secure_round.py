"""A round under masks against the plain mean, with sites that vanish, lie, or are asked twice."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import MessageType, RecordDict

from client.secure_round import _about, _adverts
from common.fixed_point import scale, vector_length
from common.keys import fingerprint, load_private_key, new_private_key, parse_public_key
from common.masking import (
    About,
    Advert,
    advertise,
    check_advert,
    combine_shares,
    is_masking_key_of,
    is_seed_of,
    members_of,
    most_dropouts,
    new_secrets,
    threshold,
)
from common.messages import TrainTask, pack_train_task, unpack_train_task
from common.secure_messages import (
    AGREE,
    MASKED,
    SHARES,
    UNMASK,
    Adverts,
    Masked,
    Revealed,
    Sealed,
    Survivors,
    pack_adverts,
    pack_masked,
    pack_revealed,
    pack_sealed,
    pack_survivors,
    put_session,
    session_of,
    unpack_adverts,
    unpack_masked,
    unpack_revealed,
    unpack_sealed,
    unpack_survivors,
)
from common.weights import Weights, check_update
from server.checkpoint import RunFolder
from server.secure_round import gather_secure_sum
from server.secure_state import forget
from server.updates import Gathered
from tests.secure_sites import (
    LOST,
    UNHEARD,
    Hospitals,
    config_of,
    hospitals,
    model,
    plain_mean,
    roll_of,
    task_of,
    updates,
)

TRAIN = MessageType.TRAIN
SIZES = 3, 10, 23


def numbers(sites: int) -> list[int]:
    """Of training subjects: from 4 to 129, as in BraTS 2020."""
    return [4 + (37 * place) % 126 for place in range(sites)]


def federation(tmp_path: Path, sites: int, **rounds: object) -> Hospitals:
    config = config_of(**{"min_sites": 3, **rounds})
    return hospitals(tmp_path / "sites", updates(model(), numbers(sites)), config)


def gather(grid: Hospitals, tmp_path: Path, number: int = 1, **roll: object) -> Gathered:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir(exist_ok=True, parents=True)
    config = grid.sites[0].config
    return gather_secure_sum(grid, config, folder, roll_of(grid, **roll), task_of(model(), number))  # type: ignore[arg-type]


def assert_is_mean_of(gathered: Gathered, grid: Hospitals, nodes: Iterable[int]) -> None:
    """Within what rounding once at each site costs, and the float type's own rounding."""
    parts = [grid.parts[node] for node in nodes]
    base, got = model(), gathered.weights
    assert got is not None
    check_update(got, base)
    for name, expected in plain_mean(parts, base).items():
        if not base[name].is_floating_point():
            assert abs(float(got[name]) - float(expected)) <= 0.5 + 1e-3, name
            continue
        rounding = len(parts) / (2 * scale(base[name], len(grid.sites)) * sum(n for n, _ in parts))
        float32 = 2.0**-24 * float(expected.abs().max())
        worst = float((got[name].double() - expected).abs().max())
        assert worst <= rounding + float32, name
        assert worst < 1e-4, "and that is little"


def contributed(gathered: Gathered) -> list[int]:
    return [int(c.site[-2:]) for c in gathered.contributions if c.trained]


@pytest.mark.parametrize("sites", SIZES)
def test_the_sum_is_the_plain_weighted_mean(tmp_path: Path, sites: int) -> None:
    grid = federation(tmp_path, sites)
    gathered = gather(grid, tmp_path)
    assert contributed(gathered) == list(range(sites))
    assert_is_mean_of(gathered, grid, range(sites))
    assert all(c.train_loss == 0.5 and c.bytes for c in gathered.contributions)


@pytest.mark.parametrize("how", [UNHEARD, LOST])
@pytest.mark.parametrize("stage", [TRAIN, SHARES, MASKED, AGREE, UNMASK])
def test_as_many_as_promised_may_vanish_at_any_stage(tmp_path: Path, stage: str, how: str) -> None:
    sites = 10  # with 23, several stages of one round below; each stage with 23 is 100 CPU seconds
    grid = federation(tmp_path, sites)
    gone = random.Random(f"{sites}{stage}{how}").sample(range(sites), most_dropouts(sites))
    grid.faults = {(stage, node): how for node in gone}
    gathered = gather(grid, tmp_path)
    late = stage in (AGREE, UNMASK)  # then they are in the sum all the same
    in_sum = range(sites) if late else [n for n in range(sites) if n not in gone]
    assert contributed(gathered) == list(in_sum)
    assert_is_mean_of(gathered, grid, in_sum)
    named = {c.site: c.reason for c in gathered.contributions if not c.trained}
    assert named.keys() == {grid.sites[n].name for n in gone if n not in in_sum}


@pytest.mark.parametrize("sites", [10, 23])
def test_sites_may_vanish_at_every_stage_of_one_round(tmp_path: Path, sites: int) -> None:
    grid = federation(tmp_path, sites)
    grid.faults = {(TRAIN, 0): UNHEARD, (SHARES, 1): LOST, (UNMASK, 3): LOST}
    if sites == 23:
        grid.faults[MASKED, 2] = UNHEARD
    gathered = gather(grid, tmp_path)
    in_sum = [2, *range(3, sites)] if sites == 10 else list(range(3, sites))
    assert contributed(gathered) == in_sum
    assert_is_mean_of(gathered, grid, in_sum)


@pytest.mark.parametrize("stage", [SHARES, MASKED, AGREE, UNMASK])
@pytest.mark.parametrize("sites", [3, 10])
def test_one_more_than_promised_fails_the_round_and_nothing_is_unmasked(
    tmp_path: Path, sites: int, stage: str
) -> None:
    grid = federation(tmp_path, sites)
    gone = range(most_dropouts(sites) + 1)
    grid.faults = {(stage, node): UNHEARD for node in gone}
    gathered = gather(grid, tmp_path)
    assert gathered.weights is None
    assert contributed(gathered) == []
    assert len(gathered.contributions) == sites
    assert all(c.reason for c in gathered.contributions)
    # tried again, with everybody there, it succeeds; nobody trains a second time
    grid.faults = {}
    again = gather(grid, tmp_path)
    assert_is_mean_of(again, grid, range(sites))
    assert sorted(grid.trained) == list(range(sites))


def test_a_sum_that_has_begun_is_finished_without_a_site_that_never_comes_back(
    tmp_path: Path,
) -> None:
    """Also without training, and in the run's results that site has contributed."""
    grid = federation(tmp_path, 4)
    grid.faults = {(UNMASK, 0): UNHEARD, (UNMASK, 1): UNHEARD}
    assert gather(grid, tmp_path).weights is None
    grid.faults = {}
    gathered = gather(grid, tmp_path, without=[3])
    assert_is_mean_of(gathered, grid, range(4))
    assert contributed(gathered) == [0, 1, 2, 3]
    assert grid.trained == [0, 1, 2, 3]


def test_fewer_than_three_are_refused_by_server_and_sites(tmp_path: Path) -> None:
    grid = federation(tmp_path, 4)
    grid.faults = {(TRAIN, 0): UNHEARD, (TRAIN, 1): UNHEARD}
    gathered = gather(grid, tmp_path)
    assert gathered.weights is None
    assert "2 sites have trained, and the sum needs 3" in gathered.contributions[3].reason
    assert not [stage for stage, _, _ in grid.seen if stage != TRAIN]


def test_a_federation_that_asks_for_more_sites_gets_no_sum_of_fewer(tmp_path: Path) -> None:
    grid = federation(tmp_path, 6, min_sites=6)
    grid.faults = {(SHARES, 0): UNHEARD}
    assert gather(grid, tmp_path).weights is None


def test_updates_as_large_as_can_be_do_not_overflow(tmp_path: Path) -> None:
    base = model()
    parts = []
    for _ in range(23):
        largest = {
            n: w + max(1.0, 2 * float(w.abs().max())) if w.is_floating_point() else w + 2**16
            for n, w in base.items()
        }
        parts.append((1024, largest))
    grid = hospitals(tmp_path / "sites", parts, config_of(min_sites=3))
    gathered = gather(grid, tmp_path)
    assert_is_mean_of(gathered, grid, range(23))


def test_a_server_that_swaps_a_key_is_caught(tmp_path: Path) -> None:
    grid = federation(tmp_path, 4)
    victim = grid.sites[1]

    def swap(stage: str, node: int, content: RecordDict) -> RecordDict:
        if stage != SHARES or node == 1:
            return content
        asked = unpack_adverts(content)
        key = load_private_key(victim.key)  # type: ignore[arg-type]
        own = fingerprint(key.public_key())
        adverts = []
        for advert in asked.adverts:
            document = json.loads(advert.text)
            if fingerprint(parse_public_key(document["key"]).key) == own:
                mine = new_secrets()
                about = About(**{name: document[name] for name in About.__dataclass_fields__})
                forged = advertise(about, mine, new_private_key())
                text = json.loads(forged.text) | {"key": document["key"]}
                advert = Advert(json.dumps(text, sort_keys=True), forged.signature)
            adverts.append(advert)
        return pack_adverts(Adverts(asked.round, asked.session, tuple(adverts)))

    grid.tamper = swap
    gathered = gather(grid, tmp_path)
    assert gathered.weights is None
    for node in (0, 2, 3):
        assert "not signed by it" in grid.said[SHARES, node]


def test_a_server_that_adds_a_site_of_its_own_is_caught(tmp_path: Path) -> None:
    grid = federation(tmp_path, 4)

    def add(stage: str, node: int, content: RecordDict) -> RecordDict:
        if stage != SHARES:
            return content
        asked = unpack_adverts(content)
        document = json.loads(asked.adverts[0].text)
        about = About(**{name: document[name] for name in About.__dataclass_fields__})
        forged = advertise(about, new_secrets(), new_private_key())
        adverts = (*asked.adverts[:3], forged) if node != 3 else asked.adverts
        return pack_adverts(Adverts(asked.round, asked.session, adverts))

    grid.tamper = add
    assert gather(grid, tmp_path).weights is None
    assert "not among the sites that were accepted" in grid.said[SHARES, 0]


def test_another_model_for_one_site_is_noticed_before_anything_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a server could choose a model that makes all updates but one vanish."""
    grid = federation(tmp_path, 4)

    def other_model(stage: str, node: int, content: RecordDict) -> RecordDict:
        if stage != TRAIN or node != 2:
            return content
        weights = {n: 2 * w for n, w in model().items()}
        forged = pack_train_task(TrainTask(unpack_train_task(content).round, "", 0.01, weights))
        session = session_of(content)
        assert session is not None
        put_session(forged, session)
        return forged

    grid.tamper = other_model
    gathered = gather(grid, tmp_path)
    # an honest server, behind a network that does this, names the site
    assert "signed its keys for another task" in gathered.contributions[2].reason
    # a dishonest one does not look: then the sites refuse
    monkeypatch.setattr(
        "server.secure_round.check_advert", lambda advert, *_: check_advert(advert, {}, None)
    )
    assert gather(grid, tmp_path / "again", 2).weights is None
    assert "signed its keys for another task" in grid.said[SHARES, 0]
    assert not [stage for stage, node, _ in grid.seen if stage == MASKED and node == 2]


def test_shares_changed_on_their_way_are_noticed(tmp_path: Path) -> None:
    grid = federation(tmp_path, 4)

    def change(stage: str, node: int, content: RecordDict) -> RecordDict:
        if stage != MASKED or node != 0:
            return content
        asked = unpack_sealed(content)
        shares = {s: bytes([share[0] ^ 1]) + share[1:] for s, share in asked.shares.items()}
        return pack_sealed(Sealed(asked.round, asked.session, shares))

    grid.tamper = change
    gathered = gather(grid, tmp_path)
    assert "changed on their way" in grid.said[MASKED, 0]
    assert contributed(gathered) == [1, 2, 3]


def test_one_false_share_is_put_right_when_there_are_enough(tmp_path: Path) -> None:
    grid = federation(tmp_path, 10)

    def lie(stage: str, node: int, content: RecordDict) -> RecordDict:
        if stage != UNMASK or node != 4:
            return content
        said = unpack_revealed(content)
        return pack_revealed(
            Revealed(said.round, said.session, {s: bytes(32) for s in said.shares})
        )

    grid.spoil = lie
    grid.faults = {(MASKED, 7): LOST}
    gathered = gather(grid, tmp_path)
    assert_is_mean_of(gathered, grid, [n for n in range(10) if n != 7])


def test_a_false_share_too_many_fails_the_round_in_words(tmp_path: Path) -> None:
    grid = federation(tmp_path, 3)

    def lie(stage: str, node: int, content: RecordDict) -> RecordDict:
        if stage != UNMASK or node != 1:
            return content
        said = unpack_revealed(content)
        return pack_revealed(
            Revealed(said.round, said.session, {s: bytes(32) for s in said.shares})
        )

    grid.spoil = lie
    gathered = gather(grid, tmp_path)
    assert gathered.weights is None
    assert "false share" in gathered.contributions[0].reason


def test_a_sum_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    grid = federation(tmp_path, 3)

    def noise(stage: str, node: int, content: RecordDict) -> RecordDict:
        if stage != MASKED or node != 1:
            return content
        said = unpack_masked(content)
        junk = np.random.default_rng(1).integers(0, 2**32, len(said.vector), dtype=np.uint32)
        junk[-1] |= 2**31
        return pack_masked(Masked(said.round, said.session, junk, said.signature))

    grid.spoil = noise
    gathered = gather(grid, tmp_path)
    assert gathered.weights is None
    assert "cannot be told under the masks" in gathered.contributions[0].reason


def test_a_vector_of_another_length_is_left_out_and_named(tmp_path: Path) -> None:
    grid = federation(tmp_path, 4)

    def shorten(stage: str, node: int, content: RecordDict) -> RecordDict:
        if stage != MASKED or node != 1:
            return content
        said = unpack_masked(content)
        return pack_masked(
            Masked(said.round, said.session, said.vector[:-1].copy(), said.signature)
        )

    grid.spoil = shorten
    gathered = gather(grid, tmp_path)
    assert contributed(gathered) == [0, 2, 3]
    assert_is_mean_of(gathered, grid, [0, 2, 3])
    assert f"expected {vector_length(model())}" in gathered.contributions[1].reason


def test_a_change_beyond_the_norm_bound_is_refused_by_the_site_itself(tmp_path: Path) -> None:
    grid = federation(tmp_path, 4, max_change=0.5)
    n, weights = grid.parts[2]
    grid.parts[2] = n, {k: w * 3 if w.is_floating_point() else w for k, w in weights.items()}
    gathered = gather(grid, tmp_path)
    assert "times as large as the model" in gathered.contributions[2].reason
    assert contributed(gathered) == [0, 1, 3]


def test_what_was_unmasked_survives_a_kill_of_the_server(tmp_path: Path) -> None:
    grid = federation(tmp_path, 4)
    first = gather(grid, tmp_path)
    asked = len(grid.seen)
    again = gather(grid, tmp_path)  # the same round: it was never recorded
    assert len(grid.seen) == asked, "nobody is asked again"
    assert again.contributions == first.contributions
    assert first.weights is not None
    assert again.weights is not None
    assert all(torch.equal(first.weights[n], again.weights[n]) for n in first.weights)


def test_a_round_cannot_be_repeated_for_a_sum_of_other_sites(tmp_path: Path) -> None:
    """The difference of the two sums would be one site's update."""
    grid = federation(tmp_path, 5)
    assert contributed(gather(grid, tmp_path)) == [0, 1, 2, 3, 4]
    forget(RunFolder(tmp_path / "run"))  # a server that forgets, or says so
    without = gather(grid, tmp_path, without=[4])
    assert without.weights is None
    for node in range(4):
        assert "one site's update could be had" in grid.said[AGREE, node]
    assert not [s for s, _, _ in grid.seen[-4:] if s == UNMASK]
    # with the same sites it can: the sum is the same
    forget(RunFolder(tmp_path / "run"))
    assert_is_mean_of(gather(grid, tmp_path), grid, range(5))


def test_an_aggregated_round_is_not_begun_again_later_or_for_another_task(tmp_path: Path) -> None:
    grid = federation(tmp_path, 4)
    assert gather(grid, tmp_path, 2).weights is not None
    assert gather(grid, tmp_path, 1).weights is None
    assert "round 2 is aggregated already" in grid.said[TRAIN, 0]
    folder, config = RunFolder(tmp_path / "run"), grid.sites[0].config
    forget(folder)
    other = task_of({n: w + 1 for n, w in model().items()}, 2)
    assert gather_secure_sum(grid, config, folder, roll_of(grid), other).weights is None  # type: ignore[arg-type]
    assert "for another task" in grid.said[TRAIN, 0]


def test_a_site_that_is_told_of_fewer_others_makes_the_others_refuse(tmp_path: Path) -> None:
    """Its masks towards the rest would be missing, and shares of both kinds could be collected."""
    grid = federation(tmp_path, 10)

    def fewer(stage: str, node: int, content: RecordDict) -> RecordDict:
        if stage != MASKED or node != 3:
            return content
        asked = unpack_sealed(content)
        return pack_sealed(Sealed(asked.round, asked.session, dict(list(asked.shares.items())[:6])))

    grid.tamper = fewer
    with pytest.MonkeyPatch.context() as patch:  # a server that does not look itself
        patch.setattr("server.secure_round.has_signed_list", lambda *_: True)
        assert gather(grid, tmp_path).weights is None
    for node in set(range(10)) - {3}:
        assert "is masked towards other sites than this one" in grid.said[AGREE, node]
    assert not [stage for stage, _, _ in grid.seen if stage == UNMASK]


def test_different_lists_of_survivors_for_different_sites_unmask_nothing(tmp_path: Path) -> None:
    grid = federation(tmp_path, 10)

    def lists(stage: str, node: int, content: RecordDict) -> RecordDict:
        if stage != AGREE:
            return content
        asked = unpack_survivors(content)
        order = sorted(asked.signatures)
        own = own_mark(grid, node)
        gone = [mark for mark in (order[:3] if node % 2 else order[-3:]) if mark != own]
        left = {s: signed for s, signed in asked.signatures.items() if s not in gone}
        return pack_survivors(Survivors(asked.round, asked.session, left))

    grid.tamper = lists
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.secure_round.has_signed_list", lambda *_: True)
        assert gather(grid, tmp_path).weights is None
    assert not [stage for stage, _, _ in grid.seen if stage == UNMASK]
    assert "sites have agreed to this sum; 7 must" in grid.said[UNMASK, 0]


def test_several_small_sums_of_one_round_are_refused(tmp_path: Path) -> None:
    """Of 7 sites in sums of 4, three sums and one colluding site would tell one update."""
    grid = federation(tmp_path, 7)

    def few(stage: str, node: int, content: RecordDict) -> RecordDict:
        if stage != SHARES:
            return content
        asked = unpack_adverts(content)
        return pack_adverts(Adverts(asked.round, asked.session, asked.adverts[:4]))

    grid.tamper = few
    assert gather(grid, tmp_path).weights is None
    assert "4 of 7 sites are in the round; 5 must be" in grid.said[SHARES, 0]


def own_mark(grid: Hospitals, node: int) -> str:
    key = load_private_key(grid.sites[node].key)  # type: ignore[arg-type]
    return fingerprint(key.public_key())


def test_what_the_server_sees_of_one_site_looks_like_noise(tmp_path: Path) -> None:
    """Masked vectors are uniform over the 2^32 values, and unlike from attempt to attempt."""
    base: Weights = {"w": torch.ones(200_000)}
    parts = [(5, {"w": torch.full((200_000,), 1.25)}) for _ in range(4)]
    grid = hospitals(tmp_path / "sites", parts, config_of(min_sites=3))
    folder, config = RunFolder(tmp_path / "run"), grid.sites[0].config
    folder.path.mkdir()
    grid.faults = {(MASKED, 2): LOST, (MASKED, 3): LOST}  # so that there are two attempts
    for _ in range(2):
        gather_secure_sum(grid, config, folder, roll_of(grid), task_of(base))
        grid.faults = {}
    vectors = [unpack_masked(content).vector for stage, _, content in grid.seen if stage == MASKED]
    assert len(vectors) == 6
    for vector in vectors:
        for shift in (0, 8, 16, 24):  # chi-square of each byte, 255 degrees of freedom: 255 +- 23
            counts = np.bincount((vector >> shift) & 0xFF, minlength=256)
            expected = len(vector) / 256
            assert 140 < float(((counts - expected) ** 2 / expected).sum()) < 400
    for a in range(6):
        for b in range(a):
            same = int((vectors[a] == vectors[b]).sum())
            assert same <= 3, "of 200,000 about 0.00005 are expected to be equal"
    # the sum of all but one is as uniform: nothing cancels before everybody is in
    partial = vectors[3] + vectors[4] + vectors[5]
    assert len(np.unique(partial >> 24)) == 256


def test_a_server_and_colluding_sites_cannot_take_another_sites_masks_off(tmp_path: Path) -> None:
    """Everything that the server and `threshold - 1` sites hold of a site's secrets, put together."""
    grid = federation(tmp_path, 10)
    grid.faults = {(UNMASK, node): UNHEARD for node in range(10)}  # while they hold everything
    gather(grid, tmp_path)
    states = [state_of(grid, node) for node in range(10)]
    victim = states[9]["own"]
    order = sorted(state["own"] for state in states)
    held = {
        order.index(state["own"]): [bytes.fromhex(part) for part in state["shares"][victim]]
        for state in states[:9]
    }
    members = members_of(_adverts(states[0]), _about(states[0]), grid.sites[0].roster, 3)
    member = next(m for m in members if m.site == victim)
    t = threshold(10)
    few = dict(list(held.items())[: t - 1])
    assert not is_seed_of(combine_shares({p: s for p, (s, _) in few.items()}), member)
    assert not is_masking_key_of(combine_shares({p: k for p, (_, k) in few.items()}), member)
    enough = dict(list(held.items())[:t])  # so that the test can fail
    assert is_seed_of(combine_shares({p: s for p, (s, _) in enough.items()}), member)
    # of a site in the sum nobody tells a share of its key, so its pairwise masks stay on
    grid.faults = {}
    assert gather(grid, tmp_path).weights is not None
    told = {
        order.index(states[node]["own"]): unpack_revealed(content).shares[victim]
        for stage, node, content in grid.seen
        if stage == UNMASK and node != 9
    }
    assert told == {p: s for p, (s, _) in held.items()}, "what they told are shares of the seed"


def test_what_a_site_keeps_afterwards_tells_no_other_secret(tmp_path: Path) -> None:
    grid = federation(tmp_path, 10)
    grid.faults = {(MASKED, 7): LOST}
    assert gather(grid, tmp_path).weights is not None
    told = {n: unpack_revealed(c).shares for stage, n, c in grid.seen if stage == UNMASK}
    for node, site in enumerate(grid.sites):
        folder = site.folder / "secure" / "f0"
        if node == 7:  # it has heard of nothing; the next round replaces what it has
            continue
        state = state_of(grid, node)
        assert state.keys() == {"session", "round", "task", "survivors", "agreed", "revealed"}
        assert {s: bytes.fromhex(share) for s, share in state["revealed"].items()} == told[node]
        assert sorted(path.name for path in folder.iterdir()) == ["agreed.json", "session.json"]
        assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())


def state_of(grid: Hospitals, node: int) -> dict[str, Any]:
    path = grid.sites[node].folder / "secure" / "f0" / "session.json"
    return json.loads(path.read_text())


def test_a_kept_sum_of_another_model_is_not_taken(tmp_path: Path) -> None:
    """As after a run folder was restored in part: its changes are none of this model."""
    grid = federation(tmp_path, 4)
    assert gather(grid, tmp_path).weights is not None
    folder, config = RunFolder(tmp_path / "run"), grid.sites[0].config
    other = task_of({n: w + 1 for n, w in model().items()})
    assert gather_secure_sum(grid, config, folder, roll_of(grid), other).weights is None  # type: ignore[arg-type]
    assert "for another task" in grid.said[TRAIN, 0]
