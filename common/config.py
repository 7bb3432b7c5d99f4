"""The federation's configuration: what all sites must agree on, as a schema with presets.

Every key has a default; a preset is a named set of other defaults that the file's own keys override
(`common.config_file` reads it). The `split` section is read by a simulation only, the `server`
section by the coordinator only; neither is part of what the sites agree on. A hospital's own
settings (data folder, device, policy) are not here.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from common.brats import MODALITIES

Grid = tuple[PositiveInt, PositiveInt, PositiveInt]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Preprocess(Section):
    """How a scan becomes the network's input. Hashed into the cache key."""

    mode: Literal["patches", "resample"] = Field(
        "patches", description="patches: keep 1 mm and train on patches; resample: one fixed grid"
    )
    shape: Grid = Field((128, 128, 128), description="the fixed grid of `resample`, in voxels")
    normalise: Literal["zscore", "minmax"] = Field(
        "zscore", description="per volume: z-score over brain voxels, or min-max to 0..1"
    )


class Network(Section):
    """The shared network, one of MONAI's."""

    name: Literal[
        "unet",
        "residual_unet",
        "attention_unet",
        "unetplusplus",
        "dynunet",
        "segresnet",
        "segresnet_vae",
    ] = "unet"
    norm: Literal["batch", "instance", "group"] = "instance"
    channels: tuple[PositiveInt, ...] = Field(
        (16, 32, 64, 128, 256), description="feature maps per resolution level, finest first"
    )


class Loss(Section):
    """Dice + focal_weight x softmax focal (`common.loss`)."""

    focal_weight: NonNegative = 1.0
    gamma: NonNegative = 2.0
    alpha: PositiveFloat | tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (
        Field(0.25, description="one factor for all classes, or one per class")
    )
    include_background: bool = True

    @field_validator("gamma")
    @classmethod
    def _differentiable(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError(
                "must be 0, or at least 1: in between the gradient has no finite limit"
            )
        return value


class Augment(Section):
    """Random changes of each training subject; 0 or false switches one off (`sites.augment`)."""

    flip: bool = True
    affine_probability: Fraction = 0.3
    rotation_degrees: NonNegative = 15.0
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.1
    elastic_probability: Fraction = 0.15
    elastic_voxels: NonNegative = 3.0
    intensity_scale: Annotated[float, Field(ge=0, lt=1)] = 0.1
    intensity_shift: NonNegative = 0.1
    noise: NonNegative = 0.05


class Training(Section):
    """What each site does with the shared network in one round."""

    epochs: PositiveInt = Field(1, description="passes over the site's training subjects a round")
    batch_size: PositiveInt = 2
    patch: Grid = Field((128, 128, 128), description="training patch, voxels (mode: patches)")
    patches_per_subject: PositiveInt = Field(1, description="per epoch (mode: patches)")
    learning_rate: PositiveFloat = 1e-4
    gradient_clip: PositiveFloat | None = Field(12.0, description="largest gradient norm")
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    threads: PositiveInt | None = Field(
        None,
        description="CPU threads; same number, same result to the last bit. Default: all cores",
    )
    augment: Augment = Augment()


class Rounds(Section):
    """How long the federation trains and when the server changes or ends it."""

    number: PositiveInt = 50
    min_sites: PositiveInt | None = Field(
        None, description="good replies a round needs; default: every training site"
    )
    plateau_patience: PositiveInt | None = Field(
        10, description="rounds without a better validation loss that leave the rate as it is"
    )
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    stop_patience: PositiveInt | None = Field(
        None, description="rounds without a better validation loss before training ends early"
    )
    max_change: PositiveFloat = Field(
        100.0,
        description="largest norm of a site's change that is averaged, in norms of the round's model",
    )
    outlier_factor: Annotated[float, Field(gt=1)] | None = Field(
        10.0,
        description="largest norm of a site's change, in medians of the round's changes (larger for "
        "a site with more subjects than the median, in proportion); not compared if null, or with "
        "secure_aggregation",
    )
    aggregation: Literal["fedavg", "trimmed_mean", "median", "krum"] = Field(
        "fedavg",
        description="how updates become one model; all but fedavg withstand some bad sites, and "
        "count every site once (docs/robustness.md)",
    )
    trim: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.2, description="of each value, the share left out at either end (trimmed_mean)"
    )
    bad_sites: Annotated[int, Field(ge=0)] = Field(
        1, description="how many sites may be bad (krum); a round needs twice as many and 3 more"
    )
    deadline_minutes: PositiveFloat = Field(
        720.0, description="longest that a site may take to train, or to evaluate, in one round"
    )
    updates: Literal["fp16", "fp32"] = Field(
        "fp16",
        description="how a site's update travels: fp16 change since the round's model, or fp32",
    )
    average_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="measure and keep an exponential moving average of the rounds' models (0: off)",
    )

    @field_validator("trim")
    @classmethod
    def _cuts_something(cls, value: float) -> float:
        if 0 < value < 0.01:
            raise ValueError("must be 0, or at least 0.01: less leaves nothing out of 100 sites")
        return value


