"""What the tests of the configuration and of the terms share: one changed value after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from common.config import FederationConfig
from common.config_file import load_config

OTHER = {  # where a number or a flag does not follow from the default
    "name": "other",
    "preset": "reference",
    "modalities": ["t2"],
    "label_coding": "msd",
    "on_bad_subject": "skip",
    "preprocess.mode": "resample",
    "preprocess.normalise": "minmax",
    "network.name": "dynunet",
    "network.norm": "batch",
    "training.precision": "fp32",
    "rounds.updates": "fp32",
    "rounds.average_decay": 0.5,
    "rounds.aggregation": "median",
    "privacy.optimiser": "adam",
    "server.init_from": "model.safetensors",
    "server.address": "fed.example.org",
    "server.listen": "127.0.0.1",
}


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        below = leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        found |= below if below else {f"{prefix}{key}": value}
    return found


def every_change(config: FederationConfig) -> Iterator[tuple[str, FederationConfig]]:
    """Each key but those of `split` (few go alone), and the default configuration with it changed."""
    for key, value in leaves(config.model_dump(mode="json")).items():
        if key.startswith("split."):
            continue
        if key in OTHER:
            other = OTHER[key]
        elif isinstance(value, bool):
            other = not value
        elif value is None:
            other = 3
        elif isinstance(value, int):
            other = value + 1
        elif isinstance(value, float):
            other = value / 2
        else:
            other = [entry * 2 for entry in value]
        text = yaml.safe_dump(other, default_flow_style=True)
        yield key, load_config(assign=[f"{key}={text}"])
