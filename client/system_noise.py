"""Gaussian noise and coin flips from the operating system's entropy, for privacy only.

Nothing here can be seeded: whoever knows a seed can subtract the noise. Each call takes a fresh
256-bit key from the system and expands it with AES in counter mode; the bits become Gaussians by
the Box-Muller transform in float64. Each value is half the sum of four Gaussians of four different
pairs, so that the last bits of a value do not betray which float the noise was (Mironov 2012;
Holohan and Braghin 2021, arXiv:2107.10138: the method of Opacus' secure mode, whose own generator
no longer installs).
"""

from __future__ import annotations

import math
import os
import secrets

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

SOURCE = "operating system (256-bit key per draw, AES-256-CTR, sum of four Gaussians)"
BLOCK = 1 << 16  # values at a time: their float64 intermediates stay in the cache
_WORDS = 4  # of 64 bits for each value: two Box-Muller pairs


def system_gaussian(
    shape: tuple[int, ...], deviation: float, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Independent values of N(0, deviation^2), float32, on `device`."""
    values = torch.empty(math.prod(shape), dtype=torch.float32, device=device)
    stream = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(8 * _WORDS * BLOCK)
    drawn = bytearray(len(zeros) + 16)  # the cipher wants room for one of its blocks more
    for block in values.split(BLOCK):
        size = max(len(block), 4)  # fewer could not come from four different pairs
        stream.update_into(zeros[: 8 * _WORDS * size], drawn)
        bits = torch.frombuffer(drawn, dtype=torch.int64, count=_WORDS * size).to(device)
        block.copy_(_gaussians(bits, size)[: len(block)].mul_(deviation))
    return values.view(shape)


def system_sample(count: int, rate: float) -> list[int]:
    """Of 0 to count - 1, each with probability `rate`, independently: a Poisson sample, maybe empty."""
    coin = secrets.SystemRandom()
    return [index for index in range(count) if coin.random() < rate]


def _gaussians(bits: torch.Tensor, size: int) -> torch.Tensor:
    """`size` standard Gaussians in float64 from `_WORDS` times as many random words."""
    words = bits.view(_WORDS, size)
    # 53 bits each: in (0, 1], as log(0) is infinite, and in [0, 1)
    mantissas = words.bitwise_right_shift(11).bitwise_and_((1 << 53) - 1).double()
    radius, angle = mantissas.split(2)
    radius = radius.add_(1).mul_(2.0**-53).log_().mul_(-2).sqrt_()
    angle = angle.mul_(2 * math.pi * 2.0**-53)
    along, across = angle.cos().mul_(radius), angle.sin_().mul_(radius)
    # the sines of other pairs than the cosines', so that four pairs meet in each value
    total = along[0].add_(along[1]).add_(across[0].roll(1)).add_(across[1].roll(2))
    return total.mul_(0.5)
