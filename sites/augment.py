"""Random changes of a training batch, on the device that trains: flips, rotation, zoom, elastic
deformation, intensity and noise.

One sampling grid per subject holds rotation, zoom and deformation together, so a volume is
interpolated once, not once per change. The idea is MONAI's and nnU-Net's (batchgenerators'
SpatialTransform); not MONAI's own Rand3DElastic, because these changes together cost that several
times as much (benchmarks/augmentation_speed.py). The random distributions are alike, not equal.

All parameters are drawn on the CPU and go to a GPU in small copies, two a subject, that nothing waits
for; no value comes back.
Nothing here is needed to evaluate or to predict.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch.nn import functional

KNOT_SPACING = 24
"""Voxels between the control points of the elastic deformation. With a standard deviation of 3
voxels the local stretch has a standard deviation of about 0.15: folds are practically excluded."""


@torch.no_grad()
def augment(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    generator: torch.Generator,
    flip: bool,
    affine_probability: float,
    rotation_degrees: float,
    scale: float,
    elastic_probability: float,
    elastic_voxels: float,
    intensity_scale: float,
    intensity_shift: float,
    noise: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A changed copy of images (B, C, D, H, W; floating point) and labels (B, D, H, W; integer),
    dtypes and device kept. What is 0 or False is off; with all off the inputs come back.

    - flip: each axis with probability 1/2.
    - affine_probability: of one rotation about the centre, each of three angles uniform in
      +-rotation_degrees, with one zoom uniform in 1 +- scale. Rigid in voxels, so sizes may differ.
    - elastic_probability: of a cubic B-spline free-form deformation (Rueckert et al., IEEE TMI
      1999) with knots KNOT_SPACING apart and displacements of elastic_voxels voxels standard
      deviation along each axis.
    - intensity_scale, intensity_shift: each channel times 1 +- intensity_scale plus
      +- intensity_shift (in units of the image), uniform; noise: Gaussian, its standard deviation
      uniform in 0 to noise for each subject. Voxels that are 0, the background, stay 0 in all
      three, as they are when the network is used.

    Images are sampled linearly, labels take the nearest voxel, what comes from outside is 0.

    `generator` is a CPU generator. Each subject's parameters come from it alone and in a fixed
    number of draws, so they are the same on every device and whatever is switched off. The noise
    itself is drawn on the device with a seed from it: equal from run to run on one kind of device,
    not between CPU and GPU.
    """
    batch, channels = images.shape[:2]
    u = torch.rand((batch, 10 + 2 * channels), generator=generator)
    seeds = torch.randint(2**62, (batch, 2), generator=generator).tolist()
    flips, affine, angles, zoom, elastic, factor, shift, spread = u.split(
        [3, 1, 3, 1, 1, channels, channels, 1], dim=1
    )
    pairs = list(zip(images, labels, strict=True))
    moved = [
        _moved(
            *pairs[b],
            flips=[flip and bool(f < 0.5) for f in flips[b]],
            affine=_affine(angles[b], zoom[b], rotation_degrees, scale)
            if affine[b] < affine_probability and (rotation_degrees or scale)
            else None,
            elastic_voxels=elastic_voxels if elastic[b] < elastic_probability else 0.0,
            seed=seeds[b][0],
        )
        for b in range(batch)
    ]
    any_moved = any(new[0] is not old[0] for new, old in zip(moved, pairs, strict=True))
    if any_moved:
        labels = torch.stack([label for _, label in moved])
    if intensity_scale or intensity_shift or noise:
        images = _recoloured(
            [image for image, _ in moved],
            factor=1 + intensity_scale * (2 * factor - 1),
            shift=intensity_shift * (2 * shift - 1),
            spread=noise * spread,
            seeds=[seed for _, seed in seeds],
        )
    elif any_moved:
        images = torch.stack([image for image, _ in moved])
    return images, labels


