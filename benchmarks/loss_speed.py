"""The training loss, forward and backward, against MONAI's DiceLoss(softmax) + FocalLoss(use_softmax).

    python benchmarks/loss_speed.py [--quick] [--threads 1] [--repeats N] [--json FILE]

The same function of the same logits, 2 x 4 x 128^3 (48^3 with --quick): values and gradients are
compared first. fp32 as MONAI's tutorials have them, and bf16 channels_last_3d, as the networks give
them here under autocast. Also the GPU where there is one, waited for in each repeat.
Memory is the most that torch had allocated at one time beyond logits, labels and what was there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from interleaved import interleaved, options, report, write_json
from monai.losses import DiceLoss, FocalLoss
from torch.profiler import ProfilerActivity, profile

from common.loss import dice_focal_loss

REACH = 2.0
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    side = 48 if chosen.quick else 128
    reports = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype, layout in (
            (torch.float32, torch.contiguous_format),
            (torch.bfloat16, torch.channels_last_3d),
        ):
            logits, labels = batch(side, device, dtype, layout)
            name = f"{str(dtype).removeprefix('torch.')}, {str(layout).removeprefix('torch.')}"
            reports.append(
                measured(
                    f"Loss, 2 x 4 x {side}^3, {name}, {device}", logits, labels, chosen.repeats
                )
            )
    write_json(chosen.json, reports)


def batch(
    side: int, device: str, dtype: torch.dtype, layout: torch.memory_format
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (2, side, side, side), generator=generator, dtype=torch.uint8)
    logits = 3 * torch.randn(2, 4, side, side, side, generator=generator)
    logits += 3 * torch.stack([labels == c for c in range(4)], dim=1)  # half trained
    return logits.to(device, dtype).contiguous(memory_format=layout), labels.to(device)


def by_monai() -> Loss:
    dice = DiceLoss(softmax=True, to_onehot_y=True)
    focal = FocalLoss(use_softmax=True, to_onehot_y=True, gamma=2.0, weight=0.25)

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores, truth = logits.float(), labels.unsqueeze(1)
        return dice(scores, truth) + focal(scores, truth)

    return loss


def measured(title: str, logits: torch.Tensor, labels: torch.Tensor, repeats: int) -> dict:
    logits.requires_grad_()
    losses: dict[str, Loss] = {
        "MONAI DiceLoss + FocalLoss": by_monai(),
        "fedbrats": dice_focal_loss,
    }

    def way(loss: Loss) -> Callable[[], None]:
        def run() -> None:
            loss(logits, labels).backward()
            if logits.is_cuda:
                torch.cuda.synchronize()

        return run

    def forget() -> None:
        logits.grad = None

    values, gradients, peaks = {}, {}, {}
    for name, loss in losses.items():
        forget()
        values[name] = loss(logits, labels)
        values[name].backward()
        gradients[name] = logits.grad.double()
        forget()
        peaks[name] = peak(way(loss), logits.is_cuda)
    (theirs, ours), (slope, found) = values.values(), gradients.values()
    difference = float((found - slope).norm() / slope.norm())
    assert abs(float(ours.detach() - theirs.detach())) < 2e-6, (ours, theirs)
    # a bf16 gradient is rounded to 3 digits, at times to the other side
    assert difference < (1e-6 if logits.dtype == torch.float32 else 1e-4), difference
    size = logits.numel() * 4 / 2**20
    facts = {
        "relative difference of the gradients": f"{difference:.1e}",
        "peak memory beyond the inputs": ", ".join(
            f"{name} {value:.0f} MiB" for name, value in peaks.items()
        )
        + f" (the logits in fp32: {size:.0f} MiB; the gradient is part of it)",
    }
    del values, gradients, theirs, ours, slope, found
    return report(
        title,
        interleaved(
            {name: way(loss) for name, loss in losses.items()}, repeats=repeats, before=forget
        ),
        peer=next(iter(losses)),
        reach={"fedbrats": REACH},
        facts=facts,
    )


def peak(run: Callable[[], None], on_gpu: bool) -> float:
    """MiB that torch had allocated at most during `run`, beyond what there was before."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    changes = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        most = max(most, now)
    return most / 2**20


if __name__ == "__main__":
    main()
