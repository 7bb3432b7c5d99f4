"""Many subjects in one folder: continued after a kill, redone where anything differs, never mixed up."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

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
    (out / f"{first}.nii.gz").write_bytes(b"edited")
    assert again() == [first]
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
    assert len(segment_all(job, subjects, [], out)) == 2
    assert segmented == [subjects[1].id]
    assert not half.exists()


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


def test_two_programs_do_not_write_into_one_folder(job, subjects, tmp_path):
    from common.files import AlreadyInUse

    out = tmp_path / "out"
    out.mkdir()
    with locked(out / ".predictions.lock"), pytest.raises(AlreadyInUse):
        segment_all(job, subjects, [], out)
