"""Reading and writing `federation.yaml`: presets, `key=value` overrides, and errors in words.

Unknown keys are refused with the nearest valid name. What the keys are is in `common.config`.
`read_yaml`, `validated` and `commented` do the same for any other settings file of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from common.config import PRESETS, FederationConfig

Settings = TypeVar("Settings", bound=BaseModel)


class ConfigError(ValueError):
    """The configuration cannot be used; the text says which key, what was found and what to write."""


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
        given = _anchored(read_yaml(path), path.parent)
    for text in assign:
        given = _merged(given, _anchored(_assignment(text), Path.cwd()))
    if preset is not None:
        given["preset"] = preset
    chosen = given.get("preset", "default")
    if not isinstance(chosen, str) or chosen not in PRESETS:
        raise ConfigError(f"{source}: preset {chosen!r} is not one of {', '.join(PRESETS)}.")
    return validated(FederationConfig, _merged(PRESETS[chosen], given), source)


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


def read_yaml(path: Path) -> dict[str, Any]:
    """What the file holds. Raises ConfigError: it cannot be read, or is no YAML of `key: value`."""
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


def anchored(config: FederationConfig, folder: Path) -> FederationConfig:
    """The configuration with a relative `server.init_from` as meant from `folder`."""
    path = config.server.init_from
    if path is None:
        return config
    path = (folder / path.expanduser()).absolute()
    server = config.server.model_copy(update={"init_from": path})
    return config.model_copy(update={"server": server})


def commented(config: BaseModel, *, omit: Collection[str] = ()) -> str:
    """The whole configuration as YAML, with what each key means above it: a file to start from.

    `omit` names sections or keys of the top level to leave out, which then have their defaults.
    """
    return "\n".join(_commented(config, 0, omit)) + "\n"


def _commented(section: BaseModel, depth: int, omit: Collection[str] = ()) -> list[str]:
    lines = []
    for name, field in type(section).model_fields.items():
        if name in omit:
            continue
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


def validated(model: type[Settings], values: Mapping[str, Any], source: str) -> Settings:
    """`values` as this model. Raises ConfigError: one line for each wrong key, each naming `source`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = "\n".join(f"{source}: {line}" for line in _explained(error, model))
        raise ConfigError(lines) from error


WORDS = {  # pydantic's own words for these are a programmer's
    "model_type": "must hold `key: value` lines",
    "tuple_type": "must be a list",
    "missing": "has too few values",
}


def _explained(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each key; where a value may have several forms, what is wrong with it in each."""
    unknown = []
    wrong: dict[str, dict[str, Any]] = {}
    for problem in error.errors(include_url=False):
        location = [str(part) for part in problem["loc"]]
        if problem["type"] in ("extra_forbidden", "invalid_key"):
            names = _field_names(model, location[:-1])
            near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"valid here: {', '.join(names)}."
            unknown.append(f"`{'.'.join(location)}` is not a known key; {hint}")
            continue
        if problem["type"] == "missing" and location[-1] in _field_names(model, location[:-1]):
            unknown.append(f"`{'.'.join(location)}` is missing; it has no default.")
            continue
        while len(location) > 1 and location[-1] not in _field_names(model, location[:-1]):
            location.pop()  # a position in a list, or pydantic's name for one of several forms
        message = WORDS.get(problem["type"], problem["msg"].removeprefix("Value error, "))
        if not location:  # two keys that do not go together: the message names them
            unknown.append(message)
            continue
        wrong.setdefault(".".join(location), {}).setdefault(message, problem["input"])
    return unknown + [
        f"`{key}`: {', or '.join(messages)} (found {next(iter(messages.values()))!r})"
        for key, messages in wrong.items()
    ]


def _field_names(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    for part in location:
        field = model.model_fields.get(part)
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))
        sections = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if not sections:  # a section may be optional, a value has none
            return []
        model = sections[0]
    return list(model.model_fields)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            result[key] = _merged(below, value)
        else:
            result[key] = value
    return result
