"""What the federation itself costs: time to the first training, gap between rounds, peak memory.

    python benchmarks/four_sites.py [--sites 4] [--network residual_unet] [--json FILE]

The job of notes/users-want.md: some sites, 4 subjects each at 64^3, 3 rounds, 1 thread, on prepared
data. `fed-sim run` is started as a user would start it; its training and evaluation are only timed.
The gap is from the end of a round's evaluation to the start of the next training.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import json, os, resource, sys, time
from pathlib import Path
from common.environment import prepare_environment
prepare_environment()
import client.app as hospital
import simulation.cli as simulation
marks = []
def timed(name, function):
    def call(*args, **kwargs):
        marks.append((name, time.time()))
        try:
            return function(*args, **kwargs)
        finally:
            marks.append((name + " end", time.time()))
    return call
hospital.train = timed("train", hospital.train)
hospital.evaluate = timed("evaluate", hospital.evaluate)
begin = float(os.environ["BENCHMARK_BEGIN"])
simulation.app(sys.argv[2:], standalone_mode=False)
gaps = [b[1] - a[1] for a, b in zip(marks, marks[1:]) if (a[0], b[0]) == ("evaluate end", "train")]
Path(sys.argv[1]).write_text(json.dumps({
    "first_training_s": round(marks[0][1] - begin, 2),
    "gap_s": [round(gap, 3) for gap in gaps],
    "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
}))
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--sites", type=int, default=4)
    options.add_argument("--network", default="residual_unet")
    options.add_argument("--channels", default="16,32,64,128")
    options.add_argument("--json")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        simulate = [sys.executable, "-c", "from simulation.cli import main; main()"]
        data, cache = folder / "data", folder / "cache"
        cohort = ["phantom", data, "--sites", chosen.sites, "--subjects", 6, "--grid", 80, 80, 52]
        quiet(*simulate, *cohort)
        keys = {
            "network.name": chosen.network,
            "network.channels": f"[{chosen.channels}]",
            "preprocess.shape": "[64,64,64]",
            "training.epochs": 1,
            "training.threads": 1,
            "held_out_fraction": 0.33,
            "rounds.number": 1,
        }
        prepare = ["run", data, "--cache", cache, "--preset", "quick"]
        prepare += [text for key, value in keys.items() for text in ("--set", f"{key}={value}")]
        quiet(*simulate, *prepare, "--out", folder / "first")
        run = [*prepare, "--set", "rounds.number=3", "--out", folder / "run"]
        os.environ["BENCHMARK_BEGIN"] = str(time.time())
        quiet(sys.executable, "-c", CHILD, folder / "measured.json", *run)
        measured = {**vars(chosen), **json.loads((folder / "measured.json").read_text())}
    for key, value in measured.items():
        print(f"{key:20} {value}")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(measured, indent=1))


def quiet(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
