"""A site's privacy budget: how much noise a round needs, and whether it may happen at all.

The budget belongs to the site and holds for every patient over all federations, with the spending
that `client.ledger` knows. A federation can ask for less (`privacy.epsilon`), never for more. The
noise is calibrated once for the rounds that are still planned and kept (a plan in the ledger), and
anew where a round had to be paid for twice, or the patients were spent on elsewhere meanwhile. A
round is paid for before its first gradient. What the noise does is `client.privacy`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from client.accounting import NotAffordable, Steps, accountant_name, epsilon, noise_multiplier
from client.ledger import (
    DONE,
    METRICS,
    PLAN,
    SPENDS,
    TRAINING,
    UNPROTECTED,
    Entry,
    Ledger,
    LedgerError,
    Patient,
    identity,
    open_ledger,
)
from client.site import Site
from common.code_hash import code_hash
from common.message_words import EXACT
from common.statement import Statement
from sites.cache import CachedSubject

LOG = logging.getLogger("fedbrats")
GROWTH = 1.5
"""Times the first plan's noise: a round that can only be paid for with more is not worth it, as after a
crash in the last round, when almost nothing is left."""


class BudgetSpent(RuntimeError):
    """The next round would exceed the budget; the text may be told to the server."""


@dataclass(frozen=True)
class Permit:
    """One paid round: its noise, and the ledger's state with it. `patients` is their number."""

    entry: Entry
    patients: int
    ledger: str  # the ledger's id

    @property
    def noise(self) -> Steps:
        return _steps(self.entry)


@dataclass(frozen=True)
class _Recipe:
    """What a plan is calibrated for; another recipe is another plan."""

    kind: str
    rounds: int
    sampling_rate: float
    steps: int
    clip: float
    epsilon: float
    cap: float | None
    delta: float

    def text(self) -> str:
        return json.dumps(vars(self), sort_keys=True)


def patients_of(site: Site, subjects: Sequence[CachedSubject]) -> dict[str, list[CachedSubject]]:
    """Patient id -> all scans of that person among `subjects`; sorted.

    Two ids that share a scan are one person, under the first of them.
    """
    named: dict[str, list[CachedSubject]] = {}
    for subject in sorted(subjects, key=lambda s: s.id):
        named.setdefault(site.patients[subject.id], []).append(subject)
    found: list[tuple[str, list[CachedSubject], set[str]]] = []
    for name, scans in sorted(named.items()):
        marks = {mark for scan in scans for mark in scan.fingerprints}
        same = [one for one in found if not marks.isdisjoint(one[2])]
        found = [one for one in found if one not in same]
        first = same[0][0] if same else name
        together = [scan for one in same for scan in one[1]] + scans
        found.append((first, together, marks.union(*(one[2] for one in same))))
    return {name: scans for name, scans, _ in sorted(found, key=lambda one: one[0])}


def delta_of(site: Site) -> float:
    """The site's choice, or 1/(10 N) for its N training patients (held-out ones if none trains)."""
    assert site.budget is not None
    if site.budget.delta is not None:
        return site.budget.delta
    return default_delta(len(patients_of(site, site.training or site.held_out)))


def default_delta(patients: int) -> float:
    return 1 / (10 * patients)


def pay_for_training(site: Site, round_: int) -> Permit:
    """Write the round's spending into the ledger; only then may a gradient be computed.

    Raises:
        BudgetSpent: the round would exceed the budget. Nothing is written.
        LedgerError: the ledger is missing, was tampered with, or cannot be written.
    """
    return _pay(site, TRAINING, round_, site.training, site.config.rounds.number - round_ + 1)


def pay_for_metrics(site: Site, round_: int) -> Permit:
    """The same for a release of noised metrics, one a round and one at the end."""
    return _pay(site, METRICS, round_, site.held_out, site.config.rounds.number - round_ + 2)