class Privacy(Section):
    """How a site trains that asks for differential privacy; its budget is its own (site.yaml)."""

    epsilon: PositiveFloat | None = Field(
        None,
        description="most that a site may spend here of its own budget; in a simulation, every "
        "site's budget. null: no limit but the site's; in a simulation, no privacy",
    )
    expected_batch: Annotated[float, Field(ge=1)] | None = Field(
        None, description="patients of a step on average; null: all of them in every step"
    )
    steps: Annotated[int, Field(ge=1, le=10_000)] = Field(1, description="noisy steps a round")
    crops: Annotated[int, Field(ge=1, le=100)] = Field(
        1, description="augmented crops of each of a patient's scans, averaged before clipping"
    )
    clip: Annotated[float, Field(ge=1e-6)] = Field(
        1.0, description="largest norm of one patient's gradient, unless a site chooses another"
    )
    optimiser: Literal["sgd", "adam"] = "sgd"
    learning_rate: PositiveFloat = Field(
        0.1, description="in place of training.learning_rate, and lowered with it"
    )


class Split(Section):
    """Simulation only: which subject belongs to which site."""

    by: Literal["institution", "name_mapping", "csv", "folders", "iid", "fets-23", "fets-33"] = (
        "institution"
    )
    file: Path | None = Field(None, description="the csv of `csv` or `name_mapping`")
    parts: PositiveInt | None = Field(None, description="number of equal sites of `iid`")
    merge_hospitals: bool = Field(False, description="one site per hospital instead of per code")
    hold_out: tuple[str, ...] = Field(
        (), description="sites that never train and are evaluated on all their subjects"
    )
    min_subjects: PositiveInt = Field(
        1, description="smaller sites do not train and are evaluated on all their subjects"
    )

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Split:
        if self.by == "csv" and self.file is None:
            raise ValueError("`by: csv` needs `file:`, a csv with Partition_ID and Subject_ID")
        if self.by == "iid" and self.parts is None:
            raise ValueError("`by: iid` needs `parts:`, the number of equal sites")
        if self.merge_hospitals and self.by != "institution":
            raise ValueError("`merge_hospitals` goes with `by: institution` only")
        return self


class Server(Section):
    """The coordinator's own affair, no part of what sites agree to: where and how long it waits."""

    address: str = Field(
        "localhost",
        pattern=r"^[A-Za-z0-9.:_-]+$",
        description="the name or IP address at which hospitals reach this server",
    )
    port: Annotated[int, Field(ge=1, le=65535)] = 8443
    listen: str = Field("0.0.0.0", description="the local address to listen on")
    wait_minutes: PositiveFloat = Field(
        60.0, description="longest wait for the sites that a round needs"
    )
    gather_minutes: NonNegative = Field(
        1.0, description="at the start, how long to wait for further sites once enough are there"
    )
    return_minutes: PositiveFloat = Field(
        5.0, description="how long a site that vanished in mid-round may take to come back"
    )
    attempts: PositiveInt = Field(
        3, description="how often a round with too few good replies is tried"
    )
    init_from: Path | None = Field(
        None,
        description="weights to begin with (model.safetensors of a run on public or synthetic "
        "data, same network); read in a simulation too",
    )


