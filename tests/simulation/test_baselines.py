"""The comparison researchers want: the same code, only the data differ, and honest means."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from common.metrics import SiteMetrics
from server.checkpoint import RunFolder
from server.history import History
from simulation.baselines import Comparison, compare, comparison_table, record_comparison
from simulation.run import Engine, simulate

SITES = ["site-01", "site-06", "site-13"]


def text_of(comparison: Comparison) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(comparison_table(comparison))
    return captured.get()


def row(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if name in line)
    return [cell.strip() for cell in re.split("[│┃]", line)[2:-1]]


def defined(metrics: dict[str, SiteMetrics]) -> dict[str, dict[str, float]]:
    """Without NaN, which equals nothing."""
    return {
        site: {key: mean for key, mean in m.means.items() if not math.isnan(mean)}
        for site, m in metrics.items()
    }


def metrics(wt: float, tc: float, et: float, n: int, **more: float) -> SiteMetrics:
    means = {"dice/WT": wt, "dice/TC": tc, "dice/ET": et, **more}
    return SiteMetrics(n=n, means=means, defined=dict.fromkeys(means, n))


HAND_MADE = Comparison(
    {
        "local-only": {"a": metrics(0.5, 0.4, 0.3, 10), "b": metrics(0.2, 0.1, 0.0, 2)},
        "federated": {
            "a": metrics(0.7, 0.6, 0.5, 10),
            "b": metrics(0.6, 0.3, 0.3, 2),
            "new [red]": metrics(0.1, 0.1, 0.1, 50),
        },
        "centralised": {
            "a": metrics(0.9, 0.6, 0.6, 10),
            "b": metrics(0.8, 0.8, 0.2, 2),
            "new [red]": metrics(0.3, 0.2, 0.1, 50),
        },
    }
)


def test_the_table_shows_each_site_and_the_means_in_both_senses():
    text = text_of(HAND_MADE)
    # local, federated, centralised: mean of WT, TC, ET; then WT; then n
    assert row(text, "│ a ") == ["0.400", "0.600", "0.700", "0.500", "0.700", "0.900", "10"]
    over_sites = ["0.250", "0.500", "0.650", "0.350", "0.650", "0.850", "12"]
    assert row(text, "mean over sites") == over_sites
    expected = [np.average(pair, weights=(10, 2)) for pair in (
        (0.4, 0.1), (0.6, 0.4), (0.7, 0.6), (0.5, 0.2), (0.7, 0.6), (0.9, 0.8)
    )]  # fmt: skip
    assert row(text, "mean over subjects") == [f"{value:.3f}" for value in expected] + ["12"]
    assert row(text, "worst site")[:3] == ["0.100", "0.400", "0.600"]
    assert row(text, "spread")[:3] == ["0.300", "0.200", "0.100"]


def test_a_site_that_never_trains_is_shown_but_does_not_tilt_the_means():
    """It has no local model: with it the federated mean would be over other sites than the local."""
    text = text_of(HAND_MADE)
    assert row(text, "│ new [red] ") == ["-", "0.100", "0.200", "-", "0.100", "0.300", "50"]
    assert row(text, "mean over sites")[1] == "0.500", "without the new one's 0.1"


@pytest.mark.slow
def test_baselines_train_on_what_they_say_and_are_recorded(
    cohort_data, cohort_cache, tiny_config, tmp_path: Path
):
    config = tiny_config("rounds.number=2", "rounds.min_sites=3")
    out = tmp_path / "run"
    result = simulate(cohort_data, out, config, cache=cohort_cache, engine=Engine())
    comparison = compare(result.cohort, out, config, Engine())
    record_comparison(comparison, out)

    folders = {"federated": out, "centralised": out / "baselines" / "centralised"}
    last = {}
    for way, folder in folders.items():
        with History(RunFolder(folder).history) as history:
            assert len(history.rounds()) == 2
            last[way] = history.rounds()[-1].metrics
            cards = {card.site: card for card in history.sites()}
            trained = {name: card.n_training for name, card in cards.items() if card.trains}
        if way == "federated":
            each = trained
            assert sorted(each) == SITES
        else:
            assert list(trained.values()) == [sum(each.values())]
            assert sorted(name for name, card in cards.items() if card.n_held_out) == SITES
    for site in SITES:
        with History(RunFolder(out / "baselines" / f"local-{site}").history) as history:
            (card,) = history.sites()
            assert (card.site, card.n_training) == (site, each[site])
            alone = history.rounds()[-1].metrics
        assert defined({site: comparison.metrics["local-only"][site]}) == defined(alone)
    for way in folders:
        assert defined(comparison.metrics[way]) == defined(last[way])
    losses = {way: of["site-01"].means["loss"] for way, of in comparison.metrics.items()}
    assert len(set(losses.values())) == 3, "three different models"

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    document = json.loads((out / "results.json").read_text(), parse_constant=refuse)
    for way, of in comparison.metrics.items():
        for site, m in of.items():
            assert document["comparison"][way][site]["dice/WT"] == m.means["dice/WT"]

    before = {p: p.stat().st_mtime_ns for p in out.rglob("round-*.safetensors")}
    again = compare(result.cohort, out, config, Engine())
    assert again.as_dict() == comparison.as_dict()
    assert {p: p.stat().st_mtime_ns for p in out.rglob("round-*.safetensors")} == before

    simulate(cohort_data, out, config, cache=cohort_cache, engine=Engine())
    after = json.loads((out / "results.json").read_text())
    assert after["comparison"] == document["comparison"], "the run again, without baselines"
