"""The naive baseline every trained model must beat: whole tumour = FLAIR above one threshold.

The threshold is the one of 512 with the best mean Dice over all sites' training subjects (on the
working grid); it is then measured on the held-out subjects' own voxels, as the network is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from common.config import FederationConfig
from common.metrics import confusion_matrix, structure_scores
from common.progress import track
from simulation.cohort import Cohort
from sites.cache import CachedSubject
from sites.preprocess import restore

STEPS = 512


@dataclass(frozen=True)
class ThresholdBaseline:
    """`threshold` is in normalised FLAIR units; Dice is of the whole tumour, per site and overall."""

    threshold: float
    dice_by_site: dict[str, float]
    mean_over_sites: float
    mean_over_subjects: float


def flair_threshold(cohort: Cohort, config: FederationConfig) -> ThresholdBaseline | None:
    """Fit on training subjects, measure on held-out ones; None where FLAIR is not among the modalities."""
    if "flair" not in config.modalities:
        return None
    channel = config.modalities.index("flair")
    training = [entry for site in cohort.sites for entry in site.training]
    edges = np.linspace(0, 1, STEPS) if config.preprocess.normalise == "minmax" else None
    if edges is None:
        edges = np.linspace(-3, 10, STEPS)
    tracked = track(training, "naive FLAIR threshold", len(training), "subjects")
    curves = [_dice_by_threshold(entry, channel, edges) for entry in tracked]
    best = float(edges[int(np.argmax(np.mean(curves, axis=0)))])
    dice = {
        site.name: [_held_out_dice(entry, channel, best) for entry in site.held_out]
        for site in cohort.sites
        if site.held_out
    }
    means = {site: float(np.mean(values)) for site, values in dice.items()}
    every = [value for values in dice.values() for value in values]
    return ThresholdBaseline(
        best, means, float(np.mean(list(means.values()))), float(np.mean(every))
    )


def _dice_by_threshold(entry: CachedSubject, channel: int, edges: np.ndarray) -> np.ndarray:
    """Dice of `flair > edge` for every edge, from two histograms instead of one pass per edge."""
    flair = np.asarray(entry.image()[channel], np.float32).ravel()
    tumour = np.asarray(entry.labels()).ravel() > 0
    positions = np.searchsorted(edges, flair, side="left")  # how many edges lie below the voxel
    above = _reversed_sum(np.bincount(positions, minlength=len(edges) + 1))
    hits = _reversed_sum(np.bincount(positions[tumour], minlength=len(edges) + 1))
    both = above + int(tumour.sum())
    return np.where(both == 0, 1.0, 2 * hits / np.maximum(both, 1))  # both empty: Dice 1


def _reversed_sum(counts: np.ndarray) -> np.ndarray:
    return counts[::-1].cumsum()[::-1][1:]


def _held_out_dice(entry: CachedSubject, channel: int, threshold: float) -> float:
    """On the subject's own voxels, exactly as the network is measured."""
    flair = torch.from_numpy(np.asarray(entry.image()[channel], np.float32))
    scores = torch.zeros(4, *flair.shape)
    scores[2] = flair - threshold  # any tumour label will do: only the whole tumour is measured
    truth = np.asarray(entry.truth())
    confusion = confusion_matrix(restore(scores, entry.geometry), truth)
    dice = structure_scores(confusion)["WT"]["dice"]
    assert not math.isnan(dice)
    return dice
