"""Secure aggregation as the server drives it: it learns the sum of a round's updates, never one.

Four questions to every site (`common.secure_messages`), each to those that answered the one before.
As many sites may vanish at any stage as `common.masking.most_dropouts` says; with fewer the round has
failed, and is tried again with new keys. Once the sites have helped to unmask a round's sum they help
with no other sum of that round, so the mean is on the disk before anything else is done with it.

What an update looks like cannot be checked here: each site checks its own, and the sum is checked.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common.config import FederationConfig
from common.fixed_point import decode_sum, vector_length
from common.masking import (
    Advert,
    BadRound,
    Member,
    check_advert,
    combine_shares,
    context_of,
    is_masking_key_of,
    is_seed_of,
    threshold,
    unmask_sum,
)
from common.messages import TrainTask, pack_train_task, task_hash
from common.secure_messages import (
    MASKED,
    SHARES,
    UNMASK,
    Adverts,
    Sealed,
    Session,
    Survivors,
    masked_bytes,
    pack_adverts,
    pack_sealed,
    pack_survivors,
    put_session,
    unpack_masked,
    unpack_revealed,
    unpack_sealed,
    unpack_trained,
)
from common.statement import Signed
from common.weights import BadWeights, Weights, load_weights, relative_change, save_weights
from server.checkpoint import RunFolder
from server.exchange import BudgetSpent, addressed, answers
from server.history import TRAINING, Contribution, GivenStatement
from server.replies import refuse_trained
from server.roll_call import Roll
from server.updates import Gathered, sites_needed

LOG = logging.getLogger("fedbrats")
STAGE_MINUTES = 30.0  # longest wait for the answers after the training: they take seconds

Answer = TypeVar("Answer")


class _Failed(RuntimeError):
    """No sum comes of this attempt; the text says why."""


@dataclass
class _Attempt:
    """`members` are the sites still in it, by name; `gone` says of the others why."""

    grid: Grid
    config: FederationConfig
    roll: Roll
    task: TrainTask
    session: Session
    members: dict[str, Member] = field(default_factory=dict)
    adverts: dict[str, Advert] = field(default_factory=dict)
    contributions: dict[str, Contribution] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    spent: dict[str, str] = field(default_factory=dict)
    statements: list[GivenStatement] = field(default_factory=list)

    def leave(self, site: str, why: str) -> None:
        LOG.warning(f"round {self.task.round}: {site} did not contribute: {why}")
        self.members.pop(site, None)
        self.gone[site] = why

    def require(self, needed: int, what: str) -> None:
        if len(self.members) < needed:
            raise _Failed(
                f"{len(self.members)} sites {what}, and the sum needs {needed}, so none was made."
            )


def gather_secure_sum(
    grid: Grid, config: FederationConfig, folder: RunFolder, roll: Roll, task: TrainTask
) -> Gathered:
    """The mean of the sites' updates, weighted by numbers of subjects that stay hidden in the sum."""
    content = pack_train_task(task)
    asked = task_hash(content)
    if (kept := _kept(folder, task.round, asked)) is not None:
        LOG.info(f"round {task.round}: its sum is there already")
        return kept
    # the same in every attempt at a round, so that sites need not encode anew
    sites = len(roll.roster) or len(roll.training)
    session = Session(secrets.token_hex(16), sites)
    put_session(content, session)
    attempt = _Attempt(grid, config, roll, task, session)
    gathered = Gathered(spent=attempt.spent)
    try:
        gathered.weights = _sum(attempt, content, asked)
    except _Failed as failed:
        for site in list(attempt.members):
            attempt.leave(site, str(failed))
    gathered.contributions = [
        attempt.contributions[site]
        if site in attempt.members
        else Contribution(site, trained=False, reason=attempt.gone[site])
        for site in sorted(attempt.members.keys() | attempt.gone.keys())
    ]
    gathered.statements = [s for s in attempt.statements if s.site in attempt.members]
    if gathered.weights is not None:
        _keep(folder, task.round, asked, gathered)
    return gathered


