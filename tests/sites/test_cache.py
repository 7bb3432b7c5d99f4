"""The cache: what is prepared again and what is not, and that a kill or a full disk leaves no half."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from common.brats import MODALITIES
from sites import cache
from sites.cache import CachedSubject, CacheError, Preparation, load_entry, prepare_subjects
from sites.checks import examine
from sites.preprocess import Recipe, prepare
from sites.subject import discover

PATCHES = Recipe()
GRID = Recipe(mode="resample", shape=(24, 24, 24))


@pytest.fixture
def data(cohort_data: Path, tmp_path: Path) -> Path:
    """Three subjects that a test may spoil."""
    for folder in sorted(p for p in cohort_data.iterdir() if p.is_dir())[:3]:
        shutil.copytree(folder, tmp_path / "data" / folder.name)
    return tmp_path / "data"


def run(data: Path, folder: Path, recipe: Recipe = PATCHES, **more) -> Preparation:
    return prepare_subjects(discover(data).subjects, recipe, folder, site="here", **more)


def written(folder: Path) -> dict[str, int]:
    """Entry -> inode of its image, which changes when it is written again."""
    return {p.parent.name: p.stat().st_ino for p in folder.glob("*/image.npy")}


def file_of(data: Path, number: int, role: str) -> Path:
    return sorted(p for p in data.iterdir() if p.is_dir())[number] / (
        f"{sorted(p.name for p in data.iterdir())[number]}_{role}.nii.gz"
    )


def change(path: Path) -> None:
    """One brain voxel brighter, everything else as it was."""
    image = nibabel.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels[tuple(np.argwhere(voxels)[0])] += 1
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine, image.header), path)


# ---------------------------------------------------------------------------- what an entry holds


def test_an_entry_holds_what_preprocessing_gives(data: Path, tmp_path: Path):
    ready = run(data, tmp_path / "cache", GRID).ready
    assert [entry.id for entry in ready] == [s.id for s in discover(data).subjects]
    for entry, subject in zip(ready, discover(data).subjects, strict=True):
        scan, _ = examine(subject, modalities=MODALITIES)
        expected = prepare(scan, GRID)
        for entry_again in (entry, load_entry(entry.folder)):
            np.testing.assert_array_equal(entry_again.image(), expected.image)
            np.testing.assert_array_equal(entry_again.labels(), expected.labels)
            np.testing.assert_array_equal(entry_again.truth(), expected.truth)
            assert entry_again.geometry == expected.geometry
            assert entry_again.digest == scan.digest
            assert entry_again.fingerprints == scan.fingerprints
        assert isinstance(entry.image(), np.memmap)
        assert (entry.image().dtype, entry.labels().dtype) == (np.float16, np.uint8)


# --------------------------------------------------------------------------- what is prepared again


def test_nothing_is_prepared_twice_nor_read_twice(data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1.0)  # else the files are too new to be trusted
    folder = tmp_path / "cache"
    first = run(data, folder)
    before = written(folder)
    read = bytes_read()
    again = run(data, folder)
    scans = sum(path.stat().st_size for path in data.rglob("*.nii.gz"))
    assert bytes_read() - read < scans / 3
    assert again == first
    assert written(folder) == before


def bytes_read() -> int:
    fields = Path("/proc/self/io").read_text().split()
    return int(fields[fields.index("rchar:") + 1])


@pytest.mark.parametrize("role", ["t2", "seg"])
def test_a_changed_file_redoes_its_subject_only(data: Path, tmp_path: Path, role: str):
    folder = tmp_path / "cache"
    first = run(data, folder).ready
    before = written(folder)
    change(file_of(data, 1, role)) if role == "t2" else relabel(file_of(data, 1, role))
    again = run(data, folder).ready
    assert [a.folder == b.folder for a, b in zip(first, again, strict=True)] == [True, False, True]
    after = written(folder)
    assert before.items() < after.items()
    assert len(after) == 4
    changed = CachedSubject.truth if role == "seg" else CachedSubject.image
    assert not np.array_equal(changed(first[1]), changed(again[1]))


def unusable(preparation: Preparation) -> set[str]:
    return {f.subject for f in preparation.findings if f.severity == "error"}


def relabel(path: Path) -> None:
    image = nibabel.load(path)
    labels = np.asarray(image.dataobj).copy()
    labels[labels == 2] = 1
    nibabel.save(nibabel.Nifti1Image(labels, image.affine, image.header), path)


def test_a_file_only_touched_or_moved_is_not_prepared_again(data: Path, tmp_path: Path):
    folder = tmp_path / "cache"
    run(data, folder)
    before = written(folder)
    for path in data.rglob("*.nii.gz"):
        os.utime(path)
    data.rename(tmp_path / "elsewhere")
    run(tmp_path / "elsewhere", folder)
    assert written(folder) == before


def test_two_files_of_equal_size_and_age_that_swap_names_are_noticed(
    data: Path, tmp_path: Path, monkeypatch
):
    """As when a person mends two mislabelled modalities of the uncompressed Kaggle copy."""
    for path in data.rglob("*.nii.gz"):
        nibabel.save(nibabel.load(path), path.with_suffix(""))
        path.unlink()
        os.utime(path.with_suffix(""), (1.6e9, 1.6e9))
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1.0)
    first = run(data, tmp_path / "cache").ready[0]
    t1, t2 = (file_of(data, 0, role).with_suffix("") for role in ("t1", "t2"))
    assert (t1.stat().st_size, t1.stat().st_mtime_ns) == (t2.stat().st_size, t2.stat().st_mtime_ns)
    spare = tmp_path / "spare"
    t1.rename(spare), t2.rename(t1), spare.rename(t2)
    again = run(data, tmp_path / "cache").ready[0]
    np.testing.assert_array_equal(again.image()[0], first.image()[2])


def test_a_folder_whose_name_is_no_utf8_is_prepared_and_remembered_like_any_other(
    data: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1.0)  # remembered at once
    before = run(data, tmp_path / "cache")
    sorted(path for path in data.iterdir() if path.is_dir())[0].rename(data / "pat\udcff")
    after = run(data, tmp_path / "cache")
    assert [e.folder for e in after.ready] == [e.folder for e in before.ready]
    monkeypatch.setattr(cache, "file_sha256", lambda path: pytest.fail("read again"))
    assert run(data, tmp_path / "cache") == after


def test_another_recipe_makes_new_entries_and_keeps_the_old(data: Path, tmp_path: Path):
    folder = tmp_path / "cache"
    run(data, folder)
    before = written(folder)
    recipes = [GRID, Recipe(normalise="minmax"), Recipe(modalities=("t1ce", "flair"))]
    for count, recipe in enumerate(recipes, start=2):
        run(data, folder, recipe)
        assert len(written(folder)) == 3 * count
        assert before.items() <= written(folder).items()
    everything = written(folder)
    run(data, folder)
    assert written(folder) == everything


@pytest.mark.parametrize("name", ["image.npy", "labels.npy", "truth.npy", "about.json"])
def test_a_truncated_or_missing_file_of_an_entry_is_made_again(
    data: Path, tmp_path: Path, name: str
):
    folder = tmp_path / "cache"
    whole = run(data, folder).ready
    expected = [entry.image().copy() for entry in whole]
    path = whole[0].folder / name
    os.truncate(path, path.stat().st_size // 2)
    (whole[1].folder / name).unlink()
    with pytest.raises(CacheError, match="start the run again"):
        load_entry(whole[0].folder)
    before = written(folder)
    again = run(data, folder).ready
    assert again == whole
    for entry, image in zip(again, expected, strict=True):
        np.testing.assert_array_equal(entry.image(), image)
        assert load_entry(entry.folder) == entry
    assert written(folder)[whole[2].folder.name] == before[whole[2].folder.name]


def test_an_entry_of_a_version_without_fingerprints_is_made_again(data: Path, tmp_path: Path):
    folder = tmp_path / "cache"
    first = run(data, folder)
    about = first.ready[1].folder / "about.json"
    old = json.loads(about.read_text())
    del old["fingerprints"]
    about.write_text(json.dumps(old))
    before = written(folder)
    again = run(data, folder)
    assert again == first
    assert again.findings == ()
    assert load_entry(first.ready[1].folder) == first.ready[1]
    assert {name for name, inode in written(folder).items() if inode != before[name]} == {
        first.ready[1].folder.name
    }


def test_a_renamed_subject_keeps_its_fingerprints_whatever_is_asked_of_it(
    data: Path, tmp_path: Path
):
    first = run(data, tmp_path / "cache").ready[0]
    source = data / first.id
    renamed = tmp_path / "elsewhere" / "BraTS-GLI-00007-000"
    renamed.mkdir(parents=True)
    for path in source.iterdir():
        shutil.copy(path, renamed / path.name.replace(source.name, renamed.name))
    for modalities in (("flair",), MODALITIES[::-1]):
        recipe = Recipe("resample", (24, 24, 24), "minmax", modalities)
        (again,) = run(renamed.parent, tmp_path / "cache", recipe).ready
        assert again.id == renamed.name
        assert len(again.fingerprints) == len(modalities)
        assert set(again.fingerprints) <= set(first.fingerprints)


# ---------------------------------------------------------------------------------------- bad data


def test_a_corrupt_subject_is_a_finding_and_no_entry(data: Path, tmp_path: Path):
    bad = file_of(data, 1, "flair")
    os.truncate(bad, bad.stat().st_size // 2)
    for _ in range(2):  # the second time too, though nothing of it is cached
        result = run(data, tmp_path / "cache")
        assert len(result.ready) == 2
        assert unusable(result) == {bad.parent.name}
        errors = [f for f in result.findings if f.severity == "error"]
        assert [(f.site, f.file) for f in errors] == [("here", bad.name)]
    assert not any(name.startswith(bad.parent.name) for name in written(tmp_path / "cache"))


def test_warnings_are_repeated_from_the_cache_for_whoever_asks(data: Path, tmp_path: Path):
    path = file_of(data, 0, "seg")
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(0 * np.asarray(image.dataobj), image.affine), path)
    first = run(data, tmp_path / "cache").findings
    assert "empty-segmentation" in {f.code for f in first}
    subjects = discover(data).subjects
    again = prepare_subjects(subjects, PATCHES, tmp_path / "cache", site="there").findings
    assert [f.as_dict() | {"site": "here"} for f in again] == [f.as_dict() for f in first]
    assert {f.site for f in again} == {"there"}


def test_a_second_file_for_the_same_role_is_noticed_although_the_first_is_cached(
    data: Path, tmp_path: Path
):
    run(data, tmp_path / "cache")
    path = file_of(data, 0, "t1")
    nibabel.save(nibabel.load(path), path.with_suffix(""))  # x.nii beside x.nii.gz
    change(path.with_suffix(""))
    result = run(data, tmp_path / "cache")
    assert [f.code for f in result.findings if f.severity == "error"] == ["two-different-files"]
    assert path.parent.name not in {entry.id for entry in result.ready}


def test_the_same_scan_under_two_ids_is_used_once(data: Path, tmp_path: Path):
    source = file_of(data, 0, "t1").parent
    twin = data / "BraTS20_Training_369"
    twin.mkdir()
    for path in source.iterdir():
        shutil.copy(path, twin / path.name.replace(source.name, twin.name))
    result = run(data, tmp_path / "cache")
    assert unusable(result) == {twin.name}
    assert len(result.ready) == 3


def test_an_absurd_voxel_size_is_a_finding_not_an_exhausted_memory(data: Path, tmp_path: Path):
    folder = file_of(data, 0, "t1").parent
    for path in folder.iterdir():
        voxels = np.asarray(nibabel.load(path).dataobj) + ("seg" not in path.name)  # no background
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([20.0, 20.0, 20.0, 1.0])), path)
    result = run(data, tmp_path / "cache")
    assert [(f.subject, f.code) for f in result.findings if f.severity == "error"] == [
        (folder.name, "no-memory")
    ]
    assert len(result.ready) == 2


def test_an_unlabelled_subject_serves_prediction_but_not_training(data: Path, tmp_path: Path):
    file_of(data, 0, "seg").unlink()
    for_prediction = run(data, tmp_path / "cache", require_labels=False)
    assert len(for_prediction.ready) == 3
    assert not (for_prediction.ready[0].folder / "labels.npy").exists()
    for_training = run(data, tmp_path / "cache")
    assert [f.code for f in for_training.findings if f.severity == "error"] == [
        "missing-segmentation"
    ]
    assert len(for_training.ready) == 2


# ------------------------------------------------------------------------- kills, races, full disks


def forked(work: Callable[..., None], *arguments: object) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def test_a_killed_preparation_continues_where_it_was(cohort_data: Path, tmp_path: Path):
    folder = tmp_path / "cache"
    program = (
        "import sys; from pathlib import Path; from sites.cache import prepare_subjects;"
        "from sites.preprocess import Recipe; from sites.subject import discover;"
        "prepare_subjects(discover(Path(sys.argv[1])).subjects,"
        " Recipe('resample', (96, 96, 96)), Path(sys.argv[2]), site='x')"
    )
    arguments = [sys.executable, "-c", program, str(cohort_data), str(folder)]
    process = subprocess.Popen(arguments)
    while len(list(folder.glob("[!.]*/about.json"))) < 3 or not list(folder.glob(".*.tmp")):
        assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    # the kill may have come when one was done and the next not begun
    leftover = folder / f".{'0' * 20}.140737353807680.{process.pid}.tmp"
    leftover.mkdir()
    (leftover / "image.npy").write_bytes(b"half")

    finished = written(folder)
    entries = [name for name in finished if not name.startswith(".")]
    for name in entries:
        load_entry(folder / name)  # whole
    recipe = Recipe("resample", (96, 96, 96))
    result = prepare_subjects(discover(cohort_data).subjects[:8], recipe, folder, site="x")
    assert len(result.ready) == 8
    after = written(folder)
    assert {name: after[name] for name in entries} == {name: finished[name] for name in entries}
    assert not list(folder.glob(".*"))


def test_two_processes_at_once_on_one_folder(data: Path, tmp_path: Path):
    barrier = multiprocessing.get_context("fork").Barrier(2)
    one = tmp_path / "one"
    shutil.copytree(next(data.iterdir()), one / next(data.iterdir()).name)
    rounds = 20

    def work() -> None:
        subjects = discover(one).subjects
        for number in range(rounds):
            barrier.wait(30)
            result = prepare_subjects(subjects, PATCHES, tmp_path / f"cache{number}", site="x")
            assert len(result.ready) == 1

    processes = [forked(work), forked(work)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    for number in range(rounds):
        (entry,) = (p for p in (tmp_path / f"cache{number}").iterdir() if p.is_dir())
        load_entry(entry)


def test_another_process_may_finish_an_entry_in_the_very_last_moment(
    data: Path, tmp_path: Path, monkeypatch
):
    rename = Path.rename

    def beaten(self: Path, target: Path) -> Path:
        shutil.copytree(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", beaten)
    result = run(data, tmp_path / "cache")
    assert len(result.ready) == 3
    assert not list((tmp_path / "cache").glob(".*"))


def test_what_is_being_written_is_left_alone_by_another_run(
    data: Path, tmp_path: Path, monkeypatch
):
    save = np.save

    def saving(path: Path, *more: object, **options: object) -> None:
        cache._remove_leftovers(path.parent.parent)  # as every run does when it begins
        save(path, *more, **options)

    monkeypatch.setattr(np, "save", saving)
    assert len(run(data, tmp_path / "cache").ready) == 3


def test_a_subject_with_a_long_name_is_prepared(data: Path, tmp_path: Path):
    [subject, *_] = discover(data).subjects
    long = replace(subject, id="x" * 220)
    result = prepare_subjects([long], GRID, tmp_path / "cache", site="s")
    assert [entry.id for entry in result.ready] == [long.id]


def test_a_live_processs_unfinished_work_is_left_alone(data: Path, tmp_path: Path):
    alive = tmp_path / "cache" / f".BraTS20_Training_001-0.{os.getppid()}.tmp"
    alive.mkdir(parents=True)
    run(data, tmp_path / "cache")
    assert alive.exists()


def test_a_full_disk_is_one_sentence_and_leaves_no_half_entry(data: Path, tmp_path: Path):
    folder = tmp_path / "cache"

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # files.sqlite fits, images not
        try:
            run(data, folder)
        except CacheError as error:
            (tmp_path / "text").write_text(str(error))

    process = forked(work)
    process.join(60)
    text = (tmp_path / "text").read_text()
    assert str(folder) in text
    assert "(the disk may be full)" in text
    assert [p.name for p in folder.iterdir()] == ["files.sqlite"]
    assert len(run(data, folder).ready) == 3  # and once there is space


def test_a_cache_that_cannot_be_a_folder_is_one_sentence(data: Path, tmp_path: Path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(CacheError, match="File exists"):
        run(data, tmp_path / "cache")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "files.sqlite").write_text("this is no database, whatever its name is")
    with pytest.raises(CacheError, match="not a database"):
        run(data, tmp_path / "other")
