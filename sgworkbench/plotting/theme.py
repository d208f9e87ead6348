"""The look of every figure: two plotly templates, and one fixed meaning for every colour.

A colour never changes its meaning between figures: the four arms, harmful and harmless content, refused and
complied behaviour, and the roles of tokens each own theirs, and no two of these families share one. Every series
also owns a dash and a marker, so that figures stay readable in grey print. The hues follow Okabe and Ito (2008),
darkened or lightened until they keep a contrast of at least 3:1 against the page of their theme. Positive values
are always drawn in the colour of refusal and negative values in the colour of compliance.

Importing this module registers the templates "sgworkbench" and "sgworkbench_dark" with plotly; the user's default
template is left alone, our figures name theirs explicitly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import plotly.graph_objects as go
import plotly.io as pio

from sgworkbench.errors import WorkbenchError, unknown_name

FONT_FAMILY = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
MONOSPACE_FAMILY = "'JetBrains Mono', Menlo, Consolas, 'Liberation Mono', 'DejaVu Sans Mono', monospace"


@dataclass(frozen=True)
class Shade:
    """One colour with a fixed meaning, in its light-page and its dark-page value (``#rrggbb``)."""

    light: str
    dark: str

    def on(self, theme: str) -> str:
        """The value for ``theme`` ("light" or "dark")."""
        return self.dark if check_theme(theme) == "dark" else self.light


@dataclass(frozen=True)
class SeriesStyle:
    """How one named series is always drawn.

    ``dash`` and ``symbol`` are plotly line dashes and marker symbols; ``pattern`` is the bar hatching
    (an empty string is a solid fill).
    """

    label: str
    shade: Shade
    dash: str
    symbol: str
    pattern: str = ""


ARMS: Mapping[str, SeriesStyle] = MappingProxyType(
    {
        "plain": SeriesStyle("plain", Shade("#2B2F36", "#E6E8EC"), "solid", "circle"),
        "prompted": SeriesStyle("prompted", Shade("#0062A8", "#3F8FDC"), "dash", "square", "/"),
        "steered": SeriesStyle("steered", Shade("#C77C00", "#F0B030"), "dot", "diamond", "\\"),
        "both": SeriesStyle("both", Shade("#1FA06A", "#4FDDA5"), "dashdot", "triangle-up", "x"),
    }
)
"""Arms of an experiment, in the order in which they are always listed."""

CONTENT: Mapping[str, SeriesStyle] = MappingProxyType(
    {
        "harmful": SeriesStyle("harmful", Shade("#9B2C6B", "#D65FA8"), "solid", "circle"),
        "harmless": SeriesStyle("harmless", Shade("#3E9BD0", "#9AD9FA"), "dash", "diamond-open", "/"),
    }
)
"""Content classes of prompts."""

BEHAVIOUR: Mapping[str, SeriesStyle] = MappingProxyType(
    {
        "refused": SeriesStyle("refused", Shade("#43329C", "#A99CF5"), "solid", "square"),
        "complied": SeriesStyle("complied", Shade("#D55E00", "#F58A45"), "dash", "triangle-down-open", "\\"),
    }
)
"""What the model did. Also the two ends of the diverging scale: positive is towards refusal."""

FAMILIES: Mapping[str, Mapping[str, SeriesStyle]] = MappingProxyType(
    {"arm": ARMS, "content": CONTENT, "behaviour": BEHAVIOUR}
)
"""Style families by the name of the column that holds them."""

OTHER_SERIES: tuple[SeriesStyle, ...] = (
    SeriesStyle("", Shade("#5B5F00", "#D6DB6A"), "solid", "circle"),
    SeriesStyle("", Shade("#00807A", "#35CFC6"), "dash", "square", "/"),
    SeriesStyle("", Shade("#8A3B12", "#E39B72"), "dot", "diamond", "\\"),
    SeriesStyle("", Shade("#7457C8", "#C3B1FF"), "dashdot", "triangle-up", "x"),
    SeriesStyle("", Shade("#B02A37", "#FF8A94"), "longdash", "cross", "-"),
    SeriesStyle("", Shade("#4C6A84", "#A3BDD4"), "longdashdot", "x", "+"),
)
"""Styles for series without a fixed meaning (several directions, several models), taken in order."""

ROLES: Mapping[str, Shade] = MappingProxyType(
    {
        "system": Shade("#DAD4F4", "#3D3566"),
        "user_prefix": Shade("#F8D9C4", "#5E3C26"),
        "instruction": Shade("#BFE3F7", "#1D4E6B"),
        "user_suffix": Shade("#F6E7A9", "#5A4E16"),
        "template": Shade("#E3E5E8", "#363A41"),
        "prefill": Shade("#F4CCDF", "#5F2B48"),
        "reasoning": Shade("#C9EBD3", "#22513A"),
        "answer": Shade("#D9E9A6", "#44531A"),
    }
)
"""Background colour of each role of a token; body text keeps a contrast of at least 4.5:1 on all of them."""

PAGE = Shade("#FFFFFF", "#16181D")
INK = Shade("#1F2328", "#ECEEF1")
MUTED = Shade("#59606B", "#A9B0BC")
GRID = Shade("#E6E8EB", "#2C3038")
AXIS = Shade("#8B929C", "#6C7480")
NULL = Shade("#8D949E", "#838B97")
MISSING = Shade("#D2D6DC", "#42474F")
HOVER_PAGE = Shade("#FDFDFE", "#23262D")

_DIVERGING: tuple[tuple[float, Shade], ...] = (
    (0.00, Shade("#803200", "#FFC08A")),
    (0.12, Shade("#B34D00", "#F9964D")),
    (0.26, Shade("#E58838", "#B9622A")),
    (0.40, Shade("#F8D3AE", "#5A3922")),
    (0.50, Shade("#F7F7F8", "#202329")),
    (0.60, Shade("#D3CFEC", "#383460")),
    (0.74, Shade("#9A8FD1", "#6A5DB8")),
    (0.88, Shade("#5B49AD", "#9B8EEE")),
    (1.00, Shade("#2E1F7A", "#CFC7FF")),
)

TEMPLATES: Mapping[str, str] = MappingProxyType({"light": "sgworkbench", "dark": "sgworkbench_dark"})
"""Registered plotly template of each theme."""


def check_theme(theme: str) -> str:
    """Return ``theme`` when it is "light" or "dark"; raise `WorkbenchError` otherwise."""
    if theme not in ("light", "dark"):
        raise unknown_name("theme", theme, ("light", "dark"))
    return theme


def check_role(role: str) -> str:
    """Return ``role`` when it is one of `ROLES`; raise `WorkbenchError` otherwise."""
    if role not in ROLES:
        raise unknown_name("token role", role, ROLES)
    return role


def with_alpha(colour: str, alpha: float | int) -> str:
    """``#rrggbb`` as a plotly ``rgba(...)`` string of opacity ``alpha`` in 0-1."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def diverging_scale(theme: str = "light") -> list[list[float | str]]:
    """Plotly colour scale whose middle is zero: compliance (negative) through neutral to refusal (positive)."""
    return [[position, shade.on(theme)] for position, shade in _DIVERGING]


def series_styles(family: str, names: list[str]) -> dict[str, SeriesStyle]:
    """Style of each series, in the order in which they are drawn.

    Series of a known family ("arm", "content", "behaviour") come in the family's order whatever the order of
    ``names``, each with its own fixed style. For any other family the order of ``names`` is kept and the styles
    of `OTHER_SERIES` are handed out in turn.

    Raises:
        WorkbenchError: a name is not a member of its known family, or there are more series than styles.
    """
    if family in FAMILIES:
        styles = FAMILIES[family]
        for name in names:
            if name not in styles:
                raise unknown_name(family, name, styles)
        return {name: style for name, style in styles.items() if name in names}
    unique = list(dict.fromkeys(names))
    if len(unique) > len(OTHER_SERIES):
        raise WorkbenchError(
            f"A figure tells at most {len(OTHER_SERIES)} series apart, but column {family!r} holds {len(unique)}; "
            "draw fewer at a time."
        )
    return {
        name: SeriesStyle(name, style.shade, style.dash, style.symbol, style.pattern)
        for name, style in zip(unique, OTHER_SERIES, strict=False)
    }


def fixed_shades() -> list[Shade]:
    """Every shade that a figure can hold, without repeats: what a switch between the themes has to translate."""
    shades = [PAGE, INK, MUTED, GRID, AXIS, NULL, MISSING, HOVER_PAGE]
    shades += [style.shade for family in FAMILIES.values() for style in family.values()]
    shades += [style.shade for style in OTHER_SERIES]
    shades += list(ROLES.values())
    shades += [shade for _, shade in _DIVERGING]
    return list(dict.fromkeys(shades))


def _template(theme: str) -> go.layout.Template:
    ink, muted = INK.on(theme), MUTED.on(theme)
    axis = {
        "showgrid": True,
        "gridcolor": GRID.on(theme),
        "gridwidth": 1,
        "zeroline": False,
        "linecolor": AXIS.on(theme),
        "linewidth": 1,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": AXIS.on(theme),
        "tickfont": {"size": 12, "color": muted},
        "title": {"font": {"size": 13, "color": ink}, "standoff": 10},
        "automargin": True,
    }
    template = go.layout.Template()
    template.layout = go.Layout(
        font={"family": FONT_FAMILY, "size": 13, "color": ink},
        title={
            "font": {"size": 17, "color": ink},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 16, "t": 16},
        },
        paper_bgcolor=PAGE.on(theme),
        plot_bgcolor=PAGE.on(theme),
        colorway=[style.shade.on(theme) for style in OTHER_SERIES],
        colorscale={"diverging": diverging_scale(theme)},
        xaxis=axis,
        yaxis=axis,
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.0,
            "yanchor": "bottom",
            "font": {"size": 12.5, "color": ink},
            "bgcolor": with_alpha(PAGE.on(theme), 0),
            "itemwidth": 34,
            "tracegroupgap": 0,
        },
        hoverlabel={
            "align": "left",
            "bgcolor": HOVER_PAGE.on(theme),
            "bordercolor": AXIS.on(theme),
            "font": {"family": FONT_FAMILY, "size": 12.5, "color": ink},
            "namelength": -1,
        },
        modebar={
            "bgcolor": with_alpha(PAGE.on(theme), 0),
            "color": muted,
            "activecolor": ink,
            # plotly.js 4 shows a button that uploads the figure to a server of its maker, prompts included.
            "remove": ["sendChartToCloud", "sendDataToCloud", "select2d", "lasso2d", "autoScale2d"],
        },
        margin={"l": 64, "r": 24, "t": 64, "b": 56},
    )
    return template


for _theme, _name in TEMPLATES.items():
    pio.templates[_name] = _template(_theme)
