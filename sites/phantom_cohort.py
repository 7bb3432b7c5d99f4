"""A synthetic BraTS 2020 training set: several sites, real numbering, files, name_mapping.csv.

Decides which subject is at which site and what each site's scanner and annotators are like, and
writes everything in BraTS 2020's layout. Resumable: a subject whose files are all there is not
made again. One subject is `sites.phantom`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from sites.brats2020 import RANGES, TSS
from sites.phantom import CANONICAL_SHAPE, Facts, SiteModel, checked_shape, synthesise
from sites.phantom_signal import SCANNED, Scanner

DATA_FOLDER = "MICCAI_BraTS2020_TrainingData"
SITE_ORDER = (1, 13, 6, 16, 5, 3, 11, 15, 7, 12, 17, 4, 10, 8, 14, 2, 9)
"""Largest first, moved so that few sites already mix high grade, low grade and both."""
MOST_SUBJECTS = 999

_GENERATOR = 1  # raise when a change alters the bytes of a subject, so that no cohort mixes two
_PARAMETERS = "phantom.json"
_COLUMNS = ("BraTS_2020_subject_ID", "site", "token", "Grade", *(f.name for f in fields(Facts)))
_NAME_COLUMNS = (
    "Grade",
    "BraTS_2017_subject_ID",
    "BraTS_2018_subject_ID",
    "TCGA_TCIA_subject_ID",
    "BraTS_2019_subject_ID",
    "BraTS_2020_subject_ID",
)
_SURVIVAL_COLUMNS = ("Brats20ID", "Age", "Survival_days", "Extent_of_Resection")


@dataclass(frozen=True)
class PlannedSubject:
    """A subject before it is made; `number` is what its id ends with."""

    id: str
    number: int
    site: int
    grade: str
    token: str


def plan(
    *, sites: int = 6, subjects_per_site: int = 10, real_sizes: bool = False
) -> tuple[PlannedSubject, ...]:
    """Which subject is at which site, sorted by number, with BraTS 2020's own ids and grades.

    Sites follow SITE_ORDER. A site asked for more subjects than BraTS has from it numbers on from
    1000 * site + 1, so that a subject's id never depends on what else is made; only
    name_mapping.csv tells where such a subject is from. `real_sizes` is all 17 sites with all 369
    subjects, whatever the other two say.

    Raises:
        ValueError: not 1 to 17 sites, or not 1 to 999 subjects per site.
    """
    if not real_sizes and not 1 <= sites <= len(SITE_ORDER):
        raise ValueError(f"sites must be 1 to {len(SITE_ORDER)} (BraTS 2020 has 17), got {sites}")
    if not real_sizes and not 1 <= subjects_per_site <= MOST_SUBJECTS:
        raise ValueError(f"subjects per site must be 1 to {MOST_SUBJECTS}, got {subjects_per_site}")
    chosen: list[PlannedSubject] = []
    for site in SITE_ORDER if real_sizes else SITE_ORDER[:sites]:
        pool = _real_subjects(site)
        wanted = len(pool) if real_sizes else subjects_per_site
        kept = min(wanted, len(pool))
        chosen += [pool[k * len(pool) // kept] for k in range(kept)]  # spread over both grades
        for k in range(wanted - kept):
            like = pool[k % len(pool)]
            chosen.append(_planned(1000 * site + k + 1, site, like.grade, like.token))
    return tuple(sorted(chosen, key=lambda s: s.number))


def _real_subjects(site: int) -> list[PlannedSubject]:
    return [
        _planned(number, site, r.grade, r.token)
        for r in RANGES
        if r.site == site
        for number in range(r.first, r.last + 1)
    ]


def _planned(number: int, site: int, grade: str, token: str) -> PlannedSubject:
    return PlannedSubject(f"BraTS20_Training_{number:03d}", number, site, grade, token)


def site_model(number: int, *, seed: int, heterogeneity: float) -> SiteModel:
    """The scanner, case mix and annotators of one site, a function of these arguments alone.

    heterogeneity scales every deviation from the reference scanner: 0 makes all sites alike, 1 is
    realistic, 1.5 strong.

    Raises:
        ValueError: heterogeneity outside 0 to 2, or an unknown site.
    """
    if not 0 <= heterogeneity <= 2:
        raise ValueError(f"heterogeneity must be 0 (all alike) to 2, got {heterogeneity}")
    token = next((r.token for r in RANGES if r.site == number), None)
    if token is None:
        raise ValueError(f"BraTS 2020 has no site {number}: the sites are 1 to {len(SITE_ORDER)}")
    rng = np.random.default_rng([seed, 7919, number])
    typical = Scanner()

    def ratio(reference: float, low: float, high: float) -> float:
        return reference * (float(rng.uniform(low, high)) / reference) ** heterogeneity

    def shift(reference: float, low: float, high: float) -> float:
        return reference + heterogeneity * (float(rng.uniform(low, high)) - reference)

    def slices(ranges: Iterable[tuple[float, float, float]]) -> list[float]:
        return [max(0.2, shift(*r)) for r in ranges]

    gains = [g * float(np.exp(heterogeneity * rng.normal(0, 0.9))) for g in typical.gain]
    scanner = Scanner(
        gain=(gains[0], gains[1], gains[2], gains[3]),
        gamma=ratio(typical.gamma, 0.70, 1.40),
        grey_white=ratio(typical.grey_white, 0.35, 1.15),
        uptake=ratio(typical.uptake, 0.55, 1.25),
        flair_csf=ratio(typical.flair_csf, 0.35, 0.85),
        flair_lesion=ratio(typical.flair_lesion, 0.70, 1.15),
        noise=typical.noise * float(np.exp(heterogeneity * rng.uniform(-0.92, 0.92))),
        bias=ratio(typical.bias, 0.02, 0.30),
        blur_mm=ratio(typical.blur_mm, 0.4, 1.1),
        slice_mm=_four(
            slices(zip(typical.slice_mm, (0.6, 0.4, 0.4, 0.6), (2.4, 2.2, 1.6, 2.4), strict=True))
        ),
    )
    return SiteModel(
        number,
        token,
        scanner,
        strip_mm=shift(0.0, -1.5, 1.5),
        tumour_size=ratio(1.0, 0.75, 1.25),
        annotator_mm=shift(0.0, -0.9, 0.9),
    )


def _four(values: list[float]) -> tuple[float, float, float, float]:
    return (values[0], values[1], values[2], values[3])


def write_cohort(
    out: Path,
    *,
    sites: int = 6,
    subjects_per_site: int = 10,
    real_sizes: bool = False,
    shape: tuple[int, int, int] = CANONICAL_SHAPE,
    seed: int = 0,
    heterogeneity: float = 1.0,
    compressed: bool = True,
    true_spacing: bool = False,
    on_subject: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write the cohort below `out` and return its MICCAI_BraTS2020_TrainingData folder.

    That folder holds one folder per subject with five NIfTI files, name_mapping.csv and
    survival_info.csv as in BraTS 2020; beside it, sites.csv is the truth about every subject and
    phantom.json what it was made with. Running it again continues where it stopped and otherwise
    changes nothing.

    Args:
        shape: voxels per axis. A coarser grid shows a head at lower resolution and says 1 mm all
            the same, so that nothing resamples it, unless `true_spacing`.
        compressed: .nii.gz; otherwise .nii, as in the Kaggle copy.
        on_subject: called after each subject with (subject id, how many are done, how many in all).

    Raises:
        ValueError: an argument out of range, or `out` holds something else.
    """
    shape = checked_shape(shape)
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    subjects = plan(sites=sites, subjects_per_site=subjects_per_site, real_sizes=real_sizes)
    models = {
        number: site_model(number, seed=seed, heterogeneity=heterogeneity)
        for number in sorted({s.site for s in subjects})
    }
    _claim(
        out,
        {
            "generator": _GENERATOR,
            "sites": len(models),
            "subjects_per_site": None if real_sizes else subjects_per_site,
            "real_sizes": real_sizes,
            "shape": list(shape),
            "seed": seed,
            "heterogeneity": float(heterogeneity),
            "compressed": compressed,
            "true_spacing": true_spacing,
        },
    )
    root = out / DATA_FOLDER
    root.mkdir(exist_ok=True)
    affine = _affine(shape, true_spacing)
    known = _read_rows(out / "sites.csv")
    rows: dict[str, list[str]] = {}
    for done, subject in enumerate(subjects, start=1):
        paths = _paths(root / subject.id, subject.id, compressed)
        if subject.id in known and all(path.is_file() for path in paths.values()):
            rows[subject.id] = known[subject.id]
        else:
            facts = _write_subject(paths, subject, models[subject.site], seed, shape, affine)
            rows[subject.id] = _row(subject, facts)
            _write_table(out / "sites.csv", _COLUMNS, (known | rows).values())
        if on_subject is not None:
            on_subject(subject.id, done, len(subjects))
    _write_table(out / "sites.csv", _COLUMNS, rows.values())
    _write_table(root / "name_mapping.csv", _NAME_COLUMNS, map(_name_row, subjects))
    _write_table(
        root / "survival_info.csv",
        _SURVIVAL_COLUMNS,
        (_survival_row(s, seed, rows[s.id]) for s in subjects if s.grade == "HGG"),
    )
    return root


