"""Options that several commands have, and the checks of them that typer does not make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.brats import CODINGS

if TYPE_CHECKING:
    from client.postprocessing import PostProcessing

Flips = Annotated[
    bool, typer.Option("--flips", help="Average over the 8 mirror images; 8 times the time.")
]
Steps = Annotated[
    str,
    typer.Option(
        help="none, as the rounds are measured; reference, or recommended, which fed-client predict does "
        "by default."
    ),
]

Confidence = Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the bootstrap intervals.")]
LabelCoding = Annotated[str, typer.Option(help=f"What labels mean: auto, {', '.join(CODINGS)}.")]


def require_coding(name: str) -> None:
    """Raises typer.BadParameter: `name` is no label coding."""
    if name != "auto" and name not in CODINGS:
        raise typer.BadParameter(
            f"{name!r} is not one of auto, {', '.join(CODINGS)}.", param_hint="--label-coding"
        )


def require_confidence(value: float) -> None:
    """Raises typer.BadParameter for NaN, which passes every range."""
    if not math.isfinite(value):
        raise typer.BadParameter(
            "nan is not in the range 0.5<=x<=0.999.", param_hint="--confidence"
        )


def chosen_steps(preset: str, overrides: Mapping[str, Any] | None = None) -> PostProcessing:
    """The post-processing of that name, with the single steps that are not None in place of its own."""
    from dataclasses import replace

    from client.postprocessing import PRESETS

    if preset not in PRESETS:
        raise typer.BadParameter(
            f"{preset!r} is not one of {', '.join(PRESETS)}.", param_hint="--postprocess"
        )
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    for name, value in given.items():
        if not math.isfinite(value):  # nan passes the limits of an option, inf some
            raise typer.BadParameter("is no number.", param_hint="--" + name.replace("_", "-"))
    return replace(PRESETS[preset], **given)
