"""A whole epoch of training on four subjects of 128^3 on a CPU, against the stock MONAI pipeline.

    python benchmarks/epoch.py [--quick] [--repeats N] [--threads N] [--json FILE]

Four phantoms of 240x240x155, whole volumes resampled to 128^3 (80x80x52 and 64^3 with --quick),
batches of two, the augmentation and the network (U-Net 16..256, instance norm) of the default
preset, learning rate 1e-4. Ours is `client.training.train` as a site calls it: volumes from the
cache on disk, bf16 where the CPU computes in it. The peer is MONAI as its BraTS tutorial has it, in
fp32: a CacheDataset in memory, the random transforms with our preset's probabilities and sizes,
DataLoader, BasicUNet, DiceLoss + softmax FocalLoss, Adam; the gradient is clipped as ours. The
DataLoader has no workers, as all cores are training: what they could save at most is printed.

Before anything is timed, on data without augmentation: the voxels that MONAI cached are ours up to
fp16's rounding and the labels equal; the first loss from the same initial weights agrees. The
augmentations have alike distributions, not equal draws; MONAI's costly elastic one hits 15 % of
subjects on both sides, and how often it did is printed.

What is paid once, before the first epoch, is timed once and stands apart: ours checks the files,
writes a cache to the disk and syncs it; MONAI's is in memory and is made again by every process. One
worker on both sides.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import interleaved, options, report, write_json
from monai import transforms as mt
from monai.data import CacheDataset, DataLoader, NibabelReader
from monai.losses import DiceLoss, FocalLoss
from monai.networks.nets import BasicUNet

from client.forward import forward_of
from client.training import train
from common.brats import MODALITIES
from common.config import Augment, FederationConfig
from common.config_file import load_config
from common.model import network_for
from common.precision import autocast_dtype
from common.seeds import derive_seed
from sites.cache import CachedSubject, prepare_subjects
from sites.phantom_cohort import write_cohort
from sites.preprocess import recipe_of
from sites.subject import Subject, discover

SUBJECTS, RATE, REACH = 4, 1e-4, 1.5
CPU = torch.device("cpu")
PEER, OURS, FP32 = "stock MONAI, fp32", "fedbrats", "fedbrats, precision: fp32"
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore", module="monai")
    torch.set_num_threads(chosen.threads)
    shape, side = ((80, 80, 52), 64) if chosen.quick else ((240, 240, 155), 128)
    configs = {OURS: configured(side, "auto"), FP32: configured(side, "fp32")}
    with tempfile.TemporaryDirectory() as folder:
        root = write_cohort(Path(folder) / "data", sites=1, subjects_per_site=SUBJECTS, shape=shape)
        subjects = discover(root).subjects
        cached, ours_once = prepared(subjects, configs[OURS], Path(folder) / "cache")
        chain = transforms(configs[OURS])
        stored, stock_once = stock_cache(subjects, chain)
        facts: dict[str, Any] = {
            f"once, {PEER}: CacheDataset in memory": stock_once,
            f"once, {OURS}: checks, digests, cache on disk": ours_once,
        }
        facts["cached voxels"] = same_voxels(stored, cached)
        facts |= same_losses(stored, cached, configs)
        elastic, drawn, waits = chain.transforms[-4], [], []
        assert isinstance(elastic, mt.Rand3DElasticd)
        ways: dict[str, Callable[[], object]] = {
            PEER: stock_epoch(configs[OURS], stored, elastic, drawn, waits)
        }
        ways |= {name: our_epoch(config, cached) for name, config in configs.items()}
        # the steps that `same_losses` compared were the warm-up
        measured = interleaved(ways, repeats=chosen.repeats, warm_ups=0)
    assert len(drawn) == SUBJECTS * chosen.repeats
    computed = autocast_dtype("auto", CPU)
    facts |= {
        "threads": chosen.threads,
        f"share of an epoch in the DataLoader, {PEER}": f"{100 * statistics.median(waits):.1f} %",
        f"{OURS} computed in": "bf16" if computed else "fp32: this CPU has no bf16",
        f"subjects with an elastic deformation, of {SUBJECTS * chosen.repeats}": f"{PEER} "
        f"{sum(drawn)}, {OURS} {sum(elastics(configs[OURS], n + 1) for n in range(chosen.repeats))}",
    }
    title = f"an epoch of {SUBJECTS} subjects of 4 x {side}^3, batch 2, augmented"
    found = report(title, measured, peer=PEER, reach={OURS: REACH}, facts=facts)
    write_json(chosen.json, [found])


def configured(side: int, precision: str) -> FederationConfig:
    config = load_config(
        preset="default",
        assign=[
            "preprocess.mode=resample",
            f"preprocess.shape=[{side},{side},{side}]",
            f"training.precision={precision}",
        ],
    )
    assert config.network.name == "unet"
    assert config.training.epochs == 1
    return config


def prepared(
    subjects: Sequence[Subject], config: FederationConfig, folder: Path
) -> tuple[list[CachedSubject], str]:
    wall, cpu = time.perf_counter(), time.process_time()
    made = prepare_subjects(subjects, recipe_of(config), folder, site="bench")
    text = seconds_since(wall, cpu)
    assert len(made.ready) == SUBJECTS, made.findings
    return list(made.ready), text


def stock_cache(subjects: Sequence[Subject], chain: mt.Compose) -> tuple[CacheDataset, str]:
    files = [
        {"image": [s.images[m] for m in MODALITIES], "label": s.segmentation} for s in subjects
    ]
    wall, cpu = time.perf_counter(), time.process_time()
    # one worker, its default: with two, MONAI 1.6.1 now and then gives a subject one modality of four
    stored = CacheDataset(files, chain, num_workers=1, progress=False)
    return stored, seconds_since(wall, cpu)


def seconds_since(wall: float, cpu: float) -> str:
    return f"{time.perf_counter() - wall:.2f} s, CPU {time.process_time() - cpu:.2f} s"


def transforms(config: FederationConfig) -> mt.Compose:
    """MONAI's, of which a CacheDataset keeps what comes before the first random one."""
    both, modes, a = ["image", "label"], ("bilinear", "nearest"), config.training.augment
    turn = {
        "rotate_range": [math.radians(a.rotation_degrees)] * 3,
        "scale_range": [a.scale] * 3,
    }
    # displacements of some 3 voxels standard deviation
    assert a.elastic_voxels == 3
    field = {"sigma_range": (5, 7), "magnitude_range": (400, 600)}
    outside = {"mode": modes, "padding_mode": "zeros"}
    fixed = [
        mt.LoadImaged(both, reader=NibabelReader(), dtype=np.int16),
        mt.EnsureChannelFirstd(both),
        mt.Orientationd(both, axcodes="RAS", labels=None),
        mt.MapLabelValued("label", orig_labels=[0, 1, 2, 4], target_labels=[0, 1, 2, 3]),
        mt.CropForegroundd(both, "image", select_fn=lambda voxels: voxels != 0, allow_smaller=True),
        mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True),
        mt.Resized(both, config.preprocess.shape, mode=("trilinear", "nearest-exact")),
    ]
    random = [
        *(mt.RandFlipd(both, prob=0.5 * a.flip, spatial_axis=axis) for axis in range(3)),
        mt.RandAffined(both, prob=a.affine_probability, **turn, **outside),
        mt.Rand3DElasticd(both, prob=a.elastic_probability, **field, **outside),
        mt.RandScaleIntensityd("image", factors=a.intensity_scale, prob=1.0, channel_wise=True),
        mt.RandShiftIntensityd("image", offsets=a.intensity_shift, prob=1.0, channel_wise=True),
        mt.RandGaussianNoised("image", std=a.noise, prob=1.0),  # a deviation of 0 to `std`
    ]
    chain = mt.Compose([*fixed, *random])
    chain.set_random_state(0)
    return chain


