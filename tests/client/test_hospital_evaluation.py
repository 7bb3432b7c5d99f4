"""`fed-client evaluate`: a hospital's own labelled subjects, in every state they may come in."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

import client.hospital_evaluation as module
from client.cli import app
from client.evaluation import evaluate
from client.hospital_evaluation import evaluate_folder
from client.prediction import load_model
from common.metrics import summarise
from common.model import initial_weights
from common.weights import save_weights


def fed_client(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Other sessions share the machine, and several threads wait for one another."""
    monkeypatch.setattr("client.device.available_cores", lambda: 1)


@pytest.fixture(scope="module")
def model(tiny_config, tmp_path_factory):
    config = tiny_config()
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_weights(path, initial_weights(config), {"config": config.agreed(), "round": 1})
    return path


@pytest.fixture
def hospital(cohort_data, tmp_path):
    """Three subjects of two grades, in a folder whose name is markup."""
    folder = tmp_path / "[red]klinik"
    names = sorted(path for path in cohort_data.iterdir() if path.is_dir())
    for grade, source in (("HGG", names[0]), ("HGG", names[1]), ("LGG", names[-1])):
        shutil.copytree(source, folder / grade / source.name)
    return folder


def test_the_means_are_those_of_the_federations_own_evaluation(model, hospital, prepared):
    document = evaluate_folder(model, hospital, site="x")
    ids = [subject["subject"] for subject in document["subjects"]]
    entries = [entry for entry in prepared.ready if entry.id in ids]
    loaded = load_model(model)
    expected = summarise(
        evaluate(
            loaded.network,
            entries,
            loaded.config,
            what="",
            surface_distances=True,
            device=loaded.device,
        )
    )
    assert document["sites"].keys() == {"x"}
    for structure in ("WT", "TC", "ET", "ED", "NCR"):
        for metric in ("dice", "iou", "hd95", "sensitivity", "specificity", "precision"):
            found, mean = document["sites"]["x"][structure][metric], f"{metric}/{structure}"
            assert found["n"] == expected.defined[mean]
            if found["n"]:
                assert found["mean"] == pytest.approx(expected.means[mean], abs=1e-9)
    grades = [subject["grade"] for subject in document["subjects"]]
    assert grades == ["HGG", "HGG", "LGG"]


