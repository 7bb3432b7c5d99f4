"""Many subjects in one folder: continued after a kill, redone where anything differs, never mixed up."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import client.prediction_folder as prediction_folder
from client.postprocessing import NONE
from client.prediction import Model, Options
from client.prediction_folder import Clash, Job, refuse_clashes, segment_all
from common.files import locked
from common.model import network_for
from sites.subject import Subject, discover


@pytest.fixture
def job(tiny_config) -> Job:
    config = tiny_config()
    return Job(Model(network_for(config), config, torch.device("cpu")), "a" * 64, Options())


@pytest.fixture
def subjects(cohort_data, tmp_path) -> tuple[Subject, ...]:
    for source in sorted(path for path in cohort_data.iterdir() if path.is_dir())[:2]:
        shutil.copytree(source, tmp_path / "data" / source.name)
    return discover(tmp_path / "data").subjects


@pytest.fixture
def segmented(monkeypatch) -> list[str]:
    """The ids of the subjects that the network has seen."""
    seen: list[str] = []
    real = prediction_folder.segment

    def noted(model, subject, *rest):
        seen.append(subject.id)
        return real(model, subject, *rest)

    monkeypatch.setattr(prediction_folder, "segment", noted)
    return seen


def test_what_is_done_is_kept_and_what_changed_is_redone(job, subjects, segmented, tmp_path):
    out = tmp_path / "out"
    first, second = (subject.id for subject in subjects)

    def again(with_job: Job = job) -> list[str]:
        segmented.clear()
        segment_all(with_job, subjects, [], out)
        return list(segmented)

    assert again() == [first, second]
    assert again() == []
    (out / f"{second}.nii.gz").unlink()
    assert again() == [second]
    assert again(replace(job, model_sha256="b" * 64)) == [first, second]
    assert again(replace(job, options=Options(postprocess=NONE))) == [first, second]
    assert again(replace(job, options=Options(uncertainty=True))) == [first, second]
    assert (out / f"{first}-entropy.nii.gz").exists()
    assert again() == [first, second]
    assert not (out / f"{first}-entropy.nii.gz").exists()  # it is of another call
    (scan := subjects[1].images["t1"]).write_bytes(subjects[0].images["t1"].read_bytes())
    assert scan.exists()
    assert again() == [second]
    (out / "predictions.json").write_text("{ damaged")
    assert again() == [first, second]


def test_a_file_that_a_person_has_worked_on_is_kept_and_named(job, subjects, segmented, tmp_path):
    out = tmp_path / "out"
    first, _second = (subject.id for subject in subjects)
    with_map = replace(job, options=Options(uncertainty=True))
    segment_all(with_map, subjects, [], out)
    corrected = out / f"{first}.nii.gz"
    image = nibabel.load(corrected)  # another tool keeps what the header says of its origin
    labels = np.asarray(image.dataobj).copy()
    labels[0, 0, 0] = 4
    nibabel.save(nibabel.Nifti1Image(labels, image.affine, image.header), corrected)
    content = corrected.read_bytes()
    entropy = out / f"{first}-entropy.nii.gz"
    other = replace(job, model_sha256="b" * 64)
    for with_job in (with_map, other, with_map):
        segmented.clear()
        bad, good = segment_all(with_job, subjects, [], out)
        assert corrected.read_bytes() == content
        assert entropy.exists()
        assert first not in segmented
        assert (bad["files"], bool(good["files"])) == ({}, True)
        (finding,) = bad["findings"]
        assert (finding["file"], finding["severity"]) == (corrected.name, "error")
        assert str(corrected) in finding["remedy"]
    corrected.rename(tmp_path / "corrected.nii.gz")
    good, _ = segment_all(job, subjects, [], out)
    assert good["files"].keys() == {corrected.name}
    assert not entropy.exists()  # ours, and of an earlier call


def test_a_file_that_the_list_does_not_know_is_replaced_only_if_it_is_ours(job, subjects, tmp_path):
    out = tmp_path / "out"
    _first, second = (subject.id for subject in subjects)
    segment_all(job, subjects, [], out)
    (out / "predictions.json").unlink()  # as after a kill between the two
    theirs = out / f"{second}.nii.gz"
    theirs.write_bytes(b"of another program")
    good, bad = segment_all(job, subjects, [], out)
    assert (bool(good["files"]), bad["files"]) == (True, {})
    assert theirs.read_bytes() == b"of another program"


def test_the_same_id_with_other_scans_is_said(job, subjects, tmp_path):
    out = tmp_path / "out"
    first, second = subjects
    segment_all(job, subjects, [], out)
    namesake = replace(second, id=first.id)
    (entry,) = segment_all(job, [namesake], [], out)
    (finding,) = [f for f in entry["findings"] if f["code"] == "other-scans"]
    assert (finding["file"], finding["severity"]) == (f"{first.id}.nii.gz", "warning")
    assert entry["files"]


def test_a_changed_duplicate_of_a_scan_is_noticed(job, subjects, segmented, tmp_path):
    subject, _ = subjects
    twin = tmp_path / "data" / subject.id / f"{subject.id}_t1.nii"
    nibabel.save(nibabel.load(subject.images["t1"]), twin)
    (subject, _) = discover(tmp_path / "data").subjects
    (entry,) = segment_all(job, [subject], [], tmp_path / "out")
    assert entry["files"]
    image = nibabel.load(twin)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine), twin)
    (entry,) = segment_all(job, [subject], [], tmp_path / "out")
    assert len(segmented) == 2
    assert not entry["files"]


def test_a_file_that_cannot_be_written_is_named_and_the_others_are_done(job, subjects, tmp_path):
    out = tmp_path / "out"
    first, second = (subject.id for subject in subjects)
    (out / f"{first}-entropy.nii.gz").mkdir(parents=True)
    bad, good = segment_all(replace(job, options=Options(uncertainty=True)), subjects, [], out)
    assert (bad["files"], bool(good["files"])) == ({}, True)
    assert [f["file"] for f in bad["findings"]] == [f"{first}-entropy.nii.gz"]
    assert not (out / f"{first}.nii.gz").exists()  # all of a subject's files or none
    assert not list(out.glob(".*.tmp"))
    listed = json.loads((out / "predictions.json").read_text())["subjects"]
    assert [entry["subject"] for entry in listed] == [first, second]


def test_the_table_tells_the_model_and_the_options_of_each_line(job, subjects, tmp_path):
    out = tmp_path / "out"
    segment_all(job, subjects[:1], [], out)
    flips = Options(flips=True, postprocess=NONE)
    segment_all(replace(job, model_sha256="b" * 64, options=flips), subjects[1:], [], out)
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert [(row["model"], row["options"]) for row in rows] == [
        ("a" * 12, "opening 1 mm, holes filled"),
        ("b" * 12, "flips, no post-processing"),
    ]


def test_a_kill_loses_only_the_subject_in_progress(job, subjects, segmented, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real = prediction_folder.save

    def killed(prediction, path: Path) -> list[Path]:
        if prediction.subject == subjects[1].id:
            raise KeyboardInterrupt
        return real(prediction, path)

    monkeypatch.setattr(prediction_folder, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        segment_all(job, subjects, [], out)
    listed = json.loads((out / "predictions.json").read_text())["subjects"]
    assert [entry["subject"] for entry in listed] == [subjects[0].id]
    monkeypatch.setattr(prediction_folder, "save", real)
    segmented.clear()
    half = out / f".{subjects[1].id}.nii.gz.123.tmp"  # kill -9 in the midst of writing
    half.touch()
    (list_half := out / ".predictions.json.123.tmp").touch()
    assert len(segment_all(job, subjects, [], out)) == 2
    assert segmented == [subjects[1].id]
    assert not half.exists()
    assert not list_half.exists()


def test_a_subject_that_became_unusable_loses_its_old_segmentation(job, subjects, tmp_path):
    out = tmp_path / "out"
    segment_all(job, subjects, [], out)
    subjects[0].images["flair"].write_bytes(b"damaged")
    bad, good = segment_all(job, subjects, [], out)
    assert (bad["files"], bool(good["files"])) == ({}, True)
    assert bad["findings"][0]["severity"] == "error"
    assert not (out / f"{subjects[0].id}.nii.gz").exists()


def test_a_subject_too_large_for_the_memory_is_listed_and_the_others_are_done(
    job, subjects, tmp_path, monkeypatch
):
    real = prediction_folder.segment

    def full(model, subject, *rest):
        if subject.id == subjects[0].id:
            raise MemoryError
        return real(model, subject, *rest)

    monkeypatch.setattr(prediction_folder, "segment", full)
    bad, good = segment_all(job, subjects, [], tmp_path / "out")
    assert bad["findings"][0]["code"] == "memory"
    assert good["files"]


def test_two_subjects_that_would_write_one_file_are_refused(subjects, tmp_path):
    first, _ = subjects
    outputs = [tmp_path / "A.nii.gz", tmp_path / "a.nii.gz"]
    with pytest.raises(Clash, match="would both write"):
        refuse_clashes(subjects, outputs)
    with pytest.raises(Clash, match="would both write"):  # one's map would be the other's labels
        refuse_clashes(subjects, [tmp_path / "A.nii.gz", tmp_path / "A-entropy.nii.gz"])
    with pytest.raises(Clash, match="replace a scan"):
        refuse_clashes([first], [first.images["t1"]])
    refuse_clashes(subjects, [tmp_path / "A.nii.gz", tmp_path / "B.nii.gz"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("S_t1.nii.gz", "a t1 scan"),
        ("S-T2F.nii", "a flair scan"),
        ("S_seg.nii.gz", "true labels"),
        ("S-seg.nii", "true labels"),
    ],
)
def test_a_name_that_would_be_taken_for_a_scan_or_the_truth_is_refused(
    name, said, subjects, tmp_path
):
    with pytest.raises(Clash, match=said):
        refuse_clashes(subjects[:1], [tmp_path / name])


def test_two_programs_do_not_write_into_one_folder(job, subjects, tmp_path):
    from common.files import AlreadyInUse

    out = tmp_path / "out"
    out.mkdir()
    with locked(out / ".predictions.lock"), pytest.raises(AlreadyInUse):
        segment_all(job, subjects, [], out)
