"""What one training step holds for the backward pass: how much GPU memory a preset needs.

    python benchmarks/training_memory.py [--preset default] [--set key=value ...]

Counts the distinct storages that autograd saves in one forward pass and loss at the preset's
training size and batch, in bf16, on the CPU; adds weights, gradients and Adam's two moments in
fp32. An estimate of a GPU's need without a GPU: cuDNN's workspaces and the allocator's slack come on
top (allow a third more).
"""

from __future__ import annotations

import argparse

import torch

from common.config_file import load_config
from common.loss import dice_focal_loss
from common.model import network_for
from common.network import parameter_count, segment
from common.precision import autocast


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--preset", default="default")
    options.add_argument("--set", action="append", default=[], dest="assign")
    chosen = options.parse_args()
    config = load_config(preset=chosen.preset, assign=chosen.assign)
    whole = config.preprocess.mode == "resample"
    size = config.preprocess.shape if whole else config.training.patch
    network = network_for(config).to(memory_format=torch.channels_last_3d)
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    shape = (config.training.batch_size, len(config.modalities), *size)
    images = torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)
    labels = torch.randint(0, 4, (shape[0], *size), dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with autocast("cpu", torch.bfloat16):
            logits, _ = segment(network, images)
        dice_focal_loss(logits, labels, **config.loss.model_dump())
    parameters = parameter_count(network)
    gib = 2**30
    activations, state = sum(held.values()) / gib, parameters * 4 * 4 / gib
    print(f"{config.network.name} {config.network.channels}, batch {shape[0]} of {size}")
    print(f"parameters                 {parameters / 1e6:8.2f} M")
    print(f"saved for backward         {activations:8.2f} GiB")
    print(f"weights, gradients, Adam   {state:8.2f} GiB")
    print(f"together                   {activations + state:8.2f} GiB")


if __name__ == "__main__":
    main()
