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


class FederationConfig(Section):
    """Everything the sites of one federation agree on."""

    name: str = Field("brats", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    preset: Literal["quick", "default", "reference"] = Field(
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
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="of each site's subjects, by a seeded hash of their ids; never trained on"
    )
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
        given = _anchored(_read(path), path.parent)
    for text in assign:
        given = _merged(given, _anchored(_assignment(text), Path.cwd()))
    if preset is not None:
        given["preset"] = preset
    chosen = given.get("preset", "default")
    if not isinstance(chosen, str) or chosen not in PRESETS:
        raise ConfigError(f"{source}: preset {chosen!r} is not one of {', '.join(PRESETS)}.")
    return _validated(_merged(PRESETS[chosen], given), source)


def dump_config(config: FederationConfig) -> str:
    """The whole configuration as YAML; `load_config` of it gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML as usual, but a key given twice is refused; otherwise the last would win in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key `{key.value}` is given twice",
                        problem_mark=key.start_mark,
                    )
                seen.add(key.value)
        return node


def _parse(text: str) -> Any:
    """Raises ConfigError, whose text says what is wrong and in which line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"is not valid YAML{line}: {error.problem or error.context}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 13th month
        raise ConfigError(f"is not valid YAML: {str(error).splitlines()[0]}.") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        given = _parse(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file in UTF-8.") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: must hold `key: value` lines, found a {type(given).__name__}.")
    return given


def _assignment(text: str) -> dict[str, Any]:
    """`section.key=value` as nested dicts."""
    key, equals, value = text.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names):
        raise ConfigError(f"{text!r}: write section.key=value, for example training.epochs=2")
    try:
        nested: Any = _parse(value)
    except ConfigError as error:
        raise ConfigError(f"{text!r}: the value {error}") from error
    for name in reversed(names):
        nested = {name: nested}
    return dict(nested)


def _anchored(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A relative `split.file` is meant from `folder`, and must mean the same in a copy elsewhere."""
    split = given.get("split")
    if isinstance(split, dict) and isinstance(split.get("file"), str):
        path = folder / Path(split["file"]).expanduser()
        return _merged(given, {"split": {"file": str(path.absolute())}})
    return given


def commented(config: FederationConfig) -> str:
    """As `dump_config`, with what each key means above it: a file to start from."""
    return "\n".join(_commented(config, 0)) + "\n"


def _commented(section: BaseModel, depth: int) -> list[str]:
    lines = []
    for name, field in type(section).model_fields.items():
        indent, value = "  " * depth, getattr(section, name)
        if isinstance(value, BaseModel):
            about = (type(value).__doc__ or "").strip().splitlines()
            lines += [f"{indent}# {about[0]}"] if about else []
            lines += [f"{indent}{name}:", *_commented(value, depth + 1)]
            continue
        if field.description:
            lines.append(f"{indent}# {field.description}")
        plain = section.model_dump(mode="json", include={name})[name]
        text = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n")
        lines.append(f"{indent}{name}: {text.strip()}")
    return lines


def _validated(values: Mapping[str, Any], source: str) -> FederationConfig:
    try:
        return FederationConfig.model_validate(values)
    except ValidationError as error:
        lines = "\n".join(f"{source}: {line}" for line in _explained(error))
        raise ConfigError(lines) from error


WORDS = {  # pydantic's own words for these are a programmer's
    "model_type": "must hold `key: value` lines",
    "tuple_type": "must be a list",
    "missing": "has too few values",
}


def _explained(error: ValidationError) -> list[str]:
    """One line for each key; where a value may have several forms, what is wrong with it in each."""
    unknown = []
    wrong: dict[str, dict[str, Any]] = {}
    for problem in error.errors(include_url=False):
        location = [str(part) for part in problem["loc"]]
        if problem["type"] in ("extra_forbidden", "invalid_key"):
            names = _field_names(location[:-1])
            near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"valid here: {', '.join(names)}."
            unknown.append(f"`{'.'.join(location)}` is not a known key; {hint}")
            continue
        while len(location) > 1 and location[-1] not in _field_names(location[:-1]):
            location.pop()  # a position in a list, or pydantic's name for one of several forms
        message = WORDS.get(problem["type"], problem["msg"].removeprefix("Value error, "))
        wrong.setdefault(".".join(location), {}).setdefault(message, problem["input"])
    return unknown + [
        f"`{key}`: {', or '.join(messages)} (found {next(iter(messages.values()))!r})"
        for key, messages in wrong.items()
    ]


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
