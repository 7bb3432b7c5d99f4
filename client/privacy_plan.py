"""Before joining: how much noise a privacy budget asks for here, and whether anything can be learned.

The noise is calibrated as `client.budget` would for patients of whom nothing has been spent. It is
set against the most that the patients' clipped gradients could add up to, which real ones never do:
a ratio that is bad here is worse in training. The verdicts are rules of thumb, not measurements of
this site's data. Read are names of files and the privacy ledger; nothing is sent. How it looks is
`client.plan_display`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from client.accounting import NotAffordable, Steps, accountant_name, epsilon, noise_multiplier
from client.budget import default_delta, most_spent
from client.consent import accepted_terms, proposed_terms
from client.hospital import HospitalFolder
from client.ledger import open_ledger
from client.privacy import NotProtectable, require_protectable
from client.privacy_report import everybody
from client.site_config import PrivacyBudget, load_site_config
from common.config import FederationConfig
from common.config_file import load_config
from common.invitation import read_invitation
from common.model import network_for
from common.progress import track
from sites.holdout import divide
from sites.institutions import grades_of
from sites.patients import patients_of
from sites.subject import discover

EPSILONS = 20.0, 8.0, 3.0
FROM_SCRATCH, PRE_TRAINED = 1.5, 3.0
"""Largest noise over signal of a whole run with which training from scratch, and training on from a
pre-trained model, did better than nothing. From runs on small synthetic tumours: from scratch 1.2
learned, 2.3 and 3.1 did not; from a pre-trained model 2.3 still gained. Nobody's clinical data."""
LEARNS, CONTINUES, DROWNS = "yes", "only from a pre-trained model", "no: the noise drowns it"
POINTS = 6  # rounds at which the course of epsilon is told, and the last
ROUGH = 0.01  # error of epsilon between the first round and the last, ten times as quick
BATCH = 4.0  # patients, of the recipe with small batches


class NothingToPlan(ValueError):
    """It is not known how many patients there are; the text says what to do."""


@dataclass(frozen=True)
class Recipe:
    """How a site would train: `steps` noisy steps in each of `rounds` rounds, `batch` patients a step
    on average (None: all of them), with a network of `parameters` trained values."""

    name: str
    rounds: int
    steps: int
    batch: float | None
    parameters: int

    def rate(self, patients: int) -> float:
        return 1.0 if self.batch is None else min(1.0, self.batch / patients)


@dataclass(frozen=True)
class Cohort:
    """Patients that would train here; `held_out` is None where nothing says who is held out."""

    training: int
    held_out: int | None
    source: str


def cohort_of(hospital: HospitalFolder, config: FederationConfig | None) -> Cohort:
    """Count the patients in the hospital's data folder by the names of its files.

    Without a federation's configuration nobody is held out.

    Raises:
        NothingToPlan: no subject is there.
        PatientsError, SplitError: a csv file in the folder cannot be followed.
        ConfigError: site.yaml cannot be read.
    """
    data = load_site_config(hospital.config).data
    subjects = discover(data).subjects
    if not subjects:
        raise NothingToPlan(
            f"{data}: no subject was found. Correct `data` in site.yaml, or give --patients."
        )
    patients = patients_of(subjects, data)
    if config is None:
        return Cohort(len(set(patients.values())), None, str(data))
    training, held_out = divide(
        [subject.id for subject in subjects],
        grades_of(subjects, data),
        patients,
        seed=config.seed,
        fraction=config.held_out_fraction,
    )
    n_training = len({patients[subject] for subject in training})
    n_held_out = len({patients[subject] for subject in held_out})
    if not n_training:
        raise NothingToPlan(f"{data}: all {n_held_out} patients are held out, so nobody trains.")
    return Cohort(n_training, n_held_out, str(data))


def config_of(hospital: HospitalFolder) -> FederationConfig | None:
    """Of the federation that this folder belongs to or is invited to.

    Raises:
        BadTerms, NotAccepted, BadInvitation: what is there cannot be read.
    """
    terms = proposed_terms(hospital) or accepted_terms(hospital)
    if terms is None and hospital.invitation.exists():
        terms = read_invitation(hospital.invitation).terms
    return terms.config if terms else None


def budget_of(hospital: HospitalFolder) -> PrivacyBudget | None:
    """Raises ConfigError: site.yaml cannot be read."""
    return load_site_config(hospital.config).privacy