def may_train(site: Site) -> str:
    """Why the site cannot pay for another round; empty if it can.

    Raises:
        LedgerError
    """
    members = _identities(site, site.training)
    with _open(site, write=False) as ledger:
        recipe = _recipe(ledger, site, TRAINING, members)
        plan = _plan(ledger, site, recipe, members)
        sigma = plan.noise_multiplier if plan else None
        if sigma is None:
            try:
                sigma = _calibrated(ledger, site, recipe, members, 1)
            except NotAffordable as error:
                return _spent(str(error))
        reason = _excess(ledger, site, recipe, members, sigma)[1]
        if reason and plan and not _excess(ledger, site, recipe, members, GROWTH * sigma)[1]:
            return ""  # the plan can be made anew
        return reason


def record_done(site: Site, permit: Permit) -> None:
    """Note that a paid round was carried through. Changes no spending."""
    with _open(site) as ledger:
        entry = replace(permit.entry, kind=DONE, of=permit.entry.number)
        ledger.append(entry, ledger.groups[entry.patients])


def record_unprotected(site: Site, round_: int) -> None:
    """Note a round without differential privacy, where the site keeps a ledger or has kept one.

    Raises:
        LedgerError: it is missing now, was tampered with, or cannot be written.
    """
    if site.ledger is None or not (site.ledger.exists() or site.anchor.exists()):
        return
    with _open(site) as ledger:
        entry = _entry(site, UNPROTECTED, round_)
        ledger.append(entry, _identities(site, site.training))


def statement(site: Site, round_: int, permit: Permit | None = None) -> Statement:
    """What the site tells the server about the privacy of this round."""
    about = Statement(
        federation=site.federation,
        site=site.name,
        round=round_,
        code=code_hash(),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        private=site.budget is not None,
        metrics=site.budget.metrics if site.budget else EXACT,
    )
    if permit is None:
        return replace(about, **_ledger_seen(site))
    e = permit.entry
    return replace(
        about,
        epsilon=e.epsilon,
        delta=e.delta,
        budget=e.budget,
        noise_multiplier=e.noise_multiplier,
        sampling_rate=e.sampling_rate,
        clip=e.clip,
        steps=e.steps,
        patients=permit.patients,
        accountant=accountant_name(),
        ledger=permit.ledger,
        entries=e.number,
        head=e.hash,
    )


def _ledger_seen(site: Site) -> dict[str, Any]:
    """Which ledger, how long, and its last entry; nothing where none can be read."""
    if site.ledger is None or not site.ledger.exists():
        return {}
    try:
        with _open(site, write=False) as ledger:
            return {"ledger": ledger.id, "entries": len(ledger.entries), "head": ledger.head}
    except LedgerError as error:  # without it nothing is trained; evaluating goes on
        LOG.warning(str(error))
        return {}


def most_spent(
    ledger: Ledger,
    members: Sequence[Patient],
    delta: float,
    further: Steps | None = None,
    federation: str | None = None,
) -> float:
    """Epsilon of the most affected of these patients, over all federations or within one."""
    spent = [0.0]
    for history, records in _histories(ledger, members, federation):
        more = () if further is None else (_felt(further, records),)
        spent.append(epsilon((*history, *more), delta))
    return max(spent)


def _pay(
    site: Site, kind: str, round_: int, subjects: Sequence[CachedSubject], planned: int
) -> Permit:
    members = _identities(site, subjects)
    with _open(site) as ledger:
        recipe = _recipe(ledger, site, kind, members)
        plan = _plan(ledger, site, recipe, members)
        if plan is None or (
            kind == TRAINING and not _suffices(ledger, plan, recipe, members, planned)
        ):
            plan = _new_plan(ledger, site, recipe, members, round_, planned, plan)
        sigma = _steps(plan).noise_multiplier
        after, reason = _excess(ledger, site, recipe, members, sigma)
        if reason:
            raise BudgetSpent(reason)
        about = _entry(site, kind, round_, recipe, sigma)
        entry = ledger.append(replace(about, epsilon=after), members)
    return Permit(entry, len(members), ledger.id)


