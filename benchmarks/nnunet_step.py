"""A training step on a CPU against a step of nnU-Net v2's own trainer.

    python3 -m venv /tmp/nnunet
    /tmp/nnunet/bin/pip install -c constraints.txt nnunetv2==2.8.1 torch==2.13.0
    python benchmarks/nnunet_step.py --nnunet /tmp/nnunet/bin/python [--quick] [--repeats N]
                                     [--threads N] [--json FILE]

Two patches of 4 x 64^3 (48^3 with --quick), features 16..256, the same random voxels on both sides, in
memory; one optimiser step, both without compiling, which nnU-Net does not do on a CPU. nnU-Net's is
`nnUNetTrainer.train_step` with the network, deep supervision, loss and optimiser that its `initialize`
makes (`nnunet_peer.py`), in a process of its own that waits between its turns. As shipped it computes
in fp32 on CPUs; the second table has autocast to bf16 forced where it has autocast on GPUs. Ours is
what `client.training` does for each batch but its augmentation, for which both are timed beside.

dynunet is MONAI's form of nnU-Net's network. With nnU-Net's initial weights its logits are asserted to be
nnU-Net's, and its FLOPs to be within 2 %. What differs: nnU-Net has biases before its norms, which do
nothing but are computed, and three more outputs, of which two count, each with Dice + cross-entropy,
and SGD; ours has one output with Dice + focal loss, and Adam. `unet` is the default, another network.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleaved import Timings, interleaved, options, report, write_json
from torch.utils.flop_counter import FlopCounterMode

from client.forward import forward_of
from client.samples import augmented
from common.config import FederationConfig
from common.config_file import load_config
from common.model import network_for
from common.network import parameter_count
from common.precision import autocast_dtype

BATCH, CHANNELS, AUGMENTED = 2, (16, 32, 64, 128, 256), 20
CPU = torch.device("cpu")
SHIPPED, FORCED = "nnU-Net as shipped, fp32", "nnU-Net, bf16 forced"
DYNUNET, UNET, FP32 = "fedbrats, dynunet", "fedbrats, unet", "fedbrats, dynunet, fp32"


class Peer:
    """nnU-Net's trainer in its own process."""

    def __init__(self, python: Path, side: int, threads: int, folder: Path) -> None:
        self.said = folder / "stderr.txt"
        self.seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
        numbers = map(str, (side, BATCH, threads, *CHANNELS))
        script = Path(__file__).with_name("nnunet_peer.py")
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [str(python), str(script), *numbers],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SystemExit(f"nnU-Net's process ended:\n{self.said.read_text()[-3000:]}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def step(self, dtype: str) -> None:
        answer = self.ask(f"step {dtype}")
        assert math.isfinite(answer["loss"]), answer
        assert answer["dtype"] == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtype], answer
        self.seconds[dtype].append(answer["cpu"])

    def timed(self, dtype: str, measured: Timings) -> Timings:
        """With the CPU seconds of that process in place of this one's."""
        return Timings(measured.wall, self.seconds[dtype][-len(measured.wall) :])

    def end(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def main() -> None:
    chosen = chosen_options()
    torch.set_num_threads(chosen.threads)
    # not 32, where the lowest of five levels has two voxels and bf16 is wrong (common.precision)
    side = 48 if chosen.quick else 64
    configs = {
        DYNUNET: configured("dynunet", "auto", side),
        UNET: configured("unet", "auto", side),
        FP32: configured("dynunet", "fp32", side),
    }
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(chosen.nnunet, side, chosen.threads, Path(folder))
        try:
            found = measured(peer, configs, side, chosen.repeats, Path(folder) / "initial.pt")
        finally:
            peer.end()
    write_json(chosen.json, found)


def chosen_options() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nnunet", type=Path, help="a Python with nnunetv2 2.8.1 and torch 2.13")
    chosen = parser.parse_args()
    if chosen.nnunet is None or not chosen.nnunet.is_file():
        raise SystemExit("--nnunet must be a Python that has nnunetv2; how to make one: --help.")
    return chosen


def configured(name: str, precision: str, side: int) -> FederationConfig:
    return load_config(
        preset="default",
        assign=[
            f"network.name={name}",
            f"network.channels={list(CHANNELS)}",
            f"training.patch=[{side},{side},{side}]",
            f"training.precision={precision}",
        ],
    )


def measured(
    peer: Peer, configs: dict[str, FederationConfig], side: int, repeats: int, file: Path
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 4, side, side, side, generator=generator)
    labels = torch.randint(0, 4, (BATCH, side, side, side), generator=generator)
    about = peer.ask(f"about {file}")
    initial = torch.load(file, weights_only=True)
    networks = {name: network_for(config) for name, config in configs.items()}
    for name in (DYNUNET, FP32):
        networks[name].load_state_dict(renamed(initial["weights"]))
    facts: dict[str, Any] = {"largest difference of the logits": alike(networks[FP32], initial)}
    facts |= described(peer, about, networks, side)
    ways: dict[str, Callable[[], object]] = {
        SHIPPED: lambda: peer.step("fp32"),
        FORCED: lambda: peer.step("bf16"),
    }
    for name, config in configs.items():
        ways[name] = our_step(config, networks[name], images, labels.byte())
    timings = interleaved(ways, repeats=repeats)
    for name, dtype in ((SHIPPED, "fp32"), (FORCED, "bf16")):
        timings[name] = peer.timed(dtype, timings[name])
    facts |= augmentation(peer, configs[UNET], images, labels.byte())
    size = f"a step of {BATCH} x 4 x {side}^3, features {CHANNELS[0]}..{CHANNELS[-1]}"
    own = f"{size}, nnU-Net {about['versions']['nnunetv2']}'s trainer as shipped"
    found = report(own, timings, peer=SHIPPED, reach={DYNUNET: 2.0}, facts=facts)
    if autocast_dtype("auto", CPU) is not torch.bfloat16:
        print("this CPU has no bf16, so ours was fp32, too: no second table.")
        return [found]
    del timings[SHIPPED], timings[FP32]
    equal = f"{size}, nnU-Net's dtype made ours"
    return [found, report(equal, timings, peer=FORCED, reach={DYNUNET: 1.0})]


def alike(network: torch.nn.Module, initial: dict[str, Any]) -> str:
    """Assert that MONAI's network with nnU-Net's weights is nnU-Net's at full resolution."""
    theirs = initial["logits"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 4, *theirs.shape[2:], generator=generator)
    with torch.no_grad():
        ours = network.train()(images)
    difference, scale = float((ours - theirs).abs().max()), float(theirs.std())
    assert difference < 1e-3 * scale, (difference, scale)
    return (
        f"{difference:.1e}, of a standard deviation of {scale:.1e}; dynunet with nnU-Net's weights"
    )


def renamed(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """nnU-Net's weights under our dynunet's names; what has no place must be of no effect."""
    levels, left = len(CHANNELS), dict(theirs)
    found: dict[str, torch.Tensor] = {}

    def block(source: str, target: str) -> None:
        for number in (0, 1):
            layer = f"{source}.convs.{number}"
            found[f"{target}.conv{number + 1}.conv.weight"] = left.pop(f"{layer}.conv.weight")
            for part in ("weight", "bias"):
                found[f"{target}.norm{number + 1}.{part}"] = left.pop(f"{layer}.norm.{part}")

    for level in range(levels):
        inner = "skip_layers" + ".next_layer" * level
        bottom = level == levels - 1
        block(f"encoder.stages.{level}.0", inner if bottom else f"{inner}.downsample")
        if not bottom:
            stage = levels - 2 - level
            block(f"decoder.stages.{stage}", f"{inner}.upsample.conv_block")
            found[f"{inner}.upsample.transp_conv.conv.weight"] = left.pop(
                f"decoder.transpconvs.{stage}.weight"
            )
    for part in ("weight", "bias"):
        found[f"output_block.conv.conv.{part}"] = left.pop(
            f"decoder.seg_layers.{levels - 2}.{part}"
        )
    for name, tensor in left.items():
        without = name.endswith(".bias") and not tensor.any()
        assert without or name.startswith("decoder.seg_layers."), name
    return found


def described(
    peer: Peer, about: dict[str, Any], networks: dict[str, torch.nn.Module], side: int
) -> dict[str, Any]:
    work = {name: flops(network, side) for name, network in networks.items() if name != FP32}
    assert abs(work[DYNUNET] / about["flops"] - 1) < 0.02, (work, about["flops"])
    assert about["threads"] == torch.get_num_threads()
    assert about["versions"]["torch"] == torch.__version__, "not the same torch on both sides"
    facts: dict[str, Any] = {
        "threads": about["threads"],
        "nnU-Net": f"{about['network']}, {about['loss']} of outputs "
        f"{[shape[-1] for shape in about['outputs']]} weighted "
        f"{[round(w, 3) for w in about['weights of the outputs']]}, {about['optimiser']}",
        "ours": "one output, Dice + focal loss, Adam",
    }
    facts["GFLOP of a step"] = f"nnU-Net {about['flops'] / 1e9:.1f}, " + ", ".join(
        f"{name} {value / 1e9:.1f}" for name, value in work.items()
    )
    facts["parameters"] = f"nnU-Net {about['parameters']}, " + ", ".join(
        f"{name} {parameter_count(networks[name])}" for name in work
    )
    return facts


def flops(network: torch.nn.Module, side: int) -> float:
    empty = torch.empty(BATCH, 4, side, side, side, device="meta")
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(network).to("meta")(empty).sum().backward()
    return float(counter.get_total_flops())


def our_step(
    config: FederationConfig, network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], None]:
    """What `client.training` does with a batch, on the network as `client.app` makes it."""
    network.to(memory_format=torch.channels_last_3d).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=config.training.learning_rate)
    forward, clip = forward_of(config, CPU), config.training.gradient_clip
    assert clip == 12.0  # nnU-Net's, too

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss, _ = forward(network, images, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimiser.step()
        assert math.isfinite(float(loss.detach()))

    return step


def augmentation(
    peer: Peer, config: FederationConfig, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, str]:
    """Not a part of the step: other transforms with other probabilities, each side's own."""
    theirs = peer.ask(f"augment {AUGMENTED}")
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(AUGMENTED):
        augmented(images, labels, config.training, generator)
    ours = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    torch.set_num_threads(threads)
    return {
        f"augmenting a batch, each its own way, mean of {AUGMENTED}, 1 thread": ", ".join(
            f"{name} {1000 * seconds['wall'] / n:.0f} ms (CPU {1000 * seconds['cpu'] / n:.0f})"
            for name, seconds, n in (("nnU-Net", theirs, 1), ("fedbrats", ours, AUGMENTED))
        )
    }


if __name__ == "__main__":
    main()
