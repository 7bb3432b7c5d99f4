"""What a training step does when the GPU has too little memory for it: the same sums, in less memory.

First the prepared subjects are read from disk (`client.held_volumes`). Then each batch is taken
subject by subject, gradients added up; then, besides, each block's activations are computed anew in
the backward pass instead of kept (Chen et al. 2016, arXiv:1604.06174). None of it changes what is
computed but for rounding, and for which noise the auto-encoder of segresnet_vae draws. So: with batch
norm, whose statistics are those of the batch, the last two are not done. What was needed is
remembered until the process ends.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from typing import TypeVar

import torch
from monai.networks.blocks import ResidualUnit
from monai.networks.blocks.dynunet_block import UnetBasicBlock
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.nets.attentionunet import AttentionBlock, ConvBlock, UpConv
from monai.networks.nets.basic_unet import TwoConv
from torch import nn
from torch.utils.checkpoint import checkpoint

from client.held_volumes import give_back
from common.full_memory import is_full_memory

LOG = logging.getLogger("fedbrats")
Result = TypeVar("Result")
BLOCKS = (TwoConv, ResidualUnit, ConvBlock, UpConv, AttentionBlock, UnetBasicBlock, ResBlock)


class Thrift(IntEnum):
    NONE = 0
    ONE_BY_ONE = 1
    RECOMPUTED = 2

    @property
    def means(self) -> str:
        return (
            "nothing",
            "one subject at a time",
            "one subject at a time, computing activations twice instead of keeping them",
        )[self]


class GpuTooSmall(RuntimeError):
    """No thrift makes a training step fit; the text says what to change."""


_needed: dict[Hashable, Thrift] = {}


def within_memory(
    attempt: Callable[[Thrift], Result], network: nn.Module, *, what: Hashable, site: str
) -> Result:
    """`attempt(thrift)`, begun anew from the same weights with more thrift if memory does not do.

    `what` names the kind of work: the thrift it needed once is where the next of it begins.

    Raises:
        GpuTooSmall: it does not do with all thrift either.
    """
    start = {name: t.detach().to("cpu", copy=True) for name, t in network.state_dict().items()}
    thrift: Thrift | None = _needed.get(what, Thrift.NONE)
    while thrift is not None:
        try:
            return attempt(thrift)
        except (MemoryError, RuntimeError) as error:
            if not is_full_memory(error):
                raise
            found = str(error).partition("\n")[0].partition(" GPU 0 has")[0]
        # The failed step may hang on the traceback of the thread that prepares batches.
        gc.collect()
        network.zero_grad(set_to_none=True)
        given_back = give_back()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        network.load_state_dict(start)
        if given_back:
            LOG.warning(
                f"{site}: the GPU's memory is too small for the prepared subjects besides the training "
                f"({found}); the round begins again and reads them from disk."
            )
            continue
        if (thrift := more(thrift, network)) is not None:
            _needed[what] = thrift
            LOG.warning(
                f"{site}: the GPU's memory is too small for this training step ({found}); the round "
                f"begins again with {thrift.means}, which is slower and gives the same result."
            )
    raise GpuTooSmall(
        f"{site}: a training step does not fit into the GPU's memory. Other programs on that GPU, other "
        "sites' among them, may hold it; else the federation needs a smaller training.patch, "
        "training.batch_size or network"
        f"{', or network.norm: instance' if _keeps_statistics(network) else ''}."
    )


def more(thrift: Thrift, network: nn.Module) -> Thrift | None:
    """The next step of thrift, or None if there is none for `network`."""
    last = thrift is Thrift.RECOMPUTED or _keeps_statistics(network)
    return None if last else Thrift(thrift + 1)


def _keeps_statistics(network: nn.Module) -> bool:
    """As batch norm does, in buffers."""
    return any(True for _ in network.buffers())


@contextmanager
def recomputing(network: nn.Module, thrift: Thrift) -> Iterator[None]:
    """Within it, a training step of `network` keeps what enters each block only."""
    blocks = [m for m in network.modules() if isinstance(m, BLOCKS)]
    if thrift is not Thrift.RECOMPUTED:
        blocks = []
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
