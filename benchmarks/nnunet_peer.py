"""nnU-Net's own trainer as a process that takes steps when told: the peer of `nnunet_step.py`.

Run by a Python that has nnunetv2, which is no dependency of ours, and so without any of our modules.
Takes one line of words on standard input, gives one line of JSON on standard output; what nnU-Net
prints goes to standard error. `about FILE` writes initial weights and the logits of the batch there,
`step fp32` and `step bf16` take one step, `augment N` prepares N batches, in one thread.

The trainer is nnunetv2's nnUNetTrainer on the CPU, initialised by its own `initialize` from plans of
its own format. bf16 is forced by autocast at the very place where its `train_step` has it on a GPU.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

NAME = "Dataset999_Bench"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    side, batch, threads, *channels = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = made(Path(folder), side, batch, channels)
        data = random_batch(trainer, side, batch)
        for line in sys.stdin:
            command, argument = line.split()
            answer = {"about": about, "step": step, "augment": augment}[command](
                trainer, data, argument
            )
            answers.write(json.dumps(answer) + "\n")


def made(folder: Path, side: int, batch: int, channels: list[int]) -> Any:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(folder / name)
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    plans, dataset = plans_for(side, batch, channels)
    prepared = folder / "nnUNet_preprocessed" / NAME / "bench"
    prepared.mkdir(parents=True)
    (prepared / "case.b2nd").touch()  # tells which loader; no data are read
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, dataset, torch.device("cpu"))
    trainer.initialize()
    trainer.network.train()
    trainer.computed_in = []
    trainer.network.register_forward_hook(
        lambda module, given, outputs: trainer.computed_in.append(str(outputs[0].dtype))
    )
    return trainer


def plans_for(side: int, batch: int, channels: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """As nnU-Net's planner writes them, but for the patch and the features."""
    levels = len(channels)
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": levels,
            "features_per_stage": channels,
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * levels,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (levels - 1),
            "n_conv_per_stage": [2] * levels,
            "n_conv_per_stage_decoder": [2] * (levels - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "data_identifier": "bench",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch,
        "patch_size": [side] * 3,
        "median_image_size_in_voxels": [140.0, 171.0, 137.0],
        "spacing": [1.0] * 3,
        "normalization_schemes": ["ZScoreNormalization"] * 4,
        "use_mask_for_norm": [True] * 4,  # of images that are mostly background
        "architecture": architecture,
        "batch_dice": False,
    }
    plans = {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "continue_training": False,
        "configurations": {"3d_fullres": configuration},
    }
    dataset = {
        "channel_names": {str(i): name for i, name in enumerate(("t1", "t1ce", "t2", "flair"))},
        "labels": {"background": 0, "NCR": 1, "ED": 2, "ET": 3},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    return plans, dataset


def random_batch(trainer: Any, side: int, batch: int) -> dict[str, Any]:
    """As its loader gives them: float32, and int16 targets for each of its outputs."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 4, side, side, side, generator=generator)
    labels = torch.randint(0, 4, (batch, side, side, side), generator=generator)
    labels = labels[:, None].to(torch.int16)
    scales = trainer._get_deep_supervision_scales()
    factors = [round(1 / scale[0]) for scale in scales]
    return {"data": images, "target": [labels[..., ::f, ::f, ::f].contiguous() for f in factors]}


def about(trainer: Any, data: dict[str, Any], file: str) -> dict[str, Any]:
    network = trainer.network
    with torch.no_grad():
        logits = network(data["data"])[0]
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    torch.save({"weights": weights, "logits": logits}, file)
    used = [bool(weight) for weight in trainer.loss.weight_factors]
    with FlopCounterMode(display=False) as counter:
        outputs = copy.deepcopy(network).to("meta")(data["data"].to("meta"))
        # its coarsest output has no weight in the loss
        sum(out.sum() for out, is_used in zip(outputs, used, strict=True) if is_used).backward()
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "flops": counter.get_total_flops(),
        "outputs": [list(output.shape) for output in outputs],
        "weights of the outputs": [float(weight) for weight in trainer.loss.weight_factors],
        "network": type(network).__name__,
        "optimiser": type(trainer.optimizer).__name__,
        "loss": type(trainer.loss.loss).__name__,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("nnunetv2", "torch")},
    }


def step(trainer: Any, data: dict[str, Any], dtype: str) -> dict[str, Any]:
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module

    if not hasattr(module, "shipped_context"):
        module.shipped_context = module.dummy_context
    module.dummy_context = {
        "fp32": module.shipped_context,
        "bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }[dtype]
    cpu = time.process_time()
    loss = trainer.train_step(data)["loss"]
    cpu = time.process_time() - cpu
    return {"cpu": cpu, "loss": float(loss), "dtype": trainer.computed_in[-1]}


def augment(trainer: Any, data: dict[str, Any], count: str) -> dict[str, float]:
    """Its random transforms alone, one thread as its loaders have them, from larger random patches."""
    patch = trainer.configuration_manager.patch_size
    found = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    rotation, dummy_2d, initial, mirrored = found
    chain = trainer.get_training_transforms(
        patch,
        rotation,
        trainer._get_deep_supervision_scales(),
        mirrored,
        dummy_2d,
        use_mask_for_norm=trainer.configuration_manager.use_mask_for_norm,
        foreground_labels=trainer.label_manager.foreground_labels,
    )
    size = [int(n) for n in initial]
    images = [torch.randn(4, *size) for _ in data["data"]]
    labels = [torch.randint(0, 4, (1, *size), dtype=torch.int16) for _ in data["data"]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        for _ in range(int(count)):
            for image, label in zip(images, labels, strict=True):
                chain(image=image.clone(), segmentation=label.clone())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    torch.set_num_threads(threads)
    return {"wall": wall / int(count), "cpu": cpu / int(count)}


if __name__ == "__main__":
    main()
