"""Training on a GPU: a step beside stock MONAI AMP, whole rounds of the product, and too little memory.

    python benchmarks/gpu_training.py [--json FILE] [--only step,round,memory,networks] [--side 128]

step      one optimiser step of two subjects of 128^3, four modalities. Peer: MONAI's network as it
          comes, DiceLoss + softmax FocalLoss, fp16 autocast with GradScaler, Adam, cuDNN benchmark
          mode on, as in MONAI's BraTS tutorial. Ours: `client.forward` eager and compiled, as
          `client.training` calls it, bf16. No augmentation, data already on the GPU. The losses of
          the first step are compared. For the reference U-Net (16..256) and nnU-Net's
          (DynUNet 32..320), for which NVIDIA publishes 27.5 images/s on an A100. FLOPs are counted
          by torch; the peak is that of an 8192^3 bf16 matrix product in the same run.
round     `client.training.train` of the default preset on subjects in a cache on disk, everything
          on: volumes in GPU memory and, for comparison, read from disk; seconds a round, and the
          share of it in which the GPU computes: its seconds by torch's profiler in one round, over
          the median of rounds without profiler, which slows the host.
memory    the same with less GPU memory than a step needs: it must end, by being thrifty.
networks  every network compiled: first loss and gradient against eager.

Needs a CUDA GPU; without one it says so and fails.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import interleaved, options, report, spread, write_json
from stock_monai import stock_loss, stock_network
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import client.held_volumes
import client.thrift
from client.evaluation import evaluate
from client.forward import _forward, forward_of
from client.training import train
from common.config import FederationConfig
from common.config_file import load_config
from common.model import network_for
from sites.cache import CachedSubject
from sites.preprocess import Geometry

BATCH, STEPS = 2, 10
NETWORKS = {
    "unet 16..256": ("unet", (16, 32, 64, 128, 256)),
    "dynunet 32..320": ("dynunet", (32, 64, 128, 256, 320, 320)),
}
GPU = torch.device("cuda")


def configured(name: str, channels: tuple[int, ...], side: int, *more: str) -> FederationConfig:
    return load_config(
        preset="default",
        assign=[
            f"network.name={name}",
            f"network.channels={list(channels)}",
            f"training.patch=[{side},{side},{side}]",
            *more,
        ],
    )


def gemm_peak() -> float:
    """bf16 TFLOP/s of an 8192^3 matrix product of random numbers."""
    a, b = (torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    seconds = interleaved({"gemm": waited(lambda: [a @ b for _ in range(20)])})["gemm"].wall
    return 20 * 2 * 8192**3 / min(seconds) / 1e12


def waited(work: Callable[[], object]) -> Callable[[], None]:
    def whole() -> None:
        work()
        torch.cuda.synchronize()

    return whole


def stock_step(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor):
    network.to(GPU).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cuda")
    loss_of = stock_loss()

    def step() -> torch.Tensor:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.float16):
            logits = network(images)
        loss = loss_of(logits, labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        scaler.step(optimiser)
        scaler.update()
        return loss.detach()

    return step


def our_step(config, network, images, labels, compiled: bool):
    network.to(GPU).to(memory_format=torch.channels_last_3d).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    forward = _forward(config.loss, torch.bfloat16, GPU, compiled)

    def step() -> torch.Tensor:
        optimiser.zero_grad(set_to_none=True)
        loss, _ = forward(network, images, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimiser.step()
        return loss.detach()

    return step


def flops(config: FederationConfig, side: int) -> float:
    network = network_for(config).to("meta")
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(BATCH, 4, side, side, side, device="meta")).sum().backward()
    return float(counter.get_total_flops())


def steps(title: str, side: int, repeats: int, peak: float) -> dict[str, Any]:
    name, channels = NETWORKS[title]
    config = configured(name, channels, side)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 4, side, side, side, generator=generator).to(GPU)
    labels = torch.randint(0, 4, (BATCH, side, side, side), generator=generator).to(GPU)
    weights = network_for(config).state_dict()
    peer = stock_network(name, channels)
    # the names are MONAI's own, but DynUNet has some of its layers under two
    peer.load_state_dict(weights, strict=name != "dynunet")
    ways, memory, first = {}, {}, {}
    networks = {"stock MONAI fp16 AMP": peer}
    for way in ("ours, eager", "ours, compiled"):
        networks[way] = network_for(config)
        networks[way].load_state_dict(weights)
    for way, network in networks.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        if network is peer:
            step = stock_step(network, images, labels.clone())
        else:
            step = our_step(config, network, images, labels.byte(), way == "ours, compiled")
        begin = time.monotonic()
        first[way] = float(step())
        torch.cuda.synchronize()
        seconds = time.monotonic() - begin
        step()
        peak_memory = (torch.cuda.max_memory_allocated() - held) / 2**30
        memory[way] = f"{peak_memory:.1f} GiB, first step {seconds:.1f} s"
        ways[way] = waited(lambda step=step: [step() for _ in range(STEPS)])
    values = list(first.values())
    assert max(values) - min(values) < 3e-3, f"the first losses differ: {first}"
    measured = interleaved(ways, repeats=repeats)
    work = flops(config, side)
    facts = {f"memory, {way}": text for way, text in memory.items()}
    for way, timings in measured.items():
        s = spread(timings.wall)["median"] / STEPS
        facts[f"rate, {way}"] = (
            f"{BATCH / s:.1f} images/s, {work / s / 1e12:.0f} TFLOP/s, "
            f"{100 * work / s / 1e12 / peak:.1f} % of the matrix product's {peak:.0f}"
        )
    facts["first losses"] = {way: round(value, 5) for way, value in first.items()}
    facts["FLOPs of a step"] = f"{work / 1e12:.2f} T"
    return report(
        f"{title}, {STEPS} steps of {BATCH} x 4 x {side}^3, {torch.cuda.get_device_name()}",
        measured,
        peer="stock MONAI fp16 AMP",
        reach={"ours, compiled": 2.0},
        facts=facts,
    )


def cohort(folder: Path, subjects: int, side: int) -> list[CachedSubject]:
    """Cached subjects of a head's size; noise in place of a brain."""
    shape = (side + 12, side + 44, side + 12)
    made = []
    for i in range(subjects):
        random = np.random.default_rng(i)
        where = folder / f"S{i:03d}"
        where.mkdir()
        labels = np.zeros(shape, np.uint8)
        tumour = labels[8 : side // 2, 8 : side // 2, 8 : side // 2]
        tumour[:] = random.integers(0, 4, tumour.shape)
        np.save(
            where / "image.npy", random.standard_normal((4, *shape), np.float32).astype(np.float16)
        )
        np.save(where / "labels.npy", labels)
        np.save(where / "truth.npy", labels)
        box = ((0, 0, 0), shape)
        made.append(CachedSubject(where.name, where, Geometry(shape, (1, 1, 1), box, box), ""))
    return made


def ready(config: FederationConfig) -> torch.nn.Module:
    return network_for(config).to(GPU).to(memory_format=torch.channels_last_3d)


def computing(work: Callable[[], object]) -> float:
    """Seconds in which a kernel or copy runs on the GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize()
    total, until = 0.0, 0.0
    spans = (
        (e.time_range.start, e.time_range.end)
        for e in profiled.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    for start, end in sorted(spans):  # two streams may overlap
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e6


def rounds(side: int, repeats: int, subjects: int) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        cases = cohort(Path(folder), subjects, side)
        for title, (name, channels) in NETWORKS.items():
            more = ("training.patches_per_subject=4", "rounds.number=1000")
            config = configured(name, channels, side, *more)
            network = ready(config)

            def one_round(network=network, config=config, n=[0]) -> None:  # noqa: B006
                n[0] += 1
                train(
                    network, cases, config,
                    site="bench", round_=n[0], learning_rate=1e-4, device=GPU,
                )  # fmt: skip

            client.held_volumes._held.clear()
            client.held_volumes._room.clear()
            begin = time.monotonic()
            one_round()
            first = time.monotonic() - begin
            ways = {"held in GPU memory": waited(one_round)}
            held = interleaved(ways, repeats=repeats, warm_ups=0)
            on_gpu = {"held in GPU memory": computing(one_round)}
            client.held_volumes.give_back()
            held |= interleaved({"read from disk": waited(one_round)}, repeats=repeats, warm_ups=1)
            on_gpu["read from disk"] = computing(one_round)
            begin = time.monotonic()
            evaluate(network, cases[:4], config, what="", surface_distances=True, device=GPU)
            evaluated = time.monotonic() - begin
            images = 4 * subjects
            facts = {
                f"images/s, {way}": round(images / spread(t.wall)["median"], 1)
                for way, t in held.items()
            }
            facts |= {
                f"GPU computes, {way}": f"{100 * on_gpu[way] / spread(t.wall)['median']:.1f} %"
                for way, t in held.items()
            }
            facts |= {
                "first round (compiles, fills the GPU's memory), s": round(first, 1),
                "evaluating 4 subjects with HD95, s": round(evaluated, 2),
            }
            found.append(
                report(
                    f"a round of {title}: {subjects} subjects, 4 patches of {side}^3 each, augmented",
                    held,
                    peer="read from disk",
                    reach={},
                    facts=facts,
                )
            )
            del network, one_round
            gc.collect()
    return found


def too_little_memory(side: int) -> dict[str, Any]:
    name, channels = NETWORKS["dynunet 32..320"]
    config = configured(name, channels, side, "rounds.number=1")
    total = torch.cuda.get_device_properties(0).total_memory
    found: dict[str, Any] = {"title": "less memory than a step needs", "ended with": {}}
    with tempfile.TemporaryDirectory() as folder:
        cases = cohort(Path(folder), 2, side)
        for gigabytes in (24.0, 5.0, 3.5, 0.6):
            client.thrift._needed.clear()
            client.held_volumes._held.clear()
            client.held_volumes._room.clear()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)
            network = ready(config)
            try:
                outcome = train(
                    network, cases, config,
                    site="bench", round_=1, learning_rate=1e-4, device=GPU,
                )  # fmt: skip
                needed = client.thrift._needed.get(config.fingerprint(), client.thrift.Thrift.NONE)
                text = f"{needed.name}, loss {outcome.loss:.4f}, {outcome.seconds:.1f} s"
            except client.thrift.GpuTooSmall as error:
                text = f"GpuTooSmall: {error}"
            found["ended with"][f"{gigabytes} GB"] = text
            print(f"{gigabytes} GB: {text}", flush=True)
    torch.cuda.set_per_process_memory_fraction(1.0)
    return found


def every_network() -> dict[str, Any]:
    found = {}
    for name in ("residual_unet", "attention_unet", "unetplusplus", "segresnet", "segresnet_vae"):
        for norm in ("instance", "group") if name == "residual_unet" else ("instance",):
            channels = (16, 32, 64, 128) if name.startswith("segres") else (8, 16, 32, 64, 128)
            config = configured(name, channels, 64, f"network.norm={norm}")
            images = torch.randn(2, 4, 64, 64, 64, device=GPU)
            labels = torch.randint(0, 4, (2, 64, 64, 64), device=GPU, dtype=torch.uint8)
            results = []
            for compiled in (False, True):
                network = ready(config).train()
                torch.manual_seed(0)
                begin = time.monotonic()
                forward = _forward(config.loss, torch.bfloat16, GPU, compiled)
                loss, auxiliary = forward(network, images, labels)
                (loss if auxiliary is None else loss + auxiliary).backward()
                gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
                results.append((float(loss), gradient, time.monotonic() - begin))
            (eager, a, _), (compiled_loss, b, seconds) = results
            cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
            text = f"{eager:.5f} {compiled_loss:.5f}, cosine of gradients {cosine:.4f}, {seconds:.0f} s"
            found[f"{name}, {norm}"] = text
            print(f"{name}, {norm}: {text}", flush=True)
    return {"title": "every network, eager and compiled", **found}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", default="step,round,memory,networks")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--subjects", type=int, default=16)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here: nothing is measured.")
    torch.backends.cudnn.benchmark = True
    what, found = chosen.only.split(","), []
    if "step" in what:
        peak = gemm_peak()
        found += [steps(title, chosen.side, chosen.repeats, peak) for title in NETWORKS]
    if "round" in what:
        assert forward_of(configured(*NETWORKS["unet 16..256"], chosen.side), GPU, 10**6)
        found += rounds(chosen.side, chosen.repeats, chosen.subjects)
    if "memory" in what:
        found.append(too_little_memory(chosen.side))
    if "networks" in what:
        found.append(every_network())
    write_json(chosen.json, found)


if __name__ == "__main__":
    main()
