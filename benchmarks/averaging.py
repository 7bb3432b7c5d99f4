"""Peak memory and time of averaging 23 sites of a 31M-parameter model, one update at a time.

    python benchmarks/averaging.py [--sites 23] [--millions 31] [--json FILE]

Each update is made when it is needed and forgotten after it is added, as `server.rounds` does. The
result is compared with a float64 weighted mean of some of the tensors.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch

from server.average import WeightedSum, add, mean

TENSORS = 40


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def update(site: int, parameters: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(site)
    size = parameters // TENSORS
    return {f"layer{i}": torch.randn(size, generator=generator) for i in range(TENSORS)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--sites", type=int, default=23)
    options.add_argument("--millions", type=float, default=31)
    options.add_argument("--json")
    chosen = options.parse_args()
    parameters = int(chosen.millions * 1e6)
    subjects = [4 + 7 * (site % 18) for site in range(chosen.sites)]
    before = peak_mib()
    one_model = parameters * 4 / 2**20
    running: WeightedSum | None = None
    seconds = 0.0
    for site, n in enumerate(subjects):
        weights = update(site, parameters)
        begin = time.perf_counter()
        running = add(running, weights, n)
        seconds += time.perf_counter() - begin
        like = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in weights.items()}
        del weights
    assert running is not None
    begin = time.perf_counter()
    averaged = mean(running, like)
    seconds += time.perf_counter() - begin
    used = peak_mib() - before
    exact = sum(n * update(s, parameters)["layer7"].double() for s, n in enumerate(subjects)) / sum(
        subjects
    )
    error = float((averaged["layer7"].double() - exact).abs().max())
    result = {
        "sites": chosen.sites,
        "parameters": parameters,
        "one_model_mib": round(one_model),
        "peak_beyond_start_mib": round(used),
        "peak_in_models": round(used / one_model, 2),
        "seconds": round(seconds, 2),
        "largest_error_against_float64": error,
    }
    for key, value in result.items():
        print(f"{key:32} {value}")
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
