"""Server and sites build the very same network from one configuration."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from common.config_file import load_config
from common.model import initial_weights, network_for
from common.network import NETWORKS
from common.weights import check_update, save_weights

SMALL = ["preprocess.mode=resample", "preprocess.shape=[32, 32, 32]"]


def small(name: str, *more: str):
    channels = "[2, 4, 8, 16]" if name.startswith("segresnet") else "[2, 2, 4, 4, 8]"
    network = [f"network.name={name}", f"network.channels={channels}"]
    return load_config(assign=[*SMALL, *network, *more])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_fits_messages_files_and_itself(name, tmp_path):
    config = small(name, "modalities=[t1ce, flair]")
    weights = initial_weights(config)
    check_update(weights, network_for(config).state_dict())
    network_for(config).load_state_dict(weights)
    save_weights(tmp_path / "w", weights, {})  # refuses two names for one tensor
    with torch.no_grad():
        output = network_for(config).eval()(torch.randn(1, 2, 32, 32, 32))
    logits = output[0] if isinstance(output, list | tuple) else output
    assert logits.shape == (1, 4, 32, 32, 32)


def test_initial_weights_depend_on_the_seed_alone():
    config = small("unet")
    first = initial_weights(config)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = initial_weights(config)
    assert torch.equal(torch.get_rng_state(), state)  # and leave other random numbers alone
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = initial_weights(small("unet", "seed=2"))
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_another_process_starts_from_the_same_bytes(tmp_path):
    program = f"""
import sys
from pathlib import Path
from common.config_file import load_config
from common.model import initial_weights
from common.weights import save_weights
config = load_config(assign={[*SMALL, "network.channels=[2, 2, 4, 4, 8]"]!r})
print(save_weights(Path(sys.argv[1]), initial_weights(config), {{}}))
"""
    digest = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "theirs")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert save_weights(tmp_path / "ours", initial_weights(small("unet")), {}) == digest
