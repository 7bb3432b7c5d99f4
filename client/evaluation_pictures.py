"""The best, the median and the worst subject of a hospital's own evaluation, as pictures.

A real federation's coordinator has no scan, so that nobody but the hospital can draw what `fed-sim report`
shows of a simulation. Pictures show patients: they stay where the scans are. For research; not a medical
device.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from client.overlays import Case, case_of, case_title, slices_figure
from client.prediction import Model, Options, load_model
from client.scene import scene_figure
from client.subject_results import PLAIN, Segmenter, segmenter_of
from common.console import ending_in_order
from common.evaluation_document import EvaluationError, results_in
from common.evaluation_summary import RANKS, SubjectResult, shown_subjects
from common.figures import draw, draw_pixels
from common.progress import track
from common.weights import file_sha256
from sites.cache import prepare_subject
from sites.preprocess import Recipe, recipe_of
from sites.subject import discover

FOLDER = "pictures"
STAY_HERE = (
    "They show patients, with their ids: they stay here, where the scans are. For research; not a medical "
    "device."
)


def draw_pictures(
    document: Mapping[str, Any],
    model: Path,
    data: Path,
    folder: Path,
    *,
    cache: Path | None = None,
    options: Options = PLAIN,
    segmenter: Callable[[Model, Options], Segmenter] = segmenter_of,
) -> list[Path]:
    """Draw three subjects of an evaluation as they were measured: slices of all, and each one's tumour.

    Args:
        document: of `client.hospital_evaluation.evaluate_folder`; the other arguments are those it had.
        folder: for the pictures; those of an earlier evaluation are replaced.

    Returns:
        The files written.

    Raises:
        EvaluationError: the model is another by now, or a subject can no longer be used.
        BadWeights, CacheError: the model cannot be read, or the cache not be written.
        OSError: a picture cannot be written.
    """
    if file_sha256(model) != document["model"]["sha256"]:
        raise EvaluationError(f"{model}: has changed since it was measured; evaluate again.")
    loaded = load_model(model)
    shown = shown_subjects(results_in(document))
    recipe = replace(recipe_of(loaded.config), label_coding=document["label_coding"])
    cases = _cases(shown, data, recipe, segmenter(loaded, options), cache)
    titles = [case_title(rank, r.site, r.subject, r.dice) for rank, r in shown.items()]

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # pictures of scans are scans
    folder.chmod(0o700)  # it may have been there
    drawn = draw(slices_figure(cases, titles), folder, "slices", "", photo=True)
    written = [path for path in (drawn.png, drawn.svg) if path is not None]
    for rank, case, title in zip(shown, cases, titles, strict=True):
        if case.truth.any() or case.prediction.any():
            made = draw_pixels(scene_figure(case, title), folder, _scene_name(rank), "")
            written.append(made.png)
    for rank in RANKS:
        old = folder / f"{_scene_name(rank)}.png"
        if old not in written:
            old.unlink(missing_ok=True)
    return written


def _scene_name(rank: str) -> str:
    return f"tumour-{rank.replace(' ', '-')}"


def _cases(
    shown: Mapping[str, SubjectResult],
    data: Path,
    recipe: Recipe,
    segment: Segmenter,
    cache: Path | None,
) -> list[Case]:
    found = {
        subject.id: subject for subject in discover(data, modalities=recipe.modalities).subjects
    }
    cases = []
    with (
        ending_in_order(),
        nullcontext(cache) if cache else TemporaryDirectory(prefix="fedbrats-") as place,
    ):
        for result in track(list(shown.values()), "drawing", len(shown), "subjects"):
            entry = None
            if result.subject in found:
                source = found[result.subject]
                entry, _ = prepare_subject(source, recipe, Path(place), site=result.site)
            if entry is None:
                raise EvaluationError(
                    f"{data}: {result.subject} was measured and can no longer be read; evaluate again."
                )
            cases.append(case_of(entry, recipe.modalities, segment(entry)))
            if cache is None:
                shutil.rmtree(entry.folder)
    return cases
