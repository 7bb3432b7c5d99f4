"""How `client.privacy_plan`'s document looks: tables for a terminal, and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Group
from rich.markup import escape

from client.privacy_page import COLOURS, LIMIT_COLOUR, SVG_SETTINGS, bare, new_table
from client.privacy_plan import FROM_SCRATCH, PRE_TRAINED
from common.files import write_atomically


def plan_table(document: Mapping[str, Any], *, terminal: bool) -> Group:
    """For a terminal or a pipe."""
    r = document["recipe"]
    held = "" if document["held_out"] is None else f", {document['held_out']} more held out"
    every = "all of them" if r["sampling_rate"] == 1 else f"q {r['sampling_rate']:.3g}"
    steps = "1 step" if r["steps"] == 1 else f"{r['steps']} steps"
    numbers = "sigma", "a coordinate", "noise/signal a step", "of the run", "sensible here alone?"
    plans = new_table(terminal, ("epsilon", *numbers), left=0)
    compared = new_table(terminal, ("recipe", "parameters", *numbers))
    for table in (plans, compared):
        table.columns[-1].justify = "left"
    for plan in document["plans"]:
        plans.add_row(f"{plan['epsilon']:g}", *_cells(plan))
    for one in document["compared"]:
        compared.add_row(escape(one["recipe"]), f"{one['parameters']:,}", *_cells(one))
    budgets = [f"of {plan['epsilon']:g}" for plan in document["plans"]]
    course = new_table(terminal, ("after round", *budgets), left=0)
    told = [dict(plan["course"]) for plan in document["plans"]]
    for round_ in sorted(set().union(*told)):
        course.add_row(str(round_), *(f"{c[round_]:.2f}" if round_ in c else "" for c in told))
    return Group(
        escape(
            f"{document['patients']} patients train ({document['counted_in']}{held}), delta "
            f"{document['delta']:.3g}; {r['rounds']} rounds of {steps} on {every}; "
            f"{document['network']['name']} with {r['parameters']:,} parameters"
        ),
        plans,
        "Epsilon after each round",
        course,
        f"Other ways, at epsilon {document['compared_at']:g}",
        compared,
        *(f"  {escape(text)}" for text in document["advice"]),
        "Noise/signal: the noise's norm over the most that clipped gradients can add up to; real ones "
        "are smaller. Rules of thumb from synthetic data; nothing spent before is counted.",
    )


def _cells(plan: Mapping[str, Any]) -> tuple[str, ...]:
    keys = ("noise_multiplier", "noise_per_coordinate", "noise_to_signal", "noise_to_signal_of_run")
    return (*("-" if plan[key] is None else f"{plan[key]:.3g}" for key in keys), plan["verdict"])


def write_plot(document: Mapping[str, Any], path: Path) -> None:
    """Epsilon over the rounds, and noise over signal of the recipes; SVG or PNG by the file's name.

    Raises:
        OSError: it cannot be written.
    """
    with matplotlib.rc_context(SVG_SETTINGS):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for index, plan in enumerate(document["plans"]):
            if plan["course"]:
                colour = COLOURS[index % len(COLOURS)]
                label = f"ε {plan['epsilon']:g}, σ {plan['noise_multiplier']:.3g}"
                left.plot(*zip(*plan["course"], strict=True), marker="o", color=colour, label=label)
        left.set_xlabel("round")
        left.set_ylabel("ε after it")
        left.set_ylim(bottom=0)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set_title(f"{document['patients']} patients, δ {document['delta']:.3g}", fontsize=10)
        bare(left)
        left.legend(frameon=False)
        known = [c for c in document["compared"] if c["noise_to_signal_of_run"] is not None]
        right.barh(
            [c["recipe"] for c in known],
            [c["noise_to_signal_of_run"] for c in known],
            color=COLOURS[0],
            height=0.55,
        )
        right.invert_yaxis()
        for limit, what, line in (
            (FROM_SCRATCH, "from scratch", ":"),
            (PRE_TRAINED, "from a pre-trained model", "--"),
        ):
            right.axvline(limit, color=LIMIT_COLOUR, linestyle=line, label=f"may learn {what}")
        right.set_xlim(left=0)
        right.set_xlabel(f"noise/signal of a run, ε {document['compared_at']:g}")
        bare(right, "x")
        right.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1))
        kind = path.suffix[1:].lower()
        write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=150))
