"""The per-subject evaluation of a run's model on the held-out subjects of all its sites.

Works from the run's folder alone (its sites' manifests and the cache they name), so the data are not
read again; the same for a model of a comparison, or of another run with the same preprocessing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from client.device import use_threads
from client.postprocessing import PRESETS
from client.prediction import Model, Options, load_model
from client.site import Site, load_site
from client.subject_results import (
    PLAIN,
    Segmenter,
    is_plain,
    segmentation_of,
    segmentation_remarks,
    segmenter_of,
    subject_result,
)
from common.config import FederationConfig
from common.evaluation_document import (
    DOCUMENT,
    INTERVALS,
    EvaluationError,
    evaluation_document,
    read_evaluation,
)
from common.precision import autocast_dtype
from common.progress import track
from common.weights import file_sha256
from server.checkpoint import RunFolder
from sites.institutions import grade_in_id
from sites.preprocess import recipe_of

CHOSEN = (
    "The model was chosen among the rounds by these very subjects, so its figures are slightly "
    "optimistic."
)
PERHAPS_CHOSEN = (
    "If this model was chosen by these very subjects, as a run's model.safetensors is, its figures "
    "are slightly optimistic."
)
TRAINED_ON = (
    "These are subjects that the sites train on: the figures say nothing about new patients."
)


def evaluate_run(
    run: Path,
    model: Path | None = None,
    *,
    confidence: float = 0.95,
    training: bool = False,
    options: Options = PLAIN,
    segmenter: Callable[[Model, Options], Segmenter] = segmenter_of,
) -> dict[str, Any]:
    """Segment and measure every held-out (or `training`) subject of the run with its model, or another.

    Returns:
        The document of `common.evaluation_document`; nothing is written.

    Raises:
        EvaluationError: `run` holds no run or no model yet, its sites have no such subject, or the
            model is for other modalities or another preprocessing.
        BadWeights: the model cannot be read.
        CacheError: the prepared subjects are no longer there.
        ConfigError: a site's configuration cannot be read.
    """
    sites = _sites(run)
    path = _model_in(run) if model is None else model
    loaded = _as_in(sites[0].config, load_model(path), path)
    digest = file_sha256(path)
    subjects = {s.name: s.training if training else s.held_out for s in sites}
    work = [(site, entry) for site in sites for entry in subjects[site.name]]
    if not work:
        what = "training" if training else "held-out"
        raise EvaluationError(f"{run}: its sites have no {what} subject to evaluate on.")
    segment = segmenter(loaded, options)
    results = [
        subject_result(
            site.name,
            entry,
            segment(entry),
            patient=site.patients[entry.id],
            grade=site.grades.get(entry.id) or grade_in_id(entry.id),
        )
        for site, entry in track(work, "evaluating", len(work), "subjects")
    ]
    document = evaluation_document(
        results,
        model={"file": str(path), "sha256": digest},
        of="training" if training else "held-out",
        segmentation=segmentation_of(options),
        label_coding=sites[0].config.label_coding,  # of the run; a foreign model's does not count
        confidence=confidence,
        findings=_findings(run),
        left_out=_left_out(run, sites),
    )
    own = any(
        of.is_file() and file_sha256(of) == digest
        for of in (RunFolder(run).model, RunFolder(run).model_worst_site)
    )
    about_model = TRAINED_ON if training else CHOSEN if own else PERHAPS_CHOSEN
    remarks = [about_model, *segmentation_remarks(options), INTERVALS]
    single = document["over_sites"]["WT"]["dice"]["single_patient_sites"]
    if single:
        remarks.append(
            f"At {single} of {document['over_sites']['n']} sites there is a single patient, who "
            "cannot be drawn anew: the intervals over sites are too narrow."
        )
    none = "does not train" if training else "holds out nobody: nothing is measured there"
    remarks += [f"{name} {none}." for name, entries in subjects.items() if not entries]
    return {**document, "remarks": remarks}


def evaluation_folder(
    run: Path, model: Path | None = None, *, training: bool = False, options: Options = PLAIN
) -> Path:
    """Where an evaluation is kept: RUN/evaluation for the run's own model, else one named by the model;
    flips and post-processing are in its name too."""
    name = "evaluation-training" if training else "evaluation"
    if not is_plain(options):
        presets = [preset for preset, steps in PRESETS.items() if steps == options.postprocess]
        name += ("-flips" if options.flips else "") + f"-postprocess-{[*presets, 'other'][0]}"
    if model is not None and model.resolve() != RunFolder(run).model.resolve():
        name += f"-{file_sha256(model)[:12]}"
    return run / name


def stored_evaluation(run: Path, model: Path | None = None) -> dict[str, Any] | None:
    """The plain evaluation on held-out subjects that is kept in the run's folder, if it is of the
    model that is there now."""
    path = RunFolder(run).model if model is None else model
    try:
        document = read_evaluation(evaluation_folder(run, model) / DOCUMENT)
        same = (
            document["model"]["sha256"] == file_sha256(path)
            and document["segmentation"] == segmentation_of(PLAIN)
            and document["of"] == "held-out"
        )
    except (EvaluationError, OSError, KeyError, TypeError):
        return None
    return document if same else None


def _sites(run: Path) -> list[Site]:
    folders = [manifest.parent for manifest in sorted((run / "sites").glob("*/site.json"))]
    if not folders:
        raise EvaluationError(f"{run} holds no run: there is no site in {run / 'sites'}.")
    try:
        return [load_site(folder) for folder in folders]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise EvaluationError(
            f"{run}: the list of a site's subjects is damaged; type the run's command again."
        ) from error


def _model_in(run: Path) -> Path:
    path = RunFolder(run).model
    if not path.exists():
        raise EvaluationError(
            f"{run} has no {path.name} yet: let the run come to its end, or name one by --model."
        )
    return path


def _as_in(config: FederationConfig, model: Model, path: Path) -> Model:
    """The model, computing as the run does: threads and precision decide the last bits.

    Raises:
        EvaluationError: the run's prepared subjects are not what the model was trained for.
    """
    theirs, ours = recipe_of(model.config), recipe_of(config)
    names = {
        "modalities": "modalities",
        "mode": "mode",
        "shape": "grid",
        "normalise": "intensities",
    }
    if theirs.mode != ours.mode:
        del names["shape"]  # only one of them has a grid
    differing = [
        f"{words} {_words(getattr(theirs, key))} instead of {_words(getattr(ours, key))}"
        for key, words in names.items()
        if getattr(theirs, key) != getattr(ours, key)
    ]
    if differing:
        raise EvaluationError(
            f"{path}: was trained with {'; '.join(differing)}. Choose a model of a run that was "
            "prepared alike."
        )
    precision = config.training.precision
    try:
        autocast_dtype(precision, model.device)
    except ValueError:  # the run was made on another machine
        precision = model.config.training.precision
    same = {"threads": config.training.threads, "precision": precision}
    training = model.config.training.model_copy(update=same)
    use_threads(training)
    return Model(
        model.network, model.config.model_copy(update={"training": training}), model.device
    )


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _manifests(run: Path) -> list[dict[str, Any]]:
    paths = sorted((run / "sites").glob("*/site.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _findings(run: Path) -> list[dict[str, str]]:
    return [finding for manifest in _manifests(run) for finding in manifest.get("findings", [])]


def _left_out(run: Path, sites: list[Site]) -> list[dict[str, str]]:
    """Those of the sites, and those of sites that had no other subject, which are in the results only."""
    left_out = [
        {"site": site.name, "subject": subject, "why": why}
        for site in sites
        for subject, why in site.left_out.items()
        if subject
    ]
    known = {entry["subject"] for entry in left_out}
    try:
        data = json.loads((run / "results.json").read_text(encoding="utf-8"))["data"]
        lost = [s for s in data["left_out"] if s not in known]
        why = {f["subject"]: f["what"] for f in data["findings"] if f["severity"] == "error"}
    except (OSError, ValueError, KeyError, TypeError):
        return left_out
    return left_out + [{"site": "", "subject": s, "why": why.get(s, "unusable")} for s in lost]
