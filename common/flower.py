"""The one version of Flower that this is written for.

Both sides use private modules of its transport, which change from release to release.
"""

from __future__ import annotations

import flwr

FLOWER = "1.41.0"


class WrongFlower(RuntimeError):
    """Another version of Flower is installed."""


def require_flower() -> None:
    """Raises:
    WrongFlower: the text says which version is needed.
    """
    if flwr.__version__ != FLOWER:
        raise WrongFlower(
            f"fedbrats needs flwr {FLOWER}, found {flwr.__version__}. Install it again, with its "
            "constraints.txt."
        )