def spent_before(hospital: HospitalFolder, delta: float) -> float:
    """Epsilon of the most affected patient in this hospital's ledger; 0 without a ledger.

    Raises:
        LedgerError: it is damaged or was tampered with.
        ConfigError: site.yaml cannot be read.
    """
    path = load_site_config(hospital.config).privacy_ledger
    if not path.exists():
        return 0.0
    with open_ledger(path, None, write=False) as ledger:
        pass
    return most_spent(ledger, everybody(ledger), delta)


def parameters_of(config: FederationConfig) -> int:
    """How many values of the federation's network are trained."""
    return sum(p.numel() for p in network_for(config).parameters() if p.requires_grad)


def plan_document(
    cohort: Cohort,
    config: FederationConfig,
    recipe: Recipe,
    epsilons: Sequence[float],
    delta: float | None,
    compared_at: float,
    spent: float = 0.0,
) -> dict[str, Any]:
    """The plan as plain JSON types: the recipe at each epsilon, and others at `compared_at`.

    `spent` is told beside it: the plan is for patients of whom nothing has been spent.
    """
    n = cohort.training
    delta = default_delta(n) if delta is None else delta
    others = _recipes(n, recipe)
    work = [*((recipe, e) for e in epsilons), *((other, compared_at) for other in others)]
    found = [
        _forecast(one, n, e, delta)
        for one, e in track(work, "calibrating the noise", len(work), "plans")
    ]
    plans, compared = found[: len(epsilons)], found[len(epsilons) :]
    courses = [
        _course(recipe, n, plan["noise_multiplier"], plan["epsilon"], delta)
        for plan in track(plans, "epsilon of each round", len(plans), "plans")
    ]
    obstacle = _obstacle(config)
    return {
        "patients": n,
        "held_out": cohort.held_out,
        "counted_in": cohort.source,
        "delta": delta,
        "accountant": accountant_name(),
        "recipe": {**vars(recipe), "sampling_rate": recipe.rate(n), "clip": config.privacy.clip},
        "network": {
            "name": config.network.name,
            "norm": config.network.norm,
            "channels": list(config.network.channels),
        },
        "not_protectable": obstacle,
        "plans": [{**plan, "course": course} for plan, course in zip(plans, courses, strict=True)],
        "compared_at": compared_at,
        "compared": compared,
        "spent": spent,
        "advice": [
            *_beforehand(n, recipe, spent),
            *_advice(n, delta, obstacle, plans, compared),
        ],
    }


def _recipes(patients: int, recipe: Recipe) -> list[Recipe]:
    """What the plan is compared with."""
    whole = [
        Recipe(f"all patients in every step, {rounds} rounds", rounds, 1, None, recipe.parameters)
        for rounds in (10, 20, 50)
    ]
    steps = max(1, math.ceil(patients / BATCH))
    batches = Recipe(
        f"batches of {BATCH:g}, 10 rounds of {steps} steps", 10, steps, BATCH, recipe.parameters
    )
    preset = load_config(preset="private")
    private = Recipe(
        "preset private",
        preset.rounds.number,
        preset.privacy.steps,
        preset.privacy.expected_batch,
        parameters_of(preset),
    )
    recipes = [*whole, batches]
    for index, one in enumerate(recipes):
        if one == replace(private, name=one.name):
            recipes[index] = replace(one, name=f"{one.name} (preset private)")
            return recipes
    return [*recipes, private]


def _forecast(recipe: Recipe, patients: int, budget: float, delta: float) -> dict[str, Any]:
    """The noise of a recipe, against the largest sum of clipped gradients: C q N a step.

    Over a run of T steps the noise grows with sqrt(T) and that sum with T.
    """
    rate, total = recipe.rate(patients), recipe.steps * recipe.rounds
    told: dict[str, Any] = {
        "recipe": recipe.name,
        "epsilon": budget,
        "rounds": recipe.rounds,
        "steps": recipe.steps,
        "sampling_rate": rate,
        "parameters": recipe.parameters,
        "noise_multiplier": None,
        "noise_per_coordinate": None,
        "noise_to_signal": None,
        "noise_to_signal_of_run": None,
        "sites_needed": None,
        "verdict": DROWNS,
        "why_not": "",
    }
    try:
        sigma = noise_multiplier(budget, delta, sampling_rate=rate, steps=total)
    except NotAffordable as error:
        return {**told, "why_not": str(error)}
    per_step = sigma * math.sqrt(recipe.parameters) / (rate * patients)
    of_run = per_step / math.sqrt(total)
    return {
        **told,
        "noise_multiplier": sigma,
        "noise_per_coordinate": sigma / (rate * patients),
        "noise_to_signal": per_step,
        "noise_to_signal_of_run": of_run,
        # an average over k sites alike has the noise of one divided by sqrt(k)
        "sites_needed": math.ceil((of_run / FROM_SCRATCH) ** 2),
        "verdict": verdict(of_run),
    }


