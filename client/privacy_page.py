"""How a hospital's privacy report looks: one HTML file that needs no other, and a terminal table.

The page has no script and refers to nothing outside of itself; whatever names or texts hold, they
are text in it. What the report says is `client.privacy_report`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, Literal

import matplotlib
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.box import ASCII2, ROUNDED
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from client.privacy_report import BROKEN_STATE
from common.console import plain

COLOURS = ("#1f6feb", "#b54708", "#1a7f37", "#8250df", "#57606a")
LIMIT_COLOUR = "#b42318"
SHOWN = 10  # of the newest payments, on a terminal
ENTRY_HEADINGS = (
    "no.", "when (UTC)", "federation", "state", "round", "for", "patients", "steps", "σ", "q", "C", "ε", "δ",
)  # fmt: skip
FEDERATION_HEADINGS = (
    "federation", "paid rounds", "noised metrics", "interrupted", "without privacy", "ε by itself",
)  # fmt: skip
LEDGER_HEADINGS = (
    "no.", "when (UTC)", "kind", "federation", "site", "round", "patients", "σ", "q", "steps", "C",
    "ε", "δ", "of no.",
)  # fmt: skip
SVG_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: to be found, read aloud and small
    "svg.hashsalt": "fedbrats",
    "font.family": "sans-serif",
    "font.size": 10,
}


def report_page(document: Mapping[str, Any]) -> str:
    """The whole report as HTML."""
    template = files("client").joinpath("privacy_page.html").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            **document,
            written=f"{_moment(document['at'])} (UTC)",
            moment=_moment,
            plot=_plot(document),
            spending=_spending(document),
            facts=_facts(document),
            federation_headings=FEDERATION_HEADINGS,
            federation_rows=[_federation_row(f) for f in document["federations"]],
            entry_headings=ENTRY_HEADINGS,
            entry_rows=[_entry_row(entry) for entry in document["entries"]],
        )
    )


def report_table(document: Mapping[str, Any], *, terminal: bool) -> Group:
    """The same in short: what was spent, by whom, what it means, and the newest payments."""
    lines: list[Any] = [f"[bold]Privacy of {_safe(document['site'])}[/bold]"]
    lines.append(_safe(document["headline"]))
    lines += [f"[yellow]Warning:[/yellow] {_safe(text)}" for text in document["warnings"]]
    facts = new_table(terminal, ("", ""), left=2)
    for what, value in (*_spending(document), *_facts(document)):
        facts.add_row(_safe(what), _safe(value))
    lines.append(facts)
    if document["federations"]:
        table = new_table(terminal, FEDERATION_HEADINGS)
        for federation in document["federations"]:
            table.add_row(*map(_safe, _federation_row(federation)))
        lines.append(table)
    if document["entries"]:
        newest = document["entries"][-SHOWN:]
        older = len(document["entries"]) - len(newest)
        lines.append("Payments" + (f" ({older} older ones are in the page)" if older else ""))
        table = new_table(terminal, ENTRY_HEADINGS, left=4)
        for entry in newest:
            table.add_row(*map(_safe, _entry_row(entry)))
        lines.append(table)
    lines.append("What it means")
    lines += [f"  {_safe(text)}" for text in (*document["meaning"], document["aggregation"])]
    lines.append("Not covered (the page says more)")
    lines += [f"  {_safe(entry['what'])}" for entry in document["not_covered"]]
    return Group(*lines)


def ledger_table(document: Mapping[str, Any], *, terminal: bool) -> Group:
    """Every entry of a verified ledger."""
    table = new_table(terminal, LEDGER_HEADINGS, left=5)
    for e in document["entries"]:
        numbers = (*("noise_multiplier", "sampling_rate", "steps"), *("clip", "epsilon", "delta"))
        table.add_row(
            *map(_safe, (e["number"], _moment(e["at"]), e["kind"], _short(e["federation"]))),
            *map(_safe, (e["site"], e["round"], e["size"])),
            *(_cell(e[key]) for key in numbers),
            "" if e["of"] is None else str(e["of"]),
        )
    known = "and goes on from where this folder last saw it" if document["anchored"] else "verified"
    return Group(
        _safe(f"Privacy ledger {document['id']} ({document['path']})"),
        _safe(f"{len(document['entries'])} entries, whole, {known}; head {document['head']}"),
        *((table,) if document["entries"] else ()),
    )


def svg(figure: Figure) -> Markup:
    """A figure as an <svg> element to stand inside a page, with no address in it at all."""
    FigureCanvasSVG(figure)
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(SVG_SETTINGS):
        figure.savefig(text, format="svg", metadata=nothing)
    element = text.getvalue()
    element = element[element.index("<svg") :]
    # inside HTML the name spaces are known, and xlink is not needed
    element = re.sub(r' xmlns(:xlink)?="[^"]*"', "", element).replace("xlink:href", "href")
    return Markup(element)


def bare(axes: Axes, values: Literal["x", "y"] = "y") -> None:
    """A quiet frame: two axes, and faint lines to read `values` by."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=values, color="#d8dee4", linewidth=0.8)
    axes.set_axisbelow(True)


