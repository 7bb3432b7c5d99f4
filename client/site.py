"""A site's own folder: what its client knows before any task arrives.

`site.json` lists the prepared subjects by their cache entries, divided into training and held-out,
which of them are one patient, and who was left out and why; `federation.yaml` beside it is the
configuration the site accepted. Both stay at the site.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client.ledger import anchor_in
from client.site_config import PrivacyBudget
from common.config import FederationConfig
from common.config_file import load_config
from common.files import write_text_atomically
from sites.cache import CachedSubject, load_entry
from sites.finding import Finding


@dataclass(frozen=True)
class Site:
    """`left_out` maps a subject that cannot be used to the reason, `patients` every training and
    held-out subject to the patient whose scan it is, `grades` to HGG, LGG or "" where grades were
    written. `budget` is None where nothing protects the patients; `ledger` is where spending is
    written, None where nobody keeps one. `key` is the file of the site's private key and `roster` the
    fingerprints of the keys that may be in a secure sum. `tells_metrics` is False where the site's
    policy lets no mean leave, so that none is paid for."""

    name: str
    folder: Path
    trains: bool
    config: FederationConfig
    training: tuple[CachedSubject, ...]
    held_out: tuple[CachedSubject, ...]
    left_out: dict[str, str]
    patients: dict[str, str]
    federation: str = ""
    budget: PrivacyBudget | None = None
    ledger: Path | None = None
    key: Path | None = None
    roster: tuple[str, ...] = ()
    tells_metrics: bool = True
    grades: dict[str, str] = field(default_factory=dict)

    @property
    def anchor(self) -> Path:
        return anchor_in(self.folder)


def write_site(
    folder: Path,
    *,
    name: str,
    trains: bool,
    config_text: str,
    training: Sequence[CachedSubject],
    held_out: Sequence[CachedSubject],
    findings: Sequence[Finding],
    patients: Mapping[str, str] | None = None,
    federation: str = "",
    budget: PrivacyBudget | None = None,
    ledger: Path | None = None,
    key: Path | None = None,
    roster: Sequence[str] = (),
    tells_metrics: bool = True,
    grades: Mapping[str, str] | None = None,
) -> None:
    """Write `site.json` and `federation.yaml` for `load_site`.

    `patients` (subject id -> patient id) must name every subject of both sides; without it each
    subject is a patient by itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = [entry.id for entry in (*training, *held_out)]
    known = grades or {}
    manifest = {
        "site": name,
        "trains": trains,
        "training": {entry.id: str(entry.folder) for entry in training},
        "held_out": {entry.id: str(entry.folder) for entry in held_out},
        "patients": {i: i if patients is None else patients[i] for i in ids},
        "grades": {i: known[i] for i in ids if i in known},
        "federation": federation,
        "budget": budget and budget.model_dump(),
        "ledger": ledger and str(ledger.absolute()),
        "key": key and str(key.absolute()),
        "roster": sorted(roster),
        "tells_metrics": tells_metrics,
        "left_out": {f.subject: f.what for f in findings if f.severity == "error"},
        "findings": [finding.as_dict() for finding in findings],
    }
    write_text_atomically(folder / "federation.yaml", config_text)
    write_text_atomically(folder / "site.json", json.dumps(manifest, indent=1))


def load_site(folder: Path) -> Site:
    """Read what `write_site` wrote.

    Raises:
        CacheError: a listed subject is no longer in the cache.
        ConfigError: the accepted configuration cannot be read.
    """
    manifest = json.loads((folder / "site.json").read_text(encoding="utf-8"))
    return Site(
        name=manifest["site"],
        folder=folder,
        trains=manifest["trains"],
        config=load_config(folder / "federation.yaml"),
        training=tuple(load_entry(Path(p)) for p in manifest["training"].values()),
        held_out=tuple(load_entry(Path(p)) for p in manifest["held_out"].values()),
        left_out=manifest["left_out"],
        patients=manifest["patients"],
        federation=manifest["federation"],
        budget=PrivacyBudget(**manifest["budget"]) if manifest["budget"] else None,
        ledger=Path(manifest["ledger"]) if manifest["ledger"] else None,
        key=Path(manifest["key"]) if manifest["key"] else None,
        roster=tuple(manifest["roster"]),
        tells_metrics=manifest["tells_metrics"],
        grades=manifest.get("grades", {}),  # runs of before have none
    )
