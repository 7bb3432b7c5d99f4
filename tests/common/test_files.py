"""A file is the old one or the new one, and a lock ends with its process, however that ends."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common.files import (
    AlreadyInUse,
    ask_to_stop,
    lock_holder,
    locked,
    remove_leftovers,
    require_writable,
    write_atomically,
    write_text_atomically,
    write_together,
)

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


# ------------------------------------------------------------------- who holds it, and stopping it

STUBBORN = LOCKED_THEN_WAITING.replace(
    "with locked", "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwith locked"
)
SLOW_TO_END = LOCKED_THEN_WAITING.replace(
    "with locked",
    "import signal\n"
    "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit()))\nwith locked",
)


def test_the_holder_of_a_lock_is_known_while_it_lives(tmp_path, started):
    lock = tmp_path / "run.lock"
    assert lock_holder(lock) is None, "there is no such file"
    process = started(LOCKED_THEN_WAITING, lock)
    assert lock_holder(lock) == process.pid
    process.kill()
    process.wait()
    assert lock.exists()
    assert lock_holder(lock) is None, "kill -9 leaves the file, with an old number in it"
    with locked(lock):
        assert lock_holder(lock) == os.getpid()
    assert lock_holder(lock) is None
    lock.write_text("not a number")
    assert lock_holder(lock) is None
    assert lock_holder(tmp_path) is None


def test_asking_who_holds_a_lock_is_in_nobodys_way(tmp_path):
    """A monitor may ask all the time; the one who wants the lock must get it."""
    lock = tmp_path / "run.lock"
    lock.touch()
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            lock_holder(lock)
            over.wait(0.001)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            with locked(lock):
                pass
    finally:
        over.set()
        for thread in threads:
            thread.join()


def reaped(process: subprocess.Popen[str]) -> threading.Thread:
    thread = threading.Thread(target=process.wait)
    thread.start()
    return thread


def test_who_holds_the_lock_is_asked_to_stop_and_waited_for(tmp_path, started):
    lock = tmp_path / "run.lock"
    assert ask_to_stop(lock, 1.0), "nobody holds it"
    process = started(SLOW_TO_END, lock)
    reaper = reaped(process)
    assert ask_to_stop(lock, 60.0)
    assert lock_holder(lock) is None
    reaper.join(timeout=60)
    assert process.returncode == 0
    assert ask_to_stop(lock, 1.0)


def test_who_does_not_stop_is_not_said_to_have_stopped(tmp_path, started):
    lock = tmp_path / "run.lock"
    process = started(STUBBORN, lock)
    assert not ask_to_stop(lock, 0.3)
    assert lock_holder(lock) == process.pid


def test_nobody_is_stopped_for_an_old_number_in_the_file(tmp_path, started):
    """The number of a process that was killed may be another's by now."""
    lock = tmp_path / "run.lock"
    other = started(LOCKED_THEN_WAITING, tmp_path / "other.lock")
    lock.write_text(str(other.pid))
    assert ask_to_stop(lock, 1.0)
    assert other.poll() is None


def test_files_are_written_together_or_not_at_all(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")
    second.mkdir()
    with pytest.raises(OSError, match="directory") as caught:
        write_together({first: b"new", second: b"new"})
    assert caught.value.filename == str(second)
    assert first.read_text() == "old"
    second.rmdir()
    write_together({first: b"new", second: b"also new"})
    assert (first.read_bytes(), second.read_bytes()) == (b"new", b"also new")
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}


def test_what_a_killed_process_left_goes_and_what_a_running_one_writes_stays(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = tmp_path / "out[1].nii"
    left = tmp_path / f".out[1].nii.{ended.pid}.tmp"
    others = [tmp_path / f".out[1].nii.{os.getpid()}.tmp", tmp_path / f".out1.nii.{ended.pid}.tmp"]
    for file in (left, *others):
        file.touch()
    remove_leftovers(path)
    assert not left.exists()
    assert all(other.exists() for other in others)


def test_a_place_that_cannot_be_written_is_told_before(tmp_path):
    require_writable(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        require_writable(tmp_path / "file" / "out")
