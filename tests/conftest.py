"""What several tests share: a small synthetic cohort, a configuration that trains on it in a blink,
and subjects made by hand."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: other sessions share the machine

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from common.environment import prepare_environment

prepare_environment()  # as every program does, and so that a test process loads as quickly

if TYPE_CHECKING:
    from common.config import FederationConfig
    from sites.cache import CachedSubject, Preparation
    from tests.link import Authority, Link

TINY = (  # the smallest that the reference U-Net can be: five levels, so 32 voxels a side
    "preprocess.shape=[32,32,32]",
    "network.name=unet",
    "network.norm=instance",
    "network.channels=[2,2,2,2,2]",
    "training.threads=1",
    "training.epochs=1",
    "training.batch_size=2",
    "training.patches_per_subject=1",
    "training.precision=fp32",
    "training.learning_rate=0.02",
    "rounds.number=3",
    "held_out_fraction=0.3",
)


def pytest_configure(config: pytest.Config) -> None:
    # of its own accord xdist hands out files with few tests last; here these take the longest
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shared among processes, files with slow tests come first: so all processes end together."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@dataclass(frozen=True)
class FinishedRun:
    folder: Path
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def undisturbed_log() -> Iterator[None]:
    """The commands send the log to standard error for good, as fits a program of its own."""
    log = logging.getLogger("fedbrats")
    before = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.level, log.propagate = before


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Lines of fedbrats' own log, each once: caplog sees a line twice once an earlier test has run a
    command (pytest listens at the logger too that no longer hands on)."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    collector = Collector()
    logging.getLogger("fedbrats").addHandler(collector)
    yield lines
    logging.getLogger("fedbrats").removeHandler(collector)


@pytest.fixture(scope="session")
def cohort_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BraTS folder with 18 subjects of 32x32x20 voxels at site-01, site-06 and site-13. Read only."""
    from sites.phantom_cohort import write_cohort

    out = tmp_path_factory.mktemp("phantom")
    return write_cohort(out, sites=3, subjects_per_site=6, shape=(32, 32, 20), seed=1)


@pytest.fixture(scope="session")
def tiny_arguments() -> tuple[str, ...]:
    """The same configuration as `tiny_config()`, for a command line."""
    return ("--preset", "quick", *(text for key in TINY for text in ("--set", key)))


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., FederationConfig]:
    """A function: further `section.key=value` texts -> the tiny configuration with these changes."""
    from common.config_file import load_config

    return lambda *assign: load_config(preset="quick", assign=[*TINY, *assign])


@pytest.fixture(scope="session")
def prepared(
    cohort_data: Path,
    tiny_config: Callable[..., FederationConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> Preparation:
    """All subjects of the cohort, prepared for the tiny configuration. Read only."""
    from sites.cache import prepare_subjects
    from sites.preprocess import recipe_of
    from sites.subject import discover

    return prepare_subjects(
        discover(cohort_data).subjects,
        recipe_of(tiny_config()),
        tmp_path_factory.mktemp("cache"),
        site="all",
    )


@pytest.fixture
def make_subject(tmp_path: Path) -> Callable[..., CachedSubject]:
    """A function: (id, image (C, X, Y, Z), labels (X, Y, Z)) -> a cached subject of 1 mm voxels."""
    from sites.cache import CachedSubject
    from sites.preprocess import Geometry

    def make(
        subject_id: str, image: np.ndarray, labels: np.ndarray, truth: np.ndarray | None = None
    ) -> CachedSubject:
        folder = tmp_path / "made" / subject_id
        folder.mkdir(parents=True)
        truth = labels if truth is None else truth
        arrays = {"image": image.astype(np.float16), "labels": labels, "truth": truth}
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        box = ((0, 0, 0), truth.shape)
        return CachedSubject(subject_id, folder, Geometry(truth.shape, (1, 1, 1), box, box), "")

    return make


@pytest.fixture(scope="session")
def cohort_cache(prepared: Preparation) -> Path:
    """The cache folder of `prepared`, so that no test waits for the same subjects again."""
    return prepared.ready[0].folder.parent


@pytest.fixture(scope="session")
def finished_run(
    cohort_data: Path,
    cohort_cache: Path,
    tiny_arguments: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> FinishedRun:
    """`fed-sim run --json` of the tiny configuration, in a process of its own. Read only."""
    out = tmp_path_factory.mktemp("run") / "run"
    program = str(Path(sys.executable).parent / "fed-sim")
    cache = ("--cache", str(cohort_cache))
    arguments = ("run", str(cohort_data), "--out", str(out), "--json", *cache, *tiny_arguments)
    done = subprocess.run((program, *arguments), capture_output=True, text=True, check=False)
    return FinishedRun(out, done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA and the certificate of a server at 127.0.0.1. Read only."""
    from tests.link import make_certificates

    return make_certificates(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def link(tmp_path: Path, authority: Authority) -> Iterator[Link]:
    """A listening coordinator at which the sites a and b are enrolled."""
    from tests.link import linked

    with linked(tmp_path, authority, "a", "b") as made:
        yield made