def test_results_are_printed_and_only_written_if_asked(model, hospital, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    as_json = json.loads(fed_client(model, hospital, "--json", "--site", "a").stdout)
    assert sorted(tmp_path.rglob("*")) == before
    assert as_json["sites"]["a"]["n"] == 3
    out = tmp_path / "[b]out"
    for _ in range(2):  # the second time over the first
        done = fed_client(model, hospital, "--out", out)
        assert done.exit_code == 0, done.output
    for text in ("[b]out", "[red]klinik", "not a medical device"):
        assert text in done.stdout
    written = json.loads((out / "evaluation.json").read_text())
    assert written["pooled"] == as_json["pooled"]
    assert (out / "subjects.csv").exists()
    assert (out / "summary.csv").exists()


def test_prepared_scans_are_kept_only_in_a_cache_that_is_asked_for(
    model, hospital, tmp_path, monkeypatch
):
    places = []

    def watched(subject, recipe, folder, **more):
        entries = [path for path in folder.glob("*") if path.is_dir()]
        places.append((folder, len(entries)))
        return prepare_subject(subject, recipe, folder, **more)

    prepare_subject = module.prepare_subject
    monkeypatch.setattr(module, "prepare_subject", watched)
    evaluate_folder(model, hospital, site="x")
    assert [n for _, n in places] == [0, 0, 0], "one subject at a time"
    assert not places[0][0].exists()
    cache = tmp_path / "cache"
    evaluate_folder(model, hospital, site="x", cache=cache)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 3
    assert cache.stat().st_mode & 0o077 == 0, "scans are the owner's alone"


def test_unusable_subjects_are_named_and_left_out(model, hospital):
    broken = sorted((hospital / "HGG").iterdir())[0]
    (broken / f"{broken.name}_flair.nii.gz").write_bytes(b"no image")
    unlabelled = sorted((hospital / "LGG").iterdir())[0]
    (unlabelled / f"{unlabelled.name}_seg.nii.gz").unlink()
    done = fed_client(model, hospital)
    assert done.exit_code == 0, done.output
    assert f"Left out: {broken.name}" in done.stdout
    assert f"Left out: {unlabelled.name}" in done.stdout
    document = json.loads(fed_client(model, hospital, "--json").stdout)
    assert document["pooled"]["n"] == 1
    assert document["pooled"]["WT"]["dice"]["ci_low"] is None
    assert [entry["subject"] for entry in document["left_out"]] == sorted(
        [broken.name, unlabelled.name]
    )


def test_no_usable_subject_is_a_failure_with_a_list(model, hospital, tmp_path):
    for path in hospital.rglob("*_seg.nii.gz"):
        path.unlink()
    failed = fed_client(model, hospital, "--out", tmp_path / "out")
    assert failed.exit_code == 1
    assert "no subject can be used" in failed.stderr
    assert "segmentation" in failed.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    failed = fed_client(model, tmp_path / "empty")
    assert failed.exit_code == 1
    assert "no subject" in failed.stderr


def test_one_scan_under_two_names_counts_once(model, hospital):
    source = sorted((hospital / "HGG").iterdir())[0]
    twin = hospital / "HGG" / "Twin"
    shutil.copytree(source, twin)
    for path in sorted(twin.iterdir()):
        path.rename(twin / path.name.replace(source.name, "Twin"))
    document = evaluate_folder(model, hospital, site="x")
    assert document["pooled"]["n"] == 3
    assert [entry["subject"] for entry in document["left_out"]] == ["Twin"]


def test_scans_of_one_patient_are_told_by_the_hospitals_list(model, hospital):
    ids = sorted(path.name for path in hospital.glob("*/*"))
    lines = ["Subject_ID,Patient_ID", f"{ids[0]},P1", f"{ids[1]},P1"]
    (hospital / "patients.csv").write_text("\n".join(lines))
    document = evaluate_folder(model, hospital, site="x")
    assert [subject["patient"] for subject in document["subjects"]] == ["P1", "P1", ids[2]]
    assert document["pooled"]["patients"] == 2
    (hospital / "patients.csv").write_text("nonsense")
    failed = fed_client(model, hospital)
    assert failed.exit_code == 1
    assert "patients.csv" in failed.stderr


def test_another_segmenter_takes_the_place_of_the_models(model, hospital):
    document = evaluate_folder(
        model, hospital, site="x", segmenter=lambda *_: lambda subject: np.array(subject.truth())
    )
    assert document["pooled"]["WT"]["dice"]["mean"] == 1
    assert document["pooled"]["WT"]["lesion_hd95"]["mean"] == 0


def test_wrong_usage_is_told_before_anything_is_read(model, hospital, tmp_path):
    (tmp_path / "file").touch()
    for arguments, text in (
        ((tmp_path / "gone", hospital), "is no file"),
        ((model, tmp_path / "file"), "is no folder"),
        ((model, hospital, "--out", tmp_path / "file"), "is no folder"),
        ((model, hospital, "--cache", tmp_path / "file"), "is no folder"),
        ((model, hospital, "--confidence", "1"), "0.5<=x<=0.999"),
    ):
        failed = fed_client(*arguments)
        assert failed.exit_code == 2
        assert text in words(failed.output)
    failed = fed_client(model, hospital, "--out", tmp_path / "file" / "out")
    assert failed.exit_code == 1
    assert "Not a directory" in failed.stderr
    failed = fed_client(tmp_path / "file", hospital)
    assert failed.exit_code == 1
    assert "safetensors" in failed.stderr


def seen_truths(model, data, **more) -> dict[str, np.ndarray]:
    """The system labels of every subject, as they are measured against."""
    seen = {}

    def segmenter(*_):
        def segment(subject):
            seen[subject.id] = np.array(subject.truth())
            return seen[subject.id]

        return segment

    evaluate_folder(model, data, site="x", segmenter=segmenter, **more)
    return seen


def recode(hospital, **labels: int) -> None:
    """Give every segmentation other numbers, such as of_1=2."""
    for path in hospital.rglob("*_seg.nii.gz"):
        image = nib.load(path)
        voxels = np.asarray(image.dataobj).astype(np.uint8)
        changed = voxels.copy()
        for name, new in labels.items():
            changed[voxels == int(name.removeprefix("of_"))] = new
        nib.save(nib.Nifti1Image(changed, image.affine, image.header), path)


@pytest.fixture(scope="module")
def msd_model(tiny_config, tmp_path_factory):
    """Of a federation that agreed on another label coding than the hospital's."""
    config = tiny_config("label_coding=msd")
    path = tmp_path_factory.mktemp("msd") / "model.safetensors"
    save_weights(path, initial_weights(config), {"config": config.agreed(), "round": 1})
    return path


def test_labels_mean_what_the_hospital_says_and_not_what_the_models_federation_agreed_on(
    model, msd_model, hospital, tmp_path
):
    expected = seen_truths(model, hospital)
    cache = tmp_path / "cache"
    found = seen_truths(msd_model, hospital, cache=cache)
    assert all((found[name] == truth).all() for name, truth in expected.items())
    recode(hospital, of_1=2, of_2=1, of_4=3)  # now they are coded so too
    for of in (model, msd_model):
        found = seen_truths(of, hospital, cache=cache, label_coding="msd")
        assert all((found[name] == truth).all() for name, truth in expected.items())
        swapped = seen_truths(of, hospital, cache=cache)  # the cache tells them apart
        assert all((swapped[name] != truth).any() for name, truth in expected.items())


def test_the_coding_is_an_option_and_is_said(model, msd_model, hospital, tmp_path):
    [one] = sorted((hospital / "LGG").iterdir())
    recode(one, of_2=3)  # 3 beside 4: nobody but the hospital knows
    document = json.loads(fed_client(model, hospital, "--json").stdout)
    assert [entry["subject"] for entry in document["left_out"]] == [one.name]
    assert document["label_coding"] == "auto"
    [finding] = [f for f in document["findings"] if f["subject"] == one.name]
    assert "--label-coding" in finding["remedy"]
    out = tmp_path / "out"
    done = fed_client(model, hospital, "--label-coding", "brats2013", "--out", out)
    assert done.exit_code == 0, done.output
    assert "Labels were read by the coding brats2013 (--label-coding)." in done.stdout
    document = json.loads((out / "evaluation.json").read_text())
    assert (document["label_coding"], document["pooled"]["n"]) == ("brats2013", 3)
    warned = fed_client(msd_model, hospital).stdout
    assert "by each file's own labels" in warned
    assert "evaluate again with --label-coding msd" in warned
    wrong = fed_client(model, hospital, "--label-coding", "brats2014")
    assert wrong.exit_code == 2
    assert "is not one of auto, brats, brats2023" in words(wrong.output)


def test_names_that_are_no_utf8_stop_nobody(model, hospital, tmp_path):
    first, second = sorted((hospital / "HGG").iterdir())
    first.rename(hospital / "HGG" / "pat\udcff")  # the id in its files is a plain one
    for path in sorted(second.iterdir()):
        path.rename(second / path.name.replace(second.name, "pat\udcff"))
    out = tmp_path / "out"
    done = fed_client(model, hospital, "--out", out, "--cache", tmp_path / "cache")
    assert done.exit_code == 0, done.output
    assert "Left out: pat? of [red]klinik: the names of 5 files" in words(done.stdout)
    document = json.loads((out / "evaluation.json").read_text())
    assert first.name in [subject["subject"] for subject in document["subjects"]]
    assert document["pooled"]["n"] == 2


def test_a_confidence_that_is_no_number_is_refused(model, hospital, monkeypatch):
    monkeypatch.setattr(module, "evaluate_folder", lambda *_, **__: pytest.fail("it was begun"))
    failed = fed_client(model, hospital, "--confidence", "nan")
    assert failed.exit_code == 2
    assert "--confidence" in failed.output
