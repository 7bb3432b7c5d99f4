"""What fp16 updates cost in accuracy and save in bytes: the same federation with both, compared.

    python benchmarks/update_precision.py [--rounds 5] [--sites 4] [--json FILE]

`fed-sim run` of a small real federation with `rounds.updates` fp32 and fp16; all else is the same to
the last bit (one thread, fp32 training), so what differs comes from the rounding of the updates, and
from what training makes of it. Compared are the models after the first and the last round, and every
site's Dice and loss. Training enlarges any difference, so the same is measured for one that nobody
minds: fp32 with two threads, which sum in another order.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SETTINGS = {
    "training.epochs": 1,
    "training.precision": "fp32",
    "preprocess.shape": "[32,32,32]",
    "network.name": "residual_unet",
    "network.channels": "[16,32,64,128]",
    "rounds.plateau_patience": "null",
}


def main() -> None:
    options = argparse.ArgumentParser(description="fp16 updates against fp32 ones.")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--sites", type=int, default=4)
    options.add_argument("--subjects", type=int, default=8)
    options.add_argument("--json")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        simulate(
            *("phantom", folder / "data", "--sites", chosen.sites, "--subjects", chosen.subjects),
            *("--grid", 80, 80, 52),
        )
        initial = initial_weights()
        result: dict[str, Any] = {key: vars(chosen)[key] for key in ("rounds", "sites", "subjects")}
        for rounds in (1, chosen.rounds):
            exact = run(folder, rounds, "fp32", threads=1)
            rounded = run(folder, rounds, "fp16", threads=1)
            reordered = run(folder, rounds, "fp32", threads=2)
            result["bytes_an_update"] = {"fp32": exact["bytes"], "fp16": rounded["bytes"]}
            result[f"after_round_{rounds}"] = {
                "fp16": compared(exact, rounded, initial),
                "fp32_with_two_threads": compared(exact, reordered, initial),
            }
    print(json.dumps(result, indent=1))
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(result, indent=1) + "\n")


def run(folder: Path, rounds: int, updates: str, threads: int) -> dict[str, Any]:
    """The model after the last round, each site's metrics of it, and the bytes of one update."""
    import safetensors.torch

    out = folder / f"{updates}-{threads}-{rounds}"
    keys = SETTINGS | {"rounds.number": rounds, "rounds.updates": updates}
    keys |= {"training.threads": threads}
    assign = [text for key, value in keys.items() for text in ("--set", f"{key}={value}")]
    cache = ("--cache", folder / "cache")
    simulate("run", folder / "data", "--out", out, *cache, "--preset", "quick", *assign)
    last = json.loads((out / "results.json").read_text())["rounds"][-1]
    return {
        "weights": safetensors.torch.load_file(out / last["checkpoint"]),
        "metrics": last["metrics"],
        "loss": last["loss"],
        "bytes": max(site["bytes"] for site in last["contributions"]),
    }


def initial_weights() -> Any:
    from common import model
    from common.config_file import load_config

    assign = [f"{key}={value}" for key, value in SETTINGS.items()]
    return model.initial_weights(load_config(preset="quick", assign=assign))


def compared(one: dict[str, Any], other: dict[str, Any], initial: Any) -> dict[str, float]:
    """How far another run is from the first."""
    a, b = one["weights"], other["weights"]
    names = [name for name in a if a[name].is_floating_point()]
    off = sum(float((a[n] - b[n]).double().square().sum()) for n in names)
    moved = sum(float((a[n] - initial[n]).double().square().sum()) for n in names)
    dice = [
        abs(one["metrics"][site]["means"][key] - other["metrics"][site]["means"][key])
        for site in one["metrics"]
        for key in ("dice/WT", "dice/TC", "dice/ET")
    ]
    return {
        "largest_weight_difference": max(float((a[n] - b[n]).abs().max()) for n in names),
        "largest_change_since_start": max(float((a[n] - initial[n]).abs().max()) for n in names),
        "norm_of_difference_by_norm_of_change": (off / moved) ** 0.5,
        "largest_dice_difference_of_a_site": max(dice),
        "mean_dice_difference": sum(dice) / len(dice),
        "validation_loss_difference": abs(one["loss"] - other["loss"]),
    }


def simulate(*arguments: object) -> None:
    command = [sys.executable, "-c", "from simulation.cli import main; main()"]
    words = [str(argument) for argument in arguments]
    subprocess.run([*command, *words], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
