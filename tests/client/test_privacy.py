"""Patient-level DP-SGD: what one patient can change, what the noise is, and what is refused.

The numbers refer to the fifteen traps at the end of the project's privacy notes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss
from monai.networks import one_hot

from client import privacy
from client.accounting import Steps
from client.patient_optimizer import PatientOptimizer
from client.privacy import (
    NotProtectable,
    patient_gradient,
    require_protectable,
    require_separable,
    take_steps,
    train_privately,
)
from common.loss import dice_focal_loss
from common.model import network_for
from common.network import NETWORKS
from common.weights import weights_of

CPU = torch.device("cpu")
CHANNELS = {"unet": "[2,2,2,2,2]", "unetplusplus": "[2,2,2,2,2]"}
STILL = (  # no augmentation
    "training.augment.flip=false",
    "training.augment.affine_probability=0",
    "training.augment.intensity_scale=0",
    "training.augment.intensity_shift=0",
    "training.augment.noise=0",
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=NETWORKS)
def every_network(request, tiny_config):
    channels = CHANNELS.get(request.param, "[2,4,8]")
    return tiny_config(
        f"network.name={request.param}",
        f"network.channels={channels}",
        "network.norm=group",
        *STILL,
    )


def released(config, network, patients, noise, clip=1.0, rate=1.0) -> torch.Tensor:
    """The change that leaves, as one vector; `network` stays as it was."""
    trained = copy.deepcopy(network)
    train_privately(
        trained,
        patients,
        config,
        noise,
        clip,
        site="site-01",
        round_=1,
        learning_rate=rate,
        device=CPU,
    )
    return flat(trained) - flat(network)


def flat(network) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in network.parameters()])


def gradient(network, scans, config) -> torch.Tensor:
    order, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    found, _ = patient_gradient(network, scans, config, order, generator, CPU)
    assert all(g.dtype == torch.float32 for g in found)
    return torch.cat([g.double().flatten() for g in found])


def people(prepared, *sizes: int) -> dict[str, list]:
    """Patients with so many scans each."""
    ready = list(prepared.ready)
    return {f"p{i}": [ready.pop() for _ in range(size)] for i, size in enumerate(sizes)}


# ------------------------------------------------------------------------------- what a patient does


def test_the_step_is_the_sum_of_clipped_gradients_of_single_patients(every_network, prepared):
    """Traps 1 and 3: every tensor of every network against a loop that knows nothing of Opacus."""
    config = every_network
    if config.network.name == "segresnet_vae":
        pytest.skip("its latent noise differs from call to call; its norm is tested below")
    network = network_for(config)
    network.train()
    patients = people(prepared, 1, 1, 1)
    singles = []
    for scans in patients.values():
        images = torch.from_numpy(np.asarray(scans[0].image(), np.float32))[None]
        labels = torch.from_numpy(np.array(scans[0].labels()))[None]
        network.zero_grad()
        output = network(images)
        logits = output[-1] if isinstance(output, list) else output
        dice_focal_loss(logits, labels, **config.loss.model_dump()).backward()
        singles.append(torch.cat([p.grad.double().flatten() for p in network.parameters()]))
    norms = [float(one.norm()) for one in singles]
    clip = float(np.median(norms))  # some are clipped, some are not
    total = sum(one * min(1.0, clip / norm) for one, norm in zip(singles, norms, strict=True))
    change = released(config, network, patients, Steps(0.0, 1.0, 1), clip)
    assert (change + total / 3).norm() < 3e-5 * total.norm() / 3


def test_one_patient_changes_the_sum_by_at_most_the_clipping_norm(every_network, prepared):
    """Trap 1: with and without an outlier, without noise; every gradient is longer than C here."""
    network = network_for(every_network)
    patients = people(prepared, 1, 1, 1)
    clip = 1e-3
    network.train()
    norms = [float(gradient(network, scans, every_network).norm()) for scans in patients.values()]
    assert min(norms) > clip
    for change in influences(every_network, network, patients, clip):
        assert 0.5 * clip <= change <= clip * (1 + 1e-4), "no more, and it does count"


def test_nor_by_way_of_the_random_numbers_of_others(prepared, tiny_config):
    """With augmentation, crops and latent noise: those of the others stay what they are."""
    for name in ("unet", "segresnet_vae"):
        channels = CHANNELS.get(name, "[2,4,8]")
        config = tiny_config(
            f"network.name={name}",
            f"network.channels={channels}",
            "network.norm=group",
            "privacy.crops=2",
            "training.augment.affine_probability=1",
            "training.augment.noise=1",
        )
        network = network_for(config)
        network.train()
        for change in influences(config, network, people(prepared, 1, 2, 1), 1e-3):
            assert change <= 1e-3 * (1 + 1e-4)


def influences(config, network, patients, clip) -> Iterator[float]:
    """By how much the sum changes without each patient in turn."""
    n = len(patients)
    whole = n * released(config, network, patients, Steps(0.0, 1.0, 1), clip)
    for left_out in patients:
        others = {name: scans for name, scans in patients.items() if name != left_out}
        rest = (n - 1) * released(config, network, others, Steps(0.0, 1.0, 1), clip)
        yield float((whole - rest).norm())


@pytest.mark.parametrize("factor", [1e-6, 0.999, 1.001, 30.0, 1e6])
def test_a_clipped_gradient_is_never_longer_than_the_norm(factor):
    """Trap 4: in float64, also of ones so short or long that fp32 rounds."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (100_000, 3, 17)]
    direction = [torch.randn_like(p) for p in parameters]
    norm = math.sqrt(sum(float(d.double().square().sum()) for d in direction))
    longer = [d * (factor / norm) for d in direction]
    take_steps(
        parameters,
        lambda _: longer,
        1,
        Steps(0.0, 1.0, 1),
        1.0,
        optimiser="sgd",
        learning_rate=1.0,
        what="",
    )
    length = math.sqrt(sum(float(p.detach().double().square().sum()) for p in parameters))
    assert length <= 1.0
    assert length == pytest.approx(min(factor, 1.0), rel=3e-5)


