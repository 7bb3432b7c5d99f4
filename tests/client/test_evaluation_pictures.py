"""`fed-client evaluate --pictures`: the best, the median and the worst subject, as they were measured."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from markupsafe import Markup
from PIL import Image
from typer.testing import CliRunner

import client.evaluation_pictures as module
from client.cli import app
from client.evaluation_pictures import draw_pictures
from client.hospital_evaluation import evaluate_folder
from client.postprocessing import REFERENCE
from client.prediction import Options
from common.brats import STRUCTURES
from common.evaluation_document import EvaluationError
from common.evaluation_summary import shown_subjects
from common.figures import Drawn
from common.metrics import REGIONS
from common.model import initial_weights
from common.weights import save_weights
from tests.common.made_results import RESULTS


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Other sessions share the machine, and several threads wait for one another."""
    monkeypatch.setattr("client.device.available_cores", lambda: 1)


@pytest.fixture(scope="module")
def model(tiny_config, tmp_path_factory):
    config = tiny_config()
    torch.manual_seed(0)
    weights = {  # untrained ones say the same everywhere
        name: of + 0.3 * torch.randn_like(of) if of.is_floating_point() else of
        for name, of in initial_weights(config).items()
    }
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_weights(path, weights, {"config": config.agreed(), "round": 1})
    return path


@pytest.fixture
def hospital(cohort_data, tmp_path):
    """Four subjects."""
    folder = tmp_path / "klinik"
    for source in sorted(path for path in cohort_data.iterdir() if path.is_dir())[:4]:
        shutil.copytree(source, folder / source.name)
    return folder


@pytest.fixture
def undrawn(monkeypatch) -> list:
    """What would be drawn, instead of the seconds that it takes."""
    seen: list = []
    monkeypatch.setattr(module, "slices_figure", lambda cases, titles: seen.append((cases, titles)))
    monkeypatch.setattr(module, "scene_figure", lambda case, title: None)

    def drawn(figure, folder, name, alt, **how):
        return Drawn(folder / f"{name}.png", None, Markup(""))

    monkeypatch.setattr(module, "draw", drawn)
    monkeypatch.setattr(module, "draw_pixels", drawn)
    return seen


