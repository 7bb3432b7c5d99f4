"""One BraTS folder as the sites of a federation: discover, split, hold out, check, prepare.

Every site's subjects are checked and preprocessed by themselves, as each hospital would do it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from client.ledger import anchor_in, create_ledger
from client.site import write_site
from client.site_config import PrivacyBudget
from common.config import FederationConfig
from common.config_file import dump_config
from common.keys import fingerprint, load_private_key, new_private_key, save_private_key
from common.message_words import EXACT
from sites.checks import same_patient_twice
from sites.finding import Finding
from sites.institutions import Split, roles, split_subjects
from sites.patients import patients_at_two_sites, patients_of, unknown_in_list
from sites.site_cohort import SiteCohort, prepare_site
from sites.subject import Discovery, Subject, discover


@dataclass(frozen=True)
class Cohort:
    """`lost_sites` have no usable subject left, so they take no part; they are always reported.
    `patients` maps every subject of the data to its patient, `grades` to HGG, LGG or ""."""

    sites: tuple[SiteCohort, ...]
    lost_sites: tuple[str, ...]
    unmapped: tuple[str, ...]
    findings: tuple[Finding, ...]
    patients: dict[str, str]
    grades: dict[str, str]

    @property
    def errors_of_no_subject(self) -> tuple[Finding, ...]:
        """Errors about a folder or a whole site, which `left_out` cannot name."""
        return tuple(f for f in self.findings if f.severity == "error" and not f.subject)

    @property
    def left_out(self) -> tuple[str, ...]:
        return tuple(sorted({f.subject for f in self.findings if f.severity == "error"} - {""}))


class UnusableData(ValueError):
    """Subjects cannot be used and the configuration refuses to leave them out."""

    def __init__(self, text: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(text)
        self.findings = tuple(findings)


def find_and_split(data: Path, config: FederationConfig) -> tuple[Discovery, Split]:
    """The subjects below `data`, and which site each belongs to.

    Raises:
        UnusableData: no subject was found.
        SplitError: the split is not possible; the text says what to do.
    """
    discovery = discover(data, modalities=config.modalities, site="")
    if not discovery.subjects:
        raise UnusableData(f"{data}: no subject was found.", discovery.findings)
    s = config.split
    split = split_subjects(
        discovery.subjects,
        by=s.by,
        root=data,
        file=s.file,
        merge_hospitals=s.merge_hospitals,
        parts=s.parts,
        seed=config.seed,
    )
    return discovery, split


def assemble(data: Path, config: FederationConfig, cache: Path) -> Cohort:
    """Everything from the BraTS folder to prepared sites.

    Raises:
        UnusableData: a subject has an error and `on_bad_subject` is `refuse`, or none is left.
        SplitError, PatientsError, CacheError: as their modules say.
    """
    discovery, split = find_and_split(data, config)
    does = roles(split, hold_out=config.split.hold_out, min_subjects=config.split.min_subjects)
    patients = patients_of(discovery.subjects, data)
    by_id = {subject.id: subject for subject in discovery.subjects}
    site_of = {subject: site for site, members in split.sites.items() for subject in members}
    sites = []
    found = [_at_site(finding, site_of) for finding in discovery.findings]
    for name, members in split.sites.items():
        subjects: list[Subject] = [by_id[member] for member in members]
        site = prepare_site(
            name,
            subjects,
            split.grades,
            patients,
            config,
            cache,
            only_evaluates=does[name] == "evaluates",
            min_subjects=config.split.min_subjects,
        )
        found += site.findings
        patients = site.patients
        sites.append(site)
    usable = {site.name: (*site.training, *site.held_out) for site in sites}
    found += same_patient_twice((s, e.id, e.digest) for s in usable for e in usable[s])
    found += unknown_in_list(discovery.subjects, data, site="")
    found += patients_at_two_sites({s: [e.id for e in usable[s]] for s in usable}, patients)
    findings = tuple(dict.fromkeys(found))
    cohort = Cohort(
        sites=tuple(site for site in sites if site.training or site.held_out),
        lost_sites=tuple(s.name for s in sites if not (s.training or s.held_out)),
        unmapped=split.unmapped,
        findings=findings,
        patients=patients,
        grades=split.grades,
    )
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors and config.on_bad_subject == "refuse":
        raise UnusableData(
            f"{len(cohort.left_out)} subjects cannot be used; mend or remove them, "
            "or leave them out with on_bad_subject: skip.",
            findings,
        )
    if not any(site.trains for site in cohort.sites):
        raise UnusableData("No site has a subject to train on.", findings)
    return cohort


def changed_sites(cohort: Cohort, folder: Path) -> list[str]:
    """Sites whose subjects, their files, roles or patients differ from what `write_sites` wrote."""
    changed = []
    for site in cohort.sites:
        manifest = folder / site.name / "site.json"
        if not manifest.exists():
            continue
        before = json.loads(manifest.read_text(encoding="utf-8"))
        now = {"training": site.training, "held_out": site.held_out}
        patients = {e.id: cohort.patients[e.id] for e in (*site.training, *site.held_out)}
        # an entry's name tells its contents; the cache itself may have moved
        if before.get("patients", patients) != patients or any(
            [Path(path).name for path in before[role].values()] != [e.folder.name for e in entries]
            for role, entries in now.items()
        ):
            changed.append(site.name)
    return changed


def write_sites(cohort: Cohort, folder: Path, config: FederationConfig) -> dict[int, Path]:
    """Give each site its own folder below `folder`; returns the folders by Flower node id."""
    folders = {}
    keys = _site_keys(cohort, folder) if config.secure_aggregation else {}
    roster = [fingerprint(load_private_key(path).public_key()) for path in keys.values()]
    for node, site in enumerate(cohort.sites, start=1):
        folders[node] = folder / site.name
        write_site(
            folders[node],
            name=site.name,
            trains=site.trains,
            config_text=dump_config(config),
            training=site.training,
            held_out=site.held_out,
            findings=site.findings,
            patients=cohort.patients,
            grades=cohort.grades,
            key=keys.get(site.name),
            roster=roster,
            **_protection(folders[node], config),
        )
    return folders


def _site_keys(cohort: Cohort, folder: Path) -> dict[str, Path]:
    """The private keys of the sites that train, by name; made once."""
    keys = {site.name: folder / site.name / "site.key" for site in cohort.sites if site.trains}
    for path in keys.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            save_private_key(path, new_private_key())
    return keys


def _protection(site: Path, config: FederationConfig) -> dict[str, Any]:
    """Every simulated hospital has a ledger of its own, and the budget that the federation asks for."""
    if config.privacy.epsilon is None:
        return {}
    ledger = site / "privacy-ledger.sqlite"
    if not ledger.exists() and not anchor_in(site).exists():
        site.mkdir(parents=True, exist_ok=True)
        create_ledger(ledger)
    budget = PrivacyBudget(epsilon=config.privacy.epsilon, metrics=EXACT)
    return {"federation": config.name, "budget": budget, "ledger": ledger}


def _at_site(finding: Finding, site_of: dict[str, str]) -> Finding:
    """Discovery runs before the split, so its findings do not know their site yet."""
    return replace(finding, site=site_of.get(finding.subject, ""))
