"""How time, memory, disk and traffic grow with sites, with parameters and with subjects.

    python benchmarks/growth.py [--figure growth.svg] [--json FILE] [--quick]

- sites: a round of `instant_rounds.py` (the product in one process; training takes no time), a model of
  4.9 M parameters, 1 to 64 sites.
- parameters: the same with 4 sites and 0.3 M to 100 M parameters (residual U-Net, wider and wider).
- subjects: preparing so many at one site, and one real epoch of training on them: grids of 48x48x32,
  network patches of 32^3, one thread. Linear by design; this is only to see that it is.

Every point is a process of its own, forked after the imports; the first round of each is not counted.
`peak` is the process's highest resident memory, which holds Python, torch and MONAI. CPU seconds of the
server are those outside the ClientApp. Down and up are weights as they travel; a model that a site
already has is not sent again. `spool` is what the updates of a round take on the server's disk until
they are compared. A line is fitted to each; `bend` is the slope between the two largest points over that
of the line: 1 is linear, and were it quadratic it would be near 2.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import options, write_json

HERE = Path(__file__).resolve().parent
MIB = 2**20
SITES, QUICK_SITES = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8)
# width of the first level, which four more double
WIDTHS, QUICK_WIDTHS = (4, 7, 12, 22, 39, 71), (4, 7, 12)
SUBJECTS, QUICK_SUBJECTS = (2, 4, 8, 16, 32), (2, 4, 8)
ROUND = ("wall_s", "server_cpu_s", "site_cpu_s", "peak_mib", "down_mb", "up_mb", "spool_mb")
FILES = ("checkpoint_mb", "run_folder_mb")
EPOCH = ("prepare_s", "epoch_s", "peak_mib")
TABLES: dict[str, tuple[str, Sequence[str]]] = {
    "sites": ("site", (*ROUND, *FILES)),
    "parameters": ("million parameters", (*ROUND, *FILES)),
    "subjects": ("subject", EPOCH),
}


def a_round(sites: int, width: int, rounds: int, folder: Path) -> dict[str, float]:
    """The mean of all rounds but the first."""
    from instant_rounds import instant_federation

    from common.weights import load_weights

    channels = [width * factor for factor in (1, 2, 4, 8, 16)]
    federation = instant_federation(folder, sites, rounds, [f"network.channels={channels}"])
    ends = federation.run()
    first, last = federation.costs[0], federation.costs[-1]
    cost = {key: (last[key] - first[key]) / (rounds - 1) for key in first}
    checkpoint = federation.last_checkpoint()
    weights = load_weights(checkpoint)[0]
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    return {
        "sites": sites,
        "parameters": sum(t.numel() for t in weights.values()) / 1e6,
        "wall_s": (ends[-1] - ends[0]) / (rounds - 1),
        "server_cpu_s": cost["server_cpu"],
        "site_cpu_s": cost["site_cpu"],
        "peak_mib": peak_mib(),
        "down_mb": cost["down"] / 1e6,
        "up_mb": cost["up"] / 1e6,
        "spool_mb": cost["spool"] / 1e6,
        "checkpoint_mb": checkpoint.stat().st_size / 1e6,
        "run_folder_mb": sum(path.stat().st_size for path in files) / 1e6,
    }


def an_epoch(subjects: int, folder: Path) -> dict[str, float]:
    from common.environment import prepare_environment

    prepare_environment()
    import torch

    from client.training import train
    from common.config_file import load_config
    from common.model import network_for
    from sites.patients import patients_of
    from sites.phantom_cohort import write_cohort
    from sites.site_cohort import prepare_site
    from sites.subject import discover

    small = ("preprocess.shape=[32,32,32]", "training.threads=1", "training.epochs=1")
    config = load_config(preset="quick", assign=[*small, "network.channels=[8,16,32]"])
    data = write_cohort(folder, sites=2, subjects_per_site=subjects, shape=(48, 48, 32), seed=1)
    found = discover(data, modalities=config.modalities, site="").subjects[:subjects]
    patients = patients_of(found, data)
    begin = time.perf_counter()
    site = prepare_site(
        "site", found, {}, patients, config, folder / "cache", only_evaluates=False, min_subjects=2
    )
    prepared = (*site.training, *site.held_out)
    prepare = time.perf_counter() - begin
    torch.set_num_threads(1)
    network = network_for(config).to(memory_format=torch.channels_last_3d)
    about = {"site": "site", "learning_rate": 1e-4, "device": torch.device("cpu")}
    train(network, prepared[:2], config, round_=1, **about)  # what is loaded on first use
    begin = time.perf_counter()
    train(network, prepared, config, round_=2, **about)
    return {
        "subjects": len(prepared),
        "prepare_s": prepare,
        "epoch_s": time.perf_counter() - begin,
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def point(what: str, *numbers: int) -> dict[str, float]:
    """In a process forked from this one, which has imported everything and computed nothing."""
    with multiprocessing.get_context("fork").Pool(1) as one:
        result = one.apply_async(inside, (what, numbers)).get(timeout=300)
    print(".", end="", file=sys.stderr, flush=True)
    return result


def inside(what: str, numbers: Sequence[int]) -> dict[str, float]:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the rounds' tables
    run: Callable[..., dict[str, float]] = {"round": a_round, "epoch": an_epoch}[what]
    with tempfile.TemporaryDirectory() as name:
        return run(*numbers, Path(name))


def import_everything() -> None:
    from common.environment import prepare_environment

    prepare_environment()
    for name in ("client.app", "server.app", "simulation.grid", "sites.site_cohort"):
        importlib.import_module(name)
    importlib.import_module("torch._dynamo")  # with the first optimizer

    logging.disable(logging.WARNING)


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares with weights 1 / x, so that the small points count, too."""
    slope, at_zero = np.polyfit(x, y, 1, w=1 / np.sqrt(x))
    last = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return {
        "slope": float(slope),
        "at_zero": float(at_zero),
        "bend": float(last / slope) if abs(slope) > 1e-9 else 1.0,
    }


