"""From a batch to its loss: the network's forward pass under autocast, and the loss in fp32.

On a GPU the pass is compiled by `torch.compile` when the federation is long enough to be worth the
half minute that this takes: what lies between two convolutions is then fused into few kernels. A
machine without a C compiler, which Triton needs, trains without, and its log says so once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import nn

from common.config import FederationConfig, Loss
from common.loss import dice_focal_loss
from common.network import segment
from common.precision import autocast, autocast_dtype

LOG = logging.getLogger("fedbrats")
COMPILE_FROM = 3000
"""Steps that a site will take in all. A compiled step of 128^3 saves 8 to 11 ms on a H200, and
compiling takes 19 to 36 s (docs/speed.md)."""

Losses = tuple[torch.Tensor, torch.Tensor | None]
Forward = Callable[[nn.Module, torch.Tensor, torch.Tensor], Losses]


def forward_of(config: FederationConfig, device: torch.device, steps: int = 0) -> Forward:
    """(network, images (B, C, X, Y, Z), labels (B, X, Y, Z)) -> (loss, auxiliary loss or None).

    `steps` is how often a site will take it in the whole federation, as far as it knows.
    """
    t = config.training
    compiled = device.type == "cuda" and steps >= COMPILE_FROM and _can_compile(device)
    return _forward(config.loss, autocast_dtype(t.precision, device), device, compiled)


@lru_cache(maxsize=8)  # what is compiled belongs to the function, so the same function every round
def _forward(
    loss: Loss, dtype: torch.dtype | None, device: torch.device, compiled: bool
) -> Forward:
    settings: dict[str, Any] = loss.model_dump()

    def forward(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Losses:
        images = images.contiguous(memory_format=torch.channels_last_3d)
        with autocast(device, dtype):
            logits, auxiliary = segment(network, images)
        return dice_focal_loss(logits, labels, **settings), auxiliary

    # one graph for each shape, of which a site has two: a full batch, and the last of an epoch
    return torch.compile(forward, dynamic=False) if compiled else forward


@cache
def _can_compile(device: torch.device) -> bool:
    """Whether this machine compiles for its GPU, found out by a function of one line."""
    probe = torch.ones(8, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: (x * 2).relu().sum())(probe).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        LOG.warning(
            "torch cannot compile for this GPU, so that training takes about a third longer than "
            f"it could ({first}). It needs Triton and a C compiler (gcc)."
        )
        return False
    LOG.info(
        "the training step is compiled for this GPU: the first steps take about half a minute."
    )
    return True
