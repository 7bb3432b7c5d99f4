"""Metrics on the subject's own grid: against a network that knows the truth, and against numpy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from client.evaluation import _beside, _with_room, class_scores, evaluate, predict
from common.config import FederationConfig
from common.metrics import SubjectMetrics
from common.model import network_for
from sites.cache import CachedSubject, Preparation, prepare_subjects
from sites.preprocess import recipe_of
from sites.subject import discover

CPU = torch.device("cpu")
PATCHES = (
    "preprocess.mode=patches",
    "training.patch=[16,16,16]",
    "network.name=residual_unet",
    "network.channels=[2,4]",
)


def run(network, subjects, config, *, surface_distances=True) -> list[SubjectMetrics]:
    torch.set_num_threads(1)
    return evaluate(
        network, subjects, config, what="", surface_distances=surface_distances, device=CPU
    )


def telling(subject: CachedSubject) -> CachedSubject:
    """The image replaced by the one-hot labels, so that an identity network segments perfectly."""
    labels = subject.labels()
    np.save(subject.folder / "image.npy", np.float16([labels == label for label in range(4)]))
    return subject


@pytest.fixture
def at_1_mm(cohort_data: Path, tiny_config, tmp_path: Path) -> Preparation:
    subjects = discover(cohort_data).subjects[:3]
    recipe = recipe_of(tiny_config(*PATCHES))
    return prepare_subjects(subjects, recipe, tmp_path / "cache", site="x")


def test_a_perfect_network_scores_1_and_0_mm(at_1_mm, tiny_config):
    config = tiny_config(*PATCHES)
    for metrics in run(torch.nn.Identity(), [telling(s) for s in at_1_mm.ready], config):
        for scores in metrics.scores.values():
            assert (scores["dice"], scores["iou"], scores["hd95"]) == (1, 1, 0)
            assert (scores["sensitivity"], scores["precision"]) == (1, 1)
        assert metrics.voxel_accuracy == 1


def test_a_perfect_network_on_a_fixed_grid_is_nearly_perfect_on_the_subjects_own(
    cohort_data, tiny_config, tmp_path
):
    config = tiny_config("preprocess.shape=[48,48,48]")
    subjects = discover(cohort_data).subjects[:3]
    ready = prepare_subjects(subjects, recipe_of(config), tmp_path, site="x").ready
    for metrics in run(torch.nn.Identity(), [telling(s) for s in ready], config):
        assert metrics.scores["WT"]["dice"] > 0.95
        assert metrics.scores["WT"]["hd95"] <= 1.0


@pytest.mark.parametrize("shape", [(40, 36, 30), (16, 16, 16), (9, 33, 12)])
def test_sliding_windows_tile_the_whole_volume(tiny_config, shape):
    """For a 1x1x1 convolution it makes no difference where the windows lie."""
    torch.manual_seed(0)
    network = torch.nn.Conv3d(4, 4, 1)
    image = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float16)
    scores = class_scores(network, image, tiny_config(*PATCHES), CPU)
    expected = network(torch.from_numpy(image)[None].float())[0]
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


def test_evaluation_does_not_change_the_network(prepared, tiny_config):
    """With batch norm, forgetting eval() would both change the statistics and use those of the subject."""
    network = network_for(tiny_config("network.norm=batch"))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    together = run(network, prepared.ready[:3], tiny_config(), surface_distances=False)
    alone = run(network, prepared.ready[2:3], tiny_config(), surface_distances=False)
    assert together[2] == alone[0]
    assert all(torch.equal(before[n], tensor) for n, tensor in network.state_dict().items())


@pytest.mark.parametrize("keys", [(), PATCHES])
def test_scores_equal_those_computed_from_the_original_files(
    cohort_data: Path, tiny_config: Callable[..., FederationConfig], tmp_path: Path, keys
):
    config = tiny_config(*keys)
    subjects = discover(cohort_data).subjects[:3]
    ready = prepare_subjects(subjects, recipe_of(config), tmp_path, site="x").ready
    network = network_for(config)
    with torch.no_grad():  # predict some of everything
        for parameter in network.parameters():
            parameter.mul_(3)
    found = run(network, ready, config, surface_distances=False)
    for subject, entry, metrics in zip(subjects, ready, found, strict=True):
        in_file = np.asarray(nibabel.load(subject.segmentation).dataobj)
        truth = np.where(in_file == 4, 3, in_file)[::-1, ::-1]  # BraTS is LPS, we are RAS
        prediction = np.zeros(truth.shape, int)
        (x0, y0, z0), (x1, y1, z1) = entry.geometry.truth_box
        prediction[x0:x1, y0:y1, z0:z1] = predict(
            network, entry.image(), entry.geometry, config, CPU
        )
        assert len(np.unique(prediction)) > 1
        assert metrics.subject == subject.id
        assert metrics.voxel_accuracy == pytest.approx((prediction == truth).mean(), abs=1e-12)
        for name, labels in {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}.items():
            p, t = np.isin(prediction, labels), np.isin(truth, labels)
            expected = {
                "dice": 2 * (p & t).sum() / (p.sum() + t.sum()) if (p | t).any() else 1,
                "iou": (p & t).sum() / (p | t).sum() if (p | t).any() else 1,
                "specificity": (~p & ~t).sum() / (~t).sum(),
            }
            for key, value in expected.items():
                assert metrics.scores[name][key] == pytest.approx(value, abs=1e-12), (name, key)


# ------------------------------------------------------------------------ beside a busy GPU


def test_metrics_beside_a_gpu_come_back_in_order_and_are_given_up_after_an_error():
    begun: list[int] = []
    wait = threading.Event()

    def slow(number: int) -> int:
        begun.append(number)
        wait.wait(5)
        return number

    with _beside(torch.device("cuda")) as beside:
        results = [beside(slow, number) for number in range(9)]
        wait.set()
        assert [result() for result in results] == list(range(9))
    begun.clear()
    wait.clear()

    def failing() -> None:
        with _beside(torch.device("cuda")) as beside:
            for number in range(99):
                beside(slow, number)
            threading.Timer(0.1, wait.set).start()
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        failing()
    assert len(begun) < 20


def test_an_evaluation_takes_the_memory_of_held_volumes_before_it_gives_up(monkeypatch):
    held = iter([True, False])
    monkeypatch.setattr("client.evaluation.give_back", lambda: next(held))
    tries: list[int] = []

    def work(enough: int) -> str:
        tries.append(1)
        if len(tries) < enough:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return "scores"

    assert _with_room(partial(work, 2)) == "scores"
    tries.clear()
    with pytest.raises(torch.OutOfMemoryError):
        _with_room(partial(work, 2))
    assert len(tries) == 1