def _claim(out: Path, parameters: dict[str, Any]) -> None:
    """Make `out` this cohort's folder, or refuse one that is something else's."""
    record = out / _PARAMETERS
    elsewhere = "choose another folder or an empty one"
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, not a folder: {elsewhere}")
    if not record.is_file():
        if out.is_dir() and any(p.name != f".{_PARAMETERS}.part" for p in out.iterdir()):
            raise ValueError(f"{out} is not empty and holds no phantom: {elsewhere}")
        out.mkdir(parents=True, exist_ok=True)
        _replace(record, (json.dumps(parameters, indent=1) + "\n").encode())
        return
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{record} cannot be read: delete {out}, or {elsewhere}")
    differing = [
        f"{key} was {json.dumps(found.get(key))} and is now {json.dumps(value)}"
        for key, value in parameters.items()
        if found.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"{out} holds a phantom made with other parameters ({'; '.join(differing)}): "
            f"repeat those, delete the folder, or {elsewhere}"
        )


def _paths(folder: Path, subject_id: str, compressed: bool) -> dict[str, Path]:
    suffix = ".nii.gz" if compressed else ".nii"
    return {part: folder / f"{subject_id}_{part}{suffix}" for part in (*SCANNED, "seg")}


def _affine(shape: tuple[int, int, int], true_spacing: bool) -> np.ndarray:
    """BraTS's: axes L, P, S, ITK origin (0, -(ny - 1) * dy, 0)."""
    dx, dy, dz = (
        (full / n if true_spacing else 1.0) for full, n in zip(CANONICAL_SHAPE, shape, strict=True)
    )
    affine = np.diag([-dx, -dy, dz, 1.0])
    affine[1, 3] = (shape[1] - 1) * dy
    return affine