class FederationConfig(Section):
    """Everything the sites of one federation agree on."""

    name: str = Field("brats", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    preset: Literal["quick", "default", "reference", "private"] = Field(
        "default", description="whose defaults the keys left out of this file take"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        1, description="same seed: same split, same initial weights and, on CPU, same metrics"
    )
    modalities: tuple[str, ...] = MODALITIES
    label_coding: Literal["auto", "brats", "brats2023", "brats2013", "msd"] = Field(
        "auto", description="auto tells BraTS 2017-2021 (ET 4) from 2023 (ET 3); declare the others"
    )
    on_bad_subject: Literal["refuse", "skip"] = Field(
        "refuse", description="an unusable subject stops the run, or is left out and reported"
    )
    secure_aggregation: bool = Field(
        False,
        description="the server learns the sum of all updates only, never one site's; needs 3 sites "
        "(docs/security.md)",
    )
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="of each site's subjects, by a seeded hash of their ids; never trained on"
    )
    split: Split = Split()
    server: Server = Server()
    preprocess: Preprocess = Preprocess()
    network: Network = Network()
    loss: Loss = Loss()
    training: Training = Training()
    rounds: Rounds = Rounds()
    privacy: Privacy = Privacy()

    @field_validator("modalities")
    @classmethod
    def _known_modalities(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [m for m in value if m not in MODALITIES]
        if unknown or not value or len(set(value)) != len(value):
            raise ValueError(f"must be one or more of {', '.join(MODALITIES)}, each once")
        return tuple(m for m in MODALITIES if m in value)  # the channel order is fixed

    @model_validator(mode="after")
    def _sums_only(self) -> FederationConfig:
        if self.secure_aggregation and self.rounds.aggregation != "fedavg":
            raise ValueError(
                f"`rounds.aggregation: {self.rounds.aggregation}` compares the sites' updates, which "
                "`secure_aggregation` hides from the server: set one of the two back "
                "(docs/security.md)"
            )
        return self

    def fingerprint(self) -> str:
        """sha256 (hex) of every agreed value, so that two parties can tell they agree."""
        return hashlib.sha256(json.dumps(self.agreed(), sort_keys=True).encode()).hexdigest()

    def agreed(self) -> dict[str, Any]:
        """What the sites agree on, as plain JSON types: all but `split` and `server`."""
        return self.model_dump(mode="json", exclude={"split", "server"})


PRESETS: dict[str, dict[str, Any]] = {
    # the demo: minutes on two CPU cores, small phantoms
    "quick": {
        "held_out_fraction": 0.3,
        "preprocess": {"mode": "resample", "shape": (48, 48, 48)},
        "network": {"name": "residual_unet", "channels": (16, 32, 64, 128)},
        "training": {
            "epochs": 3,
            "learning_rate": 5e-3,
            "augment": {"affine_probability": 0.15, "elastic_probability": 0.0},
        },
        "rounds": {"number": 10, "plateau_patience": 1},
    },
    # recommended: native 1 mm, patches, instance norm
    "default": {},
    # as published: whole volume at 128^3, min-max, batch norm, ten rounds of one epoch
    "reference": {
        "preprocess": {"mode": "resample", "normalise": "minmax"},
        "network": {"norm": "batch"},
        "training": {
            "gradient_clip": None,
            "augment": {"affine_probability": 0.5},
        },
        "rounds": {"number": 10, "plateau_patience": None},
    },
    # differential privacy at hospitals with tens of patients: a small network without running
    # statistics, every patient in every step, few rounds
    "private": {
        "preprocess": {"mode": "resample", "shape": (64, 64, 64)},
        "network": {"name": "residual_unet", "norm": "group", "channels": (8, 16, 32)},
        "training": {
            "learning_rate": 5e-3,
            "augment": {"affine_probability": 0.15, "elastic_probability": 0.0},
        },
        "rounds": {"number": 20, "plateau_patience": None},
        "privacy": {"crops": 2, "clip": 0.5, "learning_rate": 0.5},
    },
}
