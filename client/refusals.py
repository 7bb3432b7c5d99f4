"""Why a hospital refuses terms or a task: pure functions, each answering in words for both sides.

A refusal by the hospital's own policy names the rule, which is its key in site.yaml. The words hold
no path and nothing about a scan. What may leave with an answer is in `client.permitted`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from flwr.app import MessageType

from client.policy import ANY, Policy, may_train_at
from common.code_hash import code_hash
from common.console import many, plain
from common.invitation import Invitation
from common.secure_messages import STAGES
from common.terms import Terms

MOST_ANSWERS = 10  # of one kind for one round: retries after lost connections and restarts
TASKS = MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE, *STAGES


@dataclass(frozen=True)
class Refusal:
    """A rule of the policy, by its key in site.yaml, and how it is broken."""

    rule: str
    why: str

    def __str__(self) -> str:
        return f"policy rule `{self.rule}`: {self.why}"


class ByPolicy(str):
    """Words of a refusal for a rule of the policy: the federation goes on without the site meanwhile."""


def broken_by_terms(
    policy: Policy, terms: Terms, invitation: Invitation, *, private: bool, updates: bool = True
) -> list[Refusal]:
    """Every rule that these terms, or who proposes them, break; `private`: is a budget set here?

    `updates`: False once it is known that the site has too few subjects to send any.
    """
    updates = updates and policy.send_updates
    config = terms.config
    authority = (
        invitation.ca_fingerprint().replace(":", ""),
        invitation.ca_digits().replace(" ", ""),
    )
    refusals = [
        _unless(
            policy.federation in (None, terms.federation),
            "federation",
            terms.federation,
            policy.federation,
        ),
        _unless(
            policy.coordinator in (None, *authority),
            "coordinator",
            f"the CA {invitation.ca_digits()}",
            policy.coordinator,
        ),
        _unless(
            policy.networks == ANY or config.network.name in policy.networks,
            "networks",
            config.network.name,
            policy.networks,
        ),
        _unless(
            policy.recipes == ANY or config.preprocess.mode in policy.recipes,
            "recipes",
            config.preprocess.mode,
            policy.recipes,
        ),
        _at_most("max_rounds", config.rounds.number, policy.max_rounds),
        _at_most("max_epochs", config.training.epochs, policy.max_epochs),
    ]
    # who only evaluates sends no update that would have to be protected
    if updates and policy.require_privacy and not private:
        refusals.append(Refusal("require_privacy", "`privacy` is off in this site's site.yaml"))
    if updates and policy.require_secure_aggregation and not config.secure_aggregation:
        refusals.append(
            Refusal("require_secure_aggregation", "the federation's updates are not masked")
        )
    return [refusal for refusal in refusals if refusal is not None]


def broken_by_task(
    policy: Policy, kind: str, round_: int | None, n_training: int, now: datetime
) -> Refusal | None:
    """The rule that a task breaks now (local time), be it `train`, `evaluate` or the roll call.

    Outside of the hours the roll call is refused too, so that the coordinator waits for the site, or
    goes on without it, and does not fail with it. A site that is there evaluates at any time.
    """
    if round_ is not None and policy.max_rounds is not None and round_ > policy.max_rounds:
        return _at_most("max_rounds", round_, policy.max_rounds)
    if kind == MessageType.EVALUATE or kind in STAGES:  # seconds, of what was trained in time
        return None
    if kind == MessageType.TRAIN:
        if not policy.send_updates:
            return Refusal("send_updates", "this site only evaluates")
        if n_training < policy.min_subjects:
            return _too_few(policy)
    if trains(policy, n_training) and not may_train_at(policy, now):
        return _not_now(policy)
    return None


def broken_by_running(policy: Policy, kind: str, seconds: float, now: datetime) -> Refusal | None:
    """The rule for which a task has to end that has run for so long."""
    if policy.max_hours is not None and seconds > 3600 * policy.max_hours:
        return Refusal("max_hours", f"the task took longer than {policy.max_hours:g} hours")
    if kind == MessageType.TRAIN and not may_train_at(policy, now):
        return _not_now(policy)
    return None


def trains(policy: Policy, n_training: int) -> bool:
    """Does a site with so many training subjects, of as many patients, train at all?"""
    return policy.send_updates and n_training >= policy.min_subjects


def tells_metrics(policy: Policy, n_held_out: int, patients: int) -> bool:
    """Can any mean over all of so many held-out subjects, of so many patients, leave?"""
    return bool(policy.metrics) and min(n_held_out, patients) >= policy.min_subjects


def never_given(
    policy: Policy, n_training: int, n_held_out: int, held_out_patients: int
) -> list[str]:
    """What too few subjects keep a site from ever giving, whatever it is asked: for its own log, as
    nobody else can know why.

    Args:
        n_training: training subjects, of as many patients.
    """
    found = []
    least, fewest = min(n_held_out, held_out_patients), policy.min_subjects
    if policy.send_updates and n_training and not trains(policy, n_training):
        found.append(
            f"this site does not train: it has {many(n_training, 'training subject')}, and its "
            f"policy.min_subjects lets no update leave that was trained on fewer than {fewest}."
        )
    if policy.metrics and least and not tells_metrics(policy, n_held_out, held_out_patients):
        found.append(
            f"this site tells no metric: it holds out {many(least, 'subject')}, and its "
            f"policy.min_subjects lets no mean leave that is over fewer than {fewest}."
        )
    if found and not least:
        found.append("this site measures nothing either: no subject is held out.")
    return found


def in_a_line(refusals: list[Refusal]) -> str:
    return "; ".join(map(str, refusals))


# ---------------------------------------------------- whatever the policy says: task and terms agree


def foreign(site: str, invitation: Invitation, federation: str, code: str, kind: str) -> str:
    """Why a message's run is not one to work for; empty if it is."""
    if federation != invitation.federation:
        return f"{site}: the task is of another federation ({plain(federation)[:40]})."
    if code != code_hash():
        return (
            f"{site}: the task is for other code ({plain(code)[:12]}) than is installed here "
            f"({code_hash()[:12]}); nothing was run. Both sides need the same version."
        )
    return "" if kind in TASKS else f"{site}: there is no such task."


