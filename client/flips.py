"""Test-time augmentation by flips: the mean of a network's probabilities over the mirror images of a subject.

Training flips every axis at random (`training.augment.flip`), so each mirror image is as ordinary to
the network as the image itself, and their mean is steadier than any one of them. How far they agree
among each other says how sure the network is of the whole tumour.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from client.evaluation import class_scores
from common.config import FederationConfig

AXES = tuple(axes for n in range(4) for axes in itertools.combinations((0, 1, 2), n))
"""The 8 sets of axes of an image (X, Y, Z) to mirror; the first is none."""
LEAST = 1e-12  # of a mean probability, so that its logarithm can be interpolated


def flipped_scores(
    network: torch.nn.Module, image: np.ndarray, config: FederationConfig, device: torch.device
) -> tuple[torch.Tensor, float]:
    """Scores of one working-grid image (C, X, Y, Z) from all 8 of its mirror images.

    Returns:
        The logarithm (4, X, Y, Z) of the mean of the 8 softmax probabilities, which takes the place
        of `class_scores`' logits; and the mean Dice of each one's whole tumour with the mean's
        (1 where none of them finds a tumour).
    """
    total: torch.Tensor | None = None
    tumours = []
    for axes in AXES:
        mirrored = np.ascontiguousarray(np.flip(image, tuple(axis + 1 for axis in axes)))
        scores = class_scores(network, mirrored, config, device)
        probabilities = torch.flip(torch.softmax(scores, dim=0), [axis + 1 for axis in axes])
        tumours.append(probabilities.max(dim=0).indices > 0)
        total = probabilities if total is None else total.add_(probabilities)
    assert total is not None
    mean = total.div_(len(AXES))
    together = mean.max(dim=0).indices > 0
    agreement = sum(_dice(one, together) for one in tumours) / len(tumours)
    return mean.clamp_min_(LEAST).log_(), agreement


def _dice(a: torch.Tensor, b: torch.Tensor) -> float:
    both = int(a.sum() + b.sum())
    return 2 * int((a & b).sum()) / both if both else 1.0
