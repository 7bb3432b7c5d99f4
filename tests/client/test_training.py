"""Local training: which samples it sees, that it learns, and that the same seed gives the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from client.training import TrainingDiverged, train
from common.config import FederationConfig
from common.loss import dice_focal_loss
from common.model import network_for
from sites.cache import CachedSubject

CPU = torch.device("cpu")
PLAIN = (  # no augmentation
    "training.augment.flip=false",
    "training.augment.affine_probability=0",
    "training.augment.intensity_scale=0",
    "training.augment.intensity_shift=0",
    "training.augment.noise=0",
)
PATCHES = ("preprocess.mode=patches", "training.patch=[16,16,16]")


class Recorder(torch.nn.Module):
    """Keeps every batch it sees; its logits are `gain` times the image's four channels."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))
        self.batches: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(images.detach().clone())
        return self.gain * images

    @property
    def samples(self) -> list[torch.Tensor]:
        return [sample for batch in self.batches for sample in batch]


def run(network, subjects, config, *, site="site-01", round_=1, learning_rate=None):
    torch.set_num_threads(1)
    return train(
        network,
        subjects,
        config,
        site=site,
        round_=round_,
        learning_rate=learning_rate or config.training.learning_rate,
        device=CPU,
    )


def one_hot(labels: np.ndarray) -> np.ndarray:
    return np.stack([labels == label for label in range(4)]).astype(np.float16)


def random_labels(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)


# ----------------------------------------------------------------------------------- determinism


def test_the_same_seed_gives_the_same_weights_to_the_last_bit_and_nothing_else_does(
    prepared, tiny_config: Callable[..., FederationConfig]
):
    subjects = prepared.ready[:2]

    def weights(*keys: str, **more) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.seed())  # whatever ran before must not matter
        network = network_for(tiny_config())
        run(network, subjects, tiny_config(*keys), **more)
        return network.state_dict()

    def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(a[name], b[name]) for name in a)

    reference = weights()
    assert equal(weights(), reference)
    assert not equal(weights(site="site-02"), reference)
    assert not equal(weights(round_=2), reference)
    assert not equal(weights("seed=2"), reference)


def test_the_vaes_noise_is_seeded_too(prepared, tiny_config):
    config = tiny_config("network.name=segresnet_vae", "network.channels=[2,4]")
    finals = []
    for _ in range(2):
        network = network_for(config)
        run(network, prepared.ready[:2], config)
        finals.append(torch.cat([p.flatten() for p in network.state_dict().values()]))
    assert torch.equal(*finals)


# --------------------------------------------------------------------------------------- samples


def numbered(make_subject, count: int, shape=(4, 4, 4)) -> list[CachedSubject]:
    """Subject i's image is i + 1 everywhere."""
    return [
        make_subject(f"S{i}", np.full((4, *shape), i + 1.0), random_labels(shape))
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("keys", "per_epoch"),
    [((), 1), ((*PATCHES, "training.patch=[2,2,2]", "training.patches_per_subject=3"), 3)],
)
def test_every_subject_is_used_equally_often_in_every_epoch(
    make_subject, tiny_config, keys, per_epoch
):
    config = tiny_config(*PLAIN, *keys, "training.epochs=4")
    network = Recorder()
    outcome = run(network, numbered(make_subject, 5), config)
    seen = [int(sample.max()) for sample in network.samples]
    size = 5 * per_epoch
    epochs = [seen[start : start + size] for start in range(0, len(seen), size)]
    assert len(epochs) == 4
    for epoch in epochs:
        assert sorted(epoch) == sorted([1, 2, 3, 4, 5] * per_epoch)
    assert len({tuple(epoch) for epoch in epochs}) == 4, "shuffled anew in each"
    # 5 or 15 samples in batches of 2: the last holds one
    assert [len(batch) for batch in network.batches] == ([2] * (size // 2) + [1]) * 4
    assert (outcome.steps, outcome.samples) == (len(network.batches), 4 * size)


def test_the_loss_is_the_mean_over_samples_not_over_batches(make_subject, tiny_config):
    config = tiny_config(*PLAIN)
    images = np.random.default_rng(0).normal(size=(3, 4, 8, 8, 8)).astype(np.float16)
    labels = [random_labels((8, 8, 8), seed) for seed in range(3)]
    subjects = [make_subject(f"S{i}", images[i], labels[i]) for i in range(3)]
    expected = [
        dice_focal_loss(torch.from_numpy(image[None]).float(), torch.from_numpy(truth[None]))
        for image, truth in zip(images, labels, strict=True)
    ]
    outcome = run(Recorder(), subjects, config, learning_rate=1e-30)  # the weights stay
    assert outcome.loss == pytest.approx(float(sum(expected)) / 3, rel=1e-5)


def coordinates(shape: tuple[int, ...]) -> np.ndarray:
    """(4, X, Y, Z): x + 1, y + 1, z + 1 and 1."""
    return np.concatenate([np.indices(shape) + 1, np.ones((1, *shape))]).astype(np.float16)


def test_a_patch_is_a_contiguous_piece_of_the_image_and_reaches_every_corner(
    make_subject, tiny_config
):
    shape, size = (9, 5, 7), (4, 5, 3)
    config = tiny_config(
        *PLAIN, *PATCHES, f"training.patch={list(size)}", "training.patches_per_subject=300"
    )
    labels = np.zeros(shape, np.uint8)  # without tumour, every place is equally likely
    network = Recorder()
    run(network, [make_subject("S", coordinates(shape), labels)], config)
    starts = set()
    for sample in network.samples:
        start = sample[:3, 0, 0, 0]
        expected = coordinates(size)
        expected[:3] += (start.numpy() - 1)[:, None, None, None]
        np.testing.assert_array_equal(sample.numpy(), expected)
        starts.add(tuple(int(s) for s in start))
    assert starts == {(x, 1, z) for x in range(1, 7) for z in range(1, 6)}


def test_about_half_of_the_patches_are_sure_to_hold_tumour(make_subject, tiny_config):
    """One voxel of tumour in a corner of a large volume: chance finds it once in 15,000 patches."""
    config = tiny_config(*PLAIN, *PATCHES, "training.patches_per_subject=400")
    image, labels = np.zeros((4, 40, 40, 40)), np.zeros((40, 40, 40), np.uint8)
    labels[1, 38, 20] = 2
    image[3] = labels > 0
    network = Recorder()
    run(network, [make_subject("S", image, labels)], config)
    share = np.mean([float(sample[3].max()) for sample in network.samples])
    assert share == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 400))


