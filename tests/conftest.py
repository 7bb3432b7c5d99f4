"""What several tests share: a small synthetic cohort, a configuration that trains on it in a blink,
and subjects made by hand."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: other sessions share the machine

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from common.config import FederationConfig
    from sites.cache import CachedSubject, Preparation

TINY = (  # the smallest that the reference U-Net can be: five levels, so 32 voxels a side
    "preprocess.shape=[32,32,32]",
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
    from common.config import load_config

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
