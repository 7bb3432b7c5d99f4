"""The federation's configuration: one `federation.yaml`, validated by pydantic.

Every key has a default; a preset is a named set of other defaults that the file's own keys override.
Unknown keys are refused with the nearest valid name. Covers what all sites must agree on, plus the
`split` section that only a simulation reads. A hospital's own settings (data folder, device, policy)
are not here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from common.brats import MODALITIES

Grid = tuple[PositiveInt, PositiveInt, PositiveInt]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class ConfigError(ValueError):
    """The configuration cannot be used; the text says which key, what was found and what to write."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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
        10, description="rounds without a better validation loss before the rate is lowered"
    )
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    stop_patience: PositiveInt | None = Field(
        None, description="rounds without a better validation loss before training ends early"
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
        return self


class FederationConfig(Section):
    """Everything the sites of one federation agree on."""

    name: str = Field("brats", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    preset: Literal["quick", "default", "reference"] = "default"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    modalities: tuple[str, ...] = MODALITIES
    label_coding: Literal["auto", "brats", "brats2023", "brats2013", "msd"] = "auto"
    on_bad_subject: Literal["refuse", "skip"] = "refuse"
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    split: Split = Split()
    preprocess: Preprocess = Preprocess()
    network: Network = Network()
    loss: Loss = Loss()
    training: Training = Training()
    rounds: Rounds = Rounds()

    @field_validator("modalities")
    @classmethod
    def _known_modalities(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [m for m in value if m not in MODALITIES]
        if unknown or not value or len(set(value)) != len(value):
            raise ValueError(f"must be one or more of {', '.join(MODALITIES)}, each once")
        return tuple(m for m in MODALITIES if m in value)  # the channel order is fixed

    def fingerprint(self) -> str:
        """sha256 (hex) of every agreed value, so that two parties can tell they agree."""
        agreed = self.model_dump(mode="json", exclude={"split"})
        return hashlib.sha256(json.dumps(agreed, sort_keys=True).encode()).hexdigest()


PRESETS: dict[str, dict[str, Any]] = {
    # the demo: minutes on two CPU cores, small phantoms
    "quick": {
        "held_out_fraction": 0.3,
        "preprocess": {"mode": "resample", "shape": (48, 48, 48)},
        "network": {"channels": (8, 16, 32, 64, 128)},
        "training": {"learning_rate": 2e-3, "augment": {"elastic_probability": 0.0}},
        "rounds": {"number": 10},
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
}


def load_config(
    path: Path | None = None, *, preset: str | None = None, assign: Sequence[str] = ()
) -> FederationConfig:
    """Read `federation.yaml`, over the defaults of its preset.

    Args:
        path: the file, or None for the preset alone.
        preset: overrides the file's `preset`.
        assign: further `section.key=value` texts, the value in YAML; they override the file.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is not valid.
    """
    source = str(path) if path else "the command line"
    given: dict[str, Any] = {}
    if path is not None:
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: is not valid YAML: {_first_line(error)}") from error
        if not isinstance(given, dict):
            raise ConfigError(
                f"{path}: must hold `key: value` lines, found a {type(given).__name__}."
            )
    for text in assign:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{text!r}: write section.key=value, for example training.epochs=2")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{text!r}: the value is not valid YAML.") from error
        leaf: dict[str, Any] = {}
        nested = leaf
        *sections, last = key.split(".")
        for section in sections:
            nested = nested.setdefault(section, {})
        nested[last] = parsed
        given = _merged(given, leaf)
    if preset is not None:
        given["preset"] = preset
    chosen = given.get("preset", "default")
    if chosen not in PRESETS:
        raise ConfigError(f"{source}: preset {chosen!r} is not one of {', '.join(PRESETS)}.")
    config = _validated(_merged(PRESETS[chosen], given), source)
    if path is not None and config.split.file is not None and not config.split.file.is_absolute():
        beside = {"split": {"file": path.parent / config.split.file}}  # relative to the file itself
        config = _validated(_merged(PRESETS[chosen], _merged(given, beside)), source)
    return config


def dump_config(config: FederationConfig) -> str:
    """The whole configuration as YAML; `load_config` of it gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _validated(values: Mapping[str, Any], source: str) -> FederationConfig:
    try:
        return FederationConfig.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors(include_url=False)]
        raise ConfigError(
            "\n".join(f"{source}: {line}" for line in dict.fromkeys(lines))
        ) from error


def _explain(problem: Mapping[str, Any]) -> str:
    location = [part for part in problem["loc"] if isinstance(part, str)]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        names = _field_names(location[:-1])
        near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"valid here: {', '.join(names)}."
        return f"`{key}` is not a known key; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"`{key or 'file'}`: {message} (found {problem['input']!r})"


def _field_names(location: Sequence[str]) -> list[str]:
    model: type[BaseModel] = FederationConfig
    for part in location:
        field = model.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type):
            return []
        model = field.annotation
    return list(model.model_fields) if issubclass(model, BaseModel) else []


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            result[key] = _merged(below, value)
        else:
            result[key] = value
    return result


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