def _write_subject(
    paths: dict[str, Path],
    subject: PlannedSubject,
    model: SiteModel,
    seed: int,
    shape: tuple[int, int, int],
    affine: np.ndarray,
) -> Facts:
    phantom = synthesise(seed, subject.id, model, subject.grade, shape)
    paths["seg"].parent.mkdir(exist_ok=True)
    for part, path in paths.items():
        volume = phantom.labels if part == "seg" else phantom.images[part]
        _write_nifti(path, volume, affine)
    return phantom.facts


def _write_nifti(path: Path, volume: np.ndarray, affine: np.ndarray) -> None:
    image = nib.Nifti1Image(volume, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    if path.suffix == ".gz":
        packed = io.BytesIO()
        # no name and no time in the gzip header: the same subject is the same bytes
        with gzip.GzipFile("", "wb", compresslevel=1, fileobj=packed, mtime=0) as stream:
            stream.write(content)
        content = packed.getvalue()
    _replace(path, content)


def _replace(path: Path, content: bytes) -> None:
    """A file is there whole or not at all; what a kill leaves behind is overwritten next time."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def _row(subject: PlannedSubject, facts: Facts) -> list[str]:
    who = [subject.id, str(subject.site), subject.token or "IVYGAP", subject.grade]
    return who + [str(value) for value in asdict(facts).values()]


def _name_row(subject: PlannedSubject) -> list[str]:
    """name_mapping.csv's row; the patient part S<number> cannot be mistaken for a real one."""
    token = subject.token
    if not token:
        return [subject.grade, "NA", "NA", "NA", "NA", subject.id]
    local = f"S{subject.number:03d}"
    before_2019 = token != "TMC"  # Tata Memorial joined in 2019
    return [
        subject.grade,
        f"Brats17_{'TCIA' if token.startswith('TCIA') else token}_{local}_1"
        if before_2019
        else "NA",
        f"Brats18_{token}_{local}_1" if before_2019 else "NA",
        f"TCGA-{TSS[token]}-{local}" if token in TSS else "NA",
        f"BraTS19_{token}_{local}_1",
        subject.id,
    ]


def _survival_row(subject: PlannedSubject, seed: int, row: list[str]) -> list[str]:
    rng = np.random.default_rng([seed, 104729, subject.number])
    age = row[_COLUMNS.index("age")]
    return [
        subject.id,
        age,
        str(20 + int(rng.gamma(2, 220))),
        str(rng.choice(["GTR", "NA", "STR"], p=[0.5, 0.45, 0.05])),
    ]


def _read_rows(path: Path) -> dict[str, list[str]]:
    """Rows of an earlier run's sites.csv by subject id."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as stream:
        return {row[0]: row for row in csv.reader(stream) if len(row) == len(_COLUMNS)}


def _write_table(path: Path, columns: Iterable[str], rows: Iterable[list[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([list(columns), *rows])
    _replace(path, text.getvalue().encode())