def same_voxels(stored: CacheDataset, cached: Sequence[CachedSubject]) -> str:
    """Assert that both sides train on the same images, up to fp16's rounding, and labels."""
    furthest = 0.0
    for theirs, ours in zip(stored._cache, cached, strict=True):
        image, label = theirs["image"].numpy(), theirs["label"].numpy()
        np.testing.assert_allclose(ours.image().astype(np.float32), image, rtol=2**-11, atol=1e-4)
        np.testing.assert_array_equal(ours.labels(), label[0])
        furthest = max(furthest, float(np.abs(ours.image() - image).max()))
    return f"{furthest:.1e} sigma apart at most (fp16), labels equal"


def same_losses(
    stored: CacheDataset, cached: Sequence[CachedSubject], configs: dict[str, FederationConfig]
) -> dict[str, str]:
    """Assert that a step from the initial weights without augmentation has the same loss."""
    network, first = stock_network(configs[OURS]), stored._cache[:2]
    images = torch.stack([item["image"].as_tensor().float() for item in first])
    labels = torch.stack([item["label"].as_tensor() for item in first])
    losses = {PEER: float(stock_step(network, configs[OURS])(images, labels))}
    gradients = {PEER: gradient(network)}
    images = torch.stack([torch.from_numpy(np.array(c.image())).float() for c in cached[:2]])
    labels = torch.stack([torch.from_numpy(np.array(c.labels())) for c in cached[:2]])
    for name, config in configs.items():
        network = ours_ready(config)
        loss, _ = forward_of(config, CPU)(network, images, labels)
        loss.backward()
        losses[name], gradients[name] = float(loss.detach()), gradient(network)
    assert abs(losses[FP32] - losses[PEER]) < 1e-5, losses
    assert abs(losses[OURS] - losses[PEER]) < 3e-3, losses  # bf16
    likeness = {
        name: float(torch.nn.functional.cosine_similarity(gradients[PEER], found, dim=0))
        for name, found in gradients.items()
        if name != PEER
    }
    assert likeness[FP32] > 0.999, likeness
    return {
        "loss of a step without augmentation": ", ".join(
            f"{name} {loss:.6f}" for name, loss in losses.items()
        ),
        "cosine of its gradient with the peer's": ", ".join(
            f"{name} {cosine:.5f}" for name, cosine in likeness.items()
        ),
    }


