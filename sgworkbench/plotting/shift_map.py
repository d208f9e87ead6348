"""The shift map: one number per layer and token, zero-centred, with the roles of the tokens above it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.plotting.checks import require_some_finite
from sgworkbench.plotting.labels import shortened, visible
from sgworkbench.plotting.layout import NARROWEST, finish, plotly_text, titled
from sgworkbench.plotting.theme import (
    INK,
    MISSING,
    MONOSPACE_FAMILY,
    MUTED,
    PAGE,
    ROLES,
    check_role,
    check_theme,
    diverging_scale,
)

UNITS = ("raw", "separation units")
"""Units of a projection: the residual stream's own, or the distance between the two class means (METHOD 5)."""

ROBUST_PERCENTILE = 99.0
"""Percentile of the absolute values at which the colours of a map end."""

_MARGINS = 180
_PIXELS_PER_LABEL = 12.0
_LABEL_LENGTH = 18
_STRIP = 16
_GAP = 4


def robust_limit(values: Float[np.ndarray, " *any"], percentile: float = ROBUST_PERCENTILE) -> float:
    """Half-width of a zero-centred colour range: a percentile of ``|values|`` that ignores missing values.

    The largest absolute value stands in where that percentile is zero, and 1 where every value is zero.
    """
    magnitudes = np.abs(values[np.isfinite(values)])
    limit = float(np.percentile(magnitudes, percentile))
    return limit or float(magnitudes.max()) or 1.0


def shift_map(
    values: Float[np.ndarray, "layer token"],
    tokens: Sequence[str],
    layers: Sequence[int],
    *,
    site: str,
    unit: str,
    title: str,
    subtitle: str | None = None,
    roles: Sequence[str] | None = None,
    excluded: Sequence[bool] | np.ndarray | None = None,
    counts: Sequence[int] | np.ndarray | None = None,
    towards: tuple[str, str] = ("compliance", "refusal"),
    generic_positions: bool = False,
    limit: float | int | None = None,
    width: int | None = None,
    theme: str = "light",
) -> go.Figure:
    """Heatmap of a projection by layer (upwards) and token (to the right), coloured symmetrically around zero.

    Args:
        values: one number per layer and token; NaN where there is none.
        tokens: text of each token, or names of positions ("instruction -3") with ``generic_positions``. Equal
            texts stay separate columns.
        layers: layer of each row, ascending without repeats.
        site: where the residual stream was read, for the title ("resid_post").
        unit: "raw" or "separation units".
        title: what is seen; the site is added unless it is already named.
        subtitle: context, for example the number of prompts.
        roles: role of each token; draws a coloured strip above the map.
        excluded: true for tokens left out of the alignment; their columns are grey whatever their values.
        counts: number of prompts behind each column of an averaged map, for the hover.
        towards: what negative and positive values point to, in this order.
        generic_positions: the labels name positions, not token texts, so spaces in them stay spaces.
        limit: end of the colour range; by default the 99th percentile of the absolute values.
        width: figure width in pixels; by default the figure fills its page and labels fit from 700 pixels up.
        theme: "light" or "dark".

    Every cell carries ``customdata`` = layer, token index, label, role, count, so that a click can be resolved.

    Raises:
        WorkbenchError: lengths disagree, layers repeat or descend, an unknown unit, role or theme, infinite
            values, or nothing but missing values.
    """
    check_theme(theme)
    _check_shapes(values, tokens, layers, unit, roles, excluded, counts)
    dropped = np.zeros(len(tokens), dtype=bool) if excluded is None else np.asarray(excluded, dtype=bool)
    shown = np.where(dropped[None, :], np.nan, np.asarray(values, dtype=float))
    require_some_finite(shown, "shift map")
    if limit is None:
        end, ends_at = robust_limit(shown), f"{ROBUST_PERCENTILE:g}th percentile of |value|"
    elif limit > 0 and math.isfinite(limit):
        end, ends_at = float(limit), "as given"
    else:
        raise WorkbenchError(f"The limit of a colour range must be a positive number, not {limit!r}.")

    labels = list(tokens) if generic_positions else [visible(token) for token in tokens]
    rows = [str(layer) for layer in layers]
    plot_height = min(560, max(220, 13 * len(layers) + 20)) + (_STRIP + _GAP if roles is not None else 0)
    figure = go.Figure()
    unavailable = ~np.isfinite(shown)
    if unavailable.any():
        figure.add_trace(_missing_cells(unavailable, rows, labels, dropped, theme))
    figure.add_trace(
        go.Heatmap(
            z=shown,
            x=list(range(len(tokens))),
            y=rows,
            zmin=-end,
            zmax=end,
            zmid=0,
            colorscale=diverging_scale(theme),
            xgap=1 if len(tokens) <= 60 else 0,
            ygap=1 if len(layers) <= 48 else 0,
            customdata=_customdata(layers, labels, roles, counts),
            hovertemplate=_hover(unit, roles is not None, counts is not None, generic_positions),
            hoverongaps=False,
            name="shift",
            colorbar={
                "title": {
                    "text": f"{towards[0]} ← {unit} → {towards[1]}<br>ends at ±{end:.3g} ({ends_at})",
                    "side": "right",
                    "font": {"size": 12},
                },
                "thickness": 14,
                "len": 1,
                "y": 0.5,
                "x": 1.01,
                "xpad": 4,
                "outlinewidth": 0,
                "tickfont": {"size": 11.5, "color": MUTED.on(theme)},
                "tickformat": "+.3~g",
                "nticks": 7,
            },
        )
    )
    top = 1.0
    if roles is not None:
        top = 1 - (_STRIP + _GAP) / plot_height
        _add_role_strip(figure, roles, labels, theme, bottom=1 - _STRIP / plot_height)
    legend = list(dict.fromkeys(roles or ()))
    if dropped.any():
        legend.append("excluded")
    _add_legend(figure, legend, theme)
    _style_axes(figure, labels, len(layers), top, width, generic_positions)
    finish(
        figure,
        theme=theme,
        title=titled(title, site),
        subtitle=subtitle,
        plot_height=plot_height,
        legend_entries=legend,
        bottom=52 + int(6.4 * max(len(shortened(label, _LABEL_LENGTH)) for label in labels)),
        right=100,
    )
    if width is not None:
        figure.update_layout(width=width)
    return figure