def _recipe(ledger: Ledger, site: Site, kind: str, members: Sequence[Patient]) -> _Recipe:
    assert site.budget is not None
    p, rounds = site.config.privacy, site.config.rounds.number
    budget, cap, delta = site.budget.epsilon, p.epsilon, _delta(ledger, site, members)
    if kind == METRICS:
        return _Recipe(kind, rounds, 1.0, 1, 1.0, budget, cap, delta)
    rate = 1.0 if p.expected_batch is None else min(1.0, p.expected_batch / len(members))
    return _Recipe(kind, rounds, rate, p.steps, clip_of(site), budget, cap, delta)


def _delta(ledger: Ledger, site: Site, members: Sequence[Patient]) -> float:
    """The site's choice, or the default, which later never grows for who was there before: epsilon
    and delta of all federations together are one promise."""
    assert site.budget is not None
    if site.budget.delta is not None:
        return site.budget.delta
    before = [entry.delta for entry in _spends_on(ledger, members)]
    return min(delta_of(site), *(delta for delta in before if delta is not None), 1.0)


def _spends_on(ledger: Ledger, members: Sequence[Patient]) -> list[Entry]:
    """Whatever was spent on any of these patients."""
    groups = {group for member in members for group, n in ledger.records_of(member).items() if n}
    return [e for e in ledger.entries if e.kind in SPENDS and e.patients in groups]


def clip_of(site: Site) -> float:
    """The largest norm of one patient's gradient: the site's choice, or the federation's."""
    assert site.budget is not None
    return site.budget.clip or site.config.privacy.clip


def _plan(ledger: Ledger, site: Site, recipe: _Recipe, members: Sequence[Patient]) -> Entry | None:
    """The newest plan of this federation, if it is for this recipe and these patients."""
    plans = [
        e
        for e in ledger.entries
        if e.kind == PLAN
        and (e.federation, e.site) == (site.federation, site.name)
        and json.loads(e.recipe)["kind"] == recipe.kind
    ]
    if not plans or plans[-1].recipe != recipe.text():
        return None
    return plans[-1] if set(ledger.groups[plans[-1].patients]) == set(members) else None


def _suffices(
    ledger: Ledger, plan: Entry, recipe: _Recipe, members: Sequence[Patient], planned: int
) -> bool:
    """Does the plan's noise still do for the rounds of training that are left? Not if one was paid for
    twice, or these patients were spent on elsewhere since."""
    total = recipe.rounds - plan.round + 1
    since = [e for e in _spends_on(ledger, members) if e.number > plan.number]
    its = (plan.federation, plan.site, recipe.kind)
    return all((e.federation, e.site, e.kind) == its for e in since) and (
        len(since) + planned <= total
    )


def _new_plan(
    ledger: Ledger,
    site: Site,
    recipe: _Recipe,
    members: Sequence[Patient],
    round_: int,
    planned: int,
    before: Entry | None,
) -> Entry:
    """Calibrate for `planned` rounds and remember it; `before` stays where that would need far more
    noise than agreed on in the first place.

    Raises:
        BudgetSpent: no noise does, and there is no plan before.
    """
    LOG.info(f"{site.name}: calibrating the noise for {planned} rounds")
    try:
        sigma = _calibrated(ledger, site, recipe, members, planned)
    except NotAffordable as error:
        if before is not None:
            return before
        raise BudgetSpent(_spent(str(error))) from error
    if before is not None:
        its = (PLAN, before.federation, before.site, before.recipe, before.patients)
        first = next(
            e for e in ledger.entries if (e.kind, e.federation, e.site, e.recipe, e.patients) == its
        )
        if sigma > GROWTH * _steps(first).noise_multiplier:
            return before
    now = most_spent(ledger, members, recipe.delta)
    if now > 0:
        LOG.warning(
            f"{site.name}: epsilon {now:.3f} of {recipe.epsilon:g} has been spent on its patients, so "
            f"the next {planned} rounds get noise of {sigma:.3g} clipping norms each"
        )
    about = _entry(site, PLAN, round_, recipe, sigma)
    return ledger.append(replace(about, recipe=recipe.text()), members)


