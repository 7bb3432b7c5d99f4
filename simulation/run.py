"""`fed-sim run`: from a BraTS folder to a trained model, resumable by the same command."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.app import app as client_app
from common.config import FederationConfig
from common.config_file import ConfigError, dump_config, load_config
from common.files import locked, write_text_atomically
from common.model import network_for
from server.app import app as server_app
from server.checkpoint import RunFolder
from server.history import History
from server.roll_call import FederationFailed
from server.tables import Verdict, results_document, verdict
from simulation.cohort import Cohort, UnusableData, assemble, changed_sites, write_sites
from simulation.grid import run_in_process
from simulation.ray_engine import require_ray, run_on_ray
from simulation.threshold import ThresholdBaseline, flair_threshold

LOG = logging.getLogger("fedbrats")


@dataclass(frozen=True)
class Engine:
    """`in-process` has hospitals take turns; `ray` places each on its share of CPUs and GPUs."""

    name: str = "in-process"
    cpus_per_site: int = 1
    gpus_per_site: float = 0.0


@dataclass(frozen=True)
class Result:
    folder: RunFolder
    cohort: Cohort
    verdict: Verdict
    threshold: ThresholdBaseline | None


def simulate(
    data: Path, out: Path, config: FederationConfig, *, cache: Path | None, engine: Engine
) -> Result:
    """Run the federation, or continue it where it was interrupted.

    Raises:
        ConfigError: `out` holds a run with another configuration, or something else.
        AlreadyInUse: another process is running in `out`.
        UnusableData, SplitError, CacheError, FederationFailed, BadWeights: as their modules say.
        RayMissing: the engine is not installed.
    """
    if engine.name == "ray":
        require_ray()
    _require_buildable(config)
    folder = claim_folder(out, config)
    with locked(folder.lock):
        cohort = assemble(data, config, cache or out / "cache")
        for site in cohort.sites:
            LOG.info(f"{site.name}: {len(site.training)} training, {len(site.held_out)} held out")
        try:
            run_engine(engine, folder, cohort, config)
        except FederationFailed:
            _write_results(folder, cohort, None, data)  # what was reached can be looked at
            raise
        return _write_results(folder, cohort, flair_threshold(cohort, config), data)


def _write_results(
    folder: RunFolder, cohort: Cohort, threshold: ThresholdBaseline | None, data: Path
) -> Result:
    with History(folder.history) as history:
        result = Result(folder, cohort, verdict(history), threshold)
        text = _results_json(history, result, data)
        write_text_atomically(folder.path / "results.json", text)
        write_text_atomically(folder.path / "results.csv", _results_csv(history))
    return result


def _require_buildable(config: FederationConfig) -> None:
    """Widths, sizes and norm must fit the network before hours go into preparing data."""
    try:
        network_for(config)
    except ValueError as error:
        raise ConfigError(f"network `{config.network.name}`: {error}") from error


def claim_folder(out: Path, config: FederationConfig) -> RunFolder:
    """Make `out` the folder of a run with this configuration; an existing one must have the same."""
    folder = RunFolder(out)
    if folder.config.exists():
        before = load_config(folder.config)
        if before != config:
            changed = ", ".join(_differences(before.model_dump(), config.model_dump()))
            raise ConfigError(
                f"{out} holds a run with another configuration (differs in: {changed}). "
                "Choose another --out, or use the same configuration to continue it."
            )
        return folder
    if out.is_file() or (out.is_dir() and not all(p.match(".*.tmp") for p in out.iterdir())):
        raise ConfigError(f"{out} is not empty and holds no run; choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder.config, dump_config(config))
    return folder


def run_engine(engine: Engine, folder: RunFolder, cohort: Cohort, config: FederationConfig) -> None:
    """Run the cohort's federation in `folder`, or continue it.

    Raises:
        UnusableData: the rounds that `folder` holds are of other subjects.
    """
    if folder.history.exists():
        _require_same_subjects(folder, cohort)
    sites = write_sites(cohort, folder.path / "sites", config)
    if engine.name == "ray":
        run_on_ray(
            server_app,
            client_app,
            folder.path.resolve(),
            {node: path.resolve() for node, path in sites.items()},
            cpus_per_site=engine.cpus_per_site,
            gpus_per_site=engine.gpus_per_site,
        )
    else:
        run_in_process(server_app, client_app, folder.path, sites)


def _require_same_subjects(folder: RunFolder, cohort: Cohort) -> None:
    with History(folder.history) as history:
        changed = changed_sites(cohort, folder.path / "sites") if history.rounds() else []
    if changed:
        raise UnusableData(
            f"{folder.path} was begun with other scans, or other ones held out, at "
            f"{', '.join(changed)}. Restore them, or choose another --out."
        )


def _results_json(history: History, result: Result, data: Path) -> str:
    cohort = result.cohort
    document: dict[str, Any] = {
        **results_document(history),
        "data": {
            "folder": str(data),
            "unmapped": list(cohort.unmapped),
            "left_out": list(cohort.left_out),
            "findings": [finding.as_dict() for finding in cohort.findings],
            "subjects": {
                site.name: {
                    "trains": site.trains,
                    "training": [entry.id for entry in site.training],
                    "held_out": [entry.id for entry in site.held_out],
                }
                for site in cohort.sites
            },
        },
        "flair_threshold": vars(result.threshold) if result.threshold else None,
    }
    return json.dumps(document, indent=1, allow_nan=False)


def _results_csv(history: History) -> str:
    """One line per round, site and metric, and the final ones with stage `final`."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["stage", "round", "site", "metric", "mean", "subjects"])
    stages = [("round", r.round, r.metrics) for r in history.rounds()]
    final = history.final()
    if final is not None:
        stages.append(("final", *final))
    for stage, number, metrics in stages:
        for site, of in metrics.items():
            for key, value in of.means.items():
                table.writerow([stage, number, site, key, value, of.defined.get(key, of.n)])
    return text.getvalue()


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for key in a:
        if isinstance(a[key], Mapping) and isinstance(b[key], Mapping):
            changed += _differences(a[key], b[key], f"{prefix}{key}.")
        elif a[key] != b[key]:
            changed.append(f"{prefix}{key}")
    return changed
