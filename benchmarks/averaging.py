"""Peak memory and time of making one model of a round's updates, each way in its own process.

    python benchmarks/averaging.py [--sites 23] [--millions 31] [--ways sum,fedavg,...] [--json FILE]

`sum` adds each update when it comes and forgets it, as the server does with
`rounds.outlier_factor: null`. The others write it to the disk first (`server.spool`), look for
outliers and then aggregate. `seconds` are of all this but not of making the updates. The result of
both FedAvgs is compared with a float64 weighted mean of one of the tensors.

`peak` is the highest resident memory beyond what the process had before the first update, the new
model included and the round's own model not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path

import torch
from flwr.supercore.task_identity import TaskIdentity

from common.config import Rounds
from common.weights import Weights
from server.average import WeightedSum, add, mean
from server.robust import aggregate, outliers
from server.spool import Kept, spool, write

TENSORS = 40
WAYS = ("sum", "fedavg", "trimmed_mean", "median", "krum")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def update(site: int, parameters: int) -> Weights:
    generator = torch.Generator().manual_seed(site)
    size = parameters // TENSORS
    return {f"layer{i:02d}": torch.randn(size, generator=generator) for i in range(TENSORS)}


def direct(subjects: list[int], model: Weights) -> tuple[Weights, float]:
    """The new model, and the seconds it took."""
    parameters = sum(t.numel() for t in model.values())
    running: WeightedSum | None = None
    seconds = 0.0
    for site, n in enumerate(subjects):
        weights = update(site, parameters)
        begin = time.perf_counter()
        running = add(running, weights, n)
        seconds += time.perf_counter() - begin
        del weights
    assert running is not None
    begin = time.perf_counter()
    averaged = mean(running, model)
    return averaged, seconds + time.perf_counter() - begin


def spooled(
    subjects: list[int], model: Weights, rounds: Rounds, folder: Path
) -> tuple[Weights, float]:
    parameters = sum(t.numel() for t in model.values())
    seconds = 0.0
    with spool(folder) as place:
        kept = []
        for site, n in enumerate(subjects):
            weights = update(site, parameters)
            begin = time.perf_counter()
            path = place / f"{site:04d}.safetensors"
            write(path, weights)
            kept.append(Kept(f"{site:02d}", n, 1.0, path))
            seconds += time.perf_counter() - begin
            del weights
        begin = time.perf_counter()
        assert not outliers(kept, 10.0)
        averaged, _ = aggregate(kept, model, rounds)
        return averaged, seconds + time.perf_counter() - begin


def measure(way: str, sites: int, parameters: int) -> dict[str, object]:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    subjects = [4 + 7 * (site % 18) for site in range(sites)]
    small = {"layer": torch.zeros(10)}
    mean(add(None, small, 1), small)  # what torch loads on first use is not ours
    model = update(sites, parameters)
    parameters = sum(t.numel() for t in model.values())
    update(0, parameters)
    before, one_model = peak_mib() - parameters * 4 / 2**20, parameters * 4 / 2**20
    if way == "sum":
        averaged, seconds = direct(subjects, model)
    else:
        with tempfile.TemporaryDirectory() as folder:
            rounds = Rounds.model_validate({"aggregation": way})
            averaged, seconds = spooled(subjects, model, rounds, Path(folder, "updates"))
    used = peak_mib() - before
    result: dict[str, object] = {
        "way": way,
        "sites": sites,
        "parameters": parameters,
        "one_model_mib": round(one_model),
        "peak_beyond_start_mib": round(used),
        "peak_in_models": round(used / one_model, 2),
        "seconds": round(seconds, 2),
        "load_average": round(os.getloadavg()[0], 1),
    }
    if way in ("sum", "fedavg"):
        exact = sum(n * update(s, parameters)["layer07"].double() for s, n in enumerate(subjects))
        error = (averaged["layer07"].double() - exact / sum(subjects)).abs().max()
        result["largest_error_against_float64"] = float(error)
    return result


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--sites", type=int, default=23)
    options.add_argument("--millions", type=float, default=31)
    options.add_argument("--ways", default="sum", help=f"some of {','.join(WAYS)}, or all")
    options.add_argument("--json")
    chosen = options.parse_args()
    ways = WAYS if chosen.ways == "all" else chosen.ways.split(",")
    results = []
    for way in ways:
        with multiprocessing.get_context("spawn").Pool(1) as one:
            arguments = (way, chosen.sites, int(chosen.millions * 1e6))
            results.append(one.apply(measure, arguments))
        for key, value in results[-1].items():
            print(f"{key:32} {value}")
        print()
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
