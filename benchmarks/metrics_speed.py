"""Dice, IoU and all counts of one volume against MONAI's metrics.

    python benchmarks/metrics_speed.py [--quick] [--repeats N] [--json FILE]

From logits (4, 128^3; 48^3 with --quick) and uint8 labels, one CPU thread. MONAI as its tutorials
have it: AsDiscrete, then DiceMetric, MeanIoU and ConfusionMatrixMetric of the three labels without
the background. Ours: the same, and the regions TC and WT from the same confusion matrix. True and
false positives and negatives are compared as integers, the scores as numbers. The second table
starts from labels, so that the argmax, which takes much of the time of either, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from interleaved import interleaved, options, report, write_json
from monai.metrics import ConfusionMatrixMetric, DiceMetric, MeanIoU
from monai.transforms import AsDiscrete

from common.brats import STRUCTURES
from common.metrics import confusion_matrix, structure_scores
from sites.preprocess import best_class

REACH = 9.0
LABELS = {"NCR": 1, "ED": 2, "ET": 3}
CONFUSED = ("sensitivity", "specificity", "precision")
Scores = dict[str, dict[str, float]]


def main() -> None:
    chosen = options(__doc__).parse_args()
    torch.set_num_threads(1)
    side = 48 if chosen.quick else 128
    logits, truth = volume(side)
    network = logits[None].contiguous(memory_format=torch.channels_last_3d)[0]  # theirs
    labels = best_class(logits)
    given = torch.from_numpy(labels)
    discrete, one_hot = AsDiscrete(argmax=True, to_onehot=4), AsDiscrete(to_onehot=4)
    true = torch.from_numpy(truth)
    ours = {
        "fedbrats": lambda: by_counts(best_class(logits), truth),
        "fedbrats, logits channels_last": lambda: by_counts(best_class(network), truth),
    }
    theirs = {
        "MONAI": lambda: by_monai(discrete(logits), one_hot(true[None]), counts=True),
        "MONAI, Dice and IoU only": lambda: by_monai(
            discrete(logits), one_hot(true[None]), counts=False
        ),
    }
    facts = compared(theirs["MONAI"](), *(way() for way in ours.values()))
    reports = [
        measured(
            f"Dice, IoU and counts from logits, {side}^3", theirs | ours, chosen.repeats, facts
        )
    ]
    ours = {"fedbrats": lambda: by_counts(labels, truth)}
    theirs = {"MONAI": lambda: by_monai(one_hot(given[None]), one_hot(true[None]), counts=True)}
    facts = compared(theirs["MONAI"](), ours["fedbrats"]())
    reports.append(
        measured(f"The same from labels, {side}^3", theirs | ours, chosen.repeats, facts)
    )
    write_json(chosen.json, reports)


def volume(side: int) -> tuple[torch.Tensor, np.ndarray]:
    """Logits of a half-trained network and the truth: three nested balls, a tenth of the volume."""
    axis = torch.linspace(-1, 1, side)
    distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    truth = torch.zeros(side, side, side, dtype=torch.uint8)
    for radius, label in ((0.6, 2), (0.4, 3), (0.25, 1)):
        truth[distance < radius] = label
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, side, side, side, generator=generator)
    logits += 3 * torch.stack([truth == label for label in range(4)])
    return logits, truth.numpy()


def by_counts(prediction: np.ndarray, truth: np.ndarray) -> tuple[Scores, dict[str, list[int]]]:
    confusion = confusion_matrix(prediction, truth)
    scores = structure_scores(confusion)
    total = int(confusion.sum())
    counts = {}
    for name, label in LABELS.items():
        hit, true, found = (
            int(confusion[label, label]),
            int(confusion[label].sum()),
            int(confusion[:, label].sum()),
        )
        counts[name] = [hit, found - hit, total - true - found + hit, true - hit]
    return scores, counts


def by_monai(
    prediction: torch.Tensor, truth: torch.Tensor, *, counts: bool
) -> tuple[Scores, dict[str, list[int]]]:
    pair = prediction[None], truth[None]
    values: dict[str, Any] = {
        "dice": DiceMetric(include_background=False)(*pair)[0],
        "iou": MeanIoU(include_background=False)(*pair)[0],
    }
    found: dict[str, list[int]] = {}
    if counts:
        metric = ConfusionMatrixMetric(
            include_background=False, metric_name=list(CONFUSED), reduction="none"
        )
        each = metric(*pair)[0]
        found = {name: each[i].long().tolist() for i, name in enumerate(LABELS)}
        for name, rows in zip(CONFUSED, metric.aggregate(), strict=True):
            values[name] = rows[0]
    scores = {
        label: {name: float(value[i]) for name, value in values.items()}
        for i, label in enumerate(LABELS)
    }
    return scores, found


def compared(theirs: tuple, *ours: tuple) -> dict[str, str]:
    for scores, counts in ours:
        assert counts == theirs[1], (counts, theirs[1])
        for label, values in theirs[0].items():
            for name, value in values.items():
                assert abs(scores[label][name] - value) < 1e-6, (label, name)
    dice = ", ".join(f"{name} {ours[0][0][name]['dice']:.4f}" for name in STRUCTURES)
    return {
        "true and false positives, true and false negatives of each label": "identical integers",
        "Dice": dice,
    }


def measured(
    title: str, ways: dict[str, Callable[[], object]], repeats: int, facts: dict[str, str]
) -> dict[str, Any]:
    timings = interleaved(ways, repeats=repeats)
    reach = {name: REACH for name in ways if name.startswith("fedbrats")}
    return report(title, timings, peer="MONAI", reach=reach, facts=facts)


if __name__ == "__main__":
    main()
