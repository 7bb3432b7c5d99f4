"""One training step on the CPU beside stock MONAI in fp32, and how near it is to this machine's limit.

    python benchmarks/training_step.py [--repeats 5] [--threads 2] [--json FILE] [--quick]

A step: forward, loss, backward, gradient clipping, Adam, on two subjects of four modalities already
in memory; 64^3 and 128^3 (`--quick`: 32^3 and 48^3). Peer: MONAI's BasicUNet (16..256, instance norm)
in fp32, DiceLoss + softmax FocalLoss. Ours: the same weights through `client.forward` and the rest of
`client.training`'s loop, with the precision "auto" chooses and, to see where the gain is from, in
fp32. Losses of the first step are compared, and in fp32 the gradients. The limit is the rate of a
4096^3 matrix product (`--quick`: 2048^3) in fp32 and bf16, in the same run; FLOPs by torch's counter.
"""

from __future__ import annotations

from typing import Any

import torch
from interleaved import interleaved, options, report, spread, write_json
from stock_monai import stock_loss, stock_network
from torch.utils.flop_counter import FlopCounterMode

from client.forward import forward_of
from common.config import FederationConfig
from common.config_file import load_config
from common.model import network_for
from common.precision import autocast_dtype

CPU = torch.device("cpu")
CHANNELS = (16, 32, 64, 128, 256)
BATCH = 2


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    types = [torch.float32]
    if autocast_dtype("auto", CPU) is torch.bfloat16:
        types.append(torch.bfloat16)
    side = 2048 if chosen.quick else 4096
    peaks = {dtype: gemm_peak(dtype, side) for dtype in types}
    sides = (32, 48) if chosen.quick else (64, 128)
    found = [compare(side, chosen.repeats, chosen.threads, peaks) for side in sides]
    write_json(chosen.json, found)


def gemm_peak(dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a matrix product of random numbers."""
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    return 2 * side**3 / min(interleaved({"product": lambda: a @ b})["product"].wall)


def compare(
    side: int, repeats: int, threads: int, peaks: dict[torch.dtype, float]
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 4, side, side, side, generator=generator)
    labels = torch.randint(0, 4, (BATCH, side, side, side), generator=generator)
    configs = {p: configured(side, p) for p in ("auto", "fp32")}
    peer = stock_network("unet", CHANNELS)
    peer.load_state_dict(network_for(configs["auto"]).state_dict())
    stock = _Step(peer, lambda n, x, y: stock_loss()(n(x), y), images, labels)
    ours = {p: _Step.ours(config, images, labels) for p, config in configs.items()}
    first = {"stock": stock(), "auto": ours["auto"](), "fp32": ours["fp32"]()}
    assert max(first.values()) - min(first.values()) < 3e-3, f"the first losses differ: {first}"
    exact, found = stock.gradient, ours["fp32"].gradient
    off = float((found - exact).norm() / exact.norm())
    assert off < 1e-2, f"fp32 gradients differ by {off}"
    dtype = autocast_dtype("auto", CPU) or torch.float32
    kind = str(dtype).removeprefix("torch.")
    ways = {
        "stock MONAI fp32": stock,
        f"ours ({kind})": ours["auto"],
        "ours, fp32": ours["fp32"],
    }
    measured = interleaved(ways, repeats=repeats, warm_ups=1)
    work = flops(configs["auto"], side)
    limits = dict(zip(ways, (torch.float32, dtype, torch.float32), strict=True))
    facts: dict[str, Any] = {
        f"{way}": f"{work / s / 1e9:.0f} GFLOP/s, {100 * work / s / peaks[limits[way]]:.0f} % of the "
        f"matrix product's {peaks[limits[way]] / 1e9:.0f}"
        for way, s in ((way, spread(t.wall)["median"]) for way, t in measured.items())
    }
    facts["threads"] = threads
    facts["first losses"] = {way: round(value, 5) for way, value in first.items()}
    facts["fp32 gradients, relative difference"] = off
    return report(
        f"a training step, {BATCH} x 4 x {side}^3, U-Net 16..256",
        measured,
        peer="stock MONAI fp32",
        reach={f"ours ({kind})": 2.0},
        facts=facts,
    )


class _Step:
    """A step that can be repeated; returns its loss."""

    def __init__(self, network: torch.nn.Module, loss: Any, images: Any, labels: Any) -> None:
        self.network, self.loss, self.images, self.labels = network.train(), loss, images, labels
        self.optimiser = torch.optim.Adam(network.parameters(), lr=1e-4)
        self.gradient = torch.empty(0)

    @classmethod
    def ours(cls, config: FederationConfig, images: torch.Tensor, labels: torch.Tensor) -> _Step:
        network = network_for(config).to(memory_format=torch.channels_last_3d)
        forward = forward_of(config, CPU)
        return cls(network, lambda *batch: forward(*batch)[0], images, labels.byte())

    def __call__(self) -> float:
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.loss(self.network, self.images, self.labels)
        loss.backward()
        if not self.gradient.numel():
            self.gradient = torch.cat([p.grad.flatten() for p in self.network.parameters()])
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12.0)
        self.optimiser.step()
        return float(loss.detach())


def configured(side: int, precision: str) -> FederationConfig:
    return load_config(
        preset="default",
        assign=[f"training.patch=[{side},{side},{side}]", f"training.precision={precision}"],
    )


def flops(config: FederationConfig, side: int) -> float:
    network = network_for(config).to("meta")
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(BATCH, 4, side, side, side, device="meta")).sum().backward()
    return float(counter.get_total_flops())


if __name__ == "__main__":
    main()
