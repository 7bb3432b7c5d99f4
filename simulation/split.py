"""The split as a document: what each site would train on and hold out, without reading a scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.config import FederationConfig
from simulation.cohort import find_and_split
from sites.holdout import divide
from sites.institutions import roles
from sites.patients import patients_of


def describe(data: Path, config: FederationConfig) -> dict[str, Any]:
    """Site -> role, number of HGG and LGG, ids for training and held out; the unmapped ids; and how many
    subjects a partition file names that the data lacks.

    Raises:
        UnusableData, SplitError: as `simulation.cohort.find_and_split`.
        PatientsError: `patients.csv` in `data` cannot be followed.
    """
    discovery, split = find_and_split(data, config)
    patients = patients_of(discovery.subjects, data)
    does = roles(split, hold_out=config.split.hold_out, min_subjects=config.split.min_subjects)
    sites = {}
    for name, members in split.sites.items():
        training, held_out = divide(
            members, split.grades, patients, seed=config.seed, fraction=config.held_out_fraction
        )
        if does[name] == "evaluates":
            training, held_out = (), members
        grades = [split.grades[member] for member in members]
        sites[name] = {
            "role": "trains" if training else "evaluates",  # its few may all be held out
            "HGG": grades.count("HGG"),
            "LGG": grades.count("LGG"),
            "training": list(training),
            "held_out": list(held_out),
        }
    return {"sites": sites, "unmapped": list(split.unmapped), "absent": split.absent}
