"""Several subjects at a time: in their order, whatever happens to one of them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from sites import each_subject as module
from sites.cache import prepare_subjects
from sites.each_subject import AT_ONCE, each_subject
from sites.finding import Finding
from sites.preprocess import Recipe
from sites.subject import Subject, discover

SUBJECTS = [Subject(f"S{n}", Path(), {}, None) for n in range(12)]
NO_MEMORY = Finding("", "S3", "", "error", "no-memory", "there is not enough memory", "Free some.")


@pytest.fixture(autouse=True)
def many_cores(monkeypatch):
    monkeypatch.setattr(module, "available_cores", lambda: 16)
    monkeypatch.setattr(module, "available_memory", lambda: 2**40)


def test_a_few_work_at_a_time_and_no_more_and_the_order_stays():
    working, most = 0, 0
    lock = threading.Lock()
    all_here = threading.Barrier(AT_ONCE)

    def work(subject: Subject) -> tuple[str, list[Finding]]:
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
        all_here.wait(timeout=20)  # breaks if they came one by one
        time.sleep(0.05)  # for one too many to be seen
        with lock:
            working -= 1
        return subject.id, []

    made = each_subject(work, SUBJECTS, "testing")
    assert [name for name, _ in made] == [subject.id for subject in SUBJECTS]
    assert most == AT_ONCE


@pytest.mark.parametrize(
    ("cores", "gigabytes", "threads"),
    [(16, None, 4), (2, 64, 2), (16, 7, 2), (16, 1, 1), (16, 64, 4)],
)
def test_there_are_as_many_as_there_are_cores_and_memory_for(
    monkeypatch, cores, gigabytes, threads
):
    memory = None if gigabytes is None else gigabytes * 2**30
    monkeypatch.setattr(module, "available_cores", lambda: cores)
    monkeypatch.setattr(module, "available_memory", lambda: memory)
    names: set[str] = set()

    def work(subject: Subject) -> tuple[None, list[Finding]]:
        names.add(threading.current_thread().name)
        time.sleep(0.02)
        return None, []

    each_subject(work, SUBJECTS, "testing")
    assert len(names) == threads


def test_one_for_which_there_was_too_little_memory_is_tried_again_alone():
    working: set[str] = set()
    beside: list[set[str]] = []

    def work(subject: Subject) -> tuple[str, list[Finding]]:
        working.add(subject.id)
        time.sleep(0.01)
        if subject.id == "S3":
            beside.append(working - {"S3"})
        working.discard(subject.id)
        return subject.id, [NO_MEMORY] if subject.id == "S3" and len(beside) == 1 else []

    assert each_subject(work, SUBJECTS, "testing") == [(s.id, []) for s in SUBJECTS]
    assert len(beside) == 2
    assert not beside[1]


def test_an_error_ends_it_without_the_rest():
    begun: list[str] = []

    def work(subject: Subject) -> tuple[str, list[Finding]]:
        begun.append(subject.id)
        if subject.id == "S0":
            raise OSError("the disk is full")
        time.sleep(0.1)
        return subject.id, []

    with pytest.raises(OSError, match="the disk is full"):
        each_subject(work, SUBJECTS, "testing")
    assert len(begun) < len(SUBJECTS)
    assert not [t for t in threading.enumerate() if t.name.startswith("subjects")]


def test_one_core_and_many_prepare_the_same_files(cohort_data: Path, tmp_path: Path, monkeypatch):
    subjects = discover(cohort_data).subjects

    def prepared(cores: int) -> dict[str, bytes]:
        monkeypatch.setattr(module, "available_cores", lambda: cores)
        folder = tmp_path / str(cores)
        made = prepare_subjects(subjects, Recipe("resample", (16, 16, 16)), folder, site="s")
        assert [entry.id for entry in made.ready] == [subject.id for subject in subjects]
        files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".sqlite"]
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}

    alone = prepared(1)
    assert len(alone) == 4 * len(subjects)
    assert prepared(16) == alone
