"""Attacks the differential privacy of a site's training, to find it broken: `fed-sim audit-privacy`.

A one-run audit (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846). Prepared phantoms and canaries
are a site with a budget and a ledger; it gets train tasks and answers them as in any simulation.
A canary is a patient whose gradient (all that is replaced, at `client.privacy.patient_gradient`) is
one large coordinate of its own. A coin of the operating system decided beforehand whether it takes
part. From what the site releases the audit guesses the coins; more right guesses than the claimed
epsilon allows are a violation. A second site with the same patients, seed and tasks shows what of a
release is noise: how much, against the ledger's sigma, and whether a seed could repeat it.

What it cannot do: prove privacy. The bound is a lower bound on epsilon, and a few hundred guesses
cannot show more than about 4, whatever is broken; noise of half the size hides from it, not from
the direct measurement. Both look at the way from one patient's gradient to the weights that leave,
with SGD, not at metrics, at `client.accounting` (its tests do), or at how a gradient comes about.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from scipy.stats import chi2

from client.accounting import Steps, epsilon
from client.app import app
from client.ledger import TRAINING, Entry, open_ledger
from common.config import FederationConfig
from common.config_file import load_config
from common.files import write_text_atomically
from common.messages import TrainTask, pack_train_task, unpack_site_update
from common.model import initial_weights
from common.records import BadMessage
from common.weights import BadWeights, Weights
from simulation.canaries import LOUDNESS, Canaries, draw, singing, write_site_with
from simulation.cohort import assemble
from simulation.grid import run_in_process
from simulation.one_run_bound import CONFIDENCE, lower_bound, right_guesses
from simulation.planted_faults import planted
from sites.cache import CachedSubject
from sites.phantom_cohort import write_cohort

GUESSED = 0.5  # of the canaries: fixed in advance, the best of several would be no bound
FALSE_ALARM = 1e-6  # chance that a direct measurement accuses a sound client
DEVIATIONS = 5.0  # standard errors by which one patient's influence must exceed C: 3e-7
ALIKE = 0.5  # correlation of two releases whose noise was drawn twice is near 0
FEWEST = 16  # canaries
SHAPE = (32, 32, 20)  # voxels of a phantom
AUDITED, REPEATED = 1, 2  # nodes
BOUND, NOISE, REPETITION, INFLUENCE = "bound", "noise", "repetition", "influence"


class NotAudited(RuntimeError):
    """The audit could not be carried through; the text says why."""


@dataclass(frozen=True)
class Claim:
    """What the site's ledger says. `sigma` is the noise in clipping norms, `rate` each patient's chance
    to be drawn in a step, `patients` their number with the canaries that take part."""

    epsilon: float
    delta: float
    rounds: int
    sigma: float
    rate: float
    clip: float
    patients: int


@dataclass(frozen=True)
class Audit:
    """Everything in clipping norms and for the sum over patients, so that it compares with `claim`.

    `bound` is what `right` of `guesses` prove, `provable` what all of them right would. `noise` is the
    standard deviation of what differs between two runs with the same seed, `quiet` the tensors that
    have too little of it, `epsilon_as_measured` the accountant's with `noise` in place of sigma.
    `release` is the root mean square of what one run sends beside the canaries' coordinates,
    `alike` the cosine of two. `influence` is what taking part adds to a canary's coordinate in one
    step, with its standard error. `found` names the measurements that contradict the claim.
    """

    claim: Claim
    planted: str | None
    canaries: int
    guesses: int
    right: int
    bound: float
    provable: float
    noise: float
    quiet: tuple[str, ...]
    epsilon_as_measured: float | None
    release: float
    alike: float
    influence: float
    influence_error: float
    found: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "quiet": list(self.quiet), "found": list(self.found)}


def audit(
    folder: Path,
    *,
    budget: float = 8.0,
    rounds: int = 20,
    patients: int = 4,
    canaries: int = 400,
    plant: str | None = None,
) -> Audit:
    """Audit the client of this process. Writes below `folder` only, which must be empty or absent.

    Args:
        budget: epsilon that the site may spend, all of it over `rounds`.
        patients: phantoms that take part beside the canaries.
        canaries: at least FEWEST; about half of them take part.
        plant: one of `simulation.planted_faults.PLANTS`, a fault to put into the client meanwhile.

    Raises:
        NotAudited: the site refuses the task (its text says why), or `canaries` do not fit.
    """
    config = load_config(
        preset="private",
        assign=[
            "preprocess.shape=[32,32,32]",
            "training.threads=1",
            "held_out_fraction=0.01",
            f"rounds.number={rounds}",
            # a round is then one noisy sum of everybody's gradients, to be read off the weights
            "privacy.optimiser=sgd",
            "privacy.steps=1",
            "privacy.expected_batch=null",
        ],
    )
    weights = initial_weights(config)
    values = sum(tensor.numel() for tensor in weights.values())
    if not FEWEST <= canaries <= values // 2:
        raise NotAudited(f"{canaries} canaries: there must be {FEWEST} to {values // 2}.")
    real = _phantoms(folder, config, patients)
    drawn = draw(canaries, values)
    sites = {
        node: write_site_with(folder / place, config, budget, real, drawn)
        for node, place in ((AUDITED, "audited"), (REPEATED, "repeated"))
    }
    with planted(plant, config.seed), singing(drawn, weights):
        releases = _releases(folder, config, sites, weights)
    return _judged(
        releases[AUDITED],
        releases[REPEATED],
        _paid(sites[AUDITED], rounds),
        drawn,
        sizes={name: tensor.numel() for name, tensor in weights.items()},
        patients=len(real) + int(drawn.inside.sum()),
        learning_rate=config.privacy.learning_rate,
        plant=plant,
    )


def lines(result: Audit) -> list[str]:
    """The audit in words, the verdict last."""
    a, c = result, result.claim
    mark = {what: "  <- VIOLATION" if what in a.found else "" for what in FOUND}
    costs = "" if a.epsilon_as_measured is None else f" (epsilon {a.epsilon_as_measured:.2f})"
    quiet = f"; too little in {len(a.quiet)} tensors, first {a.quiet[0]}" if a.quiet else ""
    said = [
        (
            f"claimed    epsilon {c.epsilon:.3f} at delta {c.delta:.2g} by the site's ledger: "
            f"{c.rounds} rounds, noise {c.sigma:.4f} C, q {c.rate:g}, C {c.clip:g}, "
            f"{c.patients} patients"
        ),
        (
            f"proven     epsilon at least {a.bound:.2f} ({CONFIDENCE:.0%} confidence): {a.right} of "
            f"{a.guesses} guesses about {a.canaries} canaries are right{mark[BOUND]}"
        ),
        (
            f"noise      {a.noise:.4f} C{costs} differ between two runs with the same seed"
            f"{quiet}{mark[NOISE]}"
        ),
        (
            f"repetition {a.alike:.1%} correlation of what these two runs send, {a.release:.3f} C each"
            f"{mark[REPETITION]}"
        ),
        (
            f"influence  {a.influence:.3f} +- {a.influence_error:.3f} C of one patient with a gradient "
            f"of {LOUDNESS:g} C{mark[INFLUENCE]}"
        ),
    ]
    if a.provable <= c.epsilon:
        said.append(
            f"{a.guesses} guesses prove at most epsilon {a.provable:.2f}: of the claimed "
            f"{c.epsilon:.2f} only the direct measurements could show that it is wrong. The bound "
            "says more about a smaller --epsilon."
        )
    said.append(
        "An audit proves no privacy: it finds some faults, where it looks. More may be lost than it "
        "can show, and what a site sends beside the weights is not looked at."
    )
    verdict = "nothing found"
    if a.found:
        verdict = "VIOLATION: " + "; ".join(FOUND[what] for what in a.found)
    planted = f" (planted: {a.planted})" if a.planted else ""
    return [*said, f"Verdict{planted}: {verdict}."]


FOUND = {
    BOUND: "more is proven than is claimed",
    NOISE: "there is less noise than is claimed",
    REPETITION: "a seed repeats the noise, so that whoever knows it can subtract it",
    INFLUENCE: "one patient has more influence than C",
}


def _phantoms(folder: Path, config: FederationConfig, patients: int) -> tuple[CachedSubject, ...]:
    data = write_cohort(
        folder / "data", sites=1, subjects_per_site=patients, shape=SHAPE, seed=config.seed
    )
    (site,) = assemble(data, config, folder / "cache").sites
    return (*site.training, *site.held_out)


def _releases(
    folder: Path, config: FederationConfig, sites: Mapping[int, Path], weights: Weights
) -> dict[int, np.ndarray]:
    """What each site makes of the same tasks: weights before minus after, (rounds, values), by node.

    The tasks' weights are the audited site's of the round before, as in a federation of one.
    """
    changes: dict[int, list[np.ndarray]] = {node: [] for node in sites}
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        now = weights
        rate = config.training.learning_rate
        for round_ in range(1, config.rounds.number + 1):
            content = pack_train_task(TrainTask(round_, config.fingerprint(), rate, now))
            after = {}
            for node in sites:
                message = grid.create_message(content, "train", node, str(round_))
                (reply,) = grid.send_and_receive([message])
                if reply.has_error():
                    raise NotAudited(f"the site does not train: {reply.error.reason}")
                try:
                    after[node] = unpack_site_update(reply.content, now).weights
                except (BadMessage, BadWeights) as error:
                    raise NotAudited(f"the site's answer cannot be read: {error}") from error
                changes[node].append(_flat(now) - _flat(after[node], list(now)))
            now = {name: after[AUDITED][name] for name in now}

    run_in_process(server, app, folder, sites)
    return {node: np.array(found) for node, found in changes.items()}


def _flat(weights: Weights, names: Sequence[str] | None = None) -> np.ndarray:
    ordered = [weights[name] for name in names or weights]
    return torch.cat([tensor.reshape(-1) for tensor in ordered]).double().numpy()


def _paid(site: Path, rounds: int) -> list[Entry]:
    with open_ledger(site / "privacy-ledger.sqlite", None, write=False) as ledger:
        paid = [entry for entry in ledger.entries if entry.kind == TRAINING]
    if [entry.round for entry in paid] != list(range(1, rounds + 1)):
        raise NotAudited(f"the ledger knows {len(paid)} of the {rounds} rounds.")
    return paid


def _judged(
    changes: np.ndarray,
    repeated: np.ndarray,
    paid: Sequence[Entry],
    canaries: Canaries,
    *,
    sizes: Mapping[str, int],
    patients: int,
    learning_rate: float,
    plant: str | None,
) -> Audit:
    last = paid[-1]
    assert last.epsilon is not None
    assert last.delta is not None
    assert last.clip is not None
    assert last.sampling_rate is not None
    sigma = math.sqrt(sum((e.noise_multiplier or 0) ** 2 for e in paid) / len(paid))
    claim = Claim(
        last.epsilon, last.delta, len(paid), sigma, last.sampling_rate, last.clip, patients
    )
    # plain SGD: the change is the learning rate times the noisy sum over the expected patients
    unit = learning_rate * claim.clip / (claim.rate * patients)
    sums, again = changes / unit, repeated / unit

    guesses = 2 * int(GUESSED * len(canaries.inside) / 2)
    scores = sums[:, canaries.coordinates].sum(axis=0)
    right = right_guesses(scores, canaries.inside, guesses)
    bound = lower_bound(guesses, right, len(scores), claim.delta)

    apart = (sums - again) / math.sqrt(2)  # noise alone: what both were asked is the same
    squares = np.square(apart).sum(axis=0)
    parts = np.split(squares, np.cumsum(list(sizes.values()))[:-1])
    tests = dict(zip(("", *sizes), (squares, *parts), strict=True))  # "": all together
    quiet = [
        name
        for name, part in tests.items()
        if chi2.cdf(part.sum() / sigma**2, len(paid) * part.size) < FALSE_ALARM / len(tests)
    ]
    noise = math.sqrt(float(squares.mean()) / len(paid))

    aside = np.ones(sums.shape[1], dtype=bool)
    aside[canaries.coordinates] = False
    alike = _cosine(sums[:, aside], again[:, aside])
    release = float(np.sqrt(np.square(sums[:, aside]).mean()))

    a_step = scores / len(paid)
    inside, outside = a_step[canaries.inside], a_step[~canaries.inside]
    influence = error = 0.0
    if inside.size and outside.size:  # else chance took all of them or none
        influence = float(inside.mean() - outside.mean())
        # a few canaries may scatter less than the noise does
        least = sigma**2 / len(paid)
        error = math.sqrt(sum(max(part.var(), least) / part.size for part in (inside, outside)))

    checks = {
        BOUND: bound > claim.epsilon,
        NOISE: bool(quiet),
        REPETITION: alike > ALIKE and release > sigma / 2,
        INFLUENCE: influence - DEVIATIONS * error > 1,
    }
    return Audit(
        claim=claim,
        planted=plant,
        canaries=len(scores),
        guesses=guesses,
        right=right,
        bound=bound,
        provable=lower_bound(guesses, guesses, len(scores), claim.delta),
        noise=noise,
        quiet=tuple(name for name in quiet if name),
        epsilon_as_measured=_epsilon(noise, claim),
        release=release,
        alike=alike,
        influence=influence,
        influence_error=error,
        found=tuple(what for what, wrong in checks.items() if wrong),
    )


def _epsilon(noise: float, claim: Claim) -> float | None:
    if noise == 0:
        return None
    spent = epsilon([Steps(noise, claim.rate, claim.rounds)], claim.delta)
    return spent if math.isfinite(spent) else None


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    size = math.sqrt(float(np.square(one).sum()) * float(np.square(other).sum()))
    return float((one * other).sum()) / size if size else 1.0


def write_audit(result: Audit, path: Path) -> None:
    """Keep the result as JSON."""
    write_text_atomically(path, json.dumps(result.document(), indent=1) + "\n")
