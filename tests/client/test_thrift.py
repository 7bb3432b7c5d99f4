"""A GPU that is too small: the same result in less memory, begun anew from the same weights.

No GPU is needed: what runs out of memory here is a forward pass that says so."""

from __future__ import annotations

import logging

import pytest
import torch

import client.forward
import client.thrift
import client.training
from client.thrift import GpuTooSmall, Thrift, recomputing, within_memory
from client.training import _train
from common.model import network_for
from common.network import NETWORKS, build_network, segment

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(client.thrift, "_needed", {})


def trained(network, subjects, config, thrift=Thrift.NONE):
    return _train(
        network, subjects, config, site="site-01", round_=1, learning_rate=0.02, device=CPU,
        thrift=thrift,
    )  # fmt: skip


def test_subject_by_subject_gives_the_same_gradients_and_loss(prepared, tiny_config, monkeypatch):
    config = tiny_config("training.batch_size=3", "training.augment.noise=0")
    gradients: dict[Thrift, list[torch.Tensor]] = {}
    losses = {}
    for thrift in Thrift:
        network = network_for(config)
        losses[thrift] = trained(network, prepared.ready[:3], config, thrift).loss
        gradients[thrift] = [p.grad for p in network.parameters()]
    assert losses[Thrift.ONE_BY_ONE] == pytest.approx(losses[Thrift.NONE], rel=1e-5)
    whole = torch.cat([g.flatten() for g in gradients[Thrift.NONE]])
    for thrift in (Thrift.ONE_BY_ONE, Thrift.RECOMPUTED):
        found = torch.cat([g.flatten() for g in gradients[thrift]])
        assert (found - whole).norm() < 1e-3 * whole.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputing_keeps_less_and_gives_the_same(name):
    channels = (4, 8, 16, 32) if name == "segresnet_vae" else (4, 8, 16, 32, 64)
    network = build_network(name, in_channels=2, channels=channels, patch_size=(32, 32, 32), seed=0)
    batch = torch.randn(1, 2, 32, 32, 32, generator=torch.Generator().manual_seed(1))

    def step(thrift: Thrift) -> tuple[torch.Tensor, int]:
        """All gradients, and how many numbers the forward pass keeps."""
        kept: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        torch.manual_seed(0)  # the VAE's noise
        network.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with recomputing(network, thrift):
                logits, auxiliary = segment(network, batch)
            number = sum(kept)
        loss = logits.square().mean()
        (loss if auxiliary is None else loss + auxiliary).backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()]), number

    (plain, all_of_it), (again, less) = step(Thrift.NONE), step(Thrift.RECOMPUTED)
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)
    assert less < 0.6 * all_of_it, f"{less / all_of_it:.2f}"
    assert all("forward" not in vars(module) for module in network.modules())


class Small:
    """Fails as torch does on a GPU unless it is asked to be as thrifty as it needs."""

    def __init__(self, network: torch.nn.Module, needs: int) -> None:
        self.network, self.needs = network, needs
        self.asked: list[Thrift] = []

    def __call__(self, thrift: Thrift) -> float:
        self.asked.append(thrift)
        weight = next(self.network.parameters())
        begun = float(weight.detach().sum())
        with torch.no_grad():
            weight.add_(1)  # half of a round was done
        if thrift < self.needs:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return begun


def test_the_round_begins_again_from_its_weights_and_what_was_needed_is_remembered(caplog):
    network = torch.nn.Linear(2, 2)
    start = float(network.weight.detach().sum())
    attempt = Small(network, Thrift.RECOMPUTED)
    with caplog.at_level(logging.WARNING, "fedbrats"):
        begun = within_memory(attempt, network, what="config", site="site-04")
    assert begun == start
    assert attempt.asked == [Thrift.NONE, Thrift.ONE_BY_ONE, Thrift.RECOMPUTED]
    assert "site-04" in caplog.text
    assert "Tried to allocate 2 GiB" in caplog.text
    assert "one subject at a time" in caplog.text
    again = Small(network, Thrift.RECOMPUTED)
    within_memory(again, network, what="config", site="site-04")
    assert again.asked == [Thrift.RECOMPUTED]


def test_before_any_thrift_the_prepared_subjects_leave_the_gpus_memory(monkeypatch, caplog):
    network = torch.nn.Linear(2, 2)
    held = iter([True, False])
    monkeypatch.setattr(client.thrift, "give_back", lambda: next(held))
    attempt = Small(network, Thrift.ONE_BY_ONE)
    with caplog.at_level(logging.WARNING, "fedbrats"):
        within_memory(attempt, network, what="config", site="site-04")
    assert attempt.asked == [Thrift.NONE, Thrift.NONE, Thrift.ONE_BY_ONE]
    assert "reads them from disk" in caplog.text


def test_a_gpu_too_small_for_all_thrift_is_said_with_the_remedy():
    attempt = Small(network := torch.nn.Linear(2, 2), needs=9)
    with pytest.raises(GpuTooSmall, match=r"site-04.*training.patch"):
        within_memory(attempt, network, what="config", site="site-04")
    assert len(attempt.asked) == 3


def test_batch_norm_is_never_computed_in_parts():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    with pytest.raises(GpuTooSmall, match=r"network.norm: instance"):
        within_memory(attempt := Small(network, 1), network, what="config", site="site-04")
    assert attempt.asked == [Thrift.NONE]
