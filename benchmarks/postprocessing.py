"""What each post-processing step, and test-time flips, gain or lose on a run's held-out subjects.

    python benchmarks/postprocessing.py [RUN] [--json FILE]

Trains nothing if RUN is a folder of `fed-sim run` with its data still in place; without RUN it makes
synthetic institutions and a small federation on them first (about five minutes). Every step is
measured alone, then the presets of `fed-client predict`, and those with flips too: Dice and
HD95 of WT, TC and ET against the same network's bare labels, and for how many subjects the mean Dice
of the three regions got better or worse. Synthetic tumours have smooth borders and no stray pieces, so
a gain or loss here need not be one on patients: run it on a run of your own data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from client.evaluation import class_scores, measured
from client.flips import flipped_scores
from client.postprocessing import NONE, RECOMMENDED, REFERENCE, PostProcessing, postprocess
from client.prediction import Model, load_model
from common.config_file import load_config
from common.metrics import REGIONS
from common.progress import track
from sites.cache import CachedSubject
from sites.preprocess import best_class, own_scores, placed

STEPS = {
    "none": NONE,
    "threshold 0.5": PostProcessing(threshold=0.5),
    "threshold 0.7": PostProcessing(threshold=0.7),
    "opening 1 mm": PostProcessing(opening_mm=1),
    "closing 1 mm": PostProcessing(closing_mm=1),
    "fill holes": PostProcessing(fill_holes=True),
    "pieces < 20 mm3": PostProcessing(smallest_mm3=20),
    "pieces < 50 mm3": PostProcessing(smallest_mm3=50),
    "pieces < 200 mm3": PostProcessing(smallest_mm3=200),
    "ET < 20 mm3 is NCR": PostProcessing(tiny_et_mm3=20),
    "ET < 50 mm3 is NCR": PostProcessing(tiny_et_mm3=50),
    "ET < 200 mm3 is NCR": PostProcessing(tiny_et_mm3=200),
    "preset reference": REFERENCE,
    "preset recommended": RECOMMENDED,
}
WITH_FLIPS = ("none", "preset reference", "preset recommended")
Row = dict[str, Any]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("run", type=Path, nargs="?")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        document = measure(chosen.run or small_run(Path(name)))
    print(table(document))
    if chosen.json:
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")


def small_run(folder: Path) -> Path:
    data, run = folder / "data", folder / "run"
    simulate("phantom", data, "--sites", 4, "--subjects", 16, "--grid", 80, 80, 52)
    quick = ("--preset", "quick", "--set", "rounds.number=8", "--set", "held_out_fraction=0.4")
    simulate("run", data, "--out", run, *quick)
    return run


def simulate(*arguments: object) -> None:
    program = str(Path(sys.executable).parent / "fed-sim")
    subprocess.run([program, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def held_out(run: Path) -> Iterator[CachedSubject]:
    from simulation.cohort import assemble

    data = json.loads((run / "results.json").read_text(encoding="utf-8"))["data"]["folder"]
    cohort = assemble(Path(data), load_config(run / "federation.yaml"), run / "cache")
    for site in cohort.sites:
        yield from site.held_out


def measure(run: Path) -> dict[str, Any]:
    model = load_model(run / "model.safetensors")
    subjects = list(held_out(run))
    scores: dict[tuple[bool, str], list[Row]] = {}
    seconds = {False: 0.0, True: 0.0}
    for subject in track(subjects, "measuring", len(subjects), "subjects"):
        for flips in (False, True):
            begin = perf_counter()
            raw = raw_scores(model, subject, flips)
            seconds[flips] += perf_counter() - begin
            own = own_scores(raw, subject.geometry)
            labels, probabilities = best_class(own), torch.softmax(own, dim=0).cpu().numpy()
            for name in WITH_FLIPS if flips else STEPS:
                steps = STEPS[name]
                done = postprocess(labels, probabilities, subject.geometry.spacing, steps)
                scores.setdefault((flips, name), []).append(scored(subject, done))
    bare = scores[False, "none"]
    return {
        "subjects": len(subjects),
        "seconds_per_subject": {
            "without_flips": seconds[False] / len(subjects),
            "with_flips": seconds[True] / len(subjects),
        },
        "rows": [
            {"flips": flips, "step": name} | compared(rows, bare)
            for (flips, name), rows in sorted(scores.items(), key=lambda entry: entry[0][0])
        ],
    }


def raw_scores(model: Model, subject: CachedSubject, flips: bool) -> torch.Tensor:
    arguments = (model.network, subject.image(), model.config, model.device)
    return flipped_scores(*arguments)[0] if flips else class_scores(*arguments)


def scored(subject: CachedSubject, inside: np.ndarray) -> Row:
    """Dice and HD95 of the three regions, on the subject's own voxels."""
    metrics = measured(subject, placed(inside, subject.geometry), surface_distances=True)
    return {f"{m}/{r}": metrics.scores[r][m] for m in ("dice", "hd95") for r in REGIONS}


def compared(rows: list[Row], bare: list[Row]) -> Row:
    def mean(of: list[Row], key: str) -> float:
        return statistics.fmean(row[key] for row in of)

    def regions(row: Row) -> float:
        return statistics.fmean(row[f"dice/{region}"] for region in REGIONS)

    gains = [regions(a) - regions(b) for a, b in zip(rows, bare, strict=True)]
    return {
        "mean": {key: mean(rows, key) for key in rows[0]},
        "difference": {key: mean(rows, key) - mean(bare, key) for key in rows[0]},
        "better": sum(gain > 1e-9 for gain in gains),
        "worse": sum(gain < -1e-9 for gain in gains),
    }


def table(document: dict[str, Any]) -> str:
    lines = [
        "| step | Dice WT | TC | ET | HD95 WT | TC | ET | better / worse |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, row in enumerate(document["rows"]):
        mean, change = row["mean"], row["difference"]
        if number == 0:
            cells = [
                f"{v:.4f}" if key.startswith("dice") else f"{v:.2f}" for key, v in mean.items()
            ]
        else:
            cells = [
                f"{v:+.4f}" if key.startswith("dice") else f"{v:+.2f}" for key, v in change.items()
            ]
        name = ("flips, " if row["flips"] else "") + row["step"]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['better']} / {row['worse']} |")
    cost = document["seconds_per_subject"]
    lines.append(
        f"{document['subjects']} held-out subjects; the network took {cost['without_flips']:.2f} s "
        f"a subject without flips, {cost['with_flips']:.2f} s with. First line: means (Dice; mm); "
        "the others: differences to it."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