def _check_shapes(
    values: np.ndarray,
    tokens: Sequence[str],
    layers: Sequence[int],
    unit: str,
    roles: Sequence[str] | None,
    excluded: Sequence[bool] | np.ndarray | None,
    counts: Sequence[int] | np.ndarray | None,
) -> None:
    if unit not in UNITS:
        raise unknown_name("unit", unit, UNITS)
    if values.shape != (len(layers), len(tokens)):
        raise WorkbenchError(
            f"A shift map of {len(layers)} layers and {len(tokens)} tokens needs values of shape "
            f"({len(layers)}, {len(tokens)}), not {values.shape}."
        )
    if not values.size:
        raise WorkbenchError("A shift map needs at least one layer and one token; found none.")
    if any(after <= before for before, after in pairwise(layers)):
        raise WorkbenchError(f"The layers of a shift map must ascend without repeats; found {list(layers)}.")
    for name, column in (("roles", roles), ("excluded", excluded), ("counts", counts)):
        if column is not None and len(column) != len(tokens):
            raise WorkbenchError(
                f"A shift map of {len(tokens)} tokens needs as many {name}, but {len(column)} were given."
            )
    for role in roles or ():
        check_role(role)
    if np.isinf(values).any():
        raise WorkbenchError("The shift map holds infinite values; find where they come from before drawing it.")


def _customdata(
    layers: Sequence[int],
    labels: Sequence[str],
    roles: Sequence[str] | None,
    counts: Sequence[int] | np.ndarray | None,
) -> list[list[list[int | str]]]:
    columns = [
        (
            index,
            plotly_text(label),
            "" if roles is None else roles[index],
            "" if counts is None else int(counts[index]),
        )
        for index, label in enumerate(labels)
    ]
    return [[[int(layer), *column] for column in columns] for layer in layers]


def _hover(unit: str, with_roles: bool, with_counts: bool, generic: bool) -> str:
    number = "%{z:+.3~g}" if unit == "raw" else "%{z:+.3f}"
    lines = ["<b>%{customdata[2]}</b>" + ("" if generic else " (token %{customdata[1]})"), "layer %{customdata[0]}"]
    if with_roles:
        lines.append("role %{customdata[3]}")
    lines.append(f"{number} {unit}")
    if with_counts:
        lines.append("mean over %{customdata[4]} prompts")
    return "<br>".join(lines) + "<extra></extra>"


