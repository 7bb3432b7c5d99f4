"""Memory must not grow with the number of hospitals, which work one after the other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import contextlib, resource, sys
from pathlib import Path
from common.config_file import load_config
from simulation.run import Engine, simulate

data, out, cache, *keys = sys.argv[1:]
peaks = []
for parts in (3, 9):
    config = load_config(preset="quick", assign=[*keys, "split.by=iid", f"split.parts={parts}"])
    with contextlib.redirect_stdout(sys.stderr):
        result = simulate(Path(data), Path(out, str(parts)), config, cache=Path(cache), engine=Engine())
    assert sum(site.trains for site in result.cohort.sites) == parts
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""


@pytest.mark.slow
def test_nine_sites_need_no_more_memory_than_three(
    cohort_data: Path, cohort_cache: Path, tiny_arguments, tmp_path: Path
):
    """In one process, the same subjects in 3 and then in 9 sites: had each site its own copy of this
    network of 19 MB, or its update, the peak would rise by 115 MB."""
    keys = [key for key in tiny_arguments if "=" in key]
    keys += ["network.name=residual_unet", "network.channels=[16,32,64,128,256]"]
    keys += ["rounds.number=1", "held_out_fraction=0.1"]
    command = (sys.executable, "-c", PROGRAM, str(cohort_data), str(tmp_path), str(cohort_cache))
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}  # as in test_robust.py
    done = subprocess.run(
        (*command, *keys), capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    three, nine = map(int, done.stdout.split())
    assert nine < 1.08 * three, (three, nine)
