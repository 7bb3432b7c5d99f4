"""A report as one HTML file that opens offline, with its figures as PNG and SVG files beside it.

A report is a list of sections of text, tables and figures; where their numbers come from is
`server.report_sections`, and for a simulation also `simulation.report`. The page has no script and
refers to nothing outside of itself; names and reasons that came from sites are text in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

from common.console import RESEARCH_ONLY, plain
from common.figures import draw, draw_pixels
from common.files import write_text_atomically

PAGE = "report.html"
DRAWN = (".png", ".svg")
CELL = 300  # characters of a text from a site in a table


@dataclass(frozen=True)
class Table:
    """Rows of texts. The first `left` columns hold words, the others numbers.

    The last `summary` rows are set apart. `caption` says what the numbers are.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    left: int = 1
    summary: int = 0


@dataclass(frozen=True)
class Plot:
    """A figure; `name` is its files' and unique in the report, `alt` says what it shows in words.

    `kind`: `lines` is shown as an SVG, `photo` as a PNG with an SVG file beside it, `pixels` has no SVG.
    """

    name: str
    figure: Figure
    alt: str
    caption: str = ""
    kind: str = "lines"


@dataclass(frozen=True)
class Section:
    """One heading and what is below it. `listing` is shown as it is, in small type."""

    name: str
    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    remarks: Sequence[str] = ()
    listing: str = ""


@dataclass(frozen=True)
class Report:
    """`state` is the verdict in a sentence, `good` whether there is nothing to look at in it."""

    title: str
    about: str
    state: str
    good: bool
    notes: Sequence[str]
    figures: Sequence[tuple[str, str]]  # what is read first: a number and what it is
    sections: Sequence[Section] = field(default_factory=list)


def page_path(out: Path) -> Path:
    """The page's file: `out` itself if it is called so, else report.html in the folder `out`.

    Raises:
        ReportError: it cannot be there.
    """
    page = out if out.suffix.lower() in (".html", ".htm") else out / PAGE
    if page.is_dir():
        raise ReportError(f"{page} is a folder; give the name of a file, or another folder.")
    if page != out and out.exists() and not out.is_dir():
        raise ReportError(f"{out} is a file; give a folder, or a name that ends in .html.")
    return page


def figures_path(page: Path) -> Path:
    """The folder of the page's figures, beside it and of no other page: `report-figures`."""
    return page.with_name(f"{page.name.removesuffix('.html')}-figures")


class ReportError(RuntimeError):
    """No report can be made of this, or not there; the text says why."""


def write_report(report: Report, page: Path) -> list[Path]:
    """Write the page after its figures, so that it never speaks of any that are not there.

    Figures of an earlier report of the same page go: they may show names that this one hides.

    Returns:
        All figure files.

    Raises:
        OSError: a file cannot be written.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    folder = figures_path(page)
    written: list[Path] = []
    shown: dict[str, Markup] = {}
    for plot in (plot for section in report.sections for plot in section.plots):
        if plot.kind == "pixels":
            drawn = draw_pixels(plot.figure, folder, plot.name, plot.alt)
        else:
            photo = plot.kind == "photo"
            drawn = draw(plot.figure, folder, plot.name, plot.alt, photo=photo)
        shown[plot.name] = drawn.inline
        written += [path for path in (drawn.png, drawn.svg) if path is not None]
    write_text_atomically(page, _page(report, shown, folder.name))
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix in DRAWN and path not in written:
            path.unlink()
    return written


def _page(report: Report, shown: dict[str, Markup], folder: str) -> str:
    template = files("server").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = lambda text: plain(str(text), CELL)
    return environment.from_string(template).render(
        report=report, shown=shown, research=RESEARCH_ONLY, folder=folder
    )
