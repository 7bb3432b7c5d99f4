"""The federation's shared network, from its configuration."""

from __future__ import annotations

import torch

from common.config import FederationConfig
from common.precision import protect_conv3d
from common.seeds import derive_seed
from common.weights import Weights, weights_of


def network_for(config: FederationConfig) -> torch.nn.Module:
    """The network with its initial weights, the same for the same seed, guarded against the bf16 bug."""
    # imported here for MONAI takes seconds to load: who is refused before need not wait for it
    from common.network import build_network

    whole = config.preprocess.mode == "resample"
    network = build_network(
        config.network.name,
        in_channels=len(config.modalities),
        channels=config.network.channels,
        norm=config.network.norm,
        patch_size=config.preprocess.shape if whole else config.training.patch,
        seed=derive_seed(config.seed, "initial weights"),
    )
    protect_conv3d(network)
    return network


def initial_weights(config: FederationConfig) -> Weights:
    """The global model before round 1."""
    return weights_of(network_for(config))
