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


def prepare_environment() -> None:
    """For this process and the ones it starts; before torch, flwr or ray are imported."""
    os.environ.update(SILENT)
    for name, value in PATIENT.items():
        os.environ.setdefault(name, value)
    load_monai_on_demand()
    # No search for garbage in cycles at the end, where it takes torch half a second. Before the end it
    # stays as Python has it: messages with whole models in them are such garbage.
    atexit.register(gc.freeze)


def installed_version(package: str) -> str | None:
    """None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
