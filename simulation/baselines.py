"""What the federation is compared with: each site alone, and everything pooled in one place.

Both are federations with a single training site, run by the very same code for as many rounds, so
that only the data differ (and the learning rate, where a plateau lowers it). All are compared by
their last round's model, which nobody chose by looking at the held-out subjects.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Group
from rich.markup import escape

from common.config import FederationConfig
from common.files import write_text_atomically
from common.metrics import REGIONS, SiteMetrics, mean_dice
from server.checkpoint import RunFolder
from server.history import History
from server.tables import average, number, site_table
from simulation.cohort import Cohort
from simulation.run import Engine, claimed, run_engine
from sites.site_cohort import SiteCohort

LOG = logging.getLogger("fedbrats")
POOLED = "(pooled)"  # which no real site is called
Reduce = Callable[[dict[str, SiteMetrics], str], float]
WAYS = ("local-only", "federated", "centralised")


@dataclass(frozen=True)
class Comparison:
    """Way -> site -> metrics on that site's own held-out subjects.

    A site that does not train has no local model, so it is left out where ways are compared.
    """

    metrics: dict[str, dict[str, SiteMetrics]]

    @property
    def everywhere(self) -> list[str]:
        """The sites measured in all three ways."""
        return [
            s for s in self.metrics["federated"] if all(s in of for of in self.metrics.values())
        ]

    def as_dict(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Undefined means are None, as JSON has no NaN."""
        return {
            way: {
                site: {"dice": mean_dice(m), **{k: _or_none(v) for k, v in m.means.items()}}
                for site, m in sites.items()
            }
            for way, sites in self.metrics.items()
        }


def compare(cohort: Cohort, out: Path, config: FederationConfig, engine: Engine) -> Comparison:
    """Train the baselines below `out`/baselines (resumable) and gather all three."""
    with History(RunFolder(out).history) as history:
        federated = history.rounds()[-1]
    # as many rounds as the federation had: nobody stops early by looking at held-out subjects
    same = {"min_sites": None, "stop_patience": None, "number": federated.round}
    alone = config.model_copy(update={"rounds": config.rounds.model_copy(update=same)})
    local: dict[str, SiteMetrics] = {}
    for site in cohort.sites:
        if site.trains and site.held_out:
            just = replace(cohort, sites=(site,))
            local |= _last_round(just, out / "baselines" / f"local-{site.name}", alone, engine)
    pooled = SiteCohort(
        name=POOLED,
        trains=True,
        training=tuple(entry for site in cohort.sites for entry in site.training),
        held_out=(),
        findings=(),
        patients=cohort.patients,
    )
    evaluators = tuple(
        replace(site, trains=False, training=()) for site in cohort.sites if site.held_out
    )
    together = replace(cohort, sites=(pooled, *evaluators))
    centralised = _last_round(together, out / "baselines" / "centralised", alone, engine)
    found = (local, federated.metrics, centralised)
    return Comparison(dict(zip(WAYS, found, strict=True)))


def comparison_table(comparison: Comparison) -> Group:
    """Mean Dice over WT, TC and ET, and WT Dice, each site on its own held-out subjects."""
    measured = ("mean of WT, TC, ET", "WT")
    table = site_table([*(f"{way}\n{what}" for what in measured for way in WAYS), "n"])
    sites = comparison.metrics["federated"]
    for site, m in sites.items():
        found = [comparison.metrics[way].get(site) for way in WAYS]
        cells = [number(mean_dice(of) if of else None) for of in found]
        cells += [number(of.means["dice/WT"] if of else None) for of in found]
        table.add_row(escape(site), *cells, str(m.n))
    table.add_section()
    n = str(sum(sites[site].n for site in comparison.everywhere))
    table.add_row("mean over sites", *_summary(comparison, _over_sites), n)
    table.add_row("mean over subjects", *_summary(comparison, _over_subjects), n)
    table.add_row("worst site", *_summary(comparison, lambda m, key: min(_values(m, key))), "")
    spread = _summary(comparison, lambda m, key: max(_values(m, key)) - min(_values(m, key)))
    table.add_row("spread (best - worst)", *spread, "")
    return Group("Dice on each site's own held-out subjects, last round of each", table)


def _last_round(
    cohort: Cohort, out: Path, config: FederationConfig, engine: Engine
) -> dict[str, SiteMetrics]:
    LOG.info(f"baseline {out.name}")
    with claimed(out, config) as folder:
        run_engine(engine, folder, cohort, config)
    with History(folder.history) as history:
        return history.rounds()[-1].metrics


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _values(metrics: dict[str, SiteMetrics], key: str) -> list[float]:
    return [mean_dice(m) if key == "mean" else m.means[key] for m in metrics.values()]


def _over_sites(metrics: dict[str, SiteMetrics], key: str) -> float:
    values = _values(metrics, key)
    return sum(values) / len(values)


def _over_subjects(metrics: dict[str, SiteMetrics], key: str) -> float:
    keys = [f"dice/{region}" for region in REGIONS] if key == "mean" else [key]
    return sum(average(metrics, k, by_subject=True) for k in keys) / len(keys)


def _summary(comparison: Comparison, reduce: Reduce) -> list[str]:
    """Over the sites measured in all three ways, so that the ways can be compared."""
    sites = comparison.everywhere
    same = {way: {site: of[site] for site in sites} for way, of in comparison.metrics.items()}
    return [
        number(reduce(same[way], key) if sites else None)
        for key in ("mean", "dice/WT")
        for way in WAYS
    ]


def record_comparison(comparison: Comparison, out: Path) -> None:
    """Add the comparison to `results.json`."""
    path = out / "results.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["comparison"] = comparison.as_dict()
    write_text_atomically(path, json.dumps(document, indent=1, allow_nan=False))