def _plot(document: Mapping[str, Any]) -> Markup | None:
    """Epsilon after each payment, a line for each federation and purpose, and the budget."""
    entries = document["entries"]
    if not entries:
        return None
    with matplotlib.rc_context(SVG_SETTINGS):
        figure = Figure(figsize=(8.4, 3.2), layout="constrained")
        axes = figure.add_subplot()
        kinds = list(dict.fromkeys((entry["federation"], entry["kind"]) for entry in entries))
        for index, (federation, kind) in enumerate(kinds):
            mine = [
                (place, entry)
                for place, entry in enumerate(entries, start=1)
                if (entry["federation"], entry["kind"]) == (federation, kind)
            ]
            colour = COLOURS[index % len(COLOURS)]
            name = "this federation" if mine[0][1]["this"] else _short(federation)
            axes.plot(
                [place for place, _ in mine],
                [entry["epsilon"] for _, entry in mine],
                marker="o",
                markersize=4,
                color=colour,
                label=f"{kind}, {name}",
            )
            broken = [(p, e["epsilon"]) for p, e in mine if e["state"] == BROKEN_STATE]
            if broken:
                axes.plot(*zip(*broken, strict=True), "x", color=LIMIT_COLOUR, markersize=9)
        if any(entry["state"] == BROKEN_STATE for entry in entries):
            axes.plot([], [], "x", color=LIMIT_COLOUR, markersize=9, label=BROKEN_STATE)
        if document["budget"]:
            budget = document["budget"]["epsilon"]
            axes.axhline(budget, color=LIMIT_COLOUR, linestyle="--", linewidth=1.2)
            axes.annotate(
                f"budget {budget:g}",
                (1, budget),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 3),
                textcoords="offset points",
                ha="right",
                color=LIMIT_COLOUR,
            )
        axes.set_ylim(bottom=0)
        axes.margins(y=0.12)
        axes.set_xlim(0.5, len(entries) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axes.set_xlabel("payment")
        axes.set_ylabel("total ε after it")
        bare(axes)
        figure.legend(loc="outside lower center", frameon=False, fontsize=9, ncols=3)
        return svg(figure)


def _spending(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    spent, budget = document["spent"], document["budget"]
    here = next((f["epsilon"] for f in document["federations"] if f["this"]), 0.0)
    elsewhere = [f for f in document["federations"] if not f["this"]]
    rows = [("ε spent, most affected patient, all federations", f"{spent['epsilon']:.3f}")]
    if budget:
        rows.append(("ε of the budget", f"{budget['epsilon']:g}"))
        rows.append(("ε left (budget less spent)", f"{spent['left']:.3f}"))
    if spent["delta"] is not None:
        rows.append(("δ", f"{spent['delta']:.4g}"))
    elif budget:
        rows.append(("δ", "follows from the number of patients, once they are prepared"))
    rows.append(("ε spent in this federation alone", f"{here:.3f}"))
    if document["agreed_epsilon"] is not None:
        rows.append(("Most that this federation may spend", f"{document['agreed_epsilon']:g}"))
    rows.append(("Other federations in this ledger", str(len(elsewhere))))
    return rows


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    m, ledger, versions = document["mechanism"], document["ledger"], document["versions"]
    released = document["released"]
    updates, metrics = released["updates"], released["metrics"]
    rows: list[tuple[str, Any]] = [
        ("Accountant", m["accountant"]),
        ("Sampling", m["sampling"]),
        ("Noise σ, in clipping norms", _number(m["noise_multiplier"])),
        ("Clipping norm C", _number(m["clip"])),
        ("Noisy steps a round", m["steps_per_round"]),
        ("Randomness", m["randomness"]),
        ("Patients that train / are held out", _pair(m)),
        (
            "Updates that left",
            f"{updates['private']} with privacy, {updates['without_privacy']} without",
        ),
        ("Sets of metrics that left", ", ".join(f"{n} {way}" for way, n in metrics.items())),
        ("Ledger", f"{ledger['id']} ({ledger['path']})" if ledger else "none is kept"),
    ]
    if ledger:
        rows.append(("Entries in it, and its head", f"{ledger['entries']}, {ledger['head']}"))
        rows.append(("Verified", f"yes: {ledger['verified']}"))
    rows.append(("Versions", ", ".join(f"{name} {number}" for name, number in versions.items())))
    rows.append(("Hash of the code", document["code"]))
    return [(what, str(value)) for what, value in rows if value is not None]


def _pair(mechanism: Mapping[str, Any]) -> str | None:
    if mechanism["training_patients"] is None:
        return None
    return f"{mechanism['training_patients']} / {mechanism['held_out_patients']}"


def _federation_row(federation: Mapping[str, Any]) -> list[str]:
    name = _short(federation["id"]) + (" (this one)" if federation["this"] else "")
    numbers = ("rounds", "metrics", "interrupted", "unprotected")
    return [name, *(str(federation[key]) for key in numbers), f"{federation['epsilon']:.3f}"]


def _entry_row(entry: Mapping[str, Any]) -> list[str]:
    return [
        str(entry["number"]),
        _moment(entry["at"]),
        "this one" if entry["this"] else _short(entry["federation"]),
        entry["state"],
        str(entry["round"]),
        entry["kind"],
        str(entry["patients"]),
        str(entry["steps"]),
        *(_cell(entry[key]) for key in ("noise_multiplier", "sampling_rate", "clip")),
        f"{entry['epsilon']:.3f}",
        _cell(entry["delta"]),
    ]


def _moment(at: str) -> str:
    """A time in UTC as people write it."""
    return at.replace("+00:00", "").replace("T", " ")


def _short(federation: str) -> str:
    """Enough of a federation's id to tell it from the others."""
    return federation[:12] or "(none)"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _cell(value: float | None) -> str:
    return _number(value) or ""


def _safe(text: object) -> str:
    return escape(plain(str(text), 2000))


def new_table(terminal: bool, headings: Sequence[str], *, left: int = 1) -> Table:
    """Without a terminal nothing is wrapped or cut. The first `left` columns hold text, not numbers."""
    table = Table(box=ROUNDED if terminal else ASCII2, show_header=any(headings))
    for index, name in enumerate(headings):
        justify: Literal["left", "right"] = "left" if index < left else "right"
        table.add_column(name, justify=justify, no_wrap=not terminal, overflow="fold")
    return table
