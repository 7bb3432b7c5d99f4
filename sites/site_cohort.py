"""One site's subjects made ready: checked, preprocessed, and divided into training and held-out.

The same for a hospital with its own folder and for a site of a simulation, so that both train on
exactly the same. Which subjects are a site's is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import FederationConfig
from sites.cache import CachedSubject, prepare_subjects
from sites.finding import Finding
from sites.holdout import divide
from sites.patients import joined
from sites.preprocess import recipe_of
from sites.subject import Subject


@dataclass(frozen=True)
class SiteCohort:
    """A site's prepared subjects; one that only evaluates holds out all of them.

    `patients` maps subject ids to patient ids, after what the scans themselves tell of who is who.
    """

    name: str
    trains: bool
    training: tuple[CachedSubject, ...]
    held_out: tuple[CachedSubject, ...]
    findings: tuple[Finding, ...]
    patients: dict[str, str]


def prepare_site(
    name: str,
    subjects: Sequence[Subject],
    grades: Mapping[str, str],
    patients: Mapping[str, str],
    config: FederationConfig,
    cache: Path,
    *,
    only_evaluates: bool = False,
    min_subjects: int = 1,
) -> SiteCohort:
    """Prepare a site's subjects; those that cannot be used are in the findings.

    Args:
        grades: subject id -> HGG, LGG or "", part of what decides who is held out.
        patients: subject id -> patient id; a patient is held out whole.
        min_subjects: with fewer usable ones the site only evaluates.

    Raises:
        CacheError: the cache cannot be written.
    """
    preparation = prepare_subjects(subjects, recipe_of(config), cache, site=name)
    ready = {entry.id: entry for entry in preparation.ready}
    patients = joined(patients, preparation.twins)
    training, held_out = divide(
        ready, grades, patients, seed=config.seed, fraction=config.held_out_fraction
    )
    # a site can fall below the minimum by subjects that cannot be used
    if only_evaluates or len(ready) < min_subjects:
        training, held_out = (), tuple(ready)
    return SiteCohort(
        name=name,
        trains=bool(training),
        training=tuple(ready[i] for i in training),
        held_out=tuple(ready[i] for i in held_out),
        findings=preparation.findings,
        patients=patients,
    )
