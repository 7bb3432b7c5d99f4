"""Patients made for an audit: each has one large gradient, and a coin decides whether it takes part.

A canary is in the site's list of subjects and in its ledger as any patient is; only its gradient is
replaced, at `client.privacy.patient_gradient`. It has no voxels: nobody looks at them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import client.privacy
from client.ledger import create_ledger
from client.privacy import Gradient
from client.site import write_site
from client.site_config import PrivacyBudget
from common.config import FederationConfig
from common.config_file import dump_config
from common.weights import Weights
from sites.cache import CachedSubject, load_entry

LOUDNESS = 100.0  # a canary's gradient, in clipping norms
CANARY = "canary-"


@dataclass(frozen=True)
class Canaries:
    """Each one's coordinate among all the network's weights, and whether it takes part."""

    coordinates: np.ndarray
    inside: np.ndarray


def draw(canaries: int, values: int) -> Canaries:
    rng = np.random.default_rng(secrets.randbits(256))
    inside = np.array([bool(secrets.randbits(1)) for _ in range(canaries)])
    return Canaries(rng.choice(values, canaries, replace=False), inside)


def write_site_with(
    folder: Path,
    config: FederationConfig,
    budget: float,
    real: Sequence[CachedSubject],
    canaries: Canaries,
) -> Path:
    """A site as `simulation.cohort` writes it, with the canaries that take part."""
    folder.mkdir(parents=True)
    about = json.loads((real[0].folder / "about.json").read_text(encoding="utf-8"))
    entries = []
    for number in np.flatnonzero(canaries.inside):
        name = f"{CANARY}{number:05d}"
        entry = folder / "canaries" / name
        entry.mkdir(parents=True)
        # a person and a scan of its own for the ledger; nobody looks at its voxels, so it has none
        own = {"subject": name, "digest": name, "fingerprints": [name], "sizes": {}}
        (entry / "about.json").write_text(json.dumps({**about, **own}), encoding="utf-8")
        entries.append(load_entry(entry))
    ledger = folder / "privacy-ledger.sqlite"
    create_ledger(ledger)
    write_site(
        folder,
        name="audited",  # of both: seeds depend on it
        trains=True,
        config_text=dump_config(config),
        training=(*real, *entries),
        held_out=(),
        findings=(),
        federation=config.name,
        budget=PrivacyBudget(epsilon=budget),
        ledger=ledger,
    )
    return folder


@contextmanager
def singing(canaries: Canaries, weights: Weights) -> Iterator[None]:
    """Give each canary its gradient; every other patient's stays what it is."""
    real = client.privacy.patient_gradient
    ends = np.cumsum([tensor.numel() for tensor in weights.values()])
    # in the order of the network's parameters, which are all there is: it has no buffers
    silence = [torch.zeros_like(tensor) for tensor in weights.values()]

    def gradient(
        network: torch.nn.Module,
        scans: Sequence[CachedSubject],
        config: FederationConfig,
        *more: Any,
    ) -> tuple[Gradient, float]:
        if not scans[0].id.startswith(CANARY):
            return real(network, scans, config, *more)
        coordinate = canaries.coordinates[int(scans[0].id.removeprefix(CANARY))]
        k = int(np.searchsorted(ends, coordinate, side="right"))
        loud = torch.zeros_like(silence[k])
        loud.view(-1)[int(coordinate - ends[k])] = LOUDNESS * config.privacy.clip  # from the end
        return [*silence[:k], loud, *silence[k + 1 :]], 0.0

    with patch.object(client.privacy, "patient_gradient", gradient):
        yield
