"""`fed-sim evaluate` on a finished run: the numbers of its history, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from client.prediction import Options
from common.evaluation_document import EvaluationError, write_evaluation
from common.model import initial_weights
from common.weights import load_weights, save_weights
from server.history import History
from simulation.cli import app
from simulation.evaluation import evaluate_run, evaluation_folder, stored_evaluation
from tests.conftest import FinishedRun


def fed_sim(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@pytest.fixture(scope="module")
def document(finished_run: FinishedRun):
    return evaluate_run(finished_run.folder)


@pytest.fixture
def run(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A copy of the run, to be spoilt; its prepared subjects are elsewhere and shared."""
    shutil.copytree(finished_run.folder, tmp_path / "run")
    return tmp_path / "run"


def perfect(*_):
    return lambda subject: np.array(subject.truth())


def test_the_means_are_those_that_the_run_recorded(finished_run, document):
    with History(finished_run.folder / "history.sqlite") as history:
        final = history.final()
    assert final is not None
    for site, recorded in final[1].items():
        found = document["sites"][site]
        assert found["n"] == recorded.n
        for structure in ("WT", "TC", "ET", "ED", "NCR"):
            for metric in ("dice", "iou", "hd95", "sensitivity", "specificity", "precision"):
                name = f"{metric}/{structure}"
                assert found[structure][metric]["n"] == recorded.defined[name]
                if recorded.defined[name]:
                    mean = recorded.means[name]
                    assert found[structure][metric]["mean"] == pytest.approx(mean, abs=1e-9)
    assert document["pooled"]["n"] == sum(recorded.n for recorded in final[1].values())
    assert any("optimistic" in remark for remark in document["remarks"])
    grades = {subject["site"]: subject["grade"] for subject in document["subjects"]}
    assert grades == {"site-01": "HGG", "site-06": "HGG", "site-13": "LGG"}


def test_the_command_writes_and_prints_it_and_may_be_repeated(run, document):
    done = fed_sim(run)
    assert done.exit_code == 0, done.output
    assert "mean over sites" in done.stdout
    assert "Worst site by mean Dice of WT, TC, ET" in done.stdout
    assert "not a medical device" in done.stdout
    written = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert written["subjects"] == document["subjects"]
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == [
        *("evaluation.json", "subjects.csv", "summary.csv")
    ]
    again = fed_sim(run, "--json")
    assert json.loads(again.stdout)["subjects"] == document["subjects"]


def test_a_stored_evaluation_is_of_the_model_that_is_there(run, document):
    assert stored_evaluation(run) is None
    write_evaluation(document, evaluation_folder(run))
    assert stored_evaluation(run) == document
    weights, about = load_weights(run / "model.safetensors")
    save_weights(run / "model.safetensors", weights, {**about, "round": 99})
    assert stored_evaluation(run) is None
    (run / "evaluation" / "evaluation.json").write_text("{")
    assert stored_evaluation(run) is None


def test_another_segmentation_has_a_folder_of_its_own_and_is_not_taken_for_the_plain_one(
    run, document
):
    write_evaluation(document, evaluation_folder(run))
    done = fed_sim(run, "--postprocess", "recommended")
    assert done.exit_code == 0, done.output
    assert "post-processing (opening 1 mm, holes filled)" in words(done.stdout)
    folders = sorted(path.name for path in run.glob("evaluation*"))
    assert folders == ["evaluation", "evaluation-postprocess-recommended"]
    assert stored_evaluation(run) == document
    other = json.loads((run / folders[1] / "evaluation.json").read_text())
    assert other["segmentation"]["flips"] is False
    assert other["segmentation"]["postprocess"]["opening_mm"] == 1
    assert other["subjects"] != document["subjects"]
    flips = evaluation_folder(run, options=Options(flips=True))
    assert flips.name == "evaluation-flips-postprocess-recommended"
    write_evaluation(other, evaluation_folder(run))  # as --out can
    assert stored_evaluation(run) is None


def test_another_model_has_a_folder_of_its_own(run):
    other = run / "other.safetensors"
    _, about = load_weights(run / "model.safetensors")
    from client.prediction import load_model

    config = load_model(run / "model.safetensors").config
    save_weights(other, initial_weights(config), about)
    done = fed_sim(run, "--model", other, "--json")
    assert done.exit_code == 0, done.output
    assert not (run / "evaluation").exists()
    stored = stored_evaluation(run, other)
    assert stored is not None
    assert stored["model"]["file"] == str(other)
    assert "If this model was chosen" in stored["remarks"][0]


