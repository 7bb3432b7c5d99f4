"""The weights before round 1: the network's own, or those of the file that `server.init_from` names."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import FederationConfig
from common.config_file import ConfigError
from common.model import initial_weights
from common.weights import BadWeights, Weights, check_update, file_sha256, load_weights


@dataclass(frozen=True)
class Beginning:
    """`sha256` is that of the file that the weights are from, None for the network's own."""

    weights: Weights
    sha256: str | None = None


def beginning(config: FederationConfig) -> Beginning:
    """Only a run without a complete round needs it; later ones continue from a checkpoint.

    Raises:
        ConfigError: the file cannot be read, or its weights are not this network's; it says which
            tensors differ.
    """
    own = initial_weights(config)
    path = config.server.init_from
    if path is None:
        return Beginning(own)
    if not path.is_file():
        raise ConfigError(f"`server.init_from`: {path.absolute()} is no file.")
    try:
        weights, _ = load_weights(path)
    except BadWeights as error:
        raise ConfigError(f"`server.init_from`: {error}") from error
    try:
        check_update(weights, own)
    except BadWeights as error:
        what = str(error).replace("the update", "the file")
        raise ConfigError(
            f"`server.init_from`: {path} does not fit the network of this configuration: {what} "
            "Give the weights of a run with the same `network`, `modalities` and shapes."
        ) from error
    return Beginning(weights, file_sha256(path))