def _moved(
    image: torch.Tensor,
    label: torch.Tensor,
    *,
    flips: list[bool],
    affine: torch.Tensor | None,
    elastic_voxels: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One subject's image (C, D, H, W) and label (D, H, W) flipped, then resampled if need be."""
    axes = [axis - 3 for axis, flipped in enumerate(flips) if flipped]
    if affine is None and not elastic_voxels:
        return (image.flip(axes), label.flip(axes)) if axes else (image, label)
    # What is resampled anyway is flipped on the way: the sign of an axis leads to its other end.
    signs = torch.tensor([-1.0 if flipped else 1.0 for flipped in reversed(flips)])[:, None]
    matrix = signs * (torch.eye(3) if affine is None else affine)
    grid = _affine_grid(label.shape, matrix, image.device)
    if elastic_voxels:
        grid += _smooth_field(label.shape, seed, elastic_voxels * signs, image.device)
    grid = grid.permute(1, 2, 3, 0)[None]
    # float32 throughout: half precision cannot tell neighbouring voxels of a long axis apart.
    image_out = functional.grid_sample(
        image[None].float(), grid, mode="bilinear", align_corners=False
    )
    label_out = functional.grid_sample(
        label[None, None].float(), grid, mode="nearest", align_corners=False
    )
    return image_out[0].to(image.dtype), label_out[0, 0].to(label.dtype)


def _affine_grid(size: torch.Size, matrix: torch.Tensor, device: torch.device) -> torch.Tensor:
    """(3, D, H, W): where each voxel comes from by a matrix in voxels, as grid_sample counts: x, y, z
    and -1 to 1 along every axis, however long.

    As torch's affine_grid, which takes 20 times as long on a CPU: a sum of three lines of numbers."""
    extent = torch.tensor([float(n) for n in reversed(size)])  # x, y, z
    # A rotation in grid_sample's coordinates would shear a volume that is not a cube. So: to
    # voxels, rotate, back.
    matrix = matrix * extent / extent[:, None]
    lines = [
        matrix[:, axis, None] * ((2 * torch.arange(n) + 1) / n - 1)
        for axis, n in enumerate(reversed(size))
    ]
    x, y, z = torch.cat(lines, dim=1).to(device, non_blocking=True).split([*reversed(size)], dim=1)
    return (z[:, :, None] + y[:, None])[..., None] + x[:, None, None]


def _affine(
    angles: torch.Tensor, zoom: torch.Tensor, rotation_degrees: float, scale: float
) -> torch.Tensor:
    """The 3x3 matrix that leads from an output voxel to its source, in voxels x, y, z."""
    a, b, c = (math.radians(rotation_degrees) * (2 * angles - 1)).tolist()
    about_x = torch.tensor(
        [[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]]
    )
    about_y = torch.tensor(
        [[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]]
    )
    about_z = torch.tensor(
        [[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]]
    )
    return about_z @ about_y @ about_x / (1 + scale * (2 * zoom - 1))


def _smooth_field(
    size: torch.Size, seed: int, voxels: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """(3, D, H, W) twice differentiable random displacements x, y, z of zero mean and a standard
    deviation of so many voxels (3, 1), in units of half an axis."""
    # The few control points are drawn on the CPU: the same deformation on every device.
    generator = torch.Generator().manual_seed(seed)
    field = torch.randn([3, *(math.ceil(n / KNOT_SPACING) + 3 for n in size)], generator=generator)
    field *= (2 * voxels / torch.tensor([*reversed(size)])[:, None])[..., None, None]
    field = field.to(device, non_blocking=True)
    for axis, n in enumerate(size, start=1):
        weights = _spline(n, device)
        field = torch.tensordot(field, weights, dims=([axis], [1])).movedim(-1, axis)
    return field


@cache
def _spline(n: int, device: torch.device) -> torch.Tensor:
    """(n, knots): the share of each control point in each of n voxels of an axis."""
    away = torch.arange(n)[:, None] / KNOT_SPACING + 1
    away = (away - torch.arange(math.ceil(n / KNOT_SPACING) + 3)).abs()
    # The cubic B-spline; rows of unit length keep the variance 1 between knots, too.
    weights = (2 - away).clamp(min=0) ** 3 - 4 * (1 - away).clamp(min=0) ** 3
    return functional.normalize(weights, dim=1).to(device)


def _recoloured(
    images: list[torch.Tensor],
    *,
    factor: torch.Tensor,
    shift: torch.Tensor,
    spread: torch.Tensor,
    seeds: list[int],
) -> torch.Tensor:
    """Images (B times (C, D, H, W)) times factor (B, C) plus shift (B, C) plus noise of deviation
    spread (B, 1), but 0 where they were 0."""
    like, device = images[0], images[0].device
    factors, shifts = torch.stack([factor, shift])[..., None, None, None].to(
        device, non_blocking=True
    )
    changed = torch.empty((len(images), *like.shape), device=device)
    for b, image in enumerate(images):
        image = image.float()
        if deviation := spread[b].item():  # on the CPU
            generator = torch.Generator(device=device).manual_seed(seeds[b])
            added = torch.randn(image.shape, generator=generator, device=device)
            added.mul_(deviation).add_(shifts[b])
        else:
            added = shifts[b].expand_as(image).contiguous()
        added.masked_fill_(image == 0, 0)
        torch.addcmul(added, image, factors[b], out=changed[b])
    return changed.to(like.dtype)
