"""Where every voxel went is read from images that hold their own coordinates, then compared with
geometry and with scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from sites.augment import _affine, augment

OFF = {
    "flip": False,
    "affine_probability": 0.0,
    "rotation_degrees": 0.0,
    "scale": 0.0,
    "elastic_probability": 0.0,
    "elastic_voxels": 0.0,
    "intensity_scale": 0.0,
    "intensity_shift": 0.0,
    "noise": 0.0,
}
ROTATION = OFF | {"affine_probability": 1.0, "rotation_degrees": 25.0}
ZOOM = OFF | {"affine_probability": 1.0, "scale": 0.2}
ELASTIC = OFF | {"elastic_probability": 1.0, "elastic_voxels": 2.0}
INTENSITY = OFF | {"intensity_scale": 0.1, "intensity_shift": 0.2, "noise": 0.05}
ALL = {
    "flip": True,
    "affine_probability": 1.0,
    "rotation_degrees": 15.0,
    "scale": 0.1,
    "elastic_probability": 1.0,
    "elastic_voxels": 2.0,
    "intensity_scale": 0.1,
    "intensity_shift": 0.2,
    "noise": 0.05,
}
NO_INTENSITY = {"intensity_scale": 0.0, "intensity_shift": 0.0, "noise": 0.0}
SIZE = (24, 40, 56)  # not a cube


def run(images: torch.Tensor, labels: torch.Tensor, seed: int, options: dict):
    generator = torch.Generator().manual_seed(seed)
    return augment(images, labels, generator=generator, **options)


def volumes(batch: int = 1, channels: int = 4, seed: int = 0, size: tuple[int, ...] = SIZE):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(batch, channels, *size))
    images = 8 * ndimage.gaussian_filter(noise, (0, 0, 2, 2, 2))
    labels = np.digitize(images[:, 0], [-0.6, 0.0, 0.6])
    return torch.tensor(images, dtype=torch.float32), torch.tensor(labels, dtype=torch.uint8)


def sources(seed: int, options: dict, size: tuple[int, ...] = SIZE):
    """Per voxel from the centre: its position (n, 3), and the position its content came from."""
    axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in size]
    here = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    images = torch.cat([here, torch.ones(1, *size)])[None]
    moved, _ = run(images, torch.zeros(1, *size, dtype=torch.uint8), seed, options)
    inside = moved[0, 3] > 0.9999  # no share of the zeros outside
    return here[:, inside].T.double().numpy(), moved[0, :3, inside].T.double().numpy()


def matrix(seed: int, options: dict) -> np.ndarray:
    """The linear map from a voxel to its source, and proof that it is one."""
    here, source = sources(seed, options)
    fitted, *_ = np.linalg.lstsq(here, source, rcond=None)
    assert np.abs(here @ fitted - source).max() < 1e-3
    return fitted.T


def test_nothing_changes_when_all_is_off():
    images, labels = volumes(batch=2)
    new_images, new_labels = run(images, labels, 0, OFF)
    assert torch.equal(new_images, images)
    assert torch.equal(new_labels, labels)


@pytest.mark.parametrize("options", [OFF | {"flip": True}, ALL])
def test_the_input_is_left_alone(options):
    images, labels = volumes(batch=2)
    before = images.clone(), labels.clone()
    run(images, labels, 1, options)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])


def test_flips_are_exact_the_same_for_labels_and_use_every_axis():
    images, labels = volumes(batch=40, channels=2, size=(6, 7, 8))
    new_images, new_labels = run(images, labels, 3, OFF | {"flip": True})
    choices = [[i for i in range(3) if bits >> i & 1] for bits in range(8)]
    seen = set()
    for b in range(40):
        fitting = [
            axes
            for axes in choices
            if torch.equal(new_images[b], images[b].flip([axis + 1 for axis in axes]))
        ]
        assert len(fitting) == 1
        assert torch.equal(new_labels[b], labels[b].flip(fitting[0]))
        seen.add(tuple(fitting[0]))
    assert len(seen) == 8


@pytest.mark.parametrize("seed", range(4))
def test_a_rotation_is_rigid_in_voxels_about_all_axes(seed):
    rotation = matrix(seed, ROTATION)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-4)
    assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-4)
    # Every pair of axes mixes, by no more than the angles allow.
    assert (np.abs(rotation - np.diag(np.diag(rotation)))[np.triu_indices(3, 1)] > 0.005).all()
    angle = np.degrees(np.arccos((np.trace(rotation) - 1) / 2))
    assert 1 < angle < 25 * np.sqrt(3)


def test_a_zoom_keeps_the_proportions():
    factors = []
    for seed in range(12):
        zoom = matrix(seed, ZOOM)
        np.testing.assert_allclose(zoom, zoom[0, 0] * np.eye(3), atol=1e-4)
        factors.append(1 / zoom[0, 0])
    assert 0.8 <= min(factors) < 0.95
    assert 1.05 < max(factors) <= 1.2


@pytest.mark.parametrize("options", [ROTATION, ROTATION | {"scale": 0.2}])
def test_the_resampled_image_and_label_are_scipys(options):
    images, labels = volumes()
    new_images, new_labels = run(images, labels, 5, options)
    linear = matrix(5, options)
    centre = (np.array(SIZE) - 1) / 2
    geometry = {"matrix": linear, "offset": centre - linear @ centre}
    inside = ndimage.affine_transform(np.ones(SIZE), **geometry, order=1) > 0.999
    assert inside.sum() > 0.5 * inside.size
    for channel in range(4):
        expected = ndimage.affine_transform(images[0, channel].numpy(), **geometry, order=1)
        np.testing.assert_allclose(
            new_images[0, channel].numpy()[inside], expected[inside], atol=1e-3
        )
    expected = ndimage.affine_transform(labels[0].numpy(), **geometry, order=0)
    assert (new_labels[0].numpy() == expected)[inside].mean() > 0.999


def test_an_affine_with_our_matrix_by_monai_gives_our_voxels():
    from monai.transforms import Affine

    images, labels = volumes()
    found = run(images, labels, 5, ROTATION | {"scale": 0.2})
    draws = torch.rand((1, 18), generator=torch.Generator().manual_seed(5))[0]
    matrix = torch.eye(4)
    matrix[:3, :3] = _affine(draws[4:7], draws[7:8], 25.0, 0.2).flip((0, 1))  # x, y, z -> axes
    for ours, source, mode in zip(
        found, (images, labels[None]), ("bilinear", "nearest"), strict=True
    ):
        by_monai = Affine(affine=matrix, mode=mode, padding_mode="zeros", image_only=True)
        expected = by_monai(source[0].float()).as_tensor().reshape(ours.shape)
        torch.testing.assert_close(ours.float(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [SIZE, (72, 72, 72)])
def test_the_elastic_deformation_has_the_asked_size_and_never_folds(size):
    moved = []
    for seed in range(12):
        here, source = sources(seed, ELASTIC, size)
        moved.append(source - here)
    deviations = np.concatenate(moved).std(axis=0)
    assert ((deviations > 1.4) & (deviations < 2.6)).all()
    for seed in range(3):
        axes = [torch.arange(n, dtype=torch.float32) for n in size]
        here = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
        label = torch.zeros(1, *size, dtype=torch.uint8)
        new = run(here, label, seed, ELASTIC)[0][0].numpy()
        core = tuple(slice(8, -8) for _ in size)  # nothing from outside
        jacobian = np.stack([np.stack(np.gradient(c[core])) for c in new]).transpose(2, 3, 4, 0, 1)
        assert np.linalg.det(jacobian).min() > 0


@pytest.mark.parametrize("options", [ROTATION, ELASTIC, ALL | NO_INTENSITY])
def test_labels_move_with_the_image(options):
    _, labels = volumes(batch=2)
    ball = torch.tensor(ndimage.gaussian_filter(labels.float().numpy(), (0, 4, 4, 4)) > 1.5)
    new_image, new_label = run(ball[:, None].float(), ball.to(torch.uint8), 7, options)
    assert not torch.equal(new_label, ball.to(torch.uint8))
    agreement = (new_image[:, 0].round() == new_label).float().mean()
    assert agreement > 0.97


@pytest.mark.parametrize("seed", range(4))
def test_flips_come_before_what_resamples(seed):
    images, labels = volumes(batch=2)
    flipped = run(images, labels, seed, OFF | {"flip": True})
    assert not torch.equal(flipped[0], images)
    moved = run(images, labels, seed, ALL | NO_INTENSITY)
    expected = run(*flipped, seed, ALL | NO_INTENSITY | {"flip": False})
    torch.testing.assert_close(moved[0], expected[0], rtol=0, atol=1e-3)
    assert (moved[1] != expected[1]).float().mean() < 1e-4


def test_on_another_device_it_never_waits_for_a_value():
    """A tensor without values: to ask for one raises. No noise: such a device has no generator."""
    images, labels = (volume.to("meta") for volume in volumes(batch=2))
    new_images, new_labels = run(images.half(), labels, 4, ALL | {"noise": 0.0})
    assert (new_images.device.type, new_images.dtype, new_images.shape) == (
        "meta",
        torch.float16,
        images.shape,
    )
    assert (new_labels.device.type, new_labels.dtype) == ("meta", torch.uint8)


def test_labels_stay_the_labels_there_were_and_outside_is_background():
    images, labels = volumes(batch=2)
    new_images, new_labels = run(images, labels + 1, 2, ALL | {"noise": 0.0})
    assert new_labels.dtype == torch.uint8
    assert set(new_labels.unique().tolist()) <= {0, 1, 2, 3, 4}
    outside = new_labels == 0
    assert outside.any()
    # The image reaches half a voxel further than the nearest label, hence the erosion.
    far = torch.tensor(ndimage.binary_erosion(outside.numpy(), np.ones((1, 3, 3, 3))))
    assert (new_images.transpose(0, 1)[:, far] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes_and_shapes_are_kept(dtype):
    images, labels = volumes(batch=2)
    new_images, new_labels = run(images.to(dtype), labels.long(), 2, ALL)
    assert (new_images.dtype, new_images.shape) == (dtype, images.shape)
    assert (new_labels.dtype, new_labels.shape) == (torch.int64, labels.shape)
    assert new_images.isfinite().all()


def test_the_same_seed_gives_the_same_batch_and_another_seed_another():
    images, labels = volumes(batch=2)
    first, again, other = (run(images, labels, seed, ALL) for seed in (9, 9, 10))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_a_subject_does_not_depend_on_the_other_in_its_batch():
    images, labels = volumes(batch=2)
    others, other_labels = volumes(batch=2, seed=1)
    others[0], other_labels[0] = images[0], labels[0]
    one, two = run(images, labels, 4, ALL), run(others, other_labels, 4, ALL)
    assert torch.equal(one[0][0], two[0][0])
    assert torch.equal(one[1][0], two[1][0])
    assert not torch.equal(one[0][1], two[0][1])
    same = run(images[:1].repeat(2, 1, 1, 1, 1), labels[:1].repeat(2, 1, 1, 1), 4, ALL)
    assert not torch.equal(same[0][0], same[0][1])  # and each has its own draw


def test_switching_the_noise_off_leaves_the_geometry_as_it_was():
    images, labels = volumes()
    assert torch.equal(
        run(images, labels, 6, ALL)[1], run(images, labels, 6, ALL | {"noise": 0.0})[1]
    )


@pytest.mark.parametrize("key", ["affine_probability", "elastic_probability"])
def test_about_as_many_subjects_change_as_the_probability_says(key):
    images, labels = volumes(batch=400, channels=1, size=(4, 5, 6))
    never = ALL | NO_INTENSITY | {"flip": False, "affine_probability": 0, "elastic_probability": 0}
    new, _ = run(images, labels, 1, never | {key: 0.3})
    changed = (new != images).flatten(1).any(dim=1).float().mean()
    assert abs(changed - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5


def test_scale_and_shift_are_per_channel_within_their_range():
    images = torch.stack([torch.full((4, 4, 4), v) for v in (1.0, 1.0, 3.0)])
    images = images[None].repeat(200, 1, 1, 1, 1)
    images[..., 2:] *= -2  # two values per channel give its factor and its shift
    labels = torch.zeros(200, 4, 4, 4, dtype=torch.uint8)
    new, _ = run(images, labels, 0, INTENSITY | {"noise": 0.0})
    low, high = new[..., 3][:, :, 0, 0], new[..., 0][:, :, 0, 0]
    factor = (high - low) / (3 * torch.tensor([1.0, 1.0, 3.0]))
    shift = high - factor * torch.tensor([1.0, 1.0, 3.0])
    assert 0.9 - 1e-5 <= factor.min() < 0.91
    assert 1.09 < factor.max() <= 1.1 + 1e-5
    assert -0.2 - 1e-5 <= shift.min() < -0.19
    assert 0.19 < shift.max() <= 0.2 + 1e-5
    assert not torch.allclose(factor[:, 0], factor[:, 1], atol=1e-3)


def test_noise_is_gaussian_and_at_most_as_strong_as_asked():
    images = torch.ones(20, 1, 24, 24, 24)
    labels = torch.zeros(20, 24, 24, 24, dtype=torch.uint8)
    new, _ = run(images, labels, 0, OFF | {"noise": 0.5})
    added = (new - images).flatten(1)
    deviations = added.std(dim=1)
    assert deviations.max() < 0.51
    assert deviations.min() < 0.2
    assert deviations.max() > 0.4
    standard = added / deviations[:, None]
    assert abs(standard.mean()) < 0.01
    assert abs((standard**4).mean() - 3) < 0.1  # kurtosis of a Gaussian


def test_the_background_stays_exactly_zero():
    images, labels = volumes()
    images[..., :10] = 0
    new, _ = run(images, labels, 0, INTENSITY)
    assert (new[..., :10] == 0).all()
    assert (new[..., 10:] != images[..., 10:]).float().mean() > 0.99
