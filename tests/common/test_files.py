"""A file is the old one or the new one, and a lock ends with its process, however that ends."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import AlreadyInUse, locked, write_atomically, write_text_atomically

HALF_WRITTEN_THEN_WAITING = """
import sys, time
from pathlib import Path
from common.files import write_atomically
def write(path):
    with path.open("w") as file:
        file.write("new, but only ha")
        file.flush()
        print("half", flush=True)
        time.sleep(60)
write_atomically(Path(sys.argv[1]), write)
"""
LOCKED_THEN_WAITING = """
import sys, time
from pathlib import Path
from common.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def started():
    """Starts a program with one argument, returns it after its first line, kills it at the end."""
    running = []

    def start(program: str, argument: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(argument)], stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip()
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "state.json"
    write_text_atomically(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("new, but only ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_private_file_is_nobody_elses_before_its_first_byte(tmp_path):
    modes = []

    def write(temporary: Path) -> None:
        modes.append(stat.S_IMODE(temporary.stat().st_mode))
        temporary.write_text("secret")

    left_by_a_kill = tmp_path / f".key.{os.getpid()}.tmp"
    left_by_a_kill.touch(0o666)
    mask = os.umask(0)
    try:
        write_atomically(tmp_path / "key", write, private=True)
        write_atomically(tmp_path / "open", write)
    finally:
        os.umask(mask)
    modes += [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("key", "open")]
    assert modes == [0o600, 0o666, 0o600, 0o666]


def test_a_writer_that_fails_before_writing_keeps_its_own_error(tmp_path):
    def fail(temporary: Path) -> None:
        raise ValueError("no tensor")

    with pytest.raises(ValueError, match="no tensor"):
        write_atomically(tmp_path / "a", fail)


def test_kill_9_in_the_middle_of_a_write_leaves_the_old_file(tmp_path, started):
    path = tmp_path / "state.json"
    write_text_atomically(path, "old")
    process = started(HALF_WRITTEN_THEN_WAITING, path)
    assert path.read_text() == "old"  # also while the new one is being written
    process.kill()
    process.wait()
    assert path.read_text() == "old"
    write_text_atomically(path, "newer")
    assert path.read_text() == "newer"


def test_text_is_written_as_it_is(tmp_path):
    path = tmp_path / "a"
    write_text_atomically(path, "Köln\nline\n")
    assert path.read_bytes() == "Köln\nline\n".encode()


def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path, started):
    lock = tmp_path / "run.lock"
    process = started(LOCKED_THEN_WAITING, lock)
    with pytest.raises(AlreadyInUse) as caught, locked(lock):
        pass
    assert str(tmp_path) in str(caught.value)
    assert str(process.pid) in str(caught.value)
    process.kill()
    process.wait()
    with locked(lock):
        pass  # kill -9 released it


def test_lock_is_released_at_the_end_of_the_block_and_after_an_error(tmp_path):
    lock = tmp_path / "run.lock"
    with locked(lock), pytest.raises(AlreadyInUse), locked(lock):
        pass
    with pytest.raises(ValueError, match="inside"), locked(lock):
        raise ValueError("inside")
    with locked(lock):
        pass


def test_a_folder_that_cannot_be_locked_is_not_said_to_be_in_use(tmp_path):
    with pytest.raises(OSError, match="No such file"), locked(tmp_path / "none" / "run.lock"):
        pass


def test_a_full_disk_is_named_with_the_file(tmp_path):
    def fill(temporary):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as full:
        write_atomically(tmp_path / "model", fill)
    assert full.value.filename == str(tmp_path / "model")
    assert not list(tmp_path.iterdir())
