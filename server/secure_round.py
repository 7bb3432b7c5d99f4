"""Secure aggregation as the server drives it: it learns the sum of a round's updates, never one.

Five questions to every site (`common.secure_messages`), each to those that answered the one before.
More than two thirds of the roster must be there to the end (`common.masking.threshold`). Up to the
third answer a round that lost too many sites is tried again with new keys, and nobody trains anew.
From then on there is no other sum of this round, so it is kept (`server.secure_state`) until enough
sites have helped to unmask it.

What an update looks like cannot be checked here: each site checks its own, and the sum is checked.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common.config import FederationConfig
from common.fixed_point import decode_sum, vector_length
from common.masking import (
    PRESENT,
    SURVIVORS,
    Advert,
    BadRound,
    Member,
    check_advert,
    combine_shares,
    context_of,
    has_signed_list,
    is_masking_key_of,
    is_seed_of,
    threshold,
    unmask_sum,
)
from common.messages import TrainTask, pack_train_task, task_hash
from common.secure_messages import (
    AGREE,
    MASKED,
    SHARES,
    UNMASK,
    Adverts,
    Agreement,
    Sealed,
    Session,
    Survivors,
    masked_bytes,
    pack_adverts,
    pack_agreement,
    pack_sealed,
    pack_survivors,
    put_session,
    unpack_agreed,
    unpack_masked,
    unpack_revealed,
    unpack_sealed,
    unpack_trained,
)
from common.weights import BadWeights, Weights, relative_change
from server.checkpoint import RunFolder
from server.exchange import BudgetSpent, addressed, answers, refused_by_policy
from server.history import TRAINING, Contribution, GivenStatement
from server.replies import refuse_trained
from server.roll_call import Roll
from server.secure_state import (
    MaskedSum,
    base_of,
    forget,
    keep_masked,
    keep_mean,
    kept_masked,
    kept_mean,
)
from server.updates import Gathered, roster_size, sites_needed

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
    signatures: dict[str, bytes] = field(default_factory=dict)
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
    """The mean of the sites' updates, weighted by numbers of subjects that stay hidden in the sum.

    Raises:
        BadWeights: what an interrupted round has left is damaged.
        OSError: the disk has no room for the sum.
    """
    base = base_of(task.weights)
    if (kept := kept_mean(folder, task.round, base)) is not None:
        LOG.info(f"round {task.round}: its sum is there already")
        return kept
    masked = kept_masked(folder, task.round, base)
    if masked is None:
        session = Session(secrets.token_hex(16), roster_size(roll))
        attempt = _Attempt(grid, config, roll, task, session)
        try:
            masked = _masked_sum(attempt, base)
        except _Failed as failed:
            for site in list(attempt.members):
                attempt.leave(site, str(failed))
            return Gathered(contributions=_contributions(attempt), spent=attempt.spent)
        keep_masked(folder, masked)
    else:
        LOG.info(f"round {task.round}: going on with the sum that the sites have masked before")
    try:
        mean = _unmasked(grid, config, roll, task, masked)
    except _Failed as failed:
        LOG.warning(
            f"round {task.round}: the masked sum is kept in {folder.masked_sum} until enough sites help. "
            "Only if they say that they have agreed to a sum of other sites: delete that file."
        )
        return Gathered(contributions=_failed(masked, str(failed)), spent=masked.spent)
    except BadWeights as error:
        forget(folder)  # nothing can come of this one
        why = (
            f"{error} Whose update is wrong cannot be told under the masks, and sites agree to a sum of "
            "the same sites only. If it stays so, begin a new federation from the last checkpoint "
            "(server.init_from), without secure aggregation to find out who it is."
        )
        return Gathered(contributions=_failed(masked, why), spent=masked.spent)
    keep_mean(folder, task.round, mean, masked)
    return Gathered(
        mean,
        contributions=masked.contributions,
        spent=masked.spent,
        statements=masked.statements,
    )


def _failed(masked: MaskedSum, why: str) -> list[Contribution]:
    return [replace(c, trained=False, reason=why) if c.trained else c for c in masked.contributions]


def _masked_sum(attempt: _Attempt, base: str) -> MaskedSum:
    config, roll, sites = attempt.config, attempt.roll, attempt.session.sites
    content = pack_train_task(attempt.task)
    asked = task_hash(content)
    put_session(content, attempt.session)
    _train(attempt, content, asked)
    wanted = len(attempt.members) + len(attempt.gone) + len(roll.absent)
    refused = refused_by_policy([*attempt.gone.values(), *roll.absent.values()])
    needed = sites_needed(config, roll, wanted, len(attempt.spent), refused)
    attempt.require(needed, "have trained")
    sealed = _exchange_shares(attempt)
    attempt.require(needed, "have sent shares of their secrets")
    present = sorted(attempt.members)
    total = _add_masked(attempt, sealed)
    attempt.require(needed, "have sent a masked update")
    return MaskedSum(
        attempt.task.round,
        base,
        attempt.session.id,
        sites,
        attempt.adverts,
        present,
        attempt.signatures,
        _contributions(attempt),
        attempt.spent,
        [s for s in attempt.statements if s.site in attempt.members],
        total,
    )


def _contributions(attempt: _Attempt) -> list[Contribution]:
    return [
        attempt.contributions[site]
        if site in attempt.members
        else Contribution(site, trained=False, reason=attempt.gone[site])
        for site in sorted(attempt.members.keys() | attempt.gone.keys())
    ]


def _unmasked(
    grid: Grid, config: FederationConfig, roll: Roll, task: TrainTask, masked: MaskedSum
) -> Weights:
    """Have the sites agree to the sum and unmask it, with whoever of them is there.

    Raises:
        _Failed: too few are; they can be asked again.
        BadWeights: the sum is not one of updates.
    """
    number, context = task.round, context_of(list(masked.adverts.values()))
    members = {site: check_advert(a, {}, None) for site, a in masked.adverts.items()}
    survivors = {members[s].site: signature for s, signature in masked.signatures.items()}
    needed = threshold(masked.sites)
    stage = number, masked.session
    LOG.info(f"round {number}: unmasking the sum of {len(survivors)} sites")

    def agreement(site: str, content: RecordDict) -> bytes | str:
        signature = unpack_agreed(content).signature
        if not has_signed_list(signature, SURVIVORS, survivors, context, members[site]):
            return "it did not sign the list of the sites in the sum."
        return signature

    question = pack_survivors(Survivors(*stage, survivors))
    asked = [site for site in masked.signatures if site in roll.nodes]
    messages = _messages(config, roll, dict.fromkeys(asked, question), AGREE)
    agreed = {members[s].site: word for s, word in _helping(grid, messages, agreement, number)}
    if len(agreed) < needed:
        raise _Failed(f"{len(agreed)} sites have agreed to the sum, and {needed} must.")

    present = {members[site].site: members[site] for site in masked.present}

    def shares_of(site: str, content: RecordDict) -> Mapping[str, bytes] | str:
        shares = unpack_revealed(content).shares
        if shares.keys() != present.keys() or any(len(share) != 32 for share in shares.values()):
            return "it did not send its share of every site's secret."
        return shares

    order = sorted(member.site for member in members.values())
    question = pack_agreement(Agreement(*stage, agreed))
    messages = _messages(config, roll, dict.fromkeys(asked, question), UNMASK)
    shares = {
        order.index(members[site].site): given
        for site, given in _helping(grid, messages, shares_of, number)
    }
    if len(shares) < needed:
        raise _Failed(f"{len(shares)} sites helped to unmask the sum, and {needed} are needed.")
    seeds, keys = {}, {}
    for mark, member in present.items():
        held = {place: given[mark] for place, given in shares.items()}
        if mark in survivors:
            seeds[mark] = _combined(held, needed, is_seed_of, member)
        else:
            keys[mark] = _combined(held, needed, is_masking_key_of, member)
    total = masked.total.copy()
    unmask_sum(total, list(present.values()), context, seeds, keys)
    mean, _ = decode_sum(total, task.weights, masked.sites)
    change = relative_change(mean, task.weights)
    if not change <= config.rounds.max_change:
        raise BadWeights(
            f"the mean change is {change:.3g} times as large as the model "
            f"(limit: {config.rounds.max_change:g})."
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
    context = context_of(list(attempt.adverts.values()))
    present = [member.site for member in attempt.members.values()]
    contents = {
        site: pack_sealed(
            Sealed(*stage, {s: to[member.site] for s, to in sealed.items() if s != member.site})
        )
        for site, member in attempt.members.items()
    }

    def take(site: str, content: RecordDict) -> int | str:
        """Add a vector to the sum and forget it."""
        masked = unpack_masked(content)
        vector, member = masked.vector, attempt.members[site]
        if not has_signed_list(masked.signature, PRESENT, present, context, member):
            return "it did not sign the list of the sites towards which it is masked."
        if vector.shape != total.shape:
            return f"its masked update has {len(vector)} values, expected {len(total)}."
        np.add(total, vector, out=total)
        attempt.signatures[site] = masked.signature
        return masked_bytes(content)

    for site, size in _ask(attempt, MASKED, contents, take):
        attempt.contributions[site] = replace(attempt.contributions[site], bytes=size)
    return total


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
) -> Iterator[tuple[str, Answer]]:
    """What `take` makes of the good answers; who gives none has dropped out."""
    messages = _messages(attempt.config, attempt.roll, contents, stage)
    for site, answer in answers(attempt.grid, messages, take):
        if isinstance(answer, str):
            attempt.leave(site, answer)
        else:
            yield site, answer


def _helping(
    grid: Grid,
    messages: Mapping[str, Message],
    take: Callable[[str, RecordDict], Answer | str],
    number: int,
) -> Iterator[tuple[str, Answer]]:
    """The good answers; who gives none is in the sum all the same."""
    for site, answer in answers(grid, messages, take):
        if isinstance(answer, str):
            LOG.warning(f"round {number}: {site} did not help to unmask: {answer}")
        else:
            yield site, answer


def _messages(
    config: FederationConfig, roll: Roll, contents: Mapping[str, RecordDict], stage: str
) -> dict[str, Message]:
    minutes = min(STAGE_MINUTES, config.rounds.deadline_minutes)
    return {
        site: Message(content, roll.nodes[site], stage, ttl=60 * minutes)
        for site, content in contents.items()
    }