def _calibrated(
    ledger: Ledger, site: Site, recipe: _Recipe, members: Sequence[Patient], rounds: int
) -> float:
    """Noise with which `rounds` more rounds keep every patient within both limits."""
    limits: list[tuple[float, str | None]] = [(recipe.epsilon, None)]
    if recipe.cap is not None:
        limits.append((recipe.cap, site.federation))
    found = []
    for limit, within in limits:
        for history, records in _histories(ledger, members, within):
            step = _felt(Steps(1.0, recipe.sampling_rate, recipe.steps * rounds), records)
            sigma = noise_multiplier(
                limit,
                recipe.delta,
                sampling_rate=step.sampling_rate,
                steps=step.steps,
                before=history,
            )
            found.append(records * sigma)
    return max(found)


def _excess(
    ledger: Ledger, site: Site, recipe: _Recipe, members: Sequence[Patient], sigma: float
) -> tuple[float, str]:
    """Epsilon with one more round, and why that is too much; empty if it is not."""
    step = Steps(sigma, recipe.sampling_rate, recipe.steps)
    after = most_spent(ledger, members, recipe.delta, step)
    if after > recipe.epsilon:
        now = most_spent(ledger, members, recipe.delta)
        return after, _spent(
            f"epsilon {now:.3f} of {recipe.epsilon:g} at delta {recipe.delta:.2g}, and the next "
            f"round would bring it to {after:.3f}.",
        )
    if recipe.cap is not None:
        here = most_spent(ledger, members, recipe.delta, step, site.federation)
        if here > recipe.cap:
            return after, _spent(
                f"the next round would bring this federation's epsilon to {here:.3f}, agreed are "
                f"{recipe.cap:g}.",
            )
    return after, ""


def _spent(why: str) -> str:
    return f"its privacy budget is spent: {why} It goes on evaluating."


def _histories(
    ledger: Ledger, members: Sequence[Patient], federation: str | None
) -> list[tuple[tuple[Steps, ...], int]]:
    """What was done to each of these patients, and how many of them the person is; the same of
    several only once."""
    found = set()
    for member in members:
        person, counts = ledger.person(member), ledger.records_of(member)
        history = tuple(
            _felt(_steps(e), counts[e.patients])
            for e in ledger.entries
            if e.kind in SPENDS and federation in (None, e.federation) and counts[e.patients]
        )
        found.add((history, sum(not person.isdisjoint(other) for other in members)))
    return list(found)


def _felt(step: Steps, records: int) -> Steps:
    """What a step is to a person who is so many of its patients: the gradients may add up, and the
    chance that any is drawn is larger. (A smaller shift is dominated by the largest.)"""
    if records == 1:
        return step
    rate = 1 - (1 - step.sampling_rate) ** records
    return Steps(step.noise_multiplier / records, rate, step.steps)


def _steps(entry: Entry) -> Steps:
    assert entry.noise_multiplier is not None
    assert entry.sampling_rate is not None
    assert entry.steps is not None
    return Steps(entry.noise_multiplier, entry.sampling_rate, entry.steps)


def _identities(site: Site, subjects: Sequence[CachedSubject]) -> list[Patient]:
    return [
        identity(
            {site.patients[scan.id] for scan in scans},
            (mark for scan in scans for mark in scan.fingerprints),
        )
        for scans in patients_of(site, subjects).values()
    ]


def _entry(
    site: Site, kind: str, round_: int, recipe: _Recipe | None = None, sigma: float | None = None
) -> Entry:
    about = Entry(0, "", kind, site.federation, site.name, round_, "")
    if recipe is None:
        return about
    return replace(
        about,
        noise_multiplier=sigma,
        sampling_rate=recipe.sampling_rate,
        steps=recipe.steps,
        clip=recipe.clip,
        delta=recipe.delta,
        budget=recipe.epsilon,
    )


def _open(site: Site, *, write: bool = True) -> AbstractContextManager[Ledger]:
    assert site.ledger is not None
    return open_ledger(site.ledger, site.anchor, write=write)
