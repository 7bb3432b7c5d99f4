"""FedAvg of 23 models of 31 M parameters: ours against Flower's, time and memory; other aggregations.

    python benchmarks/averaging.py [--sites 23] [--millions 31] [--repeats 5] [--json FILE] [--quick]
    python benchmarks/averaging.py --ways all [--sites 10] [--millions 5] [--json FILE]

The first compares, in turn, what makes one model of the updates as they arrive (bytes):

- ours: `common.wire.decode`, `server.average.add` and `mean`, from whole fp32 weights or from the fp16
  changes that travel by default. Its checks are not in it; `decoded` leaves out the decoding.
- `aggregate_inplace`, the peer, and `aggregate_arrayrecords`, which Flower 1.41's FedAvg calls for
  messages. Both decode numpy's format inside; the latter encodes its result, too.

The errors against float64 are asserted to be no larger than Flower's. `peak` is the
highest resident memory beyond the inputs (those bytes or tensors), each way in a process of its own.

With `--ways`: memory and time of making one model of a round's updates. `sum` adds each when it comes
and forgets it. The others write it to the disk first (`server.spool`), look for outliers and then aggregate
from there, as the server does if an update is refused or `aggregation` is not FedAvg. `seconds` are of
all this but not of making the updates; `peak` is beyond what the process had before the first update,
the new model included and the round's own model not.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.common import FitRes, Parameters, Status
from flwr.common.typing import Code
from flwr.server.strategy.aggregate import aggregate_inplace
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from flwr.supercore.task_identity import TaskIdentity
from interleaved import interleaved, options, report, spread, write_json

from common.config import Rounds
from common.weights import Weights
from common.wire import decode, encode, encode_change
from server.average import WeightedMean, add, mean
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
    running: WeightedMean | None = None
    seconds = 0.0
    for site, n in enumerate(subjects):
        weights = update(site, parameters)
        begin = time.perf_counter()
        running = add(running, weights, n, model)
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
    mean(add(None, small, 1, small), small)  # what torch loads on first use is not ours
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


OURS, CHANGES, DECODED = "fedbrats, fp32 weights", "fedbrats, fp16 changes", "fedbrats, decoded"
INPLACE, RECORDS = "aggregate_inplace", "aggregate_arrayrecords"
REACH = 1.5


def near(model: Weights, site: int) -> Weights:
    """An update as sites send them: changed by about a thousandth."""
    return {name: t.roll(site + 1).mul_(1e-3).add_(t) for name, t in model.items()}


def way_of(name: str, model: Weights, subjects: Sequence[int]) -> Callable[[], Any]:
    """The inputs are made here; what is returned makes one model of them."""
    updates = (near(model, site) for site in range(len(subjects)))
    if name in (OURS, CHANGES, DECODED):
        pack = {OURS: encode, CHANGES: lambda w: encode_change(w, model), DECODED: dict}[name]
        blocks: list[Any] = [pack(weights) for weights in updates]

        def ours() -> Weights:
            running: WeightedMean | None = None
            for block, n in zip(blocks, subjects, strict=True):
                weights = block if name == DECODED else decode(block, model)
                running = add(running, weights, n, model)
                del weights  # before the next is decoded, as in the server
            assert running is not None
            return mean(running, model)

        return ours
    records = [
        RecordDict({"arrays": ArrayRecord(weights), "metrics": MetricRecord({"num-examples": n})})
        for weights, n in zip(updates, subjects, strict=True)
    ]
    if name == RECORDS:
        return lambda: aggregate_arrayrecords(records, "num-examples")
    results = [
        (None, FitRes(Status(Code.OK, ""), Parameters(bytes_of(record), "numpy.ndarray"), n, {}))
        for record, n in zip(records, subjects, strict=True)
    ]
    return lambda: aggregate_inplace(results)


def bytes_of(record: RecordDict) -> list[bytes]:
    return [array.data for array in record.array_records["arrays"].values()]


def arrays_of(result: Any) -> list[np.ndarray]:
    if isinstance(result, dict):
        return [tensor.numpy() for tensor in result.values()]
    return [a.numpy() for a in result.values()] if isinstance(result, ArrayRecord) else result


def errors_of(result: Any, model: Weights, subjects: Sequence[int]) -> tuple[float, float]:
    """Of a tensor, against the weighted mean in float64: the largest error, and how many values are
    not the fp32 number nearest to it."""
    name, index = "layer07", list(model).index("layer07")
    updates = (near(model, site)[name].double().numpy() for site in range(len(subjects)))
    exact = sum(n * weights for n, weights in zip(subjects, updates, strict=True)) / sum(subjects)
    got = arrays_of(result)[index]
    wrong = float(np.mean(got != exact.astype(np.float32)))
    return float(np.abs(got.astype(np.float64) - exact).max()), wrong


def peak_of(name: str, sites: int, parameters: int) -> float:
    """In models, beyond the inputs."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    torch.set_num_threads(1)
    way_of(name, update(99, 400), [1, 2])()  # what is loaded on first use is not counted
    way = way_of(name, update(99, parameters), numbers(sites))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    result = way()
    return (status("VmHWM") - before) * 1024 / (4 * parameters) if result is not None else 0.0


