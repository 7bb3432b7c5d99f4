"""A site's part in secure aggregation: what it answers in which order, and never twice differently.

Each stage is answered for one set of facts only; the same question again gets the same answer, any
other is refused. Two files in the site's folder hold what must survive a restart: the vector of the
round's update, which is the same in every attempt at the round, and the secrets of the one attempt
(session) that is going on. Both are gone once the site has helped to unmask, but for its answer. A
third remembers to which sum of the last round it has agreed: it agrees to no other sum of that round,
in no attempt, for from two sums one update could be had.

The arithmetic is `common.fixed_point`, the cryptography `common.masking`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import RecordDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from client.site import Site
from common.files import write_atomically
from common.fixed_point import encode_vector
from common.keys import fingerprint, load_private_key
from common.masking import (
    PRESENT,
    SURVIVORS,
    About,
    Advert,
    Member,
    RoundSecrets,
    advertise,
    context_of,
    fewest_in_sum,
    has_signed_list,
    mask_vector,
    members_of,
    new_secrets,
    roster_hash,
    seal,
    sign_list,
    split_secrets,
    threshold,
    unseal,
)
from common.messages import SiteUpdate, TrainTask
from common.secure_messages import (
    AGREE,
    MASKED,
    SHARES,
    UNMASK,
    Adverts,
    Agreed,
    Agreement,
    Masked,
    Revealed,
    Sealed,
    Session,
    Stage,
    Survivors,
    Trained,
    pack_agreed,
    pack_masked,
    pack_revealed,
    pack_sealed,
    unpack_adverts,
    unpack_agreement,
    unpack_sealed,
    unpack_survivors,
)
from common.statement import Signed
from common.weights import relative_change

LOG = logging.getLogger("fedbrats")
VECTOR = "vector"


class RoundRefused(RuntimeError):
    """The site will not take this step; the text is sent to the server."""


@dataclass(frozen=True)
class _Files:
    folder: Path

    @property
    def vector(self) -> Path:
        return self.folder / "vector.safetensors"

    @property
    def session(self) -> Path:
        return self.folder / "session.json"

    @property
    def agreed(self) -> Path:
        return self.folder / "agreed.json"


def answer_task(
    site: Site,
    task: TrainTask,
    task_hash: str,
    session: Session,
    train: Callable[[], SiteUpdate],
) -> Trained:
    """Train, unless this very task was trained for before, and begin a new attempt to aggregate.

    Args:
        task_hash: `common.messages.task_hash` of the message.
        train: is called if there is no vector of this task yet.

    Raises:
        RoundRefused: the site has agreed to a sum of a later round, or of this one for another task;
            its key is not in the roster; its change is too large.
        BadWeights: a value of the update is not finite.
    """
    files = _files(site)
    if session.sites != len(site.roster):
        raise RoundRefused(
            f"{site.name}: the roster has {len(site.roster)} sites, the task is for {session.sites}."
        )
    done = _read(files.agreed)
    if done and done["round"] > task.round:
        raise RoundRefused(f"{site.name}: round {done['round']} is aggregated already.")
    if done and done["round"] == task.round and done["task"] != task_hash:
        raise RoundRefused(
            f"{site.name}: it has agreed to a sum of round {task.round} for another task."
        )
    about = _about_vector(files.vector)
    if (about.get("task"), about.get("sites")) != (task_hash, session.sites):
        files.session.unlink(missing_ok=True)  # of an earlier round
        about = _train(site, task, task_hash, session.sites, files, train)
    else:
        LOG.info(f"round {task.round}, {site.name}: the update that is there is used again")
    key = _key(site)
    own = fingerprint(key.public_key())
    if own not in site.roster:
        raise RoundRefused(f"{site.name}: its own key is not in the roster that it accepted.")
    stored = _read(files.session)
    if stored.get("session") != session.id or stored.get("task") != task_hash:
        secrets = new_secrets()
        what = About(
            federation=site.federation,
            round=task.round,
            session=session.id,
            task=task_hash,
            roster=roster_hash(site.roster),
            sites=session.sites,
        )
        advert = advertise(what, secrets, key)
        stored = {
            **vars(what),
            "own": own,
            "secrets": {name: value.hex() for name, value in vars(secrets).items()},
            "advert": [advert.text, advert.signature.hex()],
        }
        _write(files.session, stored)
    text, signature = stored["advert"]
    statement = about["statement"]
    return Trained(
        site.name,
        task.round,
        Advert(text, bytes.fromhex(signature)),
        loss=about["loss"],
        seconds=about["seconds"],
        statement=Signed(statement) if statement else None,
    )


def answer_adverts(site: Site, stage: Adverts) -> Sealed:
    """Check everybody's keys, and seal a share of this site's secrets for every other site.

    Raises:
        RoundRefused, BadRound
    """
    files = _files(site)
    state = _session(site, files, stage)
    asked = [[advert.text, advert.signature.hex()] for advert in stage.adverts]
    if "revealed" in state:
        raise RoundRefused(f"{site.name}: the sum of this attempt is settled.")
    if "sealed" not in state:
        needed = fewest_in_sum(site.config, len(site.roster))
        members = members_of(stage.adverts, _about(state), site.roster, needed)
        if state["advert"] not in asked:
            raise RoundRefused(f"{site.name}: its own keys are not among those of the round.")
        context, secrets, own = context_of(stage.adverts), _secrets(state), state["own"]
        shares = split_secrets(secrets, len(members), threshold(len(site.roster)))
        state["sealed"] = {
            member.site: seal(part, secrets.sealing, own, member, context).hex()
            for member, part in zip(members, shares, strict=True)
            if member.site != own
        }
        mine = shares[[member.site for member in members].index(own)]
        state["shares"] = {own: [mine.seed.hex(), mine.key.hex()]}
        state["adverts"] = asked
        _write(files.session, state)
    _same(site, sorted(asked), sorted(state["adverts"]), "keys")
    sealed = {to: bytes.fromhex(share) for to, share in state["sealed"].items()}
    return Sealed(stage.round, stage.session, sealed)


def answer_sealed(site: Site, stage: Sealed) -> Masked:
    """Open the shares for this site, and mask its vector towards all whose shares came.

    Raises:
        RoundRefused, BadRound
    """
    files = _files(site)
    state = _session(site, files, stage)
    if "agreed" in state:
        raise RoundRefused(f"{site.name}: the sum of this attempt is settled.")
    if "sealed" not in state:
        raise RoundRefused(f"{site.name}: it has not seen the keys of the round yet.")
    members, own = _members(state), state["own"]
    asked = {sender: share.hex() for sender, share in sorted(stage.shares.items())}
    if "received" not in state:
        context, secrets = _context(state), _secrets(state)
        by_site = {member.site: member for member in members}
        if own in asked or not asked.keys() <= by_site.keys():
            raise RoundRefused(f"{site.name}: shares came from sites that are not in the round.")
        needed = fewest_in_sum(site.config, len(site.roster))
        if len(asked) + 1 < needed:
            raise RoundRefused(
                f"{site.name}: {len(asked) + 1} of {len(members)} sites are left; {needed} are "
                "needed."
            )
        for sender, sealed in stage.shares.items():
            opened = unseal(sealed, secrets.sealing, own, by_site[sender], context)
            state["shares"][sender] = [opened.seed.hex(), opened.key.hex()]
        state["received"] = asked
        _write(files.session, state)
    _same(site, asked, state["received"], "shares")
    vector = _load_vector(files.vector)
    present = [member for member in members if member.site in state["shares"]]
    mask_vector(vector, _secrets(state), own, present, _context(state))
    signature = sign_list(PRESENT, state["shares"], _context(state), _key(site))
    return Masked(stage.round, stage.session, vector, signature)


def answer_survivors(site: Site, stage: Survivors) -> Agreed:
    """Agree to the sum of these sites; from then on to no other sum of the round.

    Raises:
        RoundRefused, BadRound
    """
    files = _files(site)
    state = _session(site, files, stage)
    survivors = sorted(stage.signatures)
    if "agreed" in state:
        _same(site, survivors, state["survivors"], "survivors")
        return Agreed(stage.round, stage.session, bytes.fromhex(state["agreed"]))
    if "received" not in state:
        raise RoundRefused(f"{site.name}: it has sent no masked update in this attempt.")
    present, context = state["shares"].keys(), _context(state)
    if state["own"] not in survivors or not present >= set(survivors):
        raise RoundRefused(f"{site.name}: the sum would be of other sites than those of the round.")
    needed = fewest_in_sum(site.config, len(site.roster))
    if len(survivors) < needed:
        raise RoundRefused(
            f"{site.name}: a sum of {len(survivors)} sites is refused; {needed} are needed."
        )
    by_site = {member.site: member for member in _members(state)}
    for name, signature in stage.signatures.items():
        if not has_signed_list(signature, PRESENT, present, context, by_site[name]):
            raise RoundRefused(f"{site.name}: {name} is masked towards other sites than this one.")
    done = _read(files.agreed)
    if done and done["round"] == stage.round and done["survivors"] != survivors:
        raise RoundRefused(
            f"{site.name}: it has agreed to a sum of round {stage.round} already, of other sites; "
            "from the difference one site's update could be had."
        )
    what = {"round": stage.round, "task": state["task"], "survivors": survivors}
    _write(files.agreed, what)  # before anything is told
    signature = sign_list(SURVIVORS, survivors, context, _key(site))
    state |= {"survivors": survivors, "agreed": signature.hex()}
    _write(files.session, state)
    return Agreed(stage.round, stage.session, signature)


def answer_agreement(site: Site, stage: Agreement) -> Revealed:
    """Help to take the masks off the sum, if so many sites have agreed to it that no other can be.

    Raises:
        RoundRefused, BadRound
    """
    files = _files(site)
    state = _session(site, files, stage)
    if "agreed" not in state:
        raise RoundRefused(f"{site.name}: it has not agreed to a sum in this attempt.")
    if "revealed" not in state:
        survivors, context = state["survivors"], _context(state)
        signers = [
            member.site
            for member in _members(state)
            if member.site in survivors
            and has_signed_list(
                stage.signatures.get(member.site, b""), SURVIVORS, survivors, context, member
            )
        ]
        if len(signers) < (needed := threshold(len(site.roster))):
            raise RoundRefused(
                f"{site.name}: {len(signers)} sites have agreed to this sum; {needed} must."
            )
        # what is left can tell one secret of each site, and not the other one
        state = {
            **{name: state[name] for name in ("session", "round", "task", "survivors", "agreed")},
            "revealed": {
                name: shares[0] if name in survivors else shares[1]
                for name, shares in state["shares"].items()
            },
        }
        _write(files.session, state)
        files.vector.unlink(missing_ok=True)
    revealed = {name: bytes.fromhex(share) for name, share in state["revealed"].items()}
    return Revealed(stage.round, stage.session, revealed)


ANSWERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., RecordDict]]] = {
    # how a stage's question is read, answered, and its answer written
    SHARES: (unpack_adverts, answer_adverts, pack_sealed),
    MASKED: (unpack_sealed, answer_sealed, pack_masked),
    AGREE: (unpack_survivors, answer_survivors, pack_agreed),
    UNMASK: (unpack_agreement, answer_agreement, pack_revealed),
}


def answer_stage(site: Site, stage: str, content: RecordDict) -> RecordDict:
    """The answer to a message of a stage after the training.

    Raises:
        RoundRefused, BadRound
        BadMessage: it has not the agreed form.
    """
    unpack, answer, pack = ANSWERS[stage]
    return pack(answer(site, unpack(content)))


def _train(
    site: Site,
    task: TrainTask,
    task_hash: str,
    sites: int,
    files: _Files,
    train: Callable[[], SiteUpdate],
) -> dict[str, Any]:
    update = train()
    change = relative_change(update.weights, task.weights)
    if not change <= site.config.rounds.max_change:  # nobody else can see it under the masks
        raise RoundRefused(
            f"{site.name}: its change is {change:.3g} times as large as the model "
            f"(limit: {site.config.rounds.max_change:g})."
        )
    encoded = encode_vector(update.weights, task.weights, update.n_training, sites)
    if encoded.cut:
        LOG.warning(
            f"round {task.round}, {site.name}: {encoded.cut} of {len(encoded.vector) - 1} changes "
            "were beyond the range that is summed, and were cut off there"
        )
    about = {
        "task": task_hash,
        "round": task.round,
        "sites": sites,
        "loss": update.loss,
        "seconds": update.seconds,
        "statement": update.statement.text if update.statement else "",
    }
    metadata = {"fedbrats": json.dumps(about)}
    write_atomically(
        files.vector,
        lambda temporary: save_file({VECTOR: encoded.vector}, temporary, metadata=metadata),
        private=True,
    )
    return about


def _files(site: Site) -> _Files:
    if not site.config.secure_aggregation or site.key is None:
        raise RoundRefused(f"{site.name}: secure aggregation was not agreed on.")
    folder = site.folder / "secure" / (site.federation or "simulation")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return _Files(folder)


def _key(site: Site) -> ec.EllipticCurvePrivateKey:
    assert site.key is not None
    return load_private_key(site.key)


def _session(site: Site, files: _Files, stage: Stage) -> dict[str, Any]:
    state = _read(files.session)
    if (state.get("session"), state.get("round")) != (stage.session, stage.round):
        raise RoundRefused(f"{site.name}: it is not in this attempt at round {stage.round}.")
    return state


def _about(state: Mapping[str, Any]) -> About:
    return About(**{name: state[name] for name in About.__dataclass_fields__})


def _secrets(state: Mapping[str, Any]) -> RoundSecrets:
    return RoundSecrets(**{name: bytes.fromhex(v) for name, v in state["secrets"].items()})


def _adverts(state: Mapping[str, Any]) -> list[Advert]:
    return [Advert(text, bytes.fromhex(signature)) for text, signature in state["adverts"]]


def _members(state: Mapping[str, Any]) -> list[Member]:
    """They were checked when they came; the roster may have changed since."""
    return members_of(_adverts(state), _about(state), None, 1)


def _context(state: Mapping[str, Any]) -> bytes:
    return context_of(_adverts(state))


def _same(site: Site, asked: object, before: object, what: str) -> None:
    if asked != before:
        raise RoundRefused(f"{site.name}: it was asked before with other {what} in this attempt.")


def _about_vector(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="np") as file:
            return dict(json.loads((file.metadata() or {})["fedbrats"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return {}  # none, or half of one: then it was never sent


def _load_vector(path: Path) -> np.ndarray:
    try:
        with safe_open(path, framework="np") as file:
            return np.array(file.get_tensor(VECTOR))
    except (OSError, SafetensorError) as error:
        raise RoundRefused("the site's update of this round is missing or damaged.") from error


def _read(path: Path) -> dict[str, Any]:
    """What an earlier step kept. A damaged file is an error, not nothing: it may be the one that says
    what must not be answered again."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        LOG.warning(f"{path} cannot be read ({error}); restore it from a backup.")
        raise RoundRefused(
            "the site's record of secure aggregation is damaged; its log says more."
        ) from error


def _write(path: Path, value: Mapping[str, Any]) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(json.dumps(value), encoding="utf-8")

    write_atomically(path, write, private=True)