def _sum(attempt: _Attempt, content: RecordDict, asked: str) -> Weights:
    _train(attempt, content, asked)
    needed = sites_needed(
        attempt.config,
        len(attempt.members) + len(attempt.gone) + len(attempt.roll.absent),
        len(attempt.spent),
    )
    attempt.require(needed, "have trained")
    everybody = dict(attempt.members)
    needed = max(needed, threshold(len(everybody)))
    sealed = _exchange_shares(attempt)
    attempt.require(needed, "have sent shares of their secrets")
    present = dict(attempt.members)
    total = _add_masked(attempt, sealed)
    attempt.require(needed, "have sent a masked update")
    LOG.info(f"round {attempt.task.round}: unmasking the sum of {len(attempt.members)} sites")
    seeds, keys = _reveal(attempt, everybody, present)
    context = context_of(list(attempt.adverts.values()))
    unmask_sum(total, list(present.values()), context, seeds, keys)
    try:
        mean, _ = decode_sum(total, attempt.task.weights, attempt.session.sites)
    except BadWeights as error:
        raise _Failed(f"{error} Whose is wrong cannot be told under the masks.") from error
    change = relative_change(mean, attempt.task.weights)
    if not change <= attempt.config.rounds.max_change:
        raise _Failed(
            f"the mean change is {change:.3g} times as large as the model "
            f"(limit: {attempt.config.rounds.max_change:g}); whose update makes it so cannot be told "
            "under the masks."
        )
    return mean


def _train(attempt: _Attempt, content: RecordDict, asked: str) -> None:
    number, roll = attempt.task.round, attempt.roll
    session = attempt.session
    expected = {"round": number, "session": session.id, "task": asked, "sites": session.sites}
    keys: set[bytes] = set()

    def take(site: str, content: RecordDict) -> Member | str:
        trained = unpack_trained(content)
        if reason := refuse_trained(trained, roll.cards[site], number):
            return reason
        try:
            member = check_advert(trained.advert, expected, roll.roster or None)
        except BadRound as error:
            return str(error)
        if keys & {member.sealing, member.masking} or member.sealing == member.masking:
            return "its keys of the round are another site's."
        if any(member.site == other.site for other in attempt.members.values()):
            return "it signed with another site's key."
        keys.update((member.sealing, member.masking))
        attempt.adverts[site] = trained.advert
        if trained.statement is not None:
            attempt.statements.append(GivenStatement(number, site, TRAINING, trained.statement))
        attempt.contributions[site] = Contribution(
            site,
            trained=True,
            train_loss=trained.loss,
            seconds=trained.seconds,
            samples_per_second=trained.samples_per_second,
        )
        return member

    messages = addressed(content, MessageType.TRAIN, roll.training, roll.nodes, attempt.config)
    for site, answer in answers(attempt.grid, messages, take):
        if isinstance(answer, BudgetSpent):
            LOG.warning(f"round {number}: {site} did not contribute: {answer}")
            attempt.spent[site] = answer
        elif isinstance(answer, str):
            attempt.leave(site, answer)
        else:
            attempt.members[site] = answer


def _exchange_shares(attempt: _Attempt) -> dict[str, Mapping[str, bytes]]:
    """By sender's fingerprint, the shares that it sealed, by recipient's."""
    stage = attempt.task.round, attempt.session.id
    content = pack_adverts(Adverts(*stage, tuple(attempt.adverts.values())))
    everybody = {member.site for member in attempt.members.values()}

    def take(site: str, content: RecordDict) -> Mapping[str, bytes] | str:
        shares = unpack_sealed(content).shares
        if shares.keys() != everybody - {attempt.members[site].site}:
            return "it did not send a share to every other site."
        return shares

    sealed = {}
    contents = dict.fromkeys(attempt.members, content)
    for site, answer in _ask(attempt, SHARES, contents, take):
        sealed[attempt.members[site].site] = answer
    return sealed


def _add_masked(attempt: _Attempt, sealed: Mapping[str, Mapping[str, bytes]]) -> np.ndarray:
    stage = attempt.task.round, attempt.session.id
    total = np.zeros(vector_length(attempt.task.weights), np.uint32)
    contents = {
        site: pack_sealed(
            Sealed(*stage, {s: to[member.site] for s, to in sealed.items() if s != member.site})
        )
        for site, member in attempt.members.items()
    }

    def take(site: str, content: RecordDict) -> int | str:
        """Add a vector to the sum and forget it."""
        vector = unpack_masked(content).vector
        if vector.shape != total.shape:
            return f"its masked update has {len(vector)} values, expected {len(total)}."
        np.add(total, vector, out=total)
        return masked_bytes(content)

    for site, size in _ask(attempt, MASKED, contents, take):
        attempt.contributions[site] = replace(attempt.contributions[site], bytes=size)
    return total