def verdict(of_run: float) -> str:
    """What can be hoped for at one site alone with this much noise over signal in a whole run."""
    if of_run <= FROM_SCRATCH:
        return LEARNS
    return CONTINUES if of_run <= PRE_TRAINED else DROWNS


def _course(
    recipe: Recipe, patients: int, sigma: float | None, budget: float, delta: float
) -> list[tuple[int, float]]:
    """(round, epsilon after it); never above what the whole plan costs."""
    if sigma is None:
        return []
    last = recipe.rounds
    rounds = sorted({1, last, *(round(last * part / POINTS) for part in range(1, POINTS))} - {0})
    step = Steps(sigma, recipe.rate(patients), recipe.steps)
    course = [
        (r, min(budget, epsilon([replace(step, steps=recipe.steps * r)], delta, ROUGH)))
        for r in rounds[:-1]
    ]
    return [*course, (last, epsilon([replace(step, steps=recipe.steps * last)], delta))]


def _obstacle(config: FederationConfig) -> str:
    """Why this network or loss cannot be trained privately at all; empty if it can."""
    try:
        require_protectable(network_for(config), config)
    except NotProtectable as error:
        return str(error)
    return ""


def _beforehand(patients: int, recipe: Recipe, spent: float) -> list[str]:
    """What the numbers of the plan do not show."""
    said = []
    if spent > 0:
        said.append(
            f"Of the most affected patient in this site's ledger epsilon {spent:.3f} has been spent "
            "already: what is left of a budget is less by that, and its noise more than told here."
        )
    if recipe.batch is not None and recipe.batch > patients:
        said.append(
            f"{recipe.batch:g} patients a step are more than there are: every patient is in every step."
        )
    return said


def _advice(
    patients: int,
    delta: float,
    obstacle: str,
    plans: Sequence[Mapping[str, Any]],
    compared: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Plain words about the plans, the compared recipes, and what would help."""
    advice = []
    if obstacle:
        advice.append(f"Nothing of this can be used as it is: {obstacle}")
    for plan in plans:
        begin = f"With {patients} patients and epsilon {plan['epsilon']:g}"
        if plan["noise_multiplier"] is None:
            advice.append(f"{begin} the plan cannot be paid for: {plan['why_not']}")
            continue
        times = (
            f"the noise of a step is {_times(plan['noise_to_signal'])} the signal, of the whole run "
            f"{_times(plan['noise_to_signal_of_run'])} ({FROM_SCRATCH:g} lets it learn from scratch, "
            f"{PRE_TRAINED:g} from a pre-trained model)"
        )
        alone = {
            LEARNS: "something can be learned, even from scratch.",
            CONTINUES: "nothing can be learned from scratch here alone; a pre-trained model may gain.",
            DROWNS: "nothing can be learned from scratch here alone, and a pre-trained model would "
            "hardly gain.",
        }[plan["verdict"]]
        advice.append(f"{begin} {times}: {alone}{_together(plan)}")
    if any(plan["verdict"] != LEARNS for plan in plans):
        advice.append(
            "What helps, in this order: begin from a model pre-trained on public or synthetic data "
            "(the coordinator's server.init_from), more sites, all patients in every step, a smaller "
            "network (noise grows with the root of its parameters). Fewer rounds make the single step "
            "clearer, not the whole run."
        )
    usable = [c for c in compared if c["verdict"] != DROWNS]
    if usable:
        best = min(usable, key=lambda c: c["noise_to_signal_of_run"])
        advice.append(
            f"Least noise at epsilon {best['epsilon']:g}: {best['recipe']} with "
            f"{best['parameters']:,} parameters ({best['verdict']})."
        )
    if delta * patients > 0.5:
        advice.append(
            f"Delta {delta:.3g} is too large for {patients} patients: take less than 1/N."
        )
    return advice


def _together(plan: Mapping[str, Any]) -> str:
    if plan["verdict"] == LEARNS:
        return ""
    return f" About {plan['sites_needed']:,} such sites together could begin from scratch."


def _times(ratio: float) -> str:
    return f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.2g} times"
