"""Nothing phones home: switches off what dependencies would send. Imported before them."""

from __future__ import annotations

import os

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def switch_off() -> None:
    """Set for this process and the ones it starts, whatever the environment said before."""
    os.environ.update(SWITCHES)