def measure(quick: bool) -> dict[str, Any]:
    rounds = 3
    sites, widths, subjects = (SITES, WIDTHS, SUBJECTS)
    if quick:
        sites, widths, subjects = (QUICK_SITES, QUICK_WIDTHS, QUICK_SUBJECTS)
    width = 7 if quick else 16
    found = {
        "sites": [point("round", n, width, rounds) for n in sites],
        "parameters": [point("round", 4, w, rounds) for w in widths],
        "subjects": [point("epoch", n) for n in subjects],
    }
    print(file=sys.stderr)
    return {
        name: {
            "points": points,
            "fits": {
                key: line([p[name] for p in points], [p[key] for p in points])
                for key in TABLES[name][1]
            },
        }
        for name, points in found.items()
    }


def show(measured: dict[str, Any]) -> None:
    for name, table in measured.items():
        unit, keys = TABLES[name]
        print(f"\n{name:>10}" + "".join(f"{key:>15}" for key in keys))
        for p in table["points"]:
            print(f"{p[name]:10.4g}" + "".join(f"{p[key]:15.4g}" for key in keys))
        for what, label in (("slope", f"a {unit}"), ("at_zero", "at 0"), ("bend", "bend")):
            fits = "".join(f"{table['fits'][key][what]:15.3g}" for key in keys)
            print(f"{label[:10]:>10}" + fits)
    load = [round(x, 2) for x in os.getloadavg()]
    print(f"\nload averages {load} on {os.cpu_count()} cores")


def draw(measured: dict[str, Any], path: Path) -> None:
    import matplotlib

    from common.figures import STYLE, _svg, line_style, new_figure

    with matplotlib.rc_context(STYLE):
        figure = new_figure(5.4)
        axes = figure.subplots(2, 3)
        drawn = (
            ("sites", "sites", ("wall_s", "server_cpu_s", "site_cpu_s")),
            ("parameters", "million parameters, 4 sites", ("wall_s", "server_cpu_s", "site_cpu_s")),
            ("subjects", "subjects of one site", ("prepare_s", "epoch_s")),
        )
        for column, (name, label, keys) in enumerate(drawn):
            points, fits = measured[name]["points"], measured[name]["fits"]
            x = np.array([p[name] for p in points])
            for number, key in enumerate(keys):
                style = line_style(number)._asdict() | {"linestyle": "none"}
                text = key.removesuffix("_s").replace("_", " ")
                axes[0, column].plot(x, [p[key] for p in points], label=text, **style)
                fitted = fits[key]["at_zero"] + fits[key]["slope"] * x
                axes[0, column].plot(x, fitted, color=style["color"], linewidth=0.8)
            style = line_style(0)._asdict() | {"linestyle": "none"}
            axes[1, column].plot(x, [p["peak_mib"] for p in points], **style)
            axes[1, column].set_ylim(0, 1.1 * max(row["peak_mib"] for row in points))
            axes[0, column].legend()
            axes[1, column].set_xlabel(label)
        axes[0, 0].set_ylabel("seconds")
        axes[1, 0].set_ylabel("peak memory, MiB")
        path.write_text(_svg(figure), encoding="utf-8")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--figure", type=Path, help="an SVG file")
    chosen = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    import_everything()
    begin = time.monotonic()
    measured = measure(chosen.quick)
    show(measured)
    print(f"took {time.monotonic() - begin:.0f} s")
    if chosen.figure:
        draw(measured, chosen.figure)
    load = [round(x, 2) for x in os.getloadavg()]
    write_json(chosen.json, [{"growth": measured, "load": load, "cores": os.cpu_count()}])


if __name__ == "__main__":
    main()