@pytest.mark.parametrize("taken", [1, 3])
def test_gradients_of_any_layout_meet_their_own_weights(taken):
    shape = (4, 3, 2, 3, 5)
    last = torch.zeros(shape).to(memory_format=torch.channels_last_3d)
    parameters = [torch.nn.Parameter(t) for t in (last, torch.zeros(shape), torch.zeros(7))]
    torch.manual_seed(0)
    drawn = [[torch.randn(p.shape) for p in parameters] for _ in range(taken)]
    for one in drawn[1:]:
        one[0] = one[0].to(memory_format=torch.channels_last_3d)
        one[1] = one[1].transpose(0, 1).contiguous().transpose(0, 1)
    asked = [[g.clone() for g in one] for one in drawn]
    take_steps(
        parameters,
        lambda who: drawn[who],
        taken,
        Steps(0.0, 1.0, 1),
        1e6,
        optimiser="sgd",
        learning_rate=float(taken),
        what="",
    )
    for k, p in enumerate(parameters):
        torch.testing.assert_close(-p.detach(), torch.stack([one[k] for one in asked]).sum(0))
        assert all(torch.equal(one[k], a[k]) for one, a in zip(drawn, asked, strict=True))


@pytest.mark.parametrize("fill", ["random", "constant"])
def test_a_large_tensor_is_clipped_as_exactly(fill):
    """fp32 sums of squares are wrong by up to 1 % there, so Opacus' own norm would not do."""
    shape = (1024, 512, 27)
    torch.manual_seed(0)
    large = torch.randn(shape) if fill == "random" else torch.full(shape, 0.7)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    take_steps(
        [parameter],
        lambda _: [large],
        1,
        Steps(0.0, 1.0, 1),
        1.0,
        optimiser="sgd",
        learning_rate=1.0,
        what="",
    )
    length = float(torch.linalg.vector_norm(parameter.detach(), dtype=torch.float64))
    assert 0.98 < length <= 1.0


