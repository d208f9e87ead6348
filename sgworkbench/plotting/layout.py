"""Titles, legends and margins that fit from 700 pixels of width up, and switching a figure between the themes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go

from sgworkbench.plotting.theme import MUTED, TEMPLATES, check_theme, fixed_shades

NARROWEST = 700
"""Width in pixels at which nothing may be cut; line breaks are chosen for it and hold for every wider figure."""

# Average advance of the two title fonts (17 px and 12.5 px), measured on Liberation Sans with some room to spare.
_TITLE_CHARACTERS = 80
_SUBTITLE_CHARACTERS = 112
# Pixels: baseline of the first line, distance of two lines (1.3 times 17 px), height of a row of the legend.
_FIRST_BASELINE, _LINE, _LEGEND_ROW = 29, 22.1, 21

_RGBA = re.compile(r"rgba\((\d+), ?(\d+), ?(\d+),")
_HEX = re.compile(r"#[0-9A-Fa-f]{6}\b")


def titled(title: str, site: str) -> str:
    """``title`` with the site named, once."""
    return title if site in title else f"{title} · {site}"


def plotly_text(text: str) -> str:
    """``text`` so that plotly draws it literally: no pseudo-HTML, no LaTeX between dollar signs."""
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("$", "&#36;")):
        text = text.replace(character, entity)
    return text


def wrap_text(text: str, width: int) -> list[str]:
    """Break ``text`` into lines of at most ``width`` characters; a ``<br>`` in it stays a line break."""
    lines: list[str] = []
    for paragraph in text.split("<br>"):
        lines += textwrap.wrap(paragraph, width, break_long_words=False) or [""]
    return lines


def _legend_rows(entries: Sequence[str]) -> int:
    """Rows of a horizontal legend at the narrowest width: one when all fit, else plotly aligns them in columns."""
    if not entries:
        return 0
    widths = [7 * len(entry) + 50 for entry in entries]
    available = NARROWEST - 110
    if sum(widths) <= available:
        return 1
    columns = max(1, available // max(widths))
    return -(-len(entries) // columns)


def finish(
    figure: go.Figure,
    *,
    theme: str,
    title: str,
    subtitle: str | None,
    plot_height: int,
    legend_entries: Sequence[str] = (),
    bottom: int = 60,
    right: int = 24,
    above: int = 0,
) -> go.Figure:
    """Apply the template, the wrapped title and subtitle, and margins with room for the legend above the plot.

    Args:
        figure: changed in place and returned.
        theme: "light" or "dark".
        title: what is seen, with the site.
        subtitle: one sentence of context (n, how intervals were made), or None.
        plot_height: height in pixels of the plotting area itself.
        legend_entries: labels of the legend, to reserve its rows; empty hides the legend.
        bottom: bottom margin in pixels.
        right: right margin in pixels.
        above: extra pixels between legend and plotting area.
    """
    lines = wrap_text(title, _TITLE_CHARACTERS)
    text = "<br>".join(lines)
    if subtitle:
        small = wrap_text(subtitle, _SUBTITLE_CHARACTERS)
        lines += small
        style = f"font-size:12.5px;color:{MUTED.on(theme)}"
        text += f'<br><span style="{style}">' + "<br>".join(small) + "</span>"
    rows = _legend_rows(legend_entries)
    top = round(_FIRST_BASELINE + _LINE * (len(lines) - 1) + 12 + _LEGEND_ROW * rows + 10) + above
    figure.update_layout(
        template=TEMPLATES[check_theme(theme)],
        # plotly sets a single line by its top and several lines by the first baseline.
        title={"text": text, "pad": {"l": 16, "t": _FIRST_BASELINE if len(lines) > 1 else _FIRST_BASELINE - 12}},
        showlegend=bool(legend_entries),
        legend={"y": 1 + (above + 4) / plot_height},
        height=plot_height + top + bottom,
        margin={"t": top, "b": bottom, "r": right},
    )
    return figure


def colour_pairs(theme: str) -> list[tuple[str, str]]:
    """Every colour of the other theme with its counterpart in ``theme``."""
    other = "light" if check_theme(theme) == "dark" else "dark"
    return [(shade.on(other), shade.on(theme)) for shade in fixed_shades()]


def retheme(figure: go.Figure, theme: str) -> go.Figure:
    """A copy of one of our figures in the other theme; colours that are not the workbench's stay as they are."""
    pairs = {source.lower(): target for source, target in colour_pairs(theme)}

    def hexadecimal(match: re.Match[str]) -> str:
        return pairs.get(match[0].lower(), match[0])

    def rgba(match: re.Match[str]) -> str:
        source = "#" + "".join(f"{int(part):02x}" for part in match.groups())
        target = pairs.get(source)
        if target is None:
            return match[0]
        return f"rgba({','.join(str(int(target[i : i + 2], 16)) for i in (1, 3, 5))},"

    translated = _map_strings(figure.to_dict(), lambda text: _RGBA.sub(rgba, _HEX.sub(hexadecimal, text)))
    translated["layout"].pop("template", None)
    result = go.Figure(translated)
    result.update_layout(template=TEMPLATES[theme])
    return result


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change) for item in value]
    return value
