"""A disk that is full, at the coordinator and at a hospital: words, exit code 1, nothing lost.

Each keeps its folder on a small file system of its own (tmpfs), which a test fills to the last byte.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
HOSPITAL, OTHER = "site-01", "site-06"
SIZE = 24  # MB of each file system


@pytest.fixture(scope="module")
def small_disk() -> Iterator[Callable[[Path], Path]]:
    """A function: a folder to make -> the same, on a small file system of its own."""
    mounted: list[Path] = []

    def mount(folder: Path) -> Path:
        folder.mkdir(parents=True)
        options = ["-t", "tmpfs", "-o", f"size={SIZE}m,mode=700", "tmpfs", str(folder)]
        try:
            done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
            problem = done.stderr.strip() if done.returncode else ""
        except FileNotFoundError:
            problem = "there is no mount command"
        if problem:
            pytest.skip(f"no file system can be mounted here to be filled up: {problem}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave not one byte."""
    with (folder / "filling").open("ab", buffering=0) as filling:
        for size in (2**20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    filling.write(b"\0" * size)


def free(folder: Path) -> None:
    (folder / "filling").unlink()


@dataclass
class Story:
    """The federation after its end, and what each program said; the first ones met a full disk."""

    federation: Any
    first_server: Any
    server: Any
    first_client: Any
    client: Any


@pytest.fixture(scope="module")
def story(new_federation, small_disk, tmp_path_factory):
    path = tmp_path_factory.mktemp("full")
    server_disk, client_disk = small_disk(path / "server"), small_disk(path / HOSPITAL)
    sites = [HOSPITAL, OTHER]
    f = new_federation("rounds.min_sites=2", sites=sites, misbehaving=sites, path=path)
    f.faults[HOSPITAL].hold("train-2")
    f.faults[OTHER].hold("train-2", "train-3")
    first_server = f.serving()
    first_client, other = f.join(HOSPITAL), f.join(OTHER)

    for site in sites:
        f.faults[site].until_held("train-2")
    fill(client_disk)
    f.faults[HOSPITAL].release("train-2")
    first_client.exit_code()
    free(client_disk)
    client = f.join(HOSPITAL)
    f.faults[OTHER].release("train-2")

    f.faults[OTHER].until_held("train-3")
    fill(server_disk)
    f.faults[OTHER].release("train-3")
    first_server.exit_code()
    free(server_disk)
    server = f.serving()
    for program in (server, client, other):
        program.ends_well()
    return Story(f, first_server, server, first_client, client)


def test_a_hospital_s_full_disk_is_named_and_nothing_leaves_unrecorded(story):
    f = story.federation
    story.first_client.fails_saying(
        f"{f.hospitals[HOSPITAL].audit.path}: the audit log cannot be written",
        "Free disk space",
    )
    updates = f.left(HOSPITAL, "update")
    assert [row["round"] for row in updates][:2] == [1, 2]
    assert "round 2: update" not in story.first_client.text()
    assert "round 2: update" in story.client.text()


def test_a_coordinator_s_full_disk_is_named(story):
    f = story.federation
    story.first_server.fails_saying(str(f.coordinator.path), "Free disk space")
    assert "Round 3:" not in story.first_server.text()


def test_both_continue_as_if_nothing_had_been_once_there_is_space(story):
    f = story.federation
    assert "continuing after round 2" in story.server.text()
    verdict = f.results()["verdict"]
    assert (verdict["complete"], verdict["everyone"]) == (True, True)
    assert verdict["contributed"] == {HOSPITAL: [1, 2, 3], OTHER: [1, 2, 3]}
    assert f.orphans() == []
