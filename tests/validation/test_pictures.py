"""Pictures: valid files, true colours, escaped text."""

import base64
import io
import re

import matplotlib.image
import numpy as np
import pytest

from utils.validation.pictures import (
    COLOURS,
    Picture,
    colours,
    heat_grid,
    heat_image,
    heat_map,
    line_chart,
    png,
    token_strip,
)


def decoded(html):
    """Return the pixels of the first PNG in a piece of HTML."""
    data = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", html)[1]
    return (matplotlib.image.imread(io.BytesIO(base64.b64decode(data)))[..., :3] * 255).round().astype(np.uint8)


def test_png_is_read_back_by_another_decoder():
    """Every pixel survives."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 13, 3), dtype=np.uint8)
    read = (matplotlib.image.imread(io.BytesIO(png(pixels)))[..., :3] * 255).round().astype(np.uint8)
    assert np.array_equal(read, pixels)


def test_colours_run_from_dark_to_light_and_mark_what_is_not_finite():
    """Ends of the scale are the ends of the table, lightness never falls, NaN is grey."""
    values = np.array([[0.0, 1.0, np.nan, np.inf]])
    found = colours(values, 0.0, 1.0)
    assert np.array_equal(found[0, 0], COLOURS[0]) and np.array_equal(found[0, 1], COLOURS[-1])
    assert (found[0, 2:] == 128).all()
    lightness = colours(np.linspace(0, 1, 50), 0.0, 1.0) @ np.array([0.21, 0.72, 0.07])
    assert (np.diff(lightness) >= 0).all()


@pytest.mark.parametrize(("low", "high"), [(None, None), (0.0, 0.0), (-1.0, 3.0)])
def test_heat_image_keeps_the_shape(low, high):
    """One pixel per number, whatever the range; the longer side has the wanted size."""
    html = heat_image(np.arange(12.0).reshape(3, 4), 'a "b"', 200, low, high)
    assert decoded(html).shape == (3, 4, 3)
    assert 'width="200" height="150"' in html and "&quot;b&quot;" in html


def test_heat_map_states_its_range_and_survives_nothing_finite():
    """The caption has the numbers that the colours hide."""
    assert "dark 1 to light 4." in heat_map(np.array([[1.0, 4.0]]), "t").caption
    assert "nothing finite" in heat_map(np.array([[np.nan]]), "t").caption


def test_grid_names_every_map():
    """Several maps side by side."""
    picture = heat_grid({"head 0": np.eye(3), "head 1": np.ones((3, 3))}, "heads")
    assert picture.content.count("<img") == 2 and "head 1" in picture.content


def test_line_chart_puts_points_where_they_belong():
    """The largest value is at the top, zero at the bottom, values that are not finite are left out."""
    chart = line_chart([0, 1, 2], {"a": [0.0, 2.0, float("nan")]}, "title", "x").content
    assert re.search(r'points="52\.0,170\.0 341\.0,20\.0"', chart)
    assert chart.count("<circle") == 2 and "<title>a at 1: 2</title>" in chart


def test_tokens_are_escaped_and_shaded_by_size():
    """A token is text from anywhere."""
    picture = token_strip(["<b>", "x", "y"], [2.0, -1.0, float("nan")], "t")
    assert "&lt;b&gt;" in picture.content and "<b>" not in picture.content
    assert "rgba(72,120,176,0.70)" in picture.content and "rgba(209,121,58,0.35)" in picture.content


def test_picture_escapes_title_and_caption():
    """Names come from the model."""
    html = Picture("<i>", "<svg></svg>", "a & b").html()
    assert html == "<figure><b>&lt;i&gt;</b><svg></svg><figcaption>a &amp; b</figcaption></figure>"
