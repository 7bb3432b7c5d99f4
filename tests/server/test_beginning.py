"""A run begins from the weights that were asked for, or says which tensor does not fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from common.config_file import ConfigError, anchored
from common.model import initial_weights
from common.weights import file_sha256, save_weights
from server.beginning import beginning


@pytest.fixture
def config(tiny_config, tmp_path):
    return tiny_config(f"server.init_from={tmp_path / 'model.safetensors'}")


def test_by_default_a_run_begins_from_the_networks_own_weights(tiny_config):
    first, own = beginning(tiny_config()), initial_weights(tiny_config())
    assert first.sha256 is None
    assert all(torch.equal(first.weights[name], tensor) for name, tensor in own.items())


def test_given_weights_are_those_of_the_file(config):
    given = {name: tensor + 1 for name, tensor in initial_weights(config).items()}
    save_weights(config.server.init_from, given, {})
    first = beginning(config)
    assert all(torch.equal(first.weights[name], tensor) for name, tensor in given.items())
    assert first.sha256 == file_sha256(config.server.init_from)


def changed(weights, change):
    name = min(weights)
    return {**weights, name: change(weights[name])}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda w: dict([*w.items()][1:]), "the file lacks 1 tensors"),
        (lambda w: {**w, "raw/extra": torch.zeros(1)}, r"adds 1 tensors \(raw/extra\)"),
        (lambda w: changed(w, lambda t: t[None]), "tensor .* is torch.float32 .*, expected"),
        (lambda w: changed(w, lambda t: t.double()), "is torch.float64"),
        (lambda w: changed(w, lambda t: t * math.nan), "not finite"),
    ],
)
def test_weights_of_another_network_are_refused_by_what_differs(config, spoil, said):
    save_weights(config.server.init_from, spoil(initial_weights(config)), {})
    with pytest.raises(ConfigError, match=rf"`server\.init_from`: .*model\.safetensors.*{said}"):
        beginning(config)


def test_a_file_that_cannot_be_read_is_named(config):
    path = config.server.init_from
    with pytest.raises(ConfigError, match=rf"`server\.init_from`: {path} is no file"):
        beginning(config)
    path.write_bytes(b"half a file")
    with pytest.raises(ConfigError, match=rf"`server\.init_from`: {path}: is not a readable"):
        beginning(config)


def test_a_relative_path_is_meant_from_the_folder_that_is_given(tiny_config):
    def meant(path: str) -> Path | None:
        config = tiny_config(f"server.init_from={path}")
        return anchored(config, Path("/srv/study")).server.init_from

    assert meant("sub/model.safetensors") == Path("/srv/study/sub/model.safetensors")
    assert meant("/elsewhere/m") == Path("/elsewhere/m")
    assert meant("~/m") == Path.home() / "m"
    assert anchored(tiny_config(), Path("/srv")) == tiny_config()
