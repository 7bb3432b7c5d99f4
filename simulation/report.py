"""`fed-sim report`: what a run's history tells, and what only a simulation has: subjects and scans.

Per-subject results, the comparison with the baselines, overlays of the best, the median and the worst
subject, and a tumour in space. What of that cannot be made (the cache is gone, say) is named in its
place; the rest of the report is written all the same.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from client.device import best_device
from client.overlays import CONVENTION, Case, case_of, case_title, slices_figure
from client.prediction import Model, load_model
from client.scene import scene_figure
from client.site import load_site
from client.subject_results import PLAIN, segmenter_of
from common.config import FederationConfig
from common.config_file import load_config
from common.console import RESEARCH_ONLY, many
from common.evaluation_document import EvaluationError
from common.evaluation_summary import SubjectResult, ranked, shown_subjects
from common.figures import BLUE, GREEN, GREY, VERMILLION, new_figure, shown_name, styled
from common.files import lock_holder
from common.metrics import REGIONS
from common.model import network_for
from common.weights import BadWeights
from server.checkpoint import RunFolder, load_checkpoint
from server.recorded import Recorded, read_recorded
from server.report import Plot, Report, ReportError, Section, Table
from server.report_figures import boxes_over_subjects
from server.report_sections import (
    cohort,
    configuration,
    measured,
    over_the_rounds,
    privacy,
    report_of,
    spread_over_sites,
    who_took_part,
)
from server.tables import number
from simulation.evaluation import stored_evaluation
from simulation.report_evaluation import evaluation_section, held_out_grades
from sites.cache import CacheError

LOG = logging.getLogger("fedbrats")
LOWEST = 10  # subjects in the table of those that went worst
WAYS = {  # as `simulation.baselines.WAYS`: colour, marker, filled
    "local-only": (VERMILLION, "o", False),
    "federated": (BLUE, "s", True),
    "centralised": (GREEN, "^", True),
}


def simulations_report(run: Path) -> Report:
    """The whole report of the run in the folder `run`, finished or not.

    Raises:
        ReportError: there is no run.
        HistoryError, ConfigError: what it has recorded cannot be read.
    """
    folder = RunFolder(run)
    if not folder.history.exists() or not folder.config.exists():
        raise ReportError(f"{run} holds no run; make one with: fed-sim run DATA --out {run}")
    config = load_config(folder.config)
    recorded = read_recorded(folder.history, {}, config.name)
    results = _results(run)
    evaluation = stored_evaluation(run) if recorded.final else None
    subjects = _subject_results(run, recorded)
    plain_config = config.model_dump(mode="json")
    sections = [
        who_took_part(recorded),
        measured(recorded, _against_threshold(results)),
        evaluation_section(evaluation),
        *over_the_rounds(recorded),
        *_comparison(results),
        *(_over_subjects(subjects, recorded) if subjects else spread_over_sites(recorded)),
        *_pictures(folder, recorded, config, subjects),
        cohort(recorded, _about_data(results), held_out_grades(evaluation)),
        privacy(recorded, plain_config, simulated=True),
        configuration(recorded, plain_config),
    ]
    return report_of(
        recorded,
        sections,
        title=f"Report of the simulation “{config.name}”",
        planned=config.rounds.number,
        about=f" from the run in the folder {run.resolve().name}.",
        running=lock_holder(folder.lock) is not None,
    )


def per_subject_document(run: Path, stage: str) -> dict[str, Any]:
    """{"subjects": [{"site", "subject", "scores"}]} of the held-out subjects of all sites.

    Of the chosen model what `fed-sim evaluate` has kept, else what each simulated site has. `stage`:
    `final`, or `round-0003`.
    """
    evaluation = stored_evaluation(run) if stage == "final" else None
    return _sites_own_document(run, stage) if evaluation is None else evaluation


def _sites_own_document(run: Path, stage: str) -> dict[str, Any]:
    found = []
    for path in sorted((run / "sites").glob(f"*/evaluation/{stage}.json")):
        site = json.loads((path.parents[1] / "site.json").read_text(encoding="utf-8"))["site"]
        for subject in json.loads(path.read_text(encoding="utf-8")):
            found.append({"site": site, "subject": subject["subject"], "scores": subject["scores"]})
    return {"subjects": found}


def _subject_results(run: Path, recorded: Recorded) -> list[SubjectResult]:
    if recorded.measured is None:
        return []
    stage = "final" if recorded.final else f"round-{recorded.measured[0]:04d}"
    for read in (per_subject_document, _sites_own_document):
        try:
            if found := [_subject_result(entry) for entry in read(run, stage)["subjects"]]:
                return found
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            where = "sites'" if read is _sites_own_document else "kept"
            LOG.warning(
                f"{run}: the {where} results of single subjects cannot be read ({error!r})."
            )
    return []


def _subject_result(entry: Mapping[str, Any]) -> SubjectResult:
    result = SubjectResult(
        site=str(entry["site"]),
        subject=str(entry["subject"]),
        patient=entry.get("patient", entry["subject"]),
        grade=entry.get("grade"),
        tumour_ml=entry.get("tumour_ml", math.nan),
        scores={
            structure: {key: math.nan if v is None else float(v) for key, v in of.items()}
            for structure, of in entry["scores"].items()
        },
    )
    for region in REGIONS:  # what is drawn of each subject is there
        result.scores[region]["dice"], result.scores[region]["iou"]
    return result


def _results(run: Path) -> dict[str, Any]:
    """What only the end of a run knows; nothing before."""
    try:
        found = json.loads((run / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _against_threshold(results: Mapping[str, Any]) -> list[str]:
    baseline = results.get("flair_threshold")
    if not baseline:
        return []
    dice = baseline["mean_over_sites"]
    return [
        f"A naive FLAIR threshold has a whole-tumour Dice of {dice:.3f} (mean over sites) there."
    ]


def _about_data(results: Mapping[str, Any]) -> list[str]:
    data = results.get("data") or {}
    said = [
        ("unusable and left out", data.get("left_out")),
        ("of no site, so without part", data.get("unmapped")),
        ("sites without a usable subject", data.get("lost_sites")),
    ]
    return [f"{len(names)} {what}: {', '.join(names)}." for what, names in said if names]


# ------------------------------------------------------------------------------------- comparison


def _comparison(results: Mapping[str, Any]) -> list[Section]:
    found = results.get("comparison")
    title = "Local, federated, centralised"
    if not found or not all(way in found for way in WAYS):
        text = "No baselines were trained: fed-sim run … --baselines adds them to this run."
        return [Section("comparison", title, [text])]
    sites = sorted(found["federated"])
    everywhere = [site for site in sites if all(site in found[way] for way in WAYS)]
    rows = [
        [site, *(number(_score(found, way, site, key)) for key in ("dice", "dice/WT") for way in WAYS)]
        for site in sites
    ]  # fmt: skip
    for name, reduce in (("mean over sites", _mean), ("worst site", min)):
        cells = [
            number(reduce([_score(found, way, site, key) for site in everywhere]))
            if everywhere
            else "-"
            for key in ("dice", "dice/WT")
            for way in WAYS
        ]
        rows.append([name, *cells])
    headings = ["site", *(f"{way} {what}" for what in ("mean", "WT") for way in WAYS)]
    caption = (
        "Dice on each site's own held-out subjects, last round of each; mean: of WT, TC and ET. The last "
        "rows are over the sites that have all three."
    )
    plot = Plot(
        "comparison",
        _comparison_figure(found, sites),
        f"Dice of {many(len(sites), 'site')} trained alone, federated and pooled",
        "Mean Dice of WT, TC and ET on each site's own held-out subjects. ○ the site alone, ■ the "
        "federation, ▲ all data pooled. Models are those of the last round, which nobody chose.",
    )
    return [Section("comparison", title, [], [Table(headings, rows, caption, summary=2)], [plot])]


@styled
def _comparison_figure(found: Mapping[str, Any], sites: Sequence[str]) -> Figure:
    figure = new_figure(0.9 + 0.28 * len(sites))
    axes = figure.add_subplot()
    for row, site in enumerate(sites):
        values = [_score(found, way, site, "dice") for way in WAYS]
        told = [value for value in values if not math.isnan(value)]
        if told:
            axes.plot([min(told), max(told)], [row, row], color=GREY, linewidth=1, zorder=1)
    for way, (colour, marker, filled) in WAYS.items():
        values = [_score(found, way, site, "dice") for site in sites]
        face = colour if filled else "white"
        axes.scatter(values, range(len(sites)), s=46, marker=marker, facecolor=face, edgecolor=colour,
                     linewidth=1.5, label=way, zorder=2)  # fmt: skip
    axes.set_yticks(range(len(sites)), [shown_name(site) for site in sites])
    axes.set_ylim(len(sites) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("mean Dice of WT, TC and ET")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def _score(found: Mapping[str, Any], way: str, site: str, key: str) -> float:
    value = found.get(way, {}).get(site, {}).get(key)
    return math.nan if value is None else float(value)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# ----------------------------------------------------------------------------------- over subjects


def _over_subjects(subjects: Sequence[SubjectResult], recorded: Recorded) -> list[Section]:
    plots = []
    for metric, name in (("dice", "Dice"), ("iou", "IoU")):
        values: dict[str, dict[str, list[float]]] = {
            site: {} for site in recorded.sites if any(s.site == site for s in subjects)
        }
        for subject in subjects:
            for region in REGIONS:
                at = values.setdefault(subject.site, {}).setdefault(region, [])
                at.append(subject.scores[region][metric])
        plots.append(
            Plot(
                f"{metric}-over-subjects",
                boxes_over_subjects(values, metric, REGIONS),
                f"{name} of {many(len(subjects), 'held-out subject')} by site and region",
                f"{name}: each point is a held-out subject. Box: median and quartiles, where a site has "
                "five subjects or more; line: the median.",
            )
        )
    order = ranked(subjects)
    rows = [
        [
            s.subject,
            s.site,
            number(s.regions_dice),
            *(number(v) for v in s.dice.values()),
            *(number(s.scores[r].get("hd95"), 1) for r in REGIONS),
        ]
        for s in order[:LOWEST]
    ]
    headings = ("subject", "site", "mean Dice", *(f"Dice {r}" for r in REGIONS),
                *(f"HD95 {r}" for r in REGIONS))  # fmt: skip
    caption = f"The {min(LOWEST, len(order))} of {len(order)} subjects with the lowest mean Dice."
    table = Table(headings, rows, caption, left=2)
    return [Section("spread", "Box plots over subjects", [], [table], plots)]


# ---------------------------------------------------------------------------------------- pictures


def _pictures(
    folder: RunFolder,
    recorded: Recorded,
    config: FederationConfig,
    subjects: Sequence[SubjectResult],
) -> list[Section]:
    title = "Prediction against truth"
    shown = shown_subjects(subjects)
    if not shown:
        return [Section("slices", title, ["No results of single subjects are kept yet."])]
    try:
        model = _model(folder, recorded, config)
        cases = list(_cases(folder.path, shown.values(), model))
    except (
        *(BadWeights, CacheError, EvaluationError, MemoryError),
        *(OSError, ValueError, LookupError),
    ) as error:
        return [Section("slices", title, [f"There are no pictures: {error}"])]
    titles = [case_title(rank, s.site, s.subject, s.dice) for rank, s in shown.items()]
    assert recorded.measured is not None
    which = f"Model of round {recorded.measured[0]}, subjects by mean Dice of WT, TC and ET."
    slices = Plot(
        "slices",
        slices_figure(cases, titles),
        f"Slices of {many(len(cases), 'subject')} in three planes with prediction and truth: "
        + "; ".join(titles),
        f"Each plane is the one with most tumour in truth, on {cases[0].modality.upper()} as the network "
        f"was given it, in the subject's own voxels. {CONVENTION} A Dice "
        "of 1 is also given where neither truth nor prediction has any.",
        kind="photo",
    )
    sections = [Section("slices", title, [f"{which} {RESEARCH_ONLY}"], [], [slices])]
    middle = list(shown).index("median") if "median" in shown else 0
    case = cases[middle]
    if case.truth.any() or case.prediction.any():
        scene = Plot(
            "tumour-in-space",
            scene_figure(case, titles[middle]),
            f"The tumour of {case.subject} as surfaces, truth beside prediction",
            "Surfaces of the labels inside the brain's outline, seen from the right and front, slightly "
            "from above. ED is transparent. Smoothed for the picture.",
            kind="pixels",
        )
        sections.append(Section("scene", "A tumour in space", [], [], [scene]))
    return sections


def _model(folder: RunFolder, recorded: Recorded, config: FederationConfig) -> Model:
    """The chosen model; before the end that of the last round."""
    if recorded.final is not None:
        return load_model(folder.model)
    last = recorded.records[-1]
    network = network_for(config)
    network.load_state_dict(load_checkpoint(folder, last.round, last.sha256))
    device = best_device()
    return Model(network.to(device), config, device)


def _cases(run: Path, shown: Any, model: Model) -> Iterator[Case]:
    segment = segmenter_of(model, PLAIN)
    for result in shown:
        site = load_site(run / "sites" / result.site)
        entry = next((entry for entry in site.held_out if entry.id == result.subject), None)
        if entry is None:
            raise LookupError(f"{result.site} no longer holds {result.subject} out.")
        LOG.info(f"{result.site}: drawing {result.subject}")
        yield case_of(entry, model.config.modalities, segment(entry))