def _reveal(
    attempt: _Attempt, everybody: Mapping[str, Member], present: Mapping[str, Member]
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Seeds of the sites in the sum and masking keys of those that dropped out, by fingerprint."""
    order = sorted(member.site for member in everybody.values())
    wanted = {member.site for member in present.values()}
    survivors = tuple(member.site for member in attempt.members.values())
    content = pack_survivors(Survivors(attempt.task.round, attempt.session.id, survivors))

    def take(site: str, content: RecordDict) -> Mapping[str, bytes] | str:
        shares = unpack_revealed(content).shares
        if shares.keys() != wanted or any(len(share) != 32 for share in shares.values()):
            return "it did not send its share of every site's secret."
        return shares

    shares: dict[int, Mapping[str, bytes]] = {}
    contents = dict.fromkeys(attempt.members, content)
    # who does not help to unmask is in the sum all the same
    for site, answer in _ask(attempt, UNMASK, contents, take, leaves=False):
        shares[order.index(attempt.members[site].site)] = answer
    needed = threshold(len(everybody))
    if len(shares) < needed:
        raise _Failed(f"{len(shares)} sites helped to unmask it, and {needed} are needed.")
    seeds, keys = {}, {}
    for member in present.values():
        held = {place: given[member.site] for place, given in shares.items()}
        if member.site in survivors:
            seeds[member.site] = _combined(held, needed, is_seed_of, member)
        else:
            keys[member.site] = _combined(held, needed, is_masking_key_of, member)
    return seeds, keys


def _combined(
    shares: Mapping[int, bytes],
    needed: int,
    is_right: Callable[[bytes, Member], bool],
    member: Member,
) -> bytes:
    """The secret, also if one of more shares than are needed is false."""
    places = list(shares)
    without: Iterable[int | None] = [None, *(places if len(places) > needed else [])]
    for false in without:
        used = [place for place in places if place != false][:needed]
        secret = combine_shares({place: shares[place] for place in used})
        if is_right(secret, member):
            return secret
    raise _Failed("a site sent a false share, so the sum cannot be unmasked.")


def _ask(
    attempt: _Attempt,
    stage: str,
    contents: Mapping[str, RecordDict],
    take: Callable[[str, RecordDict], Answer | str],
    *,
    leaves: bool = True,
) -> Iterator[tuple[str, Answer]]:
    """What `take` makes of the good answers; who gives none has dropped out, if it `leaves`."""
    minutes = min(STAGE_MINUTES, attempt.config.rounds.deadline_minutes)
    nodes = attempt.roll.nodes
    messages = {
        site: Message(content, nodes[site], stage, ttl=60 * minutes)
        for site, content in contents.items()
    }
    for site, answer in answers(attempt.grid, messages, take):
        if not isinstance(answer, str):
            yield site, answer
        elif leaves:
            attempt.leave(site, answer)
        else:
            LOG.warning(f"round {attempt.task.round}: {site} did not help to unmask: {answer}")


def _keep(folder: RunFolder, number: int, asked: str, gathered: Gathered) -> None:
    assert gathered.weights is not None
    about = {
        "round": number,
        "task": asked,
        "contributions": [asdict(c) for c in gathered.contributions],
        "spent": gathered.spent,
        "statements": [
            [s.round, s.site, s.stage, s.signed.text, s.signed.signature.hex()]
            for s in gathered.statements
        ],
    }
    save_weights(folder.secure_sum, gathered.weights, about)


def _kept(folder: RunFolder, number: int, asked: str) -> Gathered | None:
    """What an attempt at this very round came to that was interrupted after it."""
    if not folder.secure_sum.exists():
        return None
    weights, about = load_weights(folder.secure_sum)
    if (about.get("round"), about.get("task")) != (number, asked):
        return None
    kept: Any = about
    return Gathered(
        weights,
        contributions=[Contribution(**contribution) for contribution in kept["contributions"]],
        spent=kept["spent"],
        statements=[
            GivenStatement(round_, site, stage, Signed(text, bytes.fromhex(signature)))
            for round_, site, stage, text, signature in kept["statements"]
        ],
    )
