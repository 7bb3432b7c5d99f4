"""What private training costs beside the same training without privacy: a ratio of times.

    python benchmarks/dp_cost.py [--threads 1] [--repeats 7] [--network NAME ...] [--quick] [--json FILE]

One step on two patients of 64^3 in bf16 with Adam, by the product's own functions:
`client.training.train` takes them as one batch, `client.privacy.train_privately` one after the other,
with clipping, noise and everything else that a private round does. Both in turn in one process, after
one of each that does not count, without augmentation, which costs both the same and would hide the
difference. A ratio is between neighbours in time. With one thread, CPU seconds are hardly disturbed
by other programs, unlike seconds; the load average tells how many there were. `parts` are CPU
seconds within the private steps: of the noise, and of the gradients one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

# ruff: noqa: E402
from common.environment import prepare_environment

prepare_environment()  # before torch, as in the product

import numpy as np
import torch

from client import patient_optimizer, privacy
from client.accounting import Steps
from client.privacy import train_privately
from client.training import train
from common.config import FederationConfig
from common.config_file import load_config
from common.model import network_for
from common.network import parameter_count
from sites.cache import CachedSubject
from sites.preprocess import Geometry

SIDE = 64
AIM = 1.2
WORK = (
    "preprocess.mode=resample",
    f"preprocess.shape=[{SIDE},{SIDE},{SIDE}]",
    "training.batch_size=2",
    "training.precision=bf16",
    "training.augment.flip=false",
    "training.augment.affine_probability=0",
    "training.augment.elastic_probability=0",
    "training.augment.intensity_scale=0",
    "training.augment.intensity_shift=0",
    "training.augment.noise=0",
    "privacy.optimiser=adam",
    "privacy.learning_rate=1e-4",
    "privacy.crops=1",
)
NETWORKS = {  # preset and further keys
    "unet": ("default", ()),
    "residual_unet": (
        "default",
        ("network.name=residual_unet", "network.channels=[32,64,128,256]"),
    ),
    "private": ("private", ()),
}
Seconds = tuple[float, float]  # on the wall, of the CPU


def main() -> None:
    options = argparse.ArgumentParser(description="The cost of private training.")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--network", action="append", choices=NETWORKS)
    options.add_argument("--quick", action="store_true", help="three repeats")
    options.add_argument("--json")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    repeats = 3 if chosen.quick else chosen.repeats
    result: dict[str, Any] = {
        "threads": chosen.threads,
        "repeats": repeats,
        "side": SIDE,
        "torch": torch.__version__,
        "load_before": os.getloadavg(),
        "networks": {},
    }
    print(f"load average {load()}, {chosen.threads} thread(s), {repeats} repeats of one step")
    with tempfile.TemporaryDirectory() as folder:
        patients = {name: [subject(Path(folder), name)] for name in ("one", "other")}
        for name in chosen.network or NETWORKS:
            preset, keys = NETWORKS[name]
            config = load_config(preset=preset, assign=[*WORK, *keys])
            found = measured(config, patients, repeats)
            result["networks"][name] = found
            show(name, found)
    result["load_after"] = os.getloadavg()
    print(f"load average {load()}; aim: a ratio of {AIM}")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(result, indent=1) + "\n")


def measured(
    config: FederationConfig, patients: dict[str, list[CachedSubject]], repeats: int
) -> dict[str, Any]:
    """Times of both ways to take a step, and their ratios."""
    network = network_for(config).to(memory_format=torch.channels_last_3d)
    place = {"site": "bench", "round_": 1, "device": torch.device("cpu")}
    subjects = [scan for scans in patients.values() for scan in scans]
    noise = Steps(noise_multiplier=1.0, sampling_rate=1.0, steps=1)
    where = {"add_system_gaussian": patient_optimizer, "patient_gradient": privacy}
    parts: dict[str, list[float]] = {name: [] for name in where}
    times: dict[str, list[Seconds]] = {"plain": [], "private": []}

    def plain() -> None:
        train(network, subjects, config, learning_rate=1e-4, **place)

    def private() -> None:
        for spent in parts.values():
            spent.append(0.0)
        train_privately(network, patients, config, noise, 1.0, learning_rate=1e-4, **place)

    with ExitStack() as stack:
        for name, spent in parts.items():
            watched = adding_up(getattr(where[name], name), spent)
            stack.enter_context(patch.object(where[name], name, watched))
        for _ in range(1 + repeats):
            times["plain"].append(timed(plain))
            times["private"].append(timed(private))
    for measurements in (*parts.values(), *times.values()):
        del measurements[0]  # the first is slower
    ratios = {
        clock: [p[k] / o[k] for p, o in zip(times["private"], times["plain"], strict=True)]
        for k, clock in enumerate(("wall", "cpu"))
    }
    return {
        "network": f"{config.network.name} {config.network.channels} {config.network.norm}",
        "parameters": parameter_count(network),
        "seconds": {way: [list(pair) for pair in pairs] for way, pairs in times.items()},
        "ratio": {clock: spread(values) for clock, values in ratios.items()},
        "cpu_s": {way: spread([cpu for _, cpu in pairs]) for way, pairs in times.items()},
        "parts": {name: spread(spent) for name, spent in parts.items()},
    }


def timed(work: Callable[[], None]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def adding_up(work: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def measured(*arguments: Any) -> Any:
        begin = time.process_time()
        try:
            return work(*arguments)
        finally:
            spent[-1] += time.process_time() - begin

    return measured


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def show(name: str, found: dict[str, Any]) -> None:
    def text(of: dict[str, float], digits: int) -> str:
        return f"{of['median']:.{digits}f} ({of['min']:.{digits}f}-{of['max']:.{digits}f})"

    ratio, cpu, parts = found["ratio"], found["cpu_s"], found["parts"]
    print(f"{name}: {found['network']}, {found['parameters'] / 1e6:.2f} M parameters")
    print(f"  ratio of CPU seconds {text(ratio['cpu'], 2)}, of seconds {text(ratio['wall'], 2)}")
    print(f"  CPU seconds: plain {text(cpu['plain'], 3)}, private {text(cpu['private'], 3)}")
    gradients, noise = parts["patient_gradient"], parts["add_system_gaussian"]
    print(f"  of private: gradients {text(gradients, 3)}, noise {text(noise, 3)}", flush=True)


def subject(folder: Path, name: str) -> CachedSubject:
    """A prepared patient of random voxels: time does not depend on what is to be seen."""
    rng = np.random.default_rng(len(name))
    place = folder / name
    place.mkdir()
    shape = (SIDE, SIDE, SIDE)
    np.save(place / "image.npy", rng.normal(size=(4, *shape)).astype(np.float16))
    np.save(place / "labels.npy", rng.integers(0, 4, shape, dtype=np.uint8))
    box = ((0, 0, 0), shape)
    return CachedSubject(name, place, Geometry(shape, (1.0, 1.0, 1.0), box, box), name)


def load() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


if __name__ == "__main__":
    main()
