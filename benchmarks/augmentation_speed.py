"""Augmentation of a batch against MONAI's per-sample transforms with the same parameters.

    python benchmarks/augmentation_speed.py [--quick] [--repeats N] [--json FILE]

Two subjects of 4 x 128^3 and their labels (48^3 with --quick), everything switched on with
probability 1, one CPU thread; also the GPU where there is one, on which MONAI's transforms then work,
too. MONAI's subjects go one by one through a Compose and are stacked, as in a DataLoader without
workers. Two chains:

- flips and affine, one interpolation each: the same work, so flips must be equal to the bit, and
  MONAI's Affine, given our matrices, must give our voxels.
- all: RandFlipd x 3, RandAffined, Rand3DElasticd, RandScaleIntensityd, RandShiftIntensityd and
  RandGaussianNoised. Distributions are alike, not equal: MONAI smooths white noise by a Gaussian,
  interpolates twice, and adds noise to the background too. A second peer has the affine inside
  Rand3DElasticd, so that MONAI interpolates once as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from interleaved import interleaved, options, report, write_json
from monai import transforms as mt

from sites.augment import _affine, augment

FLIPPED = {
    "flip": True,
    "affine_probability": 0.0,
    "rotation_degrees": 15.0,
    "scale": 0.1,
    "elastic_probability": 0.0,
    "elastic_voxels": 3.0,
    "intensity_scale": 0.0,
    "intensity_shift": 0.0,
    "noise": 0.0,
}
AFFINE = FLIPPED | {"affine_probability": 1.0}
COLOUR = {"intensity_scale": 0.1, "intensity_shift": 0.1, "noise": 0.05}
ALL = AFFINE | {"elastic_probability": 1.0} | COLOUR
BATCH, CHANNELS, DRAWS = 2, 4, 10 + 2 * 4
Batch = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    chosen = options(__doc__).parse_args()
    torch.set_num_threads(1)
    side = 48 if chosen.quick else 128
    seed = flipping_seed()
    reports = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        images, labels = (tensor.to(device) for tensor in batch(side))
        facts = compared(images, labels, seed)
        for title, ours, chains, reach in (
            ("flips and affine", AFFINE, {"MONAI": chain(affine=True)}, 2.0),
            (
                "all",
                ALL,
                {
                    "MONAI": chain(affine=True, elastic=True, colour=True),
                    "MONAI, affine in Rand3DElasticd": chain(
                        elastic=True, within=True, colour=True
                    ),
                },
                5.0,
            ),
        ):
            ways: dict[str, Callable[[], object]] = {
                name: each_sample(steps, images, labels) for name, steps in chains.items()
            }
            ways["fedbrats"] = whole_batch(ours, images, labels, seed)
            reports.append(
                report(
                    f"Augmentation, {title}: {BATCH} x {CHANNELS} x {side}^3 + labels, {device}",
                    interleaved(ways, repeats=chosen.repeats),
                    peer="MONAI",
                    reach={"fedbrats": reach},
                    facts=facts if ours is AFFINE else {},
                )
            )
    write_json(chosen.json, reports)


def batch(side: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(BATCH, CHANNELS, *[side // 8] * 3, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(side,) * 3, mode="trilinear")
    images[..., : side // 8] = 0  # background
    labels = (images[:, 0] > 0.5).to(torch.uint8) + 2 * (images[:, 1] > 0.5).to(torch.uint8)
    return images, labels


def flipping_seed() -> int:
    """A seed with which `augment` flips every axis of every subject."""
    for seed in range(10**6):
        draws = torch.rand((BATCH, DRAWS), generator=torch.Generator().manual_seed(seed))
        if (draws[:, :3] < 0.5).all():
            return seed
    raise AssertionError


def chain(
    *, affine: bool = False, elastic: bool = False, within: bool = False, colour: bool = False
) -> mt.Compose:
    """`within`: the affine is a part of Rand3DElasticd."""
    both, modes = ["image", "label"], ("bilinear", "nearest")
    turn = {"rotate_range": [math.radians(15)] * 3, "scale_range": [0.1] * 3}
    outside = {"mode": modes, "padding_mode": "zeros"}
    steps: list[Any] = [mt.RandFlipd(both, prob=1.0, spatial_axis=axis) for axis in range(3)]
    if affine:
        steps.append(mt.RandAffined(both, prob=1.0, **turn, **outside))
    if elastic:
        # displacements of some 3 voxels standard deviation
        field = {"sigma_range": (5, 7), "magnitude_range": (400, 600)}
        extra = turn if within else {}
        steps.append(mt.Rand3DElasticd(both, prob=1.0, **field, **extra, **outside))
    if colour:
        steps += [
            mt.RandScaleIntensityd("image", factors=0.1, prob=1.0, channel_wise=True),
            mt.RandShiftIntensityd("image", offsets=0.1, prob=1.0, channel_wise=True),
            mt.RandGaussianNoised("image", std=0.05, prob=1.0),
        ]
    composed = mt.Compose(steps)
    composed.set_random_state(0)
    return composed


def each_sample(
    steps: mt.Compose, images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], Batch]:
    def run() -> Batch:
        done = [
            steps({"image": image, "label": label[None]})
            for image, label in zip(images, labels, strict=True)
        ]
        return waited(
            torch.stack([d["image"] for d in done]), torch.stack([d["label"] for d in done])
        )

    return run


def whole_batch(
    settings: dict[str, Any], images: torch.Tensor, labels: torch.Tensor, seed: int
) -> Callable[[], Batch]:
    def run() -> Batch:
        return waited(
            *augment(images, labels, generator=torch.Generator().manual_seed(seed), **settings)
        )

    return run


def waited(images: torch.Tensor, labels: torch.Tensor) -> Batch:
    if images.is_cuda:
        torch.cuda.synchronize()
    return images, labels


def compared(images: torch.Tensor, labels: torch.Tensor, seed: int) -> dict[str, str]:
    """Flips, and affines with our matrices, by MONAI."""
    flipped = whole_batch(FLIPPED, images, labels, seed)()
    for ours, theirs in zip(flipped, each_sample(chain(), images, labels)(), strict=True):
        assert torch.equal(ours, theirs.as_tensor().reshape(ours.shape))
    draws = torch.rand((BATCH, DRAWS), generator=torch.Generator().manual_seed(seed))
    ours = whole_batch(AFFINE, images, labels, seed)()
    largest, other = 0.0, 0
    for b in range(BATCH):
        matrix = torch.eye(4)
        # MONAI counts the axes of the array, ours x, y, z
        matrix[:3, :3] = _affine(draws[b, 4:7], draws[b, 7:8], 15.0, 0.1).flip((0, 1))
        for index, (flips, mode) in enumerate(zip(flipped, ("bilinear", "nearest"), strict=True)):
            step = mt.Affine(affine=matrix, mode=mode, padding_mode="zeros", image_only=True)
            source = flips[b].float().reshape(-1, *images.shape[2:])
            theirs = step(source).as_tensor().reshape(ours[index][b].shape)
            difference = (theirs - ours[index][b].float()).abs()
            if mode == "bilinear":
                largest = max(largest, float(difference.max()))
            else:
                other += int((difference > 0).sum())
    assert largest < 1e-3, largest
    assert other <= 1e-5 * labels.numel(), other  # halfway between two voxels: either is nearest
    return {
        "flips": "equal to the bit",
        "affine with our matrices by MONAI": f"images differ by {largest:.1e} at most, labels in "
        f"{other} of {labels.numel()} voxels",
    }


if __name__ == "__main__":
    main()
