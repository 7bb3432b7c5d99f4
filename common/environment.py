"""What has to be settled before dependencies are loaded, by every entry point: environment variables
that they read, and that they load quickly."""

from __future__ import annotations

import atexit
import gc
import os
from importlib.metadata import PackageNotFoundError, version

from common.monai_on_demand import load_monai_on_demand

SILENT = {  # nothing phones home, whatever the environment said before
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # MONAI imports mlflow wherever it is installed
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
# OpenMP's threads wait for each other by spinning. Where another program wants the same cores, long
# spinning made a training step up to 3 times slower (docs/measurements.md); a user's own value wins.
PATIENT = {"GOMP_SPINCOUNT": "2000"}
# New objects until Python looks for garbage in cycles. Its own 700 make it go through the hundred
# thousands of lasting objects of torch, Flower and Opacus again and again while they load, for a third
# of that time.
COLLECT_AFTER = 50_000


def prepare_environment() -> None:
    """For this process and the ones it starts; before torch, flwr or ray are imported."""
    os.environ.update(SILENT)
    for name, value in PATIENT.items():
        os.environ.setdefault(name, value)
    load_monai_on_demand()
    gc.set_threshold(COLLECT_AFTER)
    atexit.register(gc.freeze)  # nor once more at the end, where that takes torch half a second


def installed_version(package: str) -> str | None:
    """None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
