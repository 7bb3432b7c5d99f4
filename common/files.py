"""Writing files so that a reader, or a restart after a kill, sees the old or the new, never half."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

LOOKS = 10  # before a lock is said to be held


def write_atomically(path: Path, write: Callable[[Path], None], *, private: bool = False) -> None:
    """Let `write` fill a temporary file beside `path`, sync it to the disk, and rename it.

    A `private` file is its owner's alone (0600) before its first byte is written.

    Raises:
        OSError: the disk is full or not writable; `path` is then as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # a killed process's, with whatever rights that one had
    try:
        temporary.touch(0o600 if private else 0o666)
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # some libraries leave a file that only its owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # a write to a full disk does not say where
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write all files, each whole on the disk before the first takes its name.

    Raises:
        OSError: one cannot be written, which `filename` names. Every file is then as it was before,
            unless it was only the renaming that failed: then those before it are new.
    """
    waiting = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, content in files.items():
            with _blaming(path):
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                waiting[path].unlink(missing_ok=True)  # as in `write_atomically`
            with _blaming(path), waiting[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in waiting.items():
            with _blaming(path):
                temporary.replace(path)
    finally:
        for temporary in waiting.values():
            temporary.unlink(missing_ok=True)
    for folder in {path.parent for path in files}:
        sync_folder(folder)


@contextlib.contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """An error names the file that a person knows, not the temporary one."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed left of `path`; those still running are left alone."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = left.name.split(".")[-2]
        if number.isdecimal() and not _runs(int(number)):
            with contextlib.suppress(OSError):
                left.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def write_text_atomically(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Make the renames and new names inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AlreadyInUse(RuntimeError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` for as long as the block runs; it ends with the process.

    Raises:
        AlreadyInUse: another process holds it; the text names the folder and that process.
        OSError: the file cannot be written, or its file system has no locks.
    """
    with path.open("a+") as file:
        for attempt in range(LOOKS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if attempt < LOOKS - 1:  # `lock_holder` may be looking, for a moment
                    time.sleep(0.02)
                    continue
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise AlreadyInUse(
                    f"{path.parent} is in use by another process (number {holder}). "
                    "Wait for it or stop it, or choose another folder."
                ) from error
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def lock_holder(path: Path) -> int | None:
    """The number of the process that holds `locked(path)`, if any does."""
    try:
        with path.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read().strip() or 0) or None
    except (OSError, ValueError):
        return None
    return None


def ask_to_stop(path: Path, seconds: float) -> bool:
    """Send SIGTERM to the process that holds `locked(path)`; True once it has ended.

    Raises:
        OSError: it is another user's.
    """
    holder = lock_holder(path)
    if holder is None:
        return True
    with contextlib.suppress(ProcessLookupError):
        os.kill(holder, signal.SIGTERM)
    until = time.monotonic() + seconds
    while lock_holder(path) == holder:
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def require_writable(out: Path) -> None:
    """Before hours of computing: can the folder `out` be made and written to? Makes nothing.

    Raises:
        OSError: it cannot; or it, or what it lies in, is no folder.
    """
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
