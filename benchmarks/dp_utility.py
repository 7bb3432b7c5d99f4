"""What privacy costs in Dice: whole-tumour Dice of a simulated federation at several budgets.

    python benchmarks/dp_utility.py [--quick] [--work FOLDER]

Six phantom institutions; the same network from scratch and from a model trained without privacy on
phantoms of other scanners (another seed, stronger differences). Each budget is every site's own. The
figure is that of the last round, which nobody chose by looking, so no choice is hidden in it; clip,
learning rates and rounds were chosen by hand on this phantom, which a real hospital would have to
pay for. Resumable: the same command goes on. Takes about an hour on two cores; --quick some minutes,
with numbers that mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

FED_SIM = str(Path(sys.executable).parent / "fed-sim")
BUDGETS = (None, 20, 8, 3)
CONFIG = ("preprocess.shape=[48,48,48]", "privacy.crops=1", "training.threads=1", "seed=1")
RATES = {"from scratch": 0.5, "pre-trained": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("dp-utility"))
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    subjects, rounds = (6, 2) if asked.quick else (40, 10)
    work: Path = asked.work
    for name, more in (("data", ()), ("public", ("--seed", "7", "--heterogeneity", "1.5"))):
        grid = ("--grid", "80", "80", "52")
        call("phantom", work / name, "--sites", "6", "--subjects", subjects, *grid, *more)
    public = train(work, "public-model", work / "public", rounds)
    begun = {"from scratch": None, "pre-trained": public / "model.safetensors"}
    found: dict[str, dict[str, float]] = {way: {} for way in begun}
    for way, model in begun.items():
        for budget in BUDGETS:
            keys = [f"privacy.learning_rate={RATES[way]}"]
            keys += [f"privacy.epsilon={budget}"] if budget else []
            keys += [f"server.init_from={model}"] if model else []
            name = f"{way.replace(' ', '-')}-{budget or 'inf'}"
            run = train(work, name, work / "data", rounds, *keys)
            found[way][str(budget or "inf")] = whole_tumour(run)
    found["public model, not trained further"] = {"": before_any_round(work, public, rounds)}
    print("| whole-tumour Dice | " + " | ".join(f"epsilon {b or 'inf'}" for b in BUDGETS) + " |")
    print("|---|" + "---|" * len(BUDGETS))
    for way in begun:
        print(f"| {way} | " + " | ".join(f"{d:.3f}" for d in found[way].values()) + " |")
    print("the public model as it is:", f"{found['public model, not trained further']['']:.3f}")
    (work / "dp-utility.json").write_text(json.dumps(found, indent=1))


def train(work: Path, name: str, data: Path, rounds: int, *keys: str) -> Path:
    """The folder of a finished run with these settings."""
    out = work / name
    settings = (*CONFIG, f"rounds.number={rounds}", *keys)
    assign = [part for key in settings for part in ("--set", key)]
    call("run", data, "--out", out, "--cache", work / "cache", "--preset", "private", *assign)
    return out


def before_any_round(work: Path, public: Path, rounds: int) -> float:
    """The public model on the same held-out subjects: one round in which nothing is learned."""
    still = ("training.learning_rate=1e-12", f"server.init_from={public / 'model.safetensors'}")
    return whole_tumour(train(work, "public-as-it-is", work / "data", 1, *still))


def whole_tumour(run: Path) -> float:
    """Mean over sites of the last round."""
    last = json.loads((run / "results.json").read_text())["rounds"][-1]["metrics"]
    dice = [site["means"]["dice/WT"] for site in last.values()]
    return sum(dice) / len(dice)


def call(*arguments: object) -> None:
    print("fed-sim", *arguments, file=sys.stderr, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([FED_SIM, *map(str, arguments)], check=True, env=environment, stdout=2)


if __name__ == "__main__":
    main()