def test_a_volume_smaller_than_the_patch_is_padded_with_background(make_subject, tiny_config):
    config = tiny_config(*PLAIN, *PATCHES)
    image = np.random.default_rng(0).normal(size=(4, 10, 20, 7)).astype(np.float16)
    network = Recorder()
    run(network, [make_subject("S", image, random_labels((10, 20, 7)))], config)
    (sample,) = network.samples
    assert sample.shape == (4, 16, 16, 16)
    assert not sample[:, 10:].any()
    assert not sample[..., 7:].any()
    inside = sample[:, :10, :, :7].numpy()
    assert any(np.array_equal(inside, image[:, :, start : start + 16]) for start in range(5))


@pytest.mark.parametrize("keys", [(), PATCHES])
def test_labels_follow_their_image_through_cropping_flipping_and_padding(
    make_subject, tiny_config, keys
):
    """A network that reads the labels off the image has no loss, unless the two drift apart."""
    config = tiny_config(
        *PLAIN, *keys, "training.augment.flip=true", "training.patches_per_subject=20",
        "training.augment.affine_probability=0", "training.epochs=3",
    )  # fmt: skip
    labels = random_labels((16, 20, 18))
    background = np.zeros((16, 20, 18), np.uint8)  # padding is background, which no image shows
    background[2:9, 3:12, 1:5] = random_labels((7, 9, 4))
    for seed, truth in enumerate([labels, background]):
        outcome = run(Recorder(40.0), [make_subject(f"S{seed}", one_hot(truth), truth)], config)
        assert outcome.loss < 1e-3


# -------------------------------------------------------------------------------------- learning


def test_the_loss_falls(prepared, tiny_config):
    config = tiny_config(*PLAIN, "network.channels=[4,4,4,4,4]", "training.epochs=1")
    network = network_for(config)
    losses = [
        run(network, prepared.ready[:2], config, round_=round_).loss for round_ in range(1, 26)
    ]
    assert np.mean(losses[-3:]) < 0.85 * losses[0]


def test_the_rate_of_the_round_is_used_not_that_of_the_configuration(prepared, tiny_config):
    config = tiny_config("training.learning_rate=1000")
    network = network_for(config)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    run(network, prepared.ready[:1], config, learning_rate=1e-4)
    largest = max(float((t - before[n]).abs().max()) for n, t in network.state_dict().items())
    assert largest == pytest.approx(1e-4, rel=0.05)  # Adam's first step


def test_gradients_are_clipped(prepared, tiny_config):
    """Adam forgives any scale but one far below its epsilon of 1e-8, where nothing moves any more."""
    moved = {}
    for clip in ("null", "1e-14"):
        config = tiny_config(f"training.gradient_clip={clip}")
        network = network_for(config)
        before = [p.detach().clone() for p in network.parameters()]
        run(network, prepared.ready[:1], config)
        pairs = zip(network.parameters(), before, strict=True)
        moved[clip] = max(float((p - q).detach().abs().max()) for p, q in pairs)
    assert moved["null"] > 1e-3
    assert moved["1e-14"] < 1e-5


def test_a_divergence_is_named_with_site_round_and_remedy(prepared, tiny_config):
    with pytest.raises(TrainingDiverged, match=r"site-07.*round 4.*learning_rate"):
        run(
            network_for(tiny_config()), prepared.ready[:4], tiny_config(),
            site="site-07", round_=4, learning_rate=1e30,
        )  # fmt: skip


def test_a_gradient_that_spoils_the_weights_in_the_last_step_is_noticed_too(prepared, tiny_config):
    network = Recorder()
    network.gain.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(TrainingDiverged, match="weights were not finite"):
        run(network, prepared.ready[:1], tiny_config())
