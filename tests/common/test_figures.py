"""Figures: names in them are text, nothing in them points outside, the same numbers give the same bytes."""

from __future__ import annotations

import io
import itertools
import re
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from common.figures import draw, draw_pixels, line_style, new_figure, shown_name, styled

HOSTILE = ("<script>alert(1)</script>", "$x^2$", "a & b", "$\\frac{$")


@styled
def a_figure():
    figure = new_figure(2)
    axes = figure.add_subplot()
    for index, name in enumerate(HOSTILE):
        style = line_style(index)._asdict()
        axes.plot([1, 2, 3], [index, 1, 2], label=shown_name(name), **style)
    axes.set_xticks([1, 2, 3], HOSTILE[:3])
    axes.legend()
    return figure


def test_names_are_text_whatever_they_hold(tmp_path):
    drawn = draw(a_figure(), tmp_path, "x", 'alt <b> "quoted"')
    root = ElementTree.fromstring(drawn.svg.read_text(encoding="utf-8"))
    texts = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")]
    for name in HOSTILE:
        assert name in texts
    assert shown_name("_a\nb\x1b") == " _a b?", "a legend leaves out what begins with _"
    assert len(shown_name("x" * 100)) < 30
    assert "<script" not in drawn.inline
    assert 'aria-label="alt &lt;b&gt; &#34;quoted&#34;"' in drawn.inline


def test_a_figure_points_to_nothing_outside(tmp_path):
    drawn = draw(a_figure(), tmp_path, "x", "")
    assert "://" not in drawn.inline
    text = drawn.svg.read_text(encoding="utf-8")
    assert "DOCTYPE" not in text
    # name spaces are names, and nothing fetches them
    assert set(re.findall(r'(\w+)(?::\w+)?="[^"]*://', text)) == {"xmlns"}
    photo = draw(a_figure(), tmp_path, "y", "", photo=True)
    assert re.findall(r'src="(\w+:)', photo.inline) == ["data:"]


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    first, second = (draw(a_figure(), tmp_path / name, "x", "") for name in "ab")
    assert first.png.read_bytes() == second.png.read_bytes()
    assert first.svg.read_bytes() == second.svg.read_bytes()
    assert first.inline == second.inline


def test_two_figures_in_one_page_share_no_id(tmp_path):
    ids = []
    for name in ("dice", "iou"):
        inline = draw(a_figure(), tmp_path, name, "").inline
        own = re.findall(r'\bid="([^"]+)"', inline)
        assert own
        used = re.findall(r'href="#([^"]+)"', inline) + re.findall(r"url\(#([^)]+)\)", inline)
        assert used
        assert set(used) <= set(own)
        ids.append(set(own))
    assert not ids[0] & ids[1]


def test_twenty_three_sites_differ_also_without_colour():
    styles = [line_style(index) for index in range(23)]
    grey = {(str(style.linestyle), style.marker) for style in styles}
    assert len(grey) == 23
    coloured = {(style.color, str(style.linestyle)) for style in styles}
    assert len(coloured) == 23


def test_palette_colours_are_okabe_and_itos():
    published = ["000000", "E69F00", "56B4E9", "009E73", "F0E442", "0072B2", "D55E00", "CC79A7"]
    assert {line_style(index).color for index in range(23)} <= {f"#{code}" for code in published}


def test_pixels_are_means_of_finer_ones(tmp_path):
    """Half of the figure black and half white: away from the border nothing is changed."""

    @styled
    def halves():
        figure = new_figure(1, 2)
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 0.5, 1))
        axes.set_axis_off()
        axes.imshow(np.zeros((4, 4)), cmap="gray", vmin=0, vmax=1, aspect="auto")
        return figure

    drawn = draw_pixels(halves(), tmp_path, "x", "")
    assert drawn.svg is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.png"]
    pixels = np.asarray(Image.open(io.BytesIO(drawn.png.read_bytes())))
    assert pixels.shape == (110, 220, 3)
    assert pixels[:, :100].max() == 0
    assert pixels[:, 120:].min() == 255
    for a, b in itertools.pairwise(pixels[50, 100:120, 0]):
        assert a <= b