def fed_client(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def dice_of(case, region: str) -> float:
    predicted, true = (np.isin(of, STRUCTURES[region]) for of in (case.prediction, case.truth))
    both = predicted.sum() + true.sum()
    return float(2 * (predicted & true).sum() / both) if both else 1.0


def test_what_is_drawn_is_what_was_measured(model, hospital, tmp_path, undrawn):
    options = Options(postprocess=REFERENCE)
    document = evaluate_folder(model, hospital, site="x", options=options)
    before = sorted(hospital.rglob("*"))
    draw_pictures(document, model, hospital, tmp_path / "out", options=options)
    [(cases, titles)] = undrawn
    means = {}
    for subject in document["subjects"]:
        means[subject["subject"]] = sum(subject["scores"][r]["dice"] for r in REGIONS) / 3
    by_mean = sorted(means, key=lambda name: (means[name], name))
    assert [case.subject for case in cases] == [by_mean[3], by_mean[1], by_mean[0]]
    scores = {s["subject"]: s["scores"] for s in document["subjects"]}
    for case, title in zip(cases, titles, strict=True):
        for region in REGIONS:
            dice = scores[case.subject][region]["dice"]
            assert dice_of(case, region) == pytest.approx(dice, abs=1e-9)
            assert f"{region} {dice:.3f}" in title
    assert any(case.prediction.any() for case in cases)
    assert [title.split(":")[0] for title in titles] == ["best", "median", "worst"]
    assert sorted(hospital.rglob("*")) == before


def test_labels_are_drawn_by_the_coding_by_which_they_were_measured(
    model, hospital, tmp_path, undrawn
):
    for path in hospital.rglob("*_seg.nii.gz"):
        image = nib.load(path)
        as_msd = np.array([0, 2, 1, 3, 3], np.uint8)[np.asarray(image.dataobj).astype(int)]
        nib.save(nib.Nifti1Image(as_msd, image.affine, image.header), path)
    document = evaluate_folder(model, hospital, site="x", label_coding="msd")
    draw_pictures(document, model, hospital, tmp_path / "out")
    [(cases, _)] = undrawn
    for case in cases:
        [path] = hospital.rglob(f"{case.subject}_seg.nii.gz")
        in_file = np.bincount(np.asarray(nib.load(path).dataobj).ravel().astype(int))
        np.testing.assert_array_equal(np.bincount(case.truth.ravel())[1:], in_file[[2, 1, 3]])


def test_pictures_are_files_that_only_their_owner_reads_and_the_output_says_where(
    model, hospital, tmp_path
):
    for path in sorted(hospital.iterdir())[1:]:
        shutil.rmtree(path)
    pictures = tmp_path / "out" / "pictures"
    pictures.mkdir(parents=True, mode=0o700)
    (pictures / "tumour-median.png").touch()  # of an earlier evaluation, with more subjects
    done = fed_client(model, hospital, "--out", tmp_path / "out", "--pictures", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["pooled"]["n"] == 1
    assert str(pictures) in done.stderr
    assert "They show patients, with their ids: they stay here" in done.stderr
    assert "not a medical device" in done.stderr
    names = sorted(path.name for path in pictures.iterdir())
    assert names == ["slices.png", "slices.svg", "tumour-the-only-one.png"]
    for path in pictures.glob("*.png"):
        with Image.open(path) as image:
            assert image.width > 900
            assert len(image.convert("L").getcolors(256)) > 50, "not blank"
    assert "For research; not a medical device." in (pictures / "slices.svg").read_text()


@pytest.mark.parametrize("as_json", [False, True])
def test_a_picture_that_fails_costs_no_number(model, hospital, tmp_path, monkeypatch, as_json):
    def fails(*_arguments, **_more):
        raise OSError(28, "No space left on device", "slices.png")

    monkeypatch.setattr(module, "draw_pictures", fails)
    more = ["--json"] if as_json else []
    done = fed_client(model, hospital, "--out", tmp_path / "out", "--pictures", *more)
    assert done.exit_code == 1
    assert "slices.png: No space left on device" in done.stderr
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    if as_json:
        assert json.loads(done.stdout) == written
    else:
        assert str(tmp_path / "out" / "evaluation.json") in done.stdout
        assert "hd95" in done.stdout.lower()


def test_pictures_use_the_cache_and_without_one_leave_no_scan(
    model, hospital, tmp_path, undrawn, monkeypatch
):
    document = evaluate_folder(model, hospital, site="x", cache=tmp_path / "cache")
    places = []
    prepare_subject = module.prepare_subject

    def watched(subject, recipe, folder, **more):
        places.append((folder, [p.name for p in folder.glob("*") if p.is_dir()]))
        return prepare_subject(subject, recipe, folder, **more)

    monkeypatch.setattr(module, "prepare_subject", watched)
    draw_pictures(document, model, hospital, tmp_path / "a", cache=tmp_path / "cache")
    assert [(place, len(held)) for place, held in places] == [(tmp_path / "cache", 4)] * 3
    places.clear()
    draw_pictures(document, model, hospital, tmp_path / "b")
    assert [len(held) for _, held in places] == [0, 0, 0], "one subject at a time"
    assert not places[0][0].exists()
    assert (tmp_path / "b").stat().st_mode & 0o077 == 0, "pictures of scans are the owner's alone"


def test_what_changed_after_it_was_measured_is_not_drawn(model, hospital, tmp_path):
    document = evaluate_folder(model, hospital, site="x")
    for path in hospital.glob("*/*_seg.nii.gz"):
        path.unlink()
    with pytest.raises(EvaluationError, match="can no longer be read"):
        draw_pictures(document, model, hospital, tmp_path / "out")
    other = document | {"model": {"file": "m", "sha256": "0" * 64}}
    with pytest.raises(EvaluationError, match="has changed since it was measured"):
        draw_pictures(other, model, hospital, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_need_a_folder(model, hospital):
    failed = fed_client(model, hospital, "--pictures")
    assert failed.exit_code == 2
    assert "goes with a folder --out" in failed.output


def test_ranks_of_results():
    """Means over WT, TC and ET are 0.1 below the WT Dice: a1 0.3, b2, a2, b3, c1, b1 0.8."""
    shown = shown_subjects(RESULTS)
    assert {rank: r.subject for rank, r in shown.items()} == {
        **{"best": "b1", "median": "a2", "worst": "a1"}
    }