def test_training_subjects_are_those_trained_on(run, finished_run):
    document = evaluate_run(run, training=True, segmenter=perfect)
    results = json.loads((finished_run.folder / "results.json").read_text())["data"]["subjects"]
    for site, subjects in results.items():
        found = {s["subject"] for s in document["subjects"] if s["site"] == site}
        assert found == set(subjects["training"])
    assert document["of"] == "training"
    assert document["pooled"]["WT"]["dice"]["mean"] == 1, "the segmenter is used"
    assert evaluation_folder(run, training=True) != evaluation_folder(run)


def test_a_model_for_other_scans_is_refused_in_words(run, tiny_config, tmp_path):
    patches = ("preprocess.mode=patches", "training.patch=[32,32,32]")
    for assigned, text in (
        (patches, "with mode patches instead of resample. Choose"),
        ("modalities=[t1ce,flair]", "modalities t1ce, flair instead of t1, t1ce, t2, flair"),
        ("preprocess.shape=[48,48,48]", "grid 48, 48, 48 instead of 32, 32, 32"),
        ("preprocess.normalise=minmax", "intensities minmax instead of zscore"),
    ):
        config = tiny_config(*((assigned,) if isinstance(assigned, str) else assigned))
        path = tmp_path / "other.safetensors"
        save_weights(path, initial_weights(config), {"config": config.agreed()})
        failed = fed_sim(run, "--model", path)
        assert failed.exit_code == 1
        assert text in failed.stderr
        assert "Traceback" not in failed.stderr


def test_what_is_missing_is_said(run, tmp_path):
    with pytest.raises(EvaluationError, match="holds no run"):
        evaluate_run(tmp_path)
    (run / "model.safetensors").unlink()
    failed = fed_sim(run)
    assert (failed.exit_code, "has no model.safetensors yet" in failed.stderr) == (1, True)
    assert not (run / "evaluation").exists()


def test_a_cache_that_is_gone_is_said(run):
    for manifest in (run / "sites").glob("*/site.json"):
        manifest.write_text(manifest.read_text().replace("BraTS20_Training_", "Gone_", 40))
    failed = fed_sim(run)
    assert failed.exit_code == 1
    assert "is missing or damaged" in failed.stderr
    sorted((run / "sites").glob("*/site.json"))[0].write_text("{}")
    assert "subjects is damaged" in fed_sim(run).stderr


def test_sites_without_held_out_subjects_are_named_and_nobody_at_all_is_a_failure(run):
    manifests = sorted((run / "sites").glob("*/site.json"))
    for path in manifests[1:]:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"held_out": {}}))
    document = evaluate_run(run, segmenter=perfect)
    assert document["fairness"]["sites"] is None
    assert "site-06 holds out nobody: nothing is measured there." in document["remarks"]
    one = json.loads(manifests[0].read_text())
    one["held_out"] = dict(list(one["held_out"].items())[:1])
    one["left_out"] = {"Broken": "is damaged"}
    manifests[0].write_text(json.dumps(one))
    document = evaluate_run(run, segmenter=perfect)
    assert document["pooled"]["n"] == 1
    assert document["over_sites"]["WT"]["dice"]["ci_low"] is None
    assert document["left_out"] == [{"site": "site-01", "subject": "Broken", "why": "is damaged"}]
    manifests[0].write_text(json.dumps(one | {"held_out": {}}))
    with pytest.raises(EvaluationError, match="no held-out subject"):
        evaluate_run(run)


def test_runs_from_before_grades_were_written_have_those_of_their_ids(run):
    for path in (run / "sites").glob("*/site.json"):
        manifest = json.loads(path.read_text())
        assert set(manifest.pop("grades").values()) <= {"HGG", "LGG"}
        path.write_text(json.dumps(manifest))
    document = evaluate_run(run, segmenter=perfect)
    assert {s["grade"] for s in document["subjects"]} == {"HGG", "LGG"}


def test_wrong_usage_is_told_before_anything_is_read(run, tmp_path):
    (tmp_path / "file").touch()
    for arguments, text in (
        ((tmp_path / "gone",), "is no folder"),
        ((run, "--model", tmp_path / "gone"), "is no file"),
        ((run, "--out", tmp_path / "file"), "is no folder"),
        ((run, "--confidence", "nan"), "0.5<=x<=0.999"),
        ((run, "--postprocess", "much"), "not one of none, reference, recommended"),
    ):
        failed = fed_sim(*arguments)
        assert failed.exit_code == 2
        assert text in words(failed.output)
    failed = fed_sim(run, "--out", tmp_path / "file" / "out")
    assert (failed.exit_code, "Not a directory" in failed.stderr) == (1, True)
    failed = fed_sim(run, "--model", tmp_path / "file")
    assert (failed.exit_code, "safetensors" in failed.stderr) == (1, True)
