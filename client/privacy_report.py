"""What a hospital's patients have lost of their privacy: one document for its data-protection officer.

Gathered from the ledger (verified first), site.yaml, the accepted terms, the list of prepared
subjects and the record of what left. It tells what the installed code has written down; it cannot
tell whether that code does what it says. Nothing is sent. How it looks is `client.privacy_page`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from client.accounting import accountant_name
from client.budget import default_delta, most_spent
from client.consent import NotAccepted, accepted_terms
from client.guarantee import in_words, of_aggregation, percent, right_at_most
from client.hospital import HospitalFolder
from client.ledger import (
    DONE,
    METRICS,
    SPENDS,
    TRAINING,
    UNPROTECTED,
    Entry,
    Ledger,
    Patient,
    anchor_in,
    open_ledger,
)
from client.not_covered import not_covered
from client.outbound import CARD, ERROR, UPDATE, departures
from client.outbound import METRICS as METRICS_SENT
from client.site_config import PrivacyBudget, load_site_config
from client.system_noise import SOURCE
from common.audit_log import LogError, verified
from common.code_hash import code_hash
from common.console import many
from common.files import lock_holder
from common.invitation import BadInvitation, read_invitation
from common.keys import BadKey, read_public_key
from common.message_words import EXACT, NOISED, WITHHELD
from common.progress import track
from common.statement import BadStatement, Statement, read_statement
from common.terms import BadTerms, Terms

UNIT = "one patient: all scans, crops and volumes of a person together"
NEIGHBOURS = (
    "add or remove one patient's data; how many patients and scans there are counts as known"
)
PROTECTED_FROM = (
    "the coordinator's server, which sees every update of this site by itself",
    "the other sites",
    "the public, and whoever gets the model, whatever they do with it later",
    (
        "all of them together: the noise is added here, before anything leaves, so nobody outside "
        "needs to be trusted"
    ),
)
NOT_PROTECTED_FROM = ("this hospital itself, which has the scans",)
DONE_STATE, RUNNING_STATE, BROKEN_STATE = "carried through", "in progress", "interrupted"
DELTAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # at which the accountant is asked, too


@dataclass(frozen=True)
class _Sources:
    """Everything the document is made from; `ledger` is None where none is kept nor needed."""

    site: str
    federation: str
    coordinator: str
    budget: PrivacyBudget | None
    terms: Terms | None
    prepared: dict[str, Any]  # `client.site`'s list of subjects, or nothing
    ledger: Ledger | None
    anchored: bool
    running: bool
    sent: list[dict[str, Any]]
    warnings: tuple[str, ...]


def privacy_document(hospital: HospitalFolder) -> dict[str, Any]:
    """The report as plain JSON types; what does not exist is null.

    Raises:
        LedgerError: the ledger is missing, damaged or was tampered with.
        OutboundError: the record of what left cannot be read.
        ConfigError: site.yaml cannot be read.
    """
    s = _gathered(hospital)
    entries = s.ledger.entries if s.ledger else []
    spends = [entry for entry in entries if entry.kind in SPENDS]
    released, mismatched = _released(s)
    unprotected = _unprotected(s.ledger)
    delta = _delta(s, spends)
    spent = _spent(s, delta, spends)
    federations = _federations(s, delta)
    warnings = [*s.warnings, *mismatched, *_warnings(s, spent, spends, released)]
    return {
        "site": s.site,
        "at": _now(),
        "federation": {"id": s.federation, "name": s.terms.config.name if s.terms else None},
        "coordinator": s.coordinator or None,
        "private": s.budget is not None,
        "headline": _headline(s, spent, unprotected, released),
        "warnings": warnings,
        "unit": UNIT,
        "neighbours": NEIGHBOURS,
        "protected_from": list(PROTECTED_FROM) if s.budget or spends else [],
        "not_protected_from": list(NOT_PROTECTED_FROM),
        "budget": s.budget.model_dump() if s.budget else None,
        "agreed_epsilon": s.terms.config.privacy.epsilon if s.terms else None,
        "spent": spent,
        "meaning": _meaning(s, spent),
        "aggregation": of_aggregation(s.terms, private=s.budget is not None),
        "federations": federations,
        "entries": [_line(entry, s) for entry in spends],
        "unprotected": unprotected,
        "mechanism": _mechanism(s, spends),
        "ledger": _about_ledger(s),
        "released": released,
        "not_covered": not_covered(
            s.coordinator, s.budget.metrics if s.budget else EXACT, released, unprotected
        ),
        "versions": {name: version(name) for name in ("fedbrats", "opacus", "torch")},
        "code": code_hash(),
    }


# ----------------------------------------------------------------------------------- the sources


def _gathered(hospital: HospitalFolder) -> _Sources:
    settings = load_site_config(hospital.config)
    budget = settings.privacy
    warnings: list[str] = []
    terms = None
    try:
        terms = accepted_terms(hospital)
    except (BadTerms, NotAccepted) as error:  # the ledger tells its part all the same
        warnings.append(f"The accepted terms cannot be read: {error}")
    address = ""
    if hospital.invitation.exists():
        try:
            address = read_invitation(hospital.invitation).address
        except BadInvitation as error:
            warnings.append(f"The invitation cannot be read: {error}")
    try:
        verified(hospital.audit)
    except (LogError, BadKey) as error:
        warnings.append(f"What left is counted from an audit log that is not whole: {error}")
    prepared = _prepared(hospital)
    # an anchor is not made here: only what pays for a round vouches for a ledger
    anchor = anchor_in(hospital.state)
    known = anchor if anchor.exists() else None
    ledger = None
    if budget is not None or known is not None or settings.privacy_ledger.exists():
        # what was read stays; a round that begins meanwhile must not wait for the sums below
        with open_ledger(settings.privacy_ledger, known, write=False) as ledger:
            pass
    return _Sources(
        site=prepared.get("site") or read_public_key(hospital.public_key).comment,
        federation=terms.federation if terms else str(prepared.get("federation", "")),
        coordinator=address,
        budget=budget,
        terms=terms,
        prepared=prepared,
        ledger=ledger,
        anchored=known is not None,
        running=lock_holder(hospital.lock) is not None,
        sent=departures(hospital.audit),
        warnings=tuple(warnings),
    )


def _prepared(hospital: HospitalFolder) -> dict[str, Any]:
    """site.json without its subjects' cache entries, which may have been deleted since; nothing if
    it is not there or not one of this version."""
    try:
        found = dict(json.loads((hospital.state / "site.json").read_text(encoding="utf-8")))
        for side in ("training", "held_out"):
            _ = [found["patients"][subject] for subject in found[side]]
        _ = found["site"], len(found["left_out"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return found


def _count(s: _Sources, side: str) -> int | None:
    """Patients who train, or who are held out; None before the data were prepared."""
    if not s.prepared:
        return None
    return len({s.prepared["patients"][subject] for subject in s.prepared[side]})


# ---------------------------------------------------------------------------------- what was spent


def _delta(s: _Sources, spends: Sequence[Entry]) -> float | None:
    """As `client.budget` chooses it; else the last at which anything was paid."""
    if s.budget is not None and s.budget.delta is not None:
        return s.budget.delta
    patients = _count(s, "training") or _count(s, "held_out")
    if s.budget is not None and patients:
        told = [entry.delta for entry in spends if entry.delta is not None]
        return min(default_delta(patients), *told, 1.0)
    return spends[-1].delta if spends else None


def everybody(ledger: Ledger | None, federation: str | None = None) -> list[Patient]:
    """All whom a spend touched, of one federation or of all."""
    if ledger is None:
        return []
    groups = {
        entry.patients
        for entry in ledger.entries
        if entry.kind in SPENDS and federation in (None, entry.federation)
    }
    return sorted({member for group in groups for member in ledger.groups[group]}, key=sorted)


def _spent(s: _Sources, delta: float | None, spends: Sequence[Entry]) -> dict[str, Any]:
    """Of the most affected patient in the whole ledger, whichever folder or federation it was for."""
    budget = s.budget.epsilon if s.budget else None
    if s.ledger is None or delta is None or not spends:
        return {"epsilon": 0.0, "delta": delta, "left": budget, "guess": 0.5}
    members = everybody(s.ledger)
    epsilon = most_spent(s.ledger, members, delta)
    bounds = [right_at_most(epsilon, delta)]
    for other in track(DELTAS, "what the spending means", len(DELTAS), "bounds"):
        bounds.append(right_at_most(max(0.0, most_spent(s.ledger, members, other)), other))
    left = None if budget is None else max(0.0, budget - epsilon)
    return {"epsilon": epsilon, "delta": delta, "left": left, "guess": min(bounds)}


def _federations(s: _Sources, delta: float | None) -> list[dict[str, Any]]:
    """What each federation in this ledger took by itself; together they took less than the sum."""
    if s.ledger is None:
        return []
    done = {entry.of for entry in s.ledger.entries if entry.kind == DONE}
    found = []
    for federation in dict.fromkeys(entry.federation for entry in s.ledger.entries):
        mine = [entry for entry in s.ledger.entries if entry.federation == federation]
        spends = [entry for entry in mine if entry.kind in SPENDS]
        epsilon = 0.0
        if delta is not None:
            members = everybody(s.ledger, federation)
            epsilon = most_spent(s.ledger, members, delta, federation=federation)
        found.append(
            {
                "id": federation,
                "this": federation == s.federation,
                "sites": sorted({entry.site for entry in mine}),
                "rounds": sum(entry.kind == TRAINING for entry in spends),
                "metrics": sum(entry.kind == METRICS for entry in spends),
                "interrupted": sum(entry.number not in done for entry in spends),
                "unprotected": sum(entry.kind == UNPROTECTED for entry in mine),
                "epsilon": epsilon,
            }
        )
    return found


def _line(entry: Entry, s: _Sources) -> dict[str, Any]:
    """One spend. Its epsilon is what was stated then, of all federations up to it."""
    assert s.ledger is not None
    state = BROKEN_STATE
    if any(other.kind == DONE and other.of == entry.number for other in s.ledger.entries):
        state = DONE_STATE
    elif s.running and entry.number == len(s.ledger.entries):
        state = RUNNING_STATE
    return {
        "number": entry.number,
        "at": entry.at,
        "kind": entry.kind,
        "federation": entry.federation,
        "this": entry.federation == s.federation,
        "site": entry.site,
        "round": entry.round,
        "state": state,
        "patients": len(s.ledger.groups[entry.patients]),
        "steps": entry.steps,
        "noise_multiplier": entry.noise_multiplier,
        "sampling_rate": entry.sampling_rate,
        "clip": entry.clip,
        "epsilon": entry.epsilon,
        "delta": entry.delta,
        "budget": entry.budget,
    }


def _unprotected(ledger: Ledger | None) -> list[dict[str, Any]]:
    """Rounds without differential privacy, and whether any patient of theirs also has private ones."""
    if ledger is None:
        return []
    touched = {
        group: any(
            entry.kind in SPENDS
            for member in ledger.groups[group]
            for entry in ledger.entries_about(member)
        )
        for group in {entry.patients for entry in ledger.entries if entry.kind == UNPROTECTED}
    }
    return [
        {
            "number": entry.number,
            "at": entry.at,
            "federation": entry.federation,
            "site": entry.site,
            "round": entry.round,
            "patients": len(ledger.groups[entry.patients]),
            "same_patients": touched[entry.patients],
        }
        for entry in ledger.entries
        if entry.kind == UNPROTECTED
    ]


# ----------------------------------------------------------------------------------- what has left


def _released(s: _Sources) -> tuple[dict[str, Any], list[str]]:
    """What `client.outbound` recorded, counted; and where it contradicts the ledger."""
    metrics: Counter[str] = Counter()
    private = without = losses = 0
    wrong: list[int] = []
    numbers: dict[str, Any] = {}
    behind: list[int] = []
    for left in s.sent:
        about = left["details"].get("about", {})
        if left["kind"] == METRICS_SENT:
            metrics[about.get("released", EXACT)] += 1
            behind.append(int(left["details"].get("defined", {}).get("n", 0)))
        elif left["kind"] == CARD:
            numbers = left["details"]["card"]
        elif left["kind"] == UPDATE:
            stated = _statement(left)
            losses += "loss" in about
            private += bool(stated and stated.private)
            without += not (stated and stated.private)
            if stated is not None and stated.private and not _in_ledger(stated, s.ledger):
                wrong.append(int(left["round"] or 0))
    document = {
        "updates": {"private": private, "without_privacy": without, "with_loss": losses},
        "metrics": {way: metrics[way] for way in (WITHHELD, NOISED, EXACT)},
        "subjects_behind_metrics": sorted(set(behind)),
        "site_size": {
            key: numbers[key]
            for key in ("n_training", "n_held_out", "n_left_out")
            if key in numbers
        },
        "error_texts": sum(left["kind"] == ERROR for left in s.sent),
    }
    warnings = []
    if wrong:
        rounds = ", ".join(map(str, sorted(set(wrong))))
        warnings.append(
            f"Updates of round {rounds} left that name no entry of this ledger: it is not the one "
            "that they were paid from. What they cost is not in the numbers below."
        )
    return document, warnings


def _statement(left: Mapping[str, Any]) -> Statement | None:
    try:
        return read_statement(str(left["details"].get("privacy", {}).get("statement", "")))
    except BadStatement:  # none, or of another version
        return None


def _in_ledger(stated: Statement, ledger: Ledger | None) -> bool:
    if ledger is None or stated.ledger != ledger.id:
        return False
    entries = ledger.entries
    return 0 < stated.entries <= len(entries) and entries[stated.entries - 1].hash == stated.head


def _warnings(
    s: _Sources,
    spent: Mapping[str, Any],
    spends: Sequence[Entry],
    released: Mapping[str, Any],
) -> list[str]:
    warnings = []
    if s.budget is not None and spent["epsilon"] > s.budget.epsilon:
        warnings.append(
            f"Epsilon {spent['epsilon']:.3f} is more than the budget of {s.budget.epsilon:g} in "
            "site.yaml: the budget was lowered, or delta was, after it was spent. No further round "
            "is trained."
        )
    others = sorted({e.delta for e in spends if e.delta is not None and e.delta != spent["delta"]})
    if others:
        warnings.append(
            f"Rounds were paid for at delta {', '.join(f'{d:.3g}' for d in others)}; the total here "
            f"is at delta {spent['delta']:.3g}, so it may differ from the last round's."
        )
    if s.budget is None and spends:
        warnings.append(
            "site.yaml says `privacy: off`, and rounds with privacy were paid for before: the "
            "numbers below are of those only."
        )
    if s.budget is not None and released["updates"]["without_privacy"]:
        warnings.append(
            f"{many(released['updates']['without_privacy'], 'update')} left without differential "
            "privacy."
        )
    return warnings


# ------------------------------------------------------------------------------------- in words


def _headline(
    s: _Sources,
    spent: Mapping[str, Any],
    unprotected: Sequence[Mapping[str, Any]],
    released: Mapping[str, Any],
) -> str:
    if s.budget is None:
        return (
            "Differential privacy is OFF at this site (site.yaml): there is no guarantee about what "
            "updates and metrics reveal of its patients."
        )
    without = max(len(unprotected), released["updates"]["without_privacy"])
    but = (
        f" But {many(without, 'round')} trained WITHOUT differential privacy: for what they "
        "revealed there is no guarantee at all."
        if without
        else ""
    )
    if spent["epsilon"] == 0:
        return f"Nothing has been spent of the budget of epsilon {s.budget.epsilon:g}.{but}"
    return (
        f"Of every patient at most epsilon {spent['epsilon']:.3f} (delta {spent['delta']:.3g}) has "
        f"been spent, of a budget of {s.budget.epsilon:g}, over all federations together.{but}"
    )


def _meaning(s: _Sources, spent: Mapping[str, Any]) -> list[str]:
    """What the numbers mean, for people who do not work with them."""
    if spent["epsilon"] == 0:
        if s.budget is None:
            return ["Nothing limits what can be found out about a patient from what has left."]
        if spent["delta"] is None:
            return ["No round was paid for; delta follows from the number of patients."]
        return [
            "No round was paid for yet. Should all of the budget be spent:",
            *in_words(s.budget.epsilon, spent["delta"]),
        ]
    words = in_words(spent["epsilon"], spent["delta"])
    words.insert(
        1,
        "That is what this one pair of epsilon and delta promises. The noise that was added gives "
        f"more: by the accountant's bounds at other deltas too, right in at most "
        f"{percent(spent['guess'])} of cases.",
    )
    return words


def _mechanism(s: _Sources, spends: Sequence[Entry]) -> dict[str, Any]:
    """How this site trains now: by its last paid training round here, else as agreed."""
    last = next(
        (e for e in reversed(spends) if e.kind == TRAINING and e.federation == s.federation), None
    )
    patients, held_out = _count(s, "training"), _count(s, "held_out")
    rate = last.sampling_rate if last else None
    if rate is None and s.budget is not None and s.terms is not None and patients:
        batch = s.terms.config.privacy.expected_batch
        rate = 1.0 if batch is None else min(1.0, batch / patients)
    sampling = None
    if rate is not None:
        sampling = (
            "every patient in every step"
            if rate == 1
            else f"Poisson: each step draws every patient with probability {rate:.4g} by itself"
        )
    return {
        "training_patients": patients,
        "held_out_patients": held_out,
        "left_out_subjects": len(s.prepared["left_out"]) if s.prepared else None,
        "sampling_rate": rate,
        "sampling": sampling,
        "noise_multiplier": last.noise_multiplier if last else None,
        "clip": last.clip if last else None,
        "steps_per_round": last.steps if last else None,
        "accountant": accountant_name(),
        "randomness": SOURCE,
    }


def _about_ledger(s: _Sources) -> dict[str, Any] | None:
    if s.ledger is None:
        return None
    checked = "every entry's hash follows from the one before"
    if s.anchored:
        checked += ", and it goes on from where this folder last saw it"
    return {
        "path": str(s.ledger.path.resolve()),
        "id": s.ledger.id,
        "entries": len(s.ledger.entries),
        "head": s.ledger.head,
        "verified": checked,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
