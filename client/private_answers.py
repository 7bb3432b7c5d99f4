"""What a site with a privacy budget answers: paid for in the ledger first, noised, and kept.

An answer is kept until the next, so that the same question asked again (after a lost connection or
a restart) gets the very same answer, which costs nothing; training anew would draw new noise and
have to be paid again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict

from client.budget import (
    BudgetSpent,
    Permit,
    clip_of,
    patients_of,
    pay_for_metrics,
    pay_for_training,
    record_done,
    statement,
)
from client.privacy import require_protectable, train_privately
from client.site import Site
from client.system_noise import add_system_gaussian
from common.files import write_text_atomically
from common.message_words import EXACT, NOISED, WITHHELD
from common.messages import EvaluateTask, SiteReport, SiteUpdate, TrainTask, task_hash
from common.metrics import REGIONS, SiteMetrics, SubjectMetrics, summarise
from common.statement import Signed
from common.weights import BadWeights, load_weights, save_weights, weights_of

LOG = logging.getLogger("fedbrats")


def private_update(
    site: Site, task: TrainTask, content: RecordDict, network: torch.nn.Module, device: torch.device
) -> SiteUpdate:
    """Train `network`, which holds the task's weights, within the budget.

    Raises:
        BudgetSpent: the round would exceed the budget; no voxel was read.
        NotProtectable: the network or the loss would leak past the noise.
        LedgerError: the ledger is missing, was tampered with, or cannot be written.
    """
    require_protectable(network, site.config)
    path = site.folder / "kept" / "update.safetensors"
    key = _key(site, task_hash(content))
    n = len(site.training)
    try:
        weights, about = load_weights(path)
        if about.get("key") == key:
            LOG.info(
                f"round {task.round}, {site.name}: the answer given before is given again; nothing is spent"
            )
            signed = Signed(str(about["statement"]))
            return SiteUpdate(site.name, task.round, n, weights, statement=signed)
    except BadWeights:
        pass  # none is kept, or half of one: then it was never sent
    permit = pay_for_training(site, task.round)
    _tell(site, permit)
    agreed = site.config.training.learning_rate
    outcome = train_privately(
        network,
        patients_of(site, site.training),
        site.config,
        permit.noise,
        clip_of(site),
        site=site.name,
        round_=task.round,
        learning_rate=site.config.privacy.learning_rate * task.learning_rate / agreed,
        device=device,
    )
    if not math.isnan(outcome.loss):
        LOG.info(f"round {task.round}, {site.name}: mean loss {outcome.loss:.3f} (stays here)")
    text = statement(site, task.round, permit).text()
    update = SiteUpdate(site.name, task.round, n, weights_of(network), statement=Signed(text))
    path.parent.mkdir(exist_ok=True)
    save_weights(path, update.weights, {"key": key, "statement": text})
    record_done(site, permit)
    return update


def private_report(
    site: Site, task: EvaluateTask, content: RecordDict, results: Sequence[SubjectMetrics]
) -> SiteReport:
    """The metrics as the site releases them: withheld, noised or exact.

    Raises:
        LedgerError: as `private_update`.
    """
    assert site.budget is not None
    n = len(results)
    if site.budget.metrics == EXACT:
        return SiteReport(
            site.name,
            task.round,
            summarise(results),
            statement=Signed(statement(site, task.round).text()),
        )
    withheld = SiteReport(
        site.name,
        task.round,
        SiteMetrics(n, {}, {}),
        released=WITHHELD,
        statement=Signed(replace(statement(site, task.round), metrics=WITHHELD).text()),
    )
    if site.budget.metrics == WITHHELD or not results or not site.tells_metrics:
        return withheld
    path = site.folder / "kept" / "report.json"
    key = _key(site, task_hash(content))
    kept = _read(path)
    if kept.get("key") != key:
        try:
            permit = pay_for_metrics(site, task.round)
        except BudgetSpent as spent:
            LOG.warning(f"{spent} Its metrics are withheld.")
            return withheld
        means = noised_dice(site, results, permit)
        kept = {"key": key, "means": means, "text": statement(site, task.round, permit).text()}
        path.parent.mkdir(exist_ok=True)
        write_text_atomically(path, json.dumps(kept))
        record_done(site, permit)
    means = kept["means"]
    metrics = SiteMetrics(n, means, dict.fromkeys(means, n))
    return SiteReport(
        site.name, task.round, metrics, released=NOISED, statement=Signed(kept["text"])
    )


def noised_dice(site: Site, results: Sequence[SubjectMetrics], permit: Permit) -> dict[str, float]:
    """Mean Dice of WT, TC and ET with Gaussian noise, clamped to 0..1.

    The mean over patients of each patient's mean over scans, so that one of n patients changes each
    of the three by at most 1/n, whatever the number of scans, and their vector by sqrt(3)/n.
    """
    people = patients_of(site, site.held_out)
    person = {scan.id: name for name, scans in people.items() for scan in scans}
    of: dict[str, list[SubjectMetrics]] = {}
    for result in results:
        of.setdefault(person[result.subject], []).append(result)
    names = [f"dice/{region}" for region in REGIONS]
    means = [[summarise(scans).means[name] for name in names] for scans in of.values()]
    values = torch.tensor(means, dtype=torch.float64).mean(0)
    sensitivity = math.sqrt(len(names)) / len(of)
    add_system_gaussian(values, permit.noise.noise_multiplier * sensitivity)
    return dict(zip(names, values.clamp(0, 1).tolist(), strict=True))


def _tell(site: Site, permit: Permit) -> None:
    e, noise = permit.entry, permit.noise
    LOG.info(
        f"round {e.round}, {e.site}: privacy: epsilon {e.epsilon:.3f} of {e.budget:g} spent with this round "
        f"(delta {e.delta:.2g}, sigma {noise.noise_multiplier:.3f}, q {noise.sampling_rate:.3g}, "
        f"{noise.steps} steps, C {clip_of(site):g})"
    )


def _key(site: Site, task: str) -> str:
    """Of the question and of whom it is about: another cohort or budget is another question."""
    assert site.budget is not None
    about = [site.federation, site.budget.model_dump(), sorted(site.patients.items()), task]
    about += [[s.id, *s.fingerprints] for s in (*site.training, *site.held_out)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
