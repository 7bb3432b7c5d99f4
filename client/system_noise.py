"""Gaussian noise and coin flips from the operating system's entropy, for privacy only.

Nothing here can be seeded: whoever knows a seed can subtract the noise. Each call takes a fresh
256-bit key from the system and expands it with AES in counter mode; the bits become Gaussians by
the Box-Muller transform, a float64 length times a float32 direction, so that each has all the bits
of a float64. Each value is half the sum of four Gaussians of four different pairs, so that the last
bits of a value do not betray which float the noise was (Mironov 2012; Holohan and Braghin 2021,
arXiv:2107.10138: the method of Opacus' secure mode, whose own generator no longer installs).
"""

from __future__ import annotations

import math
import os
import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

SOURCE = "operating system (256-bit key per draw, AES-256-CTR, sum of four Gaussians)"
BLOCK = 1 << 14  # values at a time: they stay in the cache, and are too few for torch to share them
# out among threads, which would wait for each other more often than they work
_WORDS = 4  # of 64 bits for each value: two Box-Muller pairs
_FEWEST = 4  # values at a time: fewer could not come from four different pairs
_UNIT = 2.0**-64 * (1 - 2.0**-52)  # a word's; a little less than it, as log(0) is infinite


def add_system_gaussian(values: torch.Tensor, deviation: float) -> None:
    """Add independent noise of N(0, deviation^2) to every value, in place.

    Raises:
        ValueError: `values` are not contiguous in some memory format.
    """
    if not _dense(values):
        raise ValueError("noise can only be added to values that lie in memory without gaps")
    # in the order of memory, whatever the layout: to the noise all values are alike
    flat = values.as_strided((values.numel(),), (1,))
    stream = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(8 * _WORDS * min(BLOCK, max(len(flat), _FEWEST)))
    drawn = bytearray(len(zeros) + 16)  # the cipher wants room for one of its blocks more
    for block in flat.split(BLOCK):
        size = max(len(block), _FEWEST)
        stream.update_into(zeros[: 8 * _WORDS * size], drawn)
        bits = torch.frombuffer(drawn, dtype=torch.int64, count=_WORDS * size).to(values.device)
        block.add_(_gaussians(bits, size, deviation)[: len(block)])


def system_sample(count: int, rate: float) -> list[int]:
    """Of 0 to count - 1, each with probability `rate`, independently: a Poisson sample, maybe empty."""
    coin = secrets.SystemRandom()
    return [index for index in range(count) if coin.random() < rate]


def _gaussians(bits: torch.Tensor, size: int, deviation: float) -> torch.Tensor:
    """`size` values of N(0, deviation^2) in float64 from `_WORDS` times as many random words."""
    radius, angle = bits.view(2, _WORDS // 2, size)
    radius = radius.double().mul_(_UNIT).add_(0.5)  # inside 0 .. 1
    # half a Gaussian's deviation each: four of them make one of the whole
    radius = _apply("sqrt", _apply("log", radius).mul_(-0.5 * deviation**2))
    angle = angle.float().mul_(2 * math.pi * _UNIT)  # float32 takes a quarter of the time
    cosine, sine = _apply("cos", angle.clone()), _apply("sin", angle)
    along, across = radius * cosine, radius.mul_(sine)
    # the sines of other pairs than the cosines', so that four pairs meet in each value
    return along[0].add_(along[1]).add_(across[0].roll(1)).add_(across[1].roll(2))


def _apply(function: str, values: torch.Tensor) -> torch.Tensor:
    """In place. On a CPU numpy's, which are two to three times as fast as torch's on AMD."""
    if values.is_cpu:
        array = values.numpy()
        getattr(np, function)(array, out=array)
    else:
        getattr(torch, function)(values, out=values)
    return values


def _dense(values: torch.Tensor) -> bool:
    """Does each value have its own place, with no gap between them?"""
    expected = 1
    for size, stride in sorted(zip(values.shape, values.stride(), strict=True), key=lambda p: p[1]):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
