"""Time several ways of doing one thing in turn, and say what that is worth as a ratio.

Repeats are interleaved (a, b, a, b, ...), so that a busy minute of the machine meets all of them; a
ratio is taken within each repeat, then minimum, median and maximum over the repeats. Wall-clock
seconds count; CPU seconds stand beside them, for a machine that had other work to do. Load averages
are printed. Whether the ways gave equal results is for the caller to assert.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Timings:
    """Seconds of each repeat, on the wall and of this process' CPU (all threads)."""

    wall: list[float]
    cpu: list[float]

    def ratios_to(self, faster: Timings) -> list[float]:
        """How many times as long this took as `faster`, in each repeat."""
        return [a / b for a, b in zip(self.wall, faster.wall, strict=True)]

    def cpu_ratios_to(self, faster: Timings) -> list[float]:
        return [a / max(b, 1e-9) for a, b in zip(self.cpu, faster.cpu, strict=True)]


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warm_ups: int = 1,
    before: Callable[[], object] | None = None,
) -> dict[str, Timings]:
    """Run every way `warm_ups` times unmeasured, then all in turn `repeats` times.

    `before` is called before each, outside the clock (to empty a cache, to copy an input).
    """
    measured = {name: Timings([], []) for name in ways}
    for turn in range(warm_ups + repeats):
        for name, way in ways.items():
            if before is not None:
                before()
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            if turn >= warm_ups:
                measured[name].wall.append(time.perf_counter() - wall)
                measured[name].cpu.append(time.process_time() - cpu)
    return measured


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def report(
    title: str,
    measured: Mapping[str, Timings],
    *,
    peer: str,
    reach: Mapping[str, float],
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Print a table of all ways and their ratios to `peer`; return the same as JSON types.

    `reach` names, for those ways that have one, the ratio that is aimed at.
    """
    load = [round(x, 2) for x in os.getloadavg()]
    print(f"\n{title}")
    print(f"{'':34}{'ms, median (range)':>30}{'CPU ms':>10}{'x peer, median (range)':>28}  reach")
    rows = {}
    for name, timings in measured.items():
        wall, cpu = spread(timings.wall), spread(timings.cpu)
        ratio = spread(measured[peer].ratios_to(timings))
        cpu_ratio = spread(measured[peer].cpu_ratios_to(timings))
        aim = reach.get(name)
        met = "" if aim is None else f"{aim:g}: {'met' if ratio['median'] >= aim else 'MISSED'}"
        print(
            f"{name:34}"
            f"{_range(wall, 1000, 1):>30}{1000 * cpu['median']:>10.1f}"
            f"{'peer' if name == peer else _range(ratio, 1, 2):>28}  {met}"
        )
        rows[name] = {
            "wall_s": timings.wall,
            "cpu_s": timings.cpu,
            "ratio": ratio,
            "cpu_ratio": cpu_ratio,
            "reach": aim,
        }
    for key, value in (facts or {}).items():
        print(f"{key}: {value}")
    print(f"repeats {len(measured[peer].wall)}, load averages {load} on {os.cpu_count()} cores")
    return {
        "title": title,
        "peer": peer,
        "ways": rows,
        "facts": dict(facts or {}),
        "load": load,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "monai", "numpy")},
    }


def _range(values: Mapping[str, float], scale: float, digits: int) -> str:
    low, middle, high = (scale * values[key] for key in ("min", "median", "max"))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--quick", action="store_true", help="small sizes, for `make bench`")
    return parser


def write_json(path: Path | None, reports: Sequence[Mapping[str, Any]]) -> None:
    if path is not None:
        path.write_text(json.dumps(list(reports), indent=1), encoding="utf-8")
