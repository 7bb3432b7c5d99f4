"""The naive baseline against a loop over every threshold."""

from __future__ import annotations

import numpy as np
import pytest

from simulation.cohort import assemble
from simulation.threshold import STEPS, flair_threshold

AT_1_MM = ("preprocess.mode=patches", "training.patch=[32,32,32]")  # where nothing is resampled


def dice(flair: np.ndarray, truth: np.ndarray, threshold: float) -> float:
    predicted = flair > threshold
    return 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())


@pytest.mark.parametrize(("normalise", "low", "high"), [("zscore", -3, 10), ("minmax", 0, 1)])
def test_it_is_the_best_single_threshold_and_measured_on_the_held_out(
    cohort_data, tiny_config, tmp_path, normalise, low, high
):
    config = tiny_config(*AT_1_MM, f"preprocess.normalise={normalise}", "split.hold_out=[site-06]")
    cohort = assemble(cohort_data, config, tmp_path)
    found = flair_threshold(cohort, config)
    training = [
        (entry.image()[3].astype(np.float32), np.asarray(entry.labels()) > 0)
        for site in cohort.sites
        for entry in site.training
    ]
    curve = [
        np.mean([dice(flair, truth, edge) for flair, truth in training])
        for edge in np.linspace(low, high, STEPS)
    ]
    reached = np.mean([dice(flair, truth, found.threshold) for flair, truth in training])
    assert reached == pytest.approx(max(curve), abs=1e-9)
    expected = {
        site.name: [
            dice(
                entry.image()[3].astype(np.float32), np.asarray(entry.truth()) > 0, found.threshold
            )
            for entry in site.held_out
        ]
        for site in cohort.sites
    }
    assert len(expected["site-06"]) == 6
    for site, values in expected.items():
        assert found.dice_by_site[site] == pytest.approx(np.mean(values), abs=1e-6)
    means = [np.mean(values) for values in expected.values()]
    assert found.mean_over_sites == pytest.approx(np.mean(means))
    every = [value for values in expected.values() for value in values]
    assert found.mean_over_subjects == pytest.approx(np.mean(every))


def test_without_flair_there_is_no_such_baseline(cohort_data, tiny_config, tmp_path):
    config = tiny_config("modalities=[t1,t1ce]", "split.hold_out=[site-01,site-06]")
    cohort = assemble(cohort_data, config, tmp_path)
    assert flair_threshold(cohort, config) is None
