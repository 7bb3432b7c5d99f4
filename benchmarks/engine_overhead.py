"""A federation round in one machine beyond training: our engine, Flower's (Ray), NVFlare's simulator.

    python benchmarks/engine_overhead.py [--sites 4,10,23] [--repeats 5] [--rounds 3] [--json FILE]
        [--nvflare PYTHON] [--quick]

All do the same work: a model of 20 MB in fp32; in every round each site trains and the updates are
averaged. "Training" adds a constant of the site to every weight, so a round is the engine. The final
weights are compared: initial + rounds * mean of the constants.

- One pair of apps, Flower's FedAvg and a client that trains and evaluates, on both engines:
  `simulation.grid.run_in_process`, and `run_simulation` (Ray) with a core for each actor, so all cores
  work. Between these two only the engine differs. The engine's overhead is a round less the apps' own
  work as they time it themselves; Ray's clients are taken to share the cores perfectly.
- The product: its ServerApp and ClientApp on our engine, default settings. A network that holds what it
  was sent, fp16 changes, checks, outliers, synced checkpoints, history and the sites' records are in its
  time; neither of the others does any of that.
- NVFlare's own FedAvg (`nvflare_peer.py`, without evaluation), if `--nvflare` names the Python of an
  environment with it:  python -m venv V; V/bin/pip install nvflare==2.9.0

Blocks of the systems alternate; a block is a process of its own with one more round than is counted:
the first is left out. A round's time is from the end of the round before. Memory is read in one more
block: the largest sum over the process tree of proportional set sizes (PSS), looked at twice a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from interleaved import options, spread, write_json

HERE = Path(__file__).resolve().parent
REACH = 5.0
STEP = 1e-3  # times the site's number
LONGEST_BLOCK = 900.0  # seconds
OURS, RAY = "FedAvg, our engine", "FedAvg, Flower's (Ray)"
PRODUCT, NVFLARE = "fedbrats", "NVFlare's simulator"


class Tree:
    """The largest PSS of a process and all below it, read from /proc while it runs."""

    def __init__(self) -> None:
        self.peak = 0
        self.processes = 0

    def look(self, root: int) -> None:
        pids = below(root)
        self.peak = max(self.peak, sum(pss(pid) for pid in pids))
        self.processes = max(self.processes, len(pids))


def below(root: int) -> list[int]:
    """The process and its descendants, and those that a descendant left behind in its session."""
    parents: dict[int, int] = {}
    sessions: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                words = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)], sessions[int(folder.name)] = int(words[1]), int(words[3])
    found, new = {root}, {root}
    found |= {pid for pid, session in sessions.items() if session == root}
    while new:
        new = {pid for pid, parent in parents.items() if parent in found} - found
        found |= new
    return sorted(found)


def pss(pid: int) -> int:
    """Bytes; 0 of a process that has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def block(command: list[str], memory: bool) -> dict[str, Any]:
    """Run one block in a session of its own; what it printed last, and its peak memory.

    Raises:
        RuntimeError: it failed; the text is the end of what it said.
    """
    tree = Tree()
    environment = os.environ | {"RAY_DEDUP_LOGS": "0", "FLWR_TELEMETRY_ENABLED": "0"}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        until = time.monotonic() + LONGEST_BLOCK
        try:
            while process.poll() is None and time.monotonic() < until:
                if memory:
                    tree.look(process.pid)
                time.sleep(0.5)
        finally:
            if process.poll() is None:
                for pid in below(process.pid):
                    with contextlib.suppress(OSError):
                        os.kill(pid, 9)
            process.wait()
        said.seek(0)
        text = said.read()
    lines = [line for line in text.splitlines() if line.startswith('{"ends"')]
    if process.returncode or not lines:
        raise RuntimeError(f"{command[:3]} failed ({process.returncode}):\n{text[-3000:]}")
    return json.loads(lines[-1]) | {"peak": tree.peak, "processes": tree.processes}


def seconds_of(result: dict[str, Any], sites: int) -> list[float]:
    """Of each round but the first. Raises RuntimeError: it did other work than was asked for."""
    expected = result["rounds"] * STEP * (sites + 1) / 2
    if not math.isclose(result["moved"], expected, rel_tol=1e-3):
        raise RuntimeError(f"the weights moved {result['moved']}, expected {expected}")
    return [b - a for a, b in zip(result["ends"], result["ends"][1:], strict=False)]