def test_bf16_gradients_are_clipped_in_fp32(prepared, tiny_config, monkeypatch):
    config = tiny_config("network.norm=group", *STILL)
    network = network_for(config)
    network.train()
    scans = people(prepared, 1)["p0"]
    exact = gradient(network, scans, config)
    monkeypatch.setattr("client.forward.autocast_dtype", lambda *_: torch.bfloat16)
    rounded = gradient(network, scans, config)
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.2
    parameters = [torch.nn.Parameter(torch.zeros(len(exact)))]
    take_steps(
        parameters,
        lambda _: [1e3 * rounded.float()],
        1,
        Steps(0.0, 1.0, 1),
        0.3,
        optimiser="sgd",
        learning_rate=1.0,
        what="",
    )
    assert 0.2999 < float(parameters[0].detach().double().norm()) <= 0.3


def test_all_scans_and_crops_of_a_patient_are_one_gradient(prepared, tiny_config):
    """Trap 6: three scans with two crops each move the sum by C, not by 6 C."""
    config = tiny_config("network.norm=group", "privacy.crops=2")
    network = network_for(config)
    network.train()
    patients = people(prepared, 3, 1)
    clip = 0.01
    change = 2 * released(config, network, patients, Steps(0.0, 1.0, 1), clip)
    alone = released(config, network, {"p0": patients["p0"]}, Steps(0.0, 1.0, 1), clip)
    assert float(alone.norm()) == pytest.approx(clip, rel=1e-3)
    assert float(change.norm()) <= 2 * clip


def test_crops_are_averaged_before_clipping(prepared, tiny_config):
    config = tiny_config("network.norm=group", "training.batch_size=2", *STILL)
    network = network_for(config)
    network.train()
    scans = people(prepared, 3)["p0"]  # in two parts, as a batch holds two
    mean = sum(gradient(network, [scan], config) for scan in scans) / 3
    assert (gradient(network, scans, config) - mean).norm() < 1e-3 * mean.norm()


def test_a_gradient_that_is_not_finite_counts_as_zero(prepared, tiny_config):
    """To stop there would tell that this patient was drawn."""
    parameters = [torch.nn.Parameter(torch.zeros(5))]
    gradients = [torch.full((5,), math.nan), torch.full((5,), math.inf), torch.ones(5)]
    take_steps(
        parameters,
        lambda i: [gradients[i]],
        3,
        Steps(0.0, 1.0, 1),
        100.0,
        optimiser="sgd",
        learning_rate=3.0,
        what="",
    )
    assert torch.allclose(parameters[0], torch.full((5,), -1.0), atol=1e-4)


# ---------------------------------------------------------------------------------------- the noise


def noise_of(sigma, clip, batch, *, optimiser="sgd", steps=1, rate=1.0, patients=4) -> torch.Tensor:
    """The change by steps whose gradients are all zero."""
    parameter = torch.nn.Parameter(torch.zeros(200_000))
    take_steps(
        [parameter],
        lambda _: [torch.zeros(200_000)],
        patients,
        Steps(sigma, batch / patients, steps),
        clip,
        optimiser=optimiser,
        learning_rate=rate,
        what="",
    )
    return parameter.detach().double()


def test_the_noise_has_the_accounted_size():
    """Trap 13: sigma C over the expected batch, once a step, whoever was drawn."""
    for sigma, clip, batch, steps in ((1.0, 1.0, 4, 1), (2.5, 0.3, 4, 1), (1.5, 2.0, 0.8, 4)):
        found = float(noise_of(sigma, clip, batch, steps=steps).std())
        assert found == pytest.approx(sigma * clip / batch * math.sqrt(steps), rel=0.01)


