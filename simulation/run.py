"""`fed-sim run`: from a BraTS folder to a trained model, resumable by the same command."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.app import app as client_app
from client.device import best_device
from client.privacy import NotProtectable, require_protectable
from common.config import FederationConfig
from common.config_file import ConfigError, anchored, dump_config, load_config
from common.csv_cells import csv_text
from common.files import locked, write_text_atomically
from common.machine import available_cores
from common.masking import FEWEST_SITES
from common.model import network_for
from common.precision import autocast_dtype
from server.app import app as server_app
from server.beginning import beginning
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
    """`config` is the run's own: with the number of threads it began with."""

    folder: RunFolder
    config: FederationConfig
    cohort: Cohort
    verdict: Verdict
    threshold: ThresholdBaseline | None


def simulate(
    data: Path, out: Path, config: FederationConfig, *, cache: Path | None, engine: Engine
) -> Result:
    """Run the federation, or continue it where it was interrupted.

    A relative `server.init_from` is meant from the working directory.

    Raises:
        ConfigError: `out` holds a run with another configuration, or something else; or the weights
            to begin with cannot be used.
        AlreadyInUse: another process is running in `out`.
        UnusableData, SplitError, CacheError, FederationFailed, BadWeights: as their modules say.
        RayMissing: the engine is not installed.
    """
    if engine.name == "ray":
        require_ray()
    _require_buildable(config)
    config = anchored(_with_threads(config, out, engine), Path.cwd())
    if not _has_begun(RunFolder(out)):
        beginning(config)  # what is wrong with its file is said before hours go into preparing data
    with claimed(out, config) as folder:
        cohort = assemble(data, config, cache or out / "cache")
        _require_enough_for_a_sum(cohort, config)
        for site in cohort.sites:
            LOG.info(f"{site.name}: {len(site.training)} training, {len(site.held_out)} held out")
        try:
            run_engine(engine, folder, cohort, config)
        except FederationFailed:
            _write_results(folder, config, cohort, None, data)  # what was reached can be looked at
            raise
        return _write_results(folder, config, cohort, flair_threshold(cohort, config), data)


def _require_enough_for_a_sum(cohort: Cohort, config: FederationConfig) -> None:
    training = sum(site.trains for site in cohort.sites)
    if config.secure_aggregation and training < FEWEST_SITES:
        raise ConfigError(
            f"`secure_aggregation` needs at least {FEWEST_SITES} sites that train, found {training}: "
            "in a sum of two each would know the other's update."
        )


def _write_results(
    folder: RunFolder,
    config: FederationConfig,
    cohort: Cohort,
    threshold: ThresholdBaseline | None,
    data: Path,
) -> Result:
    with History(folder.history) as history:
        result = Result(folder, config, cohort, verdict(history), threshold)
        text = _results_json(history, result, data, _comparison_so_far(folder))
        write_text_atomically(folder.path / "results.json", text)
        write_text_atomically(folder.path / "results.csv", _results_csv(history))
    return result


def _require_buildable(config: FederationConfig) -> None:
    """What only the network and the device can refuse, before hours go into preparing data."""
    try:
        network = network_for(config)
    except ValueError as error:
        raise ConfigError(f"network `{config.network.name}`: {error}") from error
    if config.privacy.epsilon is not None:
        try:
            require_protectable(network, config)
        except NotProtectable as error:
            raise ConfigError(f"`privacy.epsilon` is set: {error}") from error
    try:
        autocast_dtype(config.training.precision, best_device())
    except ValueError as error:
        raise ConfigError(f"`training.precision`: {error}") from error


def _with_threads(config: FederationConfig, out: Path, engine: Engine) -> FederationConfig:
    """Settle the number of threads for the whole run: the last bits of every sum depend on it.

    A run that is continued keeps the number it began with, whatever cores it finds now.
    """
    if config.training.threads is not None:
        return config
    saved = RunFolder(out).config
    threads = load_config(saved).training.threads if saved.exists() else None
    threads = threads or (engine.cpus_per_site if engine.name == "ray" else available_cores())
    training = config.training.model_copy(update={"threads": threads})
    return config.model_copy(update={"training": training})


@contextmanager
def claimed(out: Path, config: FederationConfig) -> Iterator[RunFolder]:
    """`out` as the folder of a run with this configuration, locked while the block runs.

    A run that has completed a round keeps its configuration; before that nothing is lost by another.

    Raises:
        ConfigError: `out` holds rounds of another configuration, or something else than a run.
        AlreadyInUse: another process is running in `out`.
    """
    folder = RunFolder(out)
    ours = folder.config.exists() or folder.lock.exists()
    if out.is_file() or (
        out.is_dir() and not ours and not all(p.match(".*.tmp") for p in out.iterdir())
    ):
        raise ConfigError(f"{out} is not empty and holds no run; choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    with locked(folder.lock):
        _settle_config(folder, config)
        yield folder


def _settle_config(folder: RunFolder, config: FederationConfig) -> None:
    if _has_begun(folder):
        before = load_config(folder.config)
        if before != config:
            changed = ", ".join(_differences(before.model_dump(), config.model_dump()))
            raise ConfigError(
                f"{folder.path} holds rounds of another configuration (differs in: {changed}). "
                "Choose another --out, or use the same configuration to continue it."
            )
    write_text_atomically(folder.config, dump_config(config))


def _has_begun(folder: RunFolder) -> bool:
    """Has a round been completed?"""
    if not folder.config.exists() or not folder.history.exists():
        return False
    with History(folder.history) as history:
        return bool(history.rounds())


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
            f"{folder.path} was begun with other scans or patients, or other ones held out, at "
            f"{', '.join(changed)}. Restore them, or choose another --out."
        )


def _comparison_so_far(folder: RunFolder) -> Any:
    """Baselines trained by an earlier call stay in the results of a later one."""
    try:
        return json.loads((folder.path / "results.json").read_text(encoding="utf-8"))["comparison"]
    except (OSError, ValueError, KeyError):
        return None


def _results_json(history: History, result: Result, data: Path, comparison: Any) -> str:
    cohort = result.cohort
    document: dict[str, Any] = {
        **results_document(history),
        "data": {
            "folder": str(data),
            "unmapped": list(cohort.unmapped),
            "lost_sites": list(cohort.lost_sites),
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
        "comparison": comparison,
    }
    return json.dumps(document, indent=1, allow_nan=False)


def _results_csv(history: History) -> str:
    """One line per round, site and metric, and the final ones with stage `final`."""
    rows: list[list[Any]] = []
    stages = [("round", r.round, r.metrics) for r in history.rounds()]
    final = history.final()
    if final is not None:
        stages.append(("final", *final))
    for stage, number, metrics in stages:
        for site, of in metrics.items():
            for key, value in of.means.items():
                rows.append([stage, number, site, key, value, of.defined.get(key, of.n)])
    return csv_text(["stage", "round", "site", "metric", "mean", "subjects"], rows)


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for key in a:
        if isinstance(a[key], Mapping) and isinstance(b[key], Mapping):
            changed += _differences(a[key], b[key], f"{prefix}{key}.")
        elif a[key] != b[key]:
            changed.append(f"{prefix}{key}")
    return changed