def _missing_cells(
    unavailable: np.ndarray, rows: Sequence[str], labels: Sequence[str], dropped: np.ndarray, theme: str
) -> go.Heatmap:
    """Grey cells under the map: excluded tokens and missing values look different from a shift of zero."""
    reasons = [
        f"<b>{plotly_text(label)}</b> (token {index})<br>" + ("excluded from the alignment" if out else "no value")
        for index, (label, out) in enumerate(zip(labels, dropped, strict=True))
    ]
    colour = MISSING.on(theme)
    return go.Heatmap(
        z=np.where(unavailable, 1.0, np.nan),
        x=list(range(len(labels))),
        y=list(rows),
        colorscale=[[0, colour], [1, colour]],
        showscale=False,
        hoverongaps=False,
        customdata=[reasons for _ in rows],
        hovertemplate="%{customdata}<extra></extra>",
        name="excluded or missing",
    )


def _add_role_strip(
    figure: go.Figure, roles: Sequence[str], labels: Sequence[str], theme: str, *, bottom: float
) -> None:
    present = list(dict.fromkeys(roles))
    edges = len(present)
    colours: list[list[float | str]] = []
    for index, role in enumerate(present):
        colours += [[index / edges, ROLES[role].on(theme)], [(index + 1) / edges, ROLES[role].on(theme)]]
    figure.add_trace(
        go.Heatmap(
            z=[[present.index(role) + 0.5 for role in roles]],
            x=list(range(len(roles))),
            y=["role"],
            zmin=0,
            zmax=edges,
            colorscale=colours,
            showscale=False,
            yaxis="y2",
            customdata=[
                [
                    [plotly_text(label), index, role]
                    for index, (label, role) in enumerate(zip(labels, roles, strict=True))
                ]
            ],
            hovertemplate="<b>%{customdata[0]}</b> (token %{customdata[1]})<br>role %{customdata[2]}<extra></extra>",
            name="roles",
        )
    )
    figure.update_layout(
        yaxis2={
            "domain": [bottom, 1],
            "anchor": "x",
            "type": "category",
            "showticklabels": False,
            "ticks": "",
            "showgrid": False,
            "showline": False,
            "fixedrange": True,
        }
    )
    # A role is written into its strip where its run is wide enough at the narrowest page; the legend has them all.
    cell = (NARROWEST - _MARGINS) / len(roles)
    start = 0
    for role, run in groupby(roles):
        length = len(list(run))
        if cell * length > 6.2 * len(role) + 8:
            figure.add_annotation(
                x=start + (length - 1) / 2,
                y=0,
                yref="y2",
                text=role,
                showarrow=False,
                font={"size": 10.5, "color": INK.on(theme)},
            )
        start += length


def _add_legend(figure: go.Figure, entries: Sequence[str], theme: str) -> None:
    for entry in entries:
        colour = ROLES.get(entry, MISSING).on(theme)
        figure.add_trace(
            go.Scatter(
                x=[None],
                y=[None],
                mode="markers",
                marker={"symbol": "square", "size": 13, "color": colour, "line": {"width": 1, "color": PAGE.on(theme)}},
                name=entry,
                hoverinfo="skip",
            )
        )
    figure.update_layout(legend_itemclick=False, legend_itemdoubleclick=False)


def _style_axes(
    figure: go.Figure, labels: Sequence[str], n_layers: int, top: float, width: int | None, generic: bool
) -> None:
    # At most as many labels as fit side by side; the hover names the tokens between them.
    fitting = int(((width or NARROWEST) - _MARGINS) / _PIXELS_PER_LABEL)
    step = math.ceil(len(labels) / fitting)
    ticks = list(range(0, len(labels), step))
    caption = "Position" if generic else "Token"
    figure.update_xaxes(
        tickmode="array",
        tickvals=ticks,
        ticktext=[plotly_text(shortened(labels[index], _LABEL_LENGTH)) for index in ticks],
        tickangle=-90,
        tickfont={"size": 10.5, "family": MONOSPACE_FAMILY},
        ticklen=3,
        title_text=caption if step == 1 else f"{caption} (one in {step} named; hover for the others)",
        range=[-0.5, len(labels) - 0.5],
        showgrid=False,
        showline=False,
        anchor="y",
    )
    # Never set a tick step on the axis of the strip: only the layers' axis is meant.
    figure.update_layout(
        yaxis={
            "domain": [0, top],
            "type": "category",
            "title": {"text": "Layer"},
            "dtick": max(1, 5 * math.ceil(n_layers / 60)) if n_layers > 12 else 1,
            "tick0": 0,
            "showgrid": False,
            "showline": False,
        }
    )