def test_an_empty_sample_is_a_step_with_noise(monkeypatch):
    """Trap 7: at q = 0.001 nearly every sample is empty, and every one is a step."""
    taken = []
    real = PatientOptimizer.finish
    monkeypatch.setattr(PatientOptimizer, "finish", lambda self: taken.append(1) or real(self))
    change = noise_of(1.0, 1.0, 0.004, steps=30)
    assert len(taken) == 30
    assert float(change.std()) == pytest.approx(math.sqrt(30) / 0.004, rel=0.01)


def test_the_expected_batch_is_a_fraction_and_not_rounded(monkeypatch):
    """Trap 8: 10 patients, on average 8 (or 0.8) drawn: Opacus' own sampler says 0.5 and int()."""
    rates = []
    monkeypatch.setattr(
        privacy, "system_sample", lambda n, q: rates.append((n, q)) or list(range(n))
    )
    for batch in (8, 0.8):
        parameter = torch.nn.Parameter(torch.zeros(1))
        take_steps(
            [parameter],
            lambda _: [torch.ones(1)],
            10,
            Steps(0.0, batch / 10, 1),
            100.0,
            optimiser="sgd",
            learning_rate=1.0,
            what="",
        )
        assert float(parameter.detach()) == pytest.approx(-10 / batch, rel=1e-4)
    assert rates == [(10, 0.8), (10, 0.08)]


def test_the_same_seed_gives_other_noise(prepared, tiny_config):
    """Trap 12: two runs of the same configuration, everything seeded alike."""
    config = tiny_config("network.norm=group")
    network, patients = network_for(config), people(prepared, 1, 1)
    changes = []
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)
        changes.append(released(config, network, patients, Steps(1.0, 1.0, 1)))
    difference = changes[0] - changes[1]
    assert float(difference.std()) == pytest.approx(math.sqrt(2) / 2, rel=0.1)
    silent = [released(config, network, patients, Steps(0.0, 1.0, 1)) for _ in range(2)]
    assert torch.equal(*silent), "all but noise and sampling is seeded"


def test_adam_and_sgd_see_the_same_noisy_gradient():
    """Adam's first step has the rate's length wherever there is any gradient."""
    change = noise_of(1.0, 1.0, 4, optimiser="adam", rate=0.01)
    assert float(change.abs().mean()) == pytest.approx(0.01, rel=0.01)
    assert float(change.abs().max()) <= 0.0101


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", NETWORKS)
def test_batch_norm_is_refused_with_the_reason(tiny_config, name):
    """Trap 5: its running statistics would leave without noise."""
    channels = CHANNELS.get(name, "[2,4,8]")
    keys = (f"network.name={name}", f"network.channels={channels}")
    config = tiny_config(*keys, "network.norm=batch")
    with pytest.raises(NotProtectable, match=r"network.norm batch.*statistics.*group or instance"):
        require_protectable(network_for(config), config)
    for norm in ("group", "instance"):
        config = tiny_config(*keys, f"network.norm={norm}")
        require_protectable(network_for(config), config)
        assert set(weights_of(network_for(config))) == {
            parameter for parameter, _ in network_for(config).named_parameters()
        }, "nothing but parameters leaves"


def test_a_loss_over_the_batch_is_refused():
    """Trap 2: MONAI's batch=True, and any other coupling."""

    def dice(batch: bool):
        loss = DiceLoss(softmax=True, batch=batch)
        return lambda logits, labels: loss(logits, one_hot(labels.unsqueeze(1), 4))

    require_separable(dice(False))
    require_separable(dice_focal_loss)
    with pytest.raises(NotProtectable, match="couples the patients"):
        require_separable(dice(True))
    with pytest.raises(NotProtectable):
        require_separable(lambda logits, labels: logits.square().mean().sqrt())


def test_training_itself_refuses_what_cannot_be_protected(prepared, tiny_config):
    config = tiny_config("network.norm=batch")
    network = network_for(config)
    before = weights_of(network)
    with pytest.raises(NotProtectable):
        released(config, network, people(prepared, 1), Steps(1.0, 1.0, 1))
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
