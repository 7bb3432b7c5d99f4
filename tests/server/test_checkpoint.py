"""A checkpoint is whole or refused, and pruning keeps exactly the rounds that are needed."""

from __future__ import annotations

import contextlib
import hashlib
import resource

import pytest
import torch

from common.weights import BadWeights
from server.checkpoint import (
    RunFolder,
    load_checkpoint,
    load_to_continue,
    prune_checkpoints,
    save_checkpoint,
)


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((50,), value), "n": torch.tensor(int(value))}


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())


@pytest.fixture
def small_files_only():
    """A context in which the system refuses files above 20 kB, as a full disk would."""

    @contextlib.contextmanager
    def limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def test_what_was_saved_is_loaded(tmp_path):
    folder = RunFolder(tmp_path)
    where, digest = save_checkpoint(folder, 7, weights(7))
    assert (tmp_path / where).is_file()
    assert hashlib.sha256((tmp_path / where).read_bytes()).hexdigest() == digest
    loaded = load_checkpoint(folder, 7, digest)
    assert torch.equal(loaded["w"], weights(7)["w"])
    assert loaded["n"].dtype == torch.int64


def test_a_missing_damaged_or_exchanged_checkpoint_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    _, digest = save_checkpoint(folder, 1, weights(1))
    _, other = save_checkpoint(folder, 2, weights(2))
    path = folder.checkpoint(1)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1  # one bit of one value: still a valid safetensors file
    for content in (bytes(flipped), whole[:-1], b"", folder.checkpoint(2).read_bytes()):
        path.write_bytes(content)
        with pytest.raises(BadWeights, match="round 1 was recorded"):
            load_checkpoint(folder, 1, digest)
    path.unlink()
    with pytest.raises(BadWeights, match="missing or changed"):
        load_checkpoint(folder, 1, digest)
    with pytest.raises(BadWeights):
        load_checkpoint(folder, 3, digest)
    assert load_checkpoint(folder, 2, other)["w"][0] == 2


def test_saving_a_round_again_replaces_it(tmp_path):
    """As after a kill between the checkpoint and its record in the history."""
    folder = RunFolder(tmp_path)
    save_checkpoint(folder, 3, weights(1))
    _, digest = save_checkpoint(folder, 3, weights(2))
    assert load_checkpoint(folder, 3, digest)["w"][0] == 2
    assert names(folder) == ["round-0003.safetensors"]


def test_pruning_keeps_what_it_is_told_and_removes_what_a_killed_run_left(tmp_path):
    folder = RunFolder(tmp_path)
    for number in (1, 2, 3, 10000):
        save_checkpoint(folder, number, weights(number))
    for left in (".round-0002.safetensors.999.tmp", ".tmpAbC123"):
        (folder.path / "checkpoints" / left).write_bytes(b"half")
    mine = folder.path / "checkpoints" / "notes.txt"
    mine.write_text("not a checkpoint")
    prune_checkpoints(folder, {2, 10000})
    assert names(folder) == ["notes.txt", "round-0002.safetensors", "round-10000.safetensors"]
    prune_checkpoints(folder, set())
    assert names(folder) == ["notes.txt"]


def test_a_full_disk_keeps_the_checkpoint_of_before(tmp_path, small_files_only):
    folder = RunFolder(tmp_path)
    _, digest = save_checkpoint(folder, 3, weights(1))
    with small_files_only(), pytest.raises(OSError, match=r"round-0003.*cannot be written"):
        save_checkpoint(folder, 3, {"w": torch.zeros(100_000)})
    assert load_checkpoint(folder, 3, digest)["w"][0] == 1
    assert names(folder) == ["round-0003.safetensors"]


def test_the_group_may_read_a_model_if_it_may_read_other_files(tmp_path):
    folder = RunFolder(tmp_path)
    save_checkpoint(folder, 1, weights(1))
    (tmp_path / "other").touch()
    assert folder.checkpoint(1).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_two_models_are_one_file_and_each_is_found(tmp_path):
    folder = RunFolder(tmp_path)
    _, digest = save_checkpoint(folder, 4, weights(1), raw=weights(2))
    assert names(folder) == ["round-0004.safetensors"]
    kept, raw = load_to_continue(folder, 4, digest)
    assert kept.keys() == raw.keys() == weights(1).keys()
    assert (kept["w"][0], raw["w"][0]) == (1, 2)
    assert load_checkpoint(folder, 4, digest)["w"][0] == 1
    _, digest = save_checkpoint(folder, 5, weights(3))
    kept, raw = load_to_continue(folder, 5, digest)
    assert kept["w"][0] == raw["w"][0] == 3
    with pytest.raises(BadWeights, match="missing or changed"):
        load_to_continue(folder, 4, digest)