def gradient(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for _, p in sorted(network.named_parameters())])


def stock_network(config: FederationConfig) -> torch.nn.Module:
    """MONAI's as it comes, with our initial weights."""
    channels = config.network.channels
    network = BasicUNet(
        spatial_dims=3,
        in_channels=len(MODALITIES),
        out_channels=4,
        features=(*channels, channels[0]),
        act=("RELU", {"inplace": True}),
        norm=("instance", {"affine": True}),
    )
    network.load_state_dict(network_for(config).state_dict())
    return network.train()


def stock_step(network: torch.nn.Module, config: FederationConfig) -> Step:
    optimiser = torch.optim.Adam(network.parameters(), lr=RATE)
    dice = DiceLoss(softmax=True, to_onehot_y=True)
    focal = FocalLoss(gamma=2.0, weight=0.25, use_softmax=True, to_onehot_y=True)
    assert config.loss.focal_weight == 1

    def step(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        optimiser.zero_grad(set_to_none=True)
        logits = network(images)
        loss = dice(logits, truth) + focal(logits, truth)
        loss.backward()
        if config.training.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.training.gradient_clip)
        optimiser.step()
        return loss.detach()

    return step


def stock_epoch(
    config: FederationConfig,
    stored: CacheDataset,
    elastic: mt.Rand3DElasticd,
    drawn: list[bool],
    waits: list[float],
) -> Callable[[], None]:
    """`drawn` gets whether each subject was deformed, `waits` the share of each epoch without steps."""
    network = stock_network(config)
    step = stock_step(network, config)
    loader = DataLoader(stored, batch_size=config.training.batch_size, shuffle=True, num_workers=0)
    randomize = elastic.randomize

    def counted(data: Any) -> None:
        randomize(data)
        drawn.append(elastic._do_transform)

    elastic.randomize = counted

    def epoch() -> None:
        total, stepping, begin = 0.0, 0.0, time.perf_counter()
        for batch in loader:
            start = time.perf_counter()
            total += float(step(batch["image"].as_tensor(), batch["label"].as_tensor()))
            stepping += time.perf_counter() - start
        assert math.isfinite(total)
        waits.append(1 - stepping / (time.perf_counter() - begin))

    return epoch


def ours_ready(config: FederationConfig) -> torch.nn.Module:
    """As `client.app` makes it."""
    return network_for(config).to(memory_format=torch.channels_last_3d).train()


def our_epoch(config: FederationConfig, cached: Sequence[CachedSubject]) -> Callable[[], None]:
    network, done = ours_ready(config), 0

    def epoch() -> None:
        nonlocal done
        done += 1
        outcome = train(
            network, cached, config, site="bench", round_=done, learning_rate=RATE, device=CPU
        )
        assert outcome.samples == SUBJECTS

    return epoch


def elastics(config: FederationConfig, round_: int) -> int:
    """How many subjects `sites.augment` deforms in that epoch, by its own draws."""
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "augment", "bench", round_))
    a: Augment = config.training.augment
    size, found = config.training.batch_size, 0
    for _ in range(SUBJECTS // size):
        u = torch.rand((size, 10 + 2 * len(MODALITIES)), generator=generator)
        torch.randint(2**62, (size, 2), generator=generator)
        found += int((u[:, 8] < a.elastic_probability).sum())
    return found


if __name__ == "__main__":
    main()
