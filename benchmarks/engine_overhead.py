"""A federation round in one machine beyond training: ours and Flower's Ray engine.

    python benchmarks/engine_overhead.py [--sites 4,10,23] [--repeats 5] [--rounds 3] [--json FILE]
        [--quick]

All do the same work: the same initial network of 20 MB in fp32; in every round each site trains, the
updates are averaged, and each site evaluates the new model. "Training" adds a constant of the site to
every weight and "evaluation" answers fixed numbers, so a round is the engine. The final weights are
compared: initial + rounds * mean of the constants.

- ours: `simulation.grid.run_in_process` with the product's ServerApp and ClientApp, default settings:
  checks, outliers, synced checkpoints, history and the sites' records are in its time.
- Flower: `run_simulation` (Ray) with stock FedAvg and a core for each actor, so all cores work. It keeps
  nothing on disk.

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
OURS, FLOWER = "fedbrats, in process", "Flower, Ray"


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


def seconds_of(result: dict[str, Any]) -> list[float]:
    """Of each round but the first. Raises RuntimeError: it did other work than was asked for."""
    if not math.isclose(result["moved"], result["expected"], rel_tol=1e-3):
        raise RuntimeError(f"the weights moved {result['moved']}, expected {result['expected']}")
    return [b - a for a, b in zip(result["ends"], result["ends"][1:], strict=False)]


# ------------------------------------------------------------------------------- inside a block


def run_ours(sites: int, rounds: int, initial: Path, folder: Path) -> dict[str, Any]:
    from instant_rounds import instant_federation

    from common.weights import load_weights

    made = instant_federation(folder, sites, rounds)
    ends = made.run()
    first, last = load_weights(initial)[0], load_weights(made.last_checkpoint())[0]
    return {"ends": ends, "moved": moved(first, last), "training": made.training_seconds}


def run_flower(sites: int, rounds: int, initial: Path, folder: Path) -> dict[str, Any]:
    from common.environment import prepare_environment

    prepare_environment()
    import safetensors.torch
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    step = STEP
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        import torch  # noqa: F401  Flower looks whether it is there

        weights = message.content["arrays"].to_torch_state_dict()
        for tensor in weights.values():
            if tensor.is_floating_point():
                tensor += step * (1 + int(context.node_config["partition-id"]))
        metrics = MetricRecord({"num-examples": 1, "loss": 1.0})
        content = RecordDict({"arrays": ArrayRecord(weights), "metrics": metrics})
        return Message(content, reply_to=message)

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        import torch  # noqa: F401

        message.content["arrays"].to_torch_state_dict()
        metrics = MetricRecord({"num-examples": 1, "dice": 0.5, "loss": 0.5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    ends: list[float] = []
    result: dict[str, Any] = {}

    class Marking(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            replies = list(replies)
            assert all(reply.has_content() for reply in replies), [r.error for r in replies]
            assert len(replies) == sites
            return super().aggregate_train(server_round, replies)

        def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
            metrics = super().aggregate_evaluate(server_round, list(replies))
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

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=sites,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return {"ends": ends, **result}


def moved(first: Any, last: Any) -> float:
    """How far the largest tensor's mean has moved."""
    name = max(first, key=lambda name: first[name].numel())
    return float((last[name].double() - first[name].double()).mean())


def inside(way: str, sites: int, rounds: int, initial: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = {OURS: run_ours, FLOWER: run_flower}[way]
        result = run(sites, rounds, initial, Path(folder))
    result["expected"] = rounds * STEP * (sites + 1) / 2
    print("\n" + json.dumps(result), flush=True)


# ------------------------------------------------------------------------------------- outside


def compare(sites: int, chosen: argparse.Namespace, initial: Path) -> dict[str, Any]:
    rounds = chosen.rounds + 1
    own = [sys.executable, str(HERE / "engine_overhead.py"), "--initial", str(initial)]
    asked = ["--sites", str(sites), "--rounds", str(rounds), "--inside"]
    commands = {OURS: [*own, *asked, OURS], FLOWER: [*own, *asked, FLOWER]}
    seconds: dict[str, list[float]] = {way: [] for way in commands}
    every: dict[str, list[float]] = {way: [] for way in commands}
    rows: dict[str, Any] = {}
    for repeat in range(chosen.repeats + 1):
        for way, command in commands.items():
            result = block(command, memory=repeat == chosen.repeats)
            took = seconds_of(result)
            if repeat < chosen.repeats:
                seconds[way].append(statistics.median(took))
                every[way] += took
            else:
                rows[way] = {
                    "peak_mib": round(result["peak"] / 2**20),
                    "processes": result["processes"],
                }
            print(f"{sites} sites, {way}: {' '.join(f'{s:.2f}' for s in took)}", file=sys.stderr)
    for way, row in rows.items():
        row["round_s"] = every[way]
        pairs = zip(seconds[way], seconds[OURS], strict=True)
        row["ratio"] = spread([theirs / ours for theirs, ours in pairs])
        row["memory_ratio"] = row["peak_mib"] / rows[OURS]["peak_mib"]
    load = [round(x, 2) for x in os.getloadavg()]
    return {"sites": sites, "rounds_a_block": chosen.rounds, "ways": rows, "load": load}


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['sites']} sites, load averages {result['load']} on {os.cpu_count()} cores")
    print(
        f"{'':24}{'round s, median (range)':>26}{'x ours (range)':>22}{'peak MiB':>10}{'x ours':>8}"
    )
    for way, row in result["ways"].items():
        s, r = spread(row["round_s"]), row["ratio"]
        met = ""
        if way != OURS:
            met = f"  {REACH:g}: {'met' if r['median'] >= REACH else 'MISSED'}"
        round_s = f"{s['median']:.2f} ({s['min']:.2f}-{s['max']:.2f})"
        ratio = f"{r['median']:.1f} ({r['min']:.1f}-{r['max']:.1f})"
        print(
            f"{way:24}{round_s:>26}{ratio:>22}{row['peak_mib']:>10}{row['memory_ratio']:>8.1f}{met}"
        )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sites", help="default: 4,10,23, or 4 with --quick")
    parser.add_argument("--rounds", type=int, default=3, help="counted in each block")
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