def status(key: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def numbers(sites: int) -> list[int]:
    return [4 + 7 * (site % 18) for site in range(sites)]


def compare(sites: int, parameters: int, repeats: int) -> dict[str, Any]:
    names = (OURS, CHANGES, DECODED, INPLACE, RECORDS)
    peaks = {}
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # or freed memory hides what is taken anew
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as one:
            peaks[name] = one.apply(peak_of, (name, sites, parameters))
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    torch.set_num_threads(1)  # as numpy, which Flower adds with
    model, subjects = update(99, parameters), numbers(sites)
    ways = {name: way_of(name, model, subjects) for name in names}
    errors = {name: errors_of(way(), model, subjects) for name, way in ways.items()}
    theirs = [min(of) for of in zip(errors[INPLACE], errors[RECORDS], strict=True)]
    for name in (OURS, DECODED):  # fp16 changes are rounded before they arrive
        assert all(a <= b for a, b in zip(errors[name], theirs, strict=True)), errors
    measured = interleaved(ways, repeats=repeats, warm_ups=0)
    facts: dict[str, Any] = {
        "peak beyond the inputs, models": {name: round(peak, 2) for name, peak in peaks.items()},
        "largest error, and share of values that are not the nearest fp32": {
            name: (f"{error:.2g}", f"{wrong:.2g}") for name, (error, wrong) in errors.items()
        },
    }
    for name in (OURS, CHANGES):
        ratio = spread(measured[RECORDS].cpu_ratios_to(measured[name]))
        facts[f"CPU of {RECORDS} over {name}"] = {k: round(v, 2) for k, v in ratio.items()}
    title = f"FedAvg of {sites} models of {parameters / 1e6:g} M parameters"
    return report(title, measured, peer=INPLACE, reach={OURS: REACH, CHANGES: REACH}, facts=facts)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sites", type=int, default=23)
    parser.add_argument("--millions", type=float, default=31)
    parser.add_argument("--ways", help=f"some of {','.join(WAYS)}, or all")
    chosen = parser.parse_args()
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    if chosen.quick:
        chosen.sites, chosen.millions = min(chosen.sites, 8), min(chosen.millions, 2)
    parameters = int(chosen.millions * 1e6) // TENSORS * TENSORS
    if chosen.ways is None:
        write_json(chosen.json, [compare(chosen.sites, parameters, chosen.repeats)])
        return
    results = []
    for way in WAYS if chosen.ways == "all" else chosen.ways.split(","):
        with multiprocessing.get_context("spawn").Pool(1) as one:
            results.append(one.apply(measure, (way, chosen.sites, parameters)))
        for key, value in results[-1].items():
            print(f"{key:32} {value}")
        print()
    write_json(chosen.json, results)


if __name__ == "__main__":
    main()
