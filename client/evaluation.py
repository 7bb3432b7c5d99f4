"""A model on a site's held-out subjects: labels in the subject's own voxels, and metrics against them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from client.held_volumes import give_back
from common.config import FederationConfig
from common.loss import dice_focal_loss
from common.metrics import SubjectMetrics, subject_metrics
from common.network import segment
from common.precision import autocast, autocast_dtype
from common.progress import track
from sites.cache import CachedSubject
from sites.preprocess import Geometry, restore

METRICS_THREADS = 4  # HD95 of one subject takes a core 0.2 s, which a GPU should not wait for
OVERLAP = 0.5  # of neighbouring windows, the usual choice for BraTS


@torch.no_grad()
def class_scores(
    network: torch.nn.Module, image: np.ndarray, config: FederationConfig, device: torch.device
) -> torch.Tensor:
    """Logits (4, X, Y, Z) in fp32 for one working-grid image (C, X, Y, Z), on `device`.

    Patch-trained networks slide over the image with Gaussian weighting; the others see all of it.
    """
    network.eval()
    dtype = autocast_dtype(config.training.precision, device)
    tensor = torch.from_numpy(np.asarray(image, np.float32))[None].to(device)

    def forward(batch: torch.Tensor) -> torch.Tensor:
        with autocast(device, dtype):
            logits, _ = segment(network, batch.contiguous(memory_format=torch.channels_last_3d))
        return logits.float()

    if config.preprocess.mode == "resample":
        return forward(tensor)[0]
    from monai.inferers import sliding_window_inference

    scores = sliding_window_inference(
        tensor, config.training.patch, 1, forward, overlap=OVERLAP, mode="gaussian"
    )
    assert isinstance(scores, torch.Tensor)
    return scores[0]


def predict(
    network: torch.nn.Module,
    image: np.ndarray,
    geometry: Geometry,
    config: FederationConfig,
    device: torch.device,
) -> np.ndarray:
    """uint8 system labels in the subject's own RAS voxels, inside `geometry.truth_box`."""
    return restore(class_scores(network, image, config, device), geometry)


def evaluate(
    network: torch.nn.Module,
    subjects: Sequence[CachedSubject],
    config: FederationConfig,
    *,
    what: str,
    surface_distances: bool,
    device: torch.device,
) -> list[SubjectMetrics]:
    """Metrics of every subject on its own grid; the loss is that of the working grid."""
    with _beside(device) as beside:
        results = []
        for subject in track(subjects, what, len(subjects), "subjects"):
            scores = _with_room(partial(class_scores, network, subject.image(), config, device))
            labels = torch.from_numpy(np.array(subject.labels()))[None].to(device)
            loss = float(dice_focal_loss(scores[None], labels, **config.loss.model_dump()))
            found = restore(scores, subject.geometry)
            results.append(
                beside(measured, subject, found, surface_distances=surface_distances, loss=loss)
            )
        return [result() for result in results]


@contextmanager
def _beside(device: torch.device) -> Iterator[Callable[..., Callable[[], SubjectMetrics]]]:
    """`beside(function, ...)` begins a piece of work for the CPU and gives a function that returns
    its result: in threads while a GPU is busy with the next subject, at once if the CPU does all."""
    if device.type != "cuda":
        yield lambda function, *args, **named: partial(
            lambda result: result, function(*args, **named)
        )
        return
    threads = ThreadPoolExecutor(METRICS_THREADS, thread_name_prefix="metrics")
    try:
        yield lambda function, *args, **named: threads.submit(function, *args, **named).result
    finally:
        threads.shutdown(cancel_futures=True)


def _with_room(work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`work()`, if need be in the GPU memory that held volumes take."""
    try:
        return work()
    except torch.OutOfMemoryError:
        if not give_back():
            raise
    torch.cuda.empty_cache()
    return work()


def measured(
    subject: CachedSubject,
    labels: np.ndarray,
    *,
    surface_distances: bool,
    loss: float | None = None,
) -> SubjectMetrics:
    """The metrics of uint8 system labels in the subject's own voxels inside `geometry.truth_box`.

    Raises:
        ValueError: the labels are no such labels, or not of the truth's shape.
    """
    truth = np.asarray(subject.truth())
    geometry = subject.geometry
    return subject_metrics(
        subject.id,
        labels,
        truth,
        outside=math.prod(geometry.shape) - truth.size,
        spacing=geometry.spacing,
        diagonal_mm=geometry.diagonal_mm,
        surface_distances=surface_distances,
        loss=loss,
    )