def other_terms(site: str, accepted: Terms, proposed: Terms, broken: list[Refusal]) -> str:
    """Why a roll call is not answered; empty if its terms are the accepted ones and break no rule.

    `broken`: the rules of the policy that the proposed terms break.
    """
    if broken:
        return ByPolicy(f"{site}: the terms are against {in_a_line(broken)}.")
    if proposed.hash() != accepted.hash():
        return f"{site}: has not accepted the changed terms yet (fed-client review)."
    return ""


def too_often(site: str, kind: str, round_: int | None, answered: Mapping[int, int]) -> str:
    """Why a task asks for more answers than a federation needs; empty if it does not.

    Many answers about one round tell more about the data than the one that was agreed to.
    `answered`: round -> how many answers of this kind were given since the yes.
    """
    if round_ is None:
        return f"{site}: the task names no round."
    if kind == MessageType.TRAIN and round_ < max(answered, default=0):
        return f"{site}: it has trained for later rounds than {round_} already."
    if answered.get(round_, 0) >= MOST_ANSWERS:
        return f"{site}: it has answered {MOST_ANSWERS} times for round {round_}."
    return ""


def _unless(good: bool, rule: str, found: str, allowed: object) -> Refusal | None:
    listed = ", ".join(allowed) if isinstance(allowed, tuple) else allowed
    return None if good else Refusal(rule, f"found {found}, allowed {listed}")


def _at_most(rule: str, found: int, limit: int | None) -> Refusal | None:
    good = limit is None or found <= limit
    return None if good else Refusal(rule, f"found {found}, allowed at most {limit}")


def _too_few(policy: Policy) -> Refusal:
    return Refusal("min_subjects", f"no update is trained on fewer than {policy.min_subjects}")


def _not_now(policy: Policy) -> Refusal:
    # without the time of day: the same words all night are told, and logged, once
    return Refusal("train_when", f"allowed {', '.join(policy.train_when)}, this site's time")
