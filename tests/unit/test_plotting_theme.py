"""The theme: registered without touching the user's, readable, and one meaning for every colour."""

from __future__ import annotations

import itertools

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from sgworkbench.errors import WorkbenchError
from sgworkbench.plotting import retheme, theme
from sgworkbench.plotting.layout import colour_pairs, plotly_text, wrap_text


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.1 defines it."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_importing_registers_templates_and_leaves_the_users_default() -> None:
    assert {"sgworkbench", "sgworkbench_dark"} <= set(pio.templates)
    assert pio.templates.default == "plotly"


@pytest.mark.parametrize("name", ["light", "dark"])
def test_every_series_stands_out_from_the_page(name: str) -> None:
    styles = [style for family in theme.FAMILIES.values() for style in family.values()]
    for style in [*styles, *theme.OTHER_SERIES]:
        assert contrast(style.shade.on(name), theme.PAGE.on(name)) >= 3, style
    for ink in (theme.INK, theme.MUTED):
        assert contrast(ink.on(name), theme.PAGE.on(name)) >= 4.5
    for shade in theme.ROLES.values():
        assert contrast(theme.INK.on(name), shade.on(name)) >= 4.5


# Full colour blindness of each kind as a matrix on linear RGB (Machado, Oliveira and Fernandes 2009).
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def cielab(colour: str, matrix: np.ndarray) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(matrix @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ seen / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", BLINDNESS)
@pytest.mark.parametrize("name", ["light", "dark"])
def test_members_of_a_family_differ_for_colour_blind_readers_and_in_grey(kind: str, name: str) -> None:
    matrix = np.array(BLINDNESS[kind])
    for family in theme.FAMILIES.values():
        for first, second in itertools.combinations(family.values(), 2):
            distance = cielab(first.shade.on(name), matrix) - cielab(second.shade.on(name), matrix)
            assert np.linalg.norm(distance) > 18, (first.label, second.label)
            assert first.dash != second.dash
            assert first.symbol != second.symbol


def test_no_two_meanings_share_a_colour() -> None:
    shades = [style.shade.light for family in theme.FAMILIES.values() for style in family.values()]
    assert len(set(shades)) == len(shades) == 8


@pytest.mark.parametrize("name", ["light", "dark"])
def test_diverging_scale_is_symmetric_in_lightness_with_its_neutral_at_zero(name: str) -> None:
    scale = theme.diverging_scale(name)
    positions = [position for position, _ in scale]
    assert positions == pytest.approx([1 - position for position in reversed(positions)])
    lightness = [cielab(colour, np.eye(3))[0] for _, colour in scale]
    middle = len(scale) // 2
    assert positions[middle] == 0.5
    away = np.abs(np.array(lightness) - lightness[middle])
    assert (np.diff(away[: middle + 1]) < 0).all()
    assert (np.diff(away[middle:]) > 0).all()
    assert np.abs(away - away[::-1]).max() < 16


def test_series_come_in_the_fixed_order_and_unknown_ones_are_refused() -> None:
    assert list(theme.series_styles("arm", ["both", "plain", "both"])) == ["plain", "both"]
    with pytest.raises(WorkbenchError, match=r"Unknown arm 'promted'. Did you mean 'prompted'"):
        theme.series_styles("arm", ["promted"])
    free = theme.series_styles("direction", ["b", "a"])
    assert list(free) == ["b", "a"]
    assert free["b"].label == "b"
    with pytest.raises(WorkbenchError, match="at most 6 series"):
        theme.series_styles("direction", list("abcdefg"))
    with pytest.raises(WorkbenchError, match="Unknown theme"):
        theme.PAGE.on("sepia")


def test_retheme_translates_our_colours_there_and_back() -> None:
    figure = go.Figure(go.Scatter(x=[1], y=[2], line_color="#0062A8", fillcolor="rgba(0,98,168,0.2)"))
    figure.add_scatter(x=[1], y=[2], line_color="#123456")
    figure.update_layout(template="sgworkbench", title_text='<span style="color:#59606B">n</span>')
    dark = retheme(figure, "dark")
    assert dark.data[0].line.color == "#3F8FDC"
    assert dark.data[0].fillcolor == "rgba(63,143,220,0.2)"
    assert dark.data[1].line.color == "#123456"
    assert dark.layout.title.text == '<span style="color:#A9B0BC">n</span>'
    assert dark.layout.template.layout.paper_bgcolor == theme.PAGE.dark
    assert figure.data[0].line.color == "#0062A8"
    again = retheme(dark, "light")
    assert again.to_dict() == figure.to_dict()


@pytest.mark.parametrize("name", ["light", "dark"])
def test_translation_between_themes_is_unambiguous(name: str) -> None:
    sources = [source.lower() for source, _ in colour_pairs(name)]
    assert len(sources) == len(set(sources))


def test_template_removes_the_button_that_uploads_figures() -> None:
    assert "sendChartToCloud" in pio.templates["sgworkbench"].layout.modebar.remove


def test_text_is_drawn_literally_and_wrapped() -> None:
    assert plotly_text("<b>&$x$") == "&lt;b&gt;&amp;&#36;x&#36;"
    assert wrap_text("aa bb cc<br>dd", 5) == ["aa bb", "cc", "dd"]
