"""One seed in the configuration, and every other seed derived from it by name.

A derived seed depends only on its parts, so that work done in another order, in another process
or after a restart draws the same numbers. Never used for privacy noise.
"""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts, for example `derive_seed(config.seed, "train", site, round)`."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
