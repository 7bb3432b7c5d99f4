"""The good updates of one round, kept on disk until the round ends, so that they can be compared.

Memory then holds a part of each update, whatever the number of sites. Nothing here is synced or
renamed: the updates of a killed round are of no use, its sites are asked again. Tensors are stored
flat, so that any stretch of one can be read alone. What is made of the updates: `server.robust`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from common.weights import Weights, safetensors_parts


@dataclass(frozen=True)
class Kept:
    """One site's update on disk; `change` is its `common.weights.relative_change`."""

    site: str
    n_training: int
    change: float
    path: Path


@contextmanager
def spool(folder: Path) -> Iterator[Path]:
    """An empty folder for the updates of one round, removed after it.

    Raises:
        OSError: the folder cannot be made.
    """
    shutil.rmtree(folder, ignore_errors=True)  # a killed round's
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write(path: Path, weights: Weights) -> None:
    """Raises:
    OSError: the disk is full or not writable.
    """
    try:
        flat = {name: tensor.reshape(-1) for name, tensor in weights.items()}
        with path.open("wb") as file:
            file.writelines(safetensors_parts(flat, {}))
    except OSError as error:
        raise OSError(
            f"{path}: cannot be written ({error}). Free disk space there: while a round lasts its "
            "updates are kept, one model for each site."
        ) from error


def read(kept: Kept, name: str, start: int, end: int) -> torch.Tensor:
    """The values `start` to `end` of one tensor, flat.

    The file is opened anew each time: its pages stay in memory for as long as it is open.
    """
    if start == end:
        return torch.empty(0)
    with safe_open(kept.path, framework="pt") as file:
        values: torch.Tensor = file.get_slice(name)[start:end]
        return values.clone()
