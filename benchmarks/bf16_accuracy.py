"""Does bf16 cost accuracy? The same federation in fp32 and in bf16, several seeds, Dice compared.

    python benchmarks/bf16_accuracy.py [--seeds 3] [--sites 3] [--subjects 8] [--json FILE]
                                       [--other TREE]

`fed-sim run --preset quick` on phantoms; a seed decides split, initial weights, order and augmentation,
so runs of one seed differ by the precision alone. `--other` names another checkout of this project,
run with the same seeds in bf16, to see that a change of the code cost nothing.
The gate: the mean difference of a pair is no larger than the spread between the seeds (standard
deviation of the fp32 runs), in each region; else it exits with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REGIONS = ("WT", "TC", "ET")
HERE = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if chosen.seeds < 2:
        parser.error("--seeds must be 2 at least: the gate is their spread")
    kinds = {"fp32": (HERE, "fp32"), "bf16": (HERE, "bf16")}
    if chosen.other:
        kinds["other tree, bf16"] = (chosen.other.resolve(), "bf16")
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data"
        size = ("--sites", chosen.sites, "--subjects", chosen.subjects, "--grid", 80, 80, 52)
        simulate(HERE, "phantom", data, *size)
        for seed in range(1, chosen.seeds + 1):
            for kind, (tree, precision) in kinds.items():
                out = folder / f"{seed}-{kind.split(',')[0]}"
                settings = {
                    "seed": seed,
                    "training.precision": precision,
                    "rounds.number": chosen.rounds,
                }
                assign = [x for k, v in settings.items() for x in ("--set", f"{k}={v}")]
                simulate(tree, "run", data, "--out", out, "--preset", "quick", *assign)
                recorded = json.loads(simulate(tree, "results", out, "--json"))
                found[kind].append(final_dice(recorded))
                print(f"seed {seed} {kind:18}", text(found[kind][-1]), flush=True)
    passed = gate(found)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    raise SystemExit(0 if passed else 1)


def simulate(tree: Path, *words: Any) -> str:
    program = "import sys; from simulation.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"fed-sim {words[0]} failed in {tree}:\n{done.stderr[-2000:]}")
    return done.stdout


def final_dice(recorded: dict[str, Any]) -> dict[str, float]:
    """Of the last round's model, the mean over sites."""
    sites = recorded["rounds"][-1]["metrics"].values()
    return {r: statistics.mean(site["means"][f"dice/{r}"] for site in sites) for r in REGIONS}


def gate(found: dict[str, list[dict[str, float]]]) -> bool:
    passed = True
    for kind, runs in found.items():
        means = {r: statistics.mean(run[r] for run in runs) for r in REGIONS}
        print(f"{kind:25} mean     ", text(means))
        if kind == "fp32":
            continue
        for r in REGIONS:
            first = found["fp32"] if kind == "bf16" else found["bf16"]
            differences = [b[r] - a[r] for a, b in zip(first, runs, strict=True)]
            noise = statistics.stdev(run[r] for run in found["fp32"])
            good = abs(statistics.mean(differences)) <= noise
            passed &= good
            spread = " ".join(f"{d:+.3f}" for d in differences)
            verdict = "within" if good else "BEYOND"
            print(f"   {r}: differences {spread}; seeds' spread {noise:.3f}: {verdict}")
    return passed


def text(dice: dict[str, float]) -> str:
    return " ".join(f"{region} {value:.3f}" for region, value in dice.items())


if __name__ == "__main__":
    main()