# ------------------------------------------------------------------------------- inside a block


def run_product(sites: int, rounds: int, initial: Path, folder: Path) -> dict[str, Any]:
    from instant_rounds import instant_federation

    from common.weights import load_weights

    made = instant_federation(folder, sites, rounds)
    ends = made.run()
    first, last = load_weights(initial)[0], load_weights(made.last_checkpoint())[0]
    return {"ends": ends, "moved": moved(first, last), "training": made.training_seconds}


def run_apps(way: str, sites: int, rounds: int, initial: Path, folder: Path) -> dict[str, Any]:
    """Flower's FedAvg and a client, the same two on either engine."""
    from common.environment import prepare_environment

    prepare_environment()
    import safetensors.torch
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg

    step = STEP
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        import torch  # noqa: F401  Flower looks whether it is there

        begin = time.monotonic()
        # which site: Ray's nodes have a number, ours a folder
        told = context.node_config
        number = int(str(told.get("site-folder") or 1 + int(told["partition-id"])))
        weights = message.content["arrays"].to_torch_state_dict()
        for tensor in weights.values():
            if tensor.is_floating_point():
                tensor += step * number
        arrays = ArrayRecord(weights)
        numbers = {"num-examples": 1, "loss": 1.0, "seconds": time.monotonic() - begin}
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord(numbers)})
        return Message(content, reply_to=message)

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        import torch  # noqa: F401

        begin = time.monotonic()
        message.content["arrays"].to_torch_state_dict()
        numbers = {"num-examples": 1, "dice": 0.5, "seconds": time.monotonic() - begin}
        return Message(RecordDict({"metrics": MetricRecord(numbers)}), reply_to=message)

    ends: list[float] = []
    work: list[float] = []
    result: dict[str, Any] = {}
    at_once = 1 if way == OURS else min(sites, os.cpu_count() or 1)

    class Marking(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            replies = list(replies)
            assert all(reply.has_content() for reply in replies), [r.error for r in replies]
            assert len(replies) == sites
            begin = time.monotonic()
            arrays, metrics = super().aggregate_train(server_round, replies)
            assert metrics is not None
            mean = float(metrics["seconds"])  # type: ignore[arg-type]
            work.append(time.monotonic() - begin + mean * sites / at_once)
            return arrays, metrics

        def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
            metrics = super().aggregate_evaluate(server_round, list(replies))
            assert metrics is not None
            work[-1] += float(metrics["seconds"]) * sites / at_once  # type: ignore[arg-type]
            ends.append(time.monotonic())
            return metrics

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        first = safetensors.torch.load_file(initial)
        strategy = Marking(
            fraction_train=1.0,
            fraction_evaluate=1.0,
            min_train_nodes=sites,
            min_evaluate_nodes=sites,
            min_available_nodes=sites,
        )
        done = strategy.start(grid=grid, initial_arrays=ArrayRecord(first), num_rounds=rounds)
        result["moved"] = moved(first, done.arrays.to_torch_state_dict())

    if way == OURS:
        from simulation.grid import run_in_process

        run_in_process(server, client, folder, {n: Path(str(n)) for n in range(1, sites + 1)})
    else:
        from flwr.simulation import run_simulation

        run_simulation(
            server_app=server,
            client_app=client,
            num_supernodes=sites,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
    return {"ends": ends, "work": work, **result}


def moved(first: Any, last: Any) -> float:
    """How far the largest tensor's mean has moved."""
    name = max(first, key=lambda name: first[name].numel())
    return float((last[name].double() - first[name].double()).mean())


def inside(way: str, sites: int, rounds: int, initial: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if way == PRODUCT:
            result = run_product(sites, rounds, initial, Path(folder))
        else:
            result = run_apps(way, sites, rounds, initial, Path(folder))
    print("\n" + json.dumps(result | {"rounds": rounds}), flush=True)


# ------------------------------------------------------------------------------------- outside


def commands(sites: int, rounds: int, initial: Path, nvflare: str | None) -> dict[str, list[str]]:
    own = [sys.executable, str(HERE / "engine_overhead.py"), "--initial", str(initial)]
    asked = ["--sites", str(sites), "--rounds", str(rounds), "--inside"]
    found = {way: [*own, *asked, way] for way in (OURS, RAY, PRODUCT)}
    if nvflare:
        values = str(initial.stat().st_size // 4)
        peer = str(HERE / "nvflare_peer.py")
        found[NVFLARE] = [nvflare, peer, str(sites), str(rounds), values]
    return found


def compare(sites: int, chosen: argparse.Namespace, initial: Path) -> dict[str, Any]:
    ways = commands(sites, chosen.rounds + 1, initial, chosen.nvflare)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    overhead: dict[str, list[float]] = {OURS: [], RAY: []}
    rows: dict[str, Any] = {way: {"round_s": []} for way in ways}
    for repeat in range(chosen.repeats + 1):
        for way, command in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                own = [*command, folder] if way == NVFLARE else command
                result = block(own, memory=repeat == chosen.repeats)
            took = seconds_of(result, sites)
            if repeat < chosen.repeats:
                seconds[way].append(statistics.median(took))
                rows[way]["round_s"] += took
                if way in overhead:
                    worked = result["work"][1:]
                    beyond = [s - w for s, w in zip(took, worked, strict=True)]
                    overhead[way].append(statistics.median(beyond))
            else:
                rows[way]["peak_mib"] = round(result["peak"] / 2**20)
                rows[way]["processes"] = result["processes"]
            print(f"{sites} sites, {way}: {' '.join(f'{s:.2f}' for s in took)}", file=sys.stderr)
    for way, row in rows.items():
        row["x_our_engine"] = spread(
            [t / o for t, o in zip(seconds[way], seconds[OURS], strict=True)]
        )
        row["x_product"] = spread(
            [t / o for t, o in zip(seconds[way], seconds[PRODUCT], strict=True)]
        )
    load = [round(x, 2) for x in os.getloadavg()]
    ratios = [theirs / ours for theirs, ours in zip(overhead[RAY], overhead[OURS], strict=True)]
    return {
        "sites": sites,
        "rounds_a_block": chosen.rounds,
        "ways": rows,
        "engine_overhead_s": overhead,
        "engine_ratio": spread(ratios),
        "load": load,
    }


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['sites']} sites, load averages {result['load']} on {os.cpu_count()} cores")
    print(
        f"{'':24}{'round s, median (range)':>26}{'x our engine':>20}{'x fedbrats':>20}{'peak MiB':>10}"
    )
    for way, row in result["ways"].items():
        s, e, p = spread(row["round_s"]), row["x_our_engine"], row["x_product"]
        round_s = f"{s['median']:.2f} ({s['min']:.2f}-{s['max']:.2f})"
        engine = f"{e['median']:.1f} ({e['min']:.1f}-{e['max']:.1f})"
        product = f"{p['median']:.1f} ({p['min']:.1f}-{p['max']:.1f})"
        print(f"{way:24}{round_s:>26}{engine:>20}{product:>20}{row['peak_mib']:>10}")
    ours, rays = (statistics.median(result["engine_overhead_s"][way]) for way in (OURS, RAY))
    ratio = result["engine_ratio"]
    print(
        f"the same apps: ours takes {ours:.3f} s a round beyond their work, Flower's {rays:.3f} s: "
        f"{ratio['min']:.1f} / {ratio['median']:.1f} / {ratio['max']:.1f} times, "
        f"aim {REACH:g}: {'met' if ratio['median'] >= REACH else 'MISSED'}",
        flush=True,
    )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sites", help="default: 4,10,23, or 4 with --quick")
    parser.add_argument("--rounds", type=int, default=3, help="counted in each block")
    parser.add_argument("--nvflare", help="the Python of an environment with NVFlare")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--initial", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    if chosen.inside:
        inside(chosen.inside, int(chosen.sites), chosen.rounds, chosen.initial)
        return
    if chosen.quick:
        chosen.repeats = 1
    from round_overhead import initial_model

    results = []
    with tempfile.TemporaryDirectory() as folder:
        initial = Path(folder, "initial.safetensors")
        size = initial_model(initial)
        print(f"the model has {size / 1e6:.1f} MB")
        for sites in (chosen.sites or ("4" if chosen.quick else "4,10,23")).split(","):
            results.append(compare(int(sites), chosen, initial) | {"model_bytes": size})
            show(results[-1])
    write_json(chosen.json, results)


if __name__ == "__main__":
    main()
