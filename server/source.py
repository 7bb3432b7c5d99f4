"""What a dashboard or tracking is made of: a coordinator's folder, or that of a run; looked at only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from server.checkpoint import RunFolder
from server.coordinator import CoordinatorFolder

Stamp = tuple[int, int, int]
NO_FILE: Stamp = (0, 0, 0)


@dataclass(frozen=True)
class Source:
    """A coordinator's folder, or that of a run: a simulation's, or a copy of a federation's."""

    path: Path

    @property
    def is_coordinators(self) -> bool:
        return self.coordinator.identity.exists()

    @property
    def coordinator(self) -> CoordinatorFolder:
        return CoordinatorFolder(self.path)

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.coordinator.run if self.is_coordinators else self.path)

    @property
    def lock(self) -> Path:
        return self.coordinator.lock if self.is_coordinators else self.run.lock

    @property
    def config(self) -> Path:
        return self.coordinator.config if self.is_coordinators else self.run.config

    def holds_a_run(self) -> bool:
        return any(path.exists() for path in (self.config, self.run.history, self.lock))


def stamp(path: Path) -> Stamp:
    """When the file was changed (ns), its size and its inode: other ones when it was changed or replaced."""
    try:
        found = path.stat()
    except OSError:
        return NO_FILE
    return found.st_mtime_ns, found.st_size, found.st_ino
