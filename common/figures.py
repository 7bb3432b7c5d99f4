"""How figures look, and how they come into files and pages: the palette, a PNG, an SVG, both inline.

Colours are those of Okabe and Ito (jfly.uni-koeln.de/color), which people with any kind of colour
vision tell apart; every series differs by its dashes, its marker and the marker's filling too, so that
a figure can be read in greyscale. Names in a figure are text: nothing in them is read as mathematics or
markup. No figure holds a date, so the same numbers give the same bytes.

Not here: what a figure shows.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

from common.console import plain
from common.files import write_atomically

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, YELLOW = "#E69F00", "#56B4E9", "#000000", "#F0E442"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)  # yellow is lost on white paper
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")  # nine, which share no factor with four
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
GREY, FAINT = "#57606a", "#d8dee4"
REGION_STYLES = {  # colour, dashes and marker of each region, the same in every figure
    "WT": (BLUE, DASHES[0], "o"),
    "TC": (VERMILLION, DASHES[1], "s"),
    "ET": (GREEN, DASHES[2], "^"),
}
LABEL_COLOURS = {"NCR": BLUE, "ED": GREEN, "ET": YELLOW}  # dark, between and bright in greyscale
WIDTH = 9.6  # inches: a page's full width at a size at which its text is as large as the page's
FINER = 3  # along each side
NAME_LENGTH = 28  # characters of a site's name in a figure
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a name may hold dollar signs
    "text.usetex": False,
    "svg.fonttype": "none",  # text stays text: to be found, read aloud and small
    "svg.hashsalt": "fedbrats",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}
styled = matplotlib.rc_context(STYLE)
"""Decorates a function that draws: its texts and axes are made in the house style."""


class LineStyle(NamedTuple):
    """Keywords of `Axes.plot`, by `_asdict()`."""

    color: str
    linestyle: Any
    marker: str
    markerfacecolor: str


def line_style(index: int) -> LineStyle:
    """How the series of that number looks. 28 differ in colour and dashes, 36 in dashes and marker."""
    colour = COLOURS[index % len(COLOURS)]
    return LineStyle(
        colour,
        DASHES[index % len(DASHES)],
        MARKERS[index % len(MARKERS)],
        "white" if index % 2 else colour,
    )


def shown_name(name: str) -> str:
    """A name as it stands in a figure: one line, no control characters, not too long."""
    line = plain(name, NAME_LENGTH)
    return f" {line}" if line.startswith("_") else line  # which a legend leaves out otherwise


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure (inches) that no global state knows of."""
    return Figure(figsize=(width, height), layout="constrained")


@dataclass(frozen=True)
class Drawn:
    """A figure's files, and the element that shows it inside an HTML page."""

    png: Path
    svg: Path | None
    inline: Markup


def draw(figure: Figure, folder: Path, name: str, alt: str, *, photo: bool = False) -> Drawn:
    """Write `folder`/NAME.png and NAME.svg, and give what a page shows.

    Args:
        name: letters, digits and dashes; unique in its page, as it begins the ids of its SVG.
        alt: what the figure shows, for who cannot see it.
        photo: it is made of so many pixels or triangles that the page holds the PNG.

    Raises:
        OSError: a file cannot be written.
    """
    png = _png(figure, dpi=110 if photo else 160)
    svg = _svg(figure)
    folder.mkdir(parents=True, exist_ok=True)
    png_path, svg_path = folder / f"{name}.png", folder / f"{name}.svg"
    write_atomically(png_path, lambda temporary: _write(temporary, png))
    write_atomically(svg_path, lambda temporary: _write(temporary, svg.encode()))
    inline = png_element(png, alt) if photo else svg_element(svg, name, alt)
    return Drawn(png_path, svg_path, inline)


def draw_pixels(figure: Figure, folder: Path, name: str, alt: str) -> Drawn:
    """As `draw`, of a figure that as an SVG would be tens of megabytes: a PNG only."""
    png = _smooth(_png(figure, dpi=110 * FINER))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    write_atomically(path, lambda temporary: _write(temporary, png))
    return Drawn(path, None, png_element(png, alt))


def svg_element(svg: str, name: str, alt: str) -> Markup:
    """An SVG file's text as an element inside a page: its ids begin with `name`, no address is left."""
    element = svg[svg.index("<svg") :]
    # inside HTML the name spaces are known, and xlink is not needed
    element = re.sub(r' xmlns(:xlink)?="[^"]*"', "", element).replace("xlink:href", "href")
    element = re.sub(r'\bid="', f'id="{name}-', element)
    element = re.sub(r'\bhref="#', f'href="#{name}-', element)
    element = element.replace("url(#", f"url(#{name}-")
    label = Markup('<svg role="img" aria-label="{}"').format(alt)
    return label + Markup(element.removeprefix("<svg"))


def png_element(png: bytes, alt: str) -> Markup:
    data = base64.b64encode(png).decode()
    return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(alt, data)


def _png(figure: Figure, dpi: int) -> bytes:
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    with _quiet():
        figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    return file.getvalue()


def _smooth(png: bytes) -> bytes:
    """Every pixel the mean of FINER x FINER: what is drawn of triangles shows its seams otherwise."""
    image, file = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    image.reduce(FINER).save(file, format="png", optimize=True)
    return file.getvalue()


def _svg(figure: Figure) -> str:
    """Without the address of a DTD; that of a name space is none that anything would fetch."""
    FigureCanvasSVG(figure)
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with _quiet():
        figure.savefig(text, format="svg", metadata=nothing)
    return re.sub(r"<!DOCTYPE[^>]*>\s*", "", text.getvalue())


@contextmanager
def _quiet() -> Iterator[None]:
    """In the house style, and without a word about letters that the font lacks."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
