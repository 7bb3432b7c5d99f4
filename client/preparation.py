"""A hospital's own folder of scans made ready for one federation: the first thing that `join` does.

Writes the site's folder (`client.site`), which lists the prepared subjects. All of it stays here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.refusals import tells_metrics
from client.site import write_site
from client.site_config import SiteConfig
from common.config_file import dump_config
from common.terms import Terms
from sites.finding import Finding
from sites.institutions import grades_of
from sites.patients import PATIENTS, PatientsError, patients_of, unknown_in_list
from sites.site_cohort import prepare_site
from sites.subject import discover


@dataclass(frozen=True)
class Prepared:
    n_training: int
    n_held_out: int
    n_left_out: int
    warnings: int
    training_patients: int
    held_out_patients: int


class UnusableData(ValueError):
    """The folder cannot be trained on; `findings` say which file and why."""

    def __init__(self, text: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(text)
        self.findings = tuple(findings)


def prepare_hospital(
    name: str, settings: SiteConfig, state: Path, terms: Terms, key: Path
) -> Prepared:
    """Check and preprocess the hospital's subjects, and write the site's folder `state`.

    `key` is the file of the site's private key, with which it signs its keys for secure aggregation.

    Raises:
        UnusableData: no subject can be used, or one cannot and the federation refuses to skip it.
        CacheError: the cache cannot be written.
        SplitError: name mappings in `data` contradict each other.
        PatientsError: `patients.csv` in `data` cannot be followed.
    """
    config, data, cache = terms.config, settings.data, settings.cache
    if not data.is_dir():
        raise UnusableData(f"{data} is no folder; correct `data` in site.yaml.")
    discovery = discover(data, modalities=config.modalities, site=name)
    if not discovery.subjects:
        raise UnusableData(f"{data}: no subject was found.", discovery.findings)
    unknown = unknown_in_list(discovery.subjects, data, site=name)
    if unknown and settings.privacy is not None:
        # two scans of one patient, taken for two, would lose twice what the ledger says
        raise PatientsError(f"{data / PATIENTS} {unknown[0].what}. {unknown[0].remedy}")
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)  # prepared scans are scans
    grades = grades_of(discovery.subjects, data)
    patients = patients_of(discovery.subjects, data)
    site = prepare_site(name, discovery.subjects, grades, patients, config, cache)
    findings = tuple(dict.fromkeys((*discovery.findings, *site.findings, *unknown)))
    errors = [finding for finding in findings if finding.severity == "error"]
    bad = {finding.subject for finding in errors} - {""}
    if errors and config.on_bad_subject == "refuse":
        raise UnusableData(
            f"{len(bad)} subjects cannot be used; mend or remove them. (The federation agreed on "
            "on_bad_subject: refuse.)",
            findings,
        )
    if not site.training and not site.held_out:
        raise UnusableData(f"{data}: no subject can be used.", findings)
    trained, measured = (
        {site.patients[entry.id] for entry in side} for side in (site.training, site.held_out)
    )
    write_site(
        state,
        name=name,
        trains=site.trains,
        config_text=dump_config(config),
        training=site.training,
        held_out=site.held_out,
        findings=findings,
        patients=site.patients,
        federation=terms.federation,
        budget=settings.privacy,
        ledger=settings.privacy_ledger,
        key=key,
        roster=terms.roster,
        tells_metrics=tells_metrics(settings.policy, len(site.held_out), len(measured)),
    )
    warnings = sum(finding.severity == "warning" for finding in findings)
    return Prepared(
        len(site.training), len(site.held_out), len(bad), warnings, len(trained), len(measured)
    )
