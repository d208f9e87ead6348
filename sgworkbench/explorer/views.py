"""The panel's views: readings in, HTML and plotly figures out. Nothing here runs a model or touches a widget."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sgworkbench.analysis import Directions
from sgworkbench.explorer.readings import PromptRun, TokenGrid, projections
from sgworkbench.explorer.state import ExplorerState
from sgworkbench.plotting.labels import visible
from sgworkbench.plotting.layer_curves import layer_curves
from sgworkbench.plotting.shift_map import robust_limit, shift_map
from sgworkbench.plotting.theme import ARMS as ARM_STYLES
from sgworkbench.plotting.theme import INK, MUTED
from sgworkbench.plotting.tokens import coloured_tokens_html

_TOWARDS: Mapping[str, tuple[str, str]] = {
    "refusal": ("compliance", "refusal"),
    "awareness": ("harmless", "harmful"),
}
_SEE_THROUGH = "rgba(0,0,0,0)"


def tokens_html(run: PromptRun, directions: Directions, state: ExplorerState) -> str:
    """Return an arm's tokens coloured by their projection at the focus layer; the hover names value, role and layer."""
    values = projections(run, directions)[state.focus_layer]
    # The first token often holds an activation far larger than all others, which would leave them without colour.
    finite = values[1:][np.isfinite(values[1:])]
    limit = robust_limit(finite, 95.0) if finite.size else None
    site = directions.sites[state.focus_layer]
    return coloured_tokens_html(
        [*run.item.tokens],
        values,
        unit=f"separation units at layer {site.layer}",
        label=f"{state.arm}: projection onto the {directions.concept} direction, {site}",
        roles=list(run.item.roles),
        limit=limit,
        towards=_TOWARDS[state.concept],
    )


def map_figure(grid: TokenGrid, directions: Directions, state: ExplorerState, *, theme: str = "light") -> go.Figure:
    """Return the layer x token map, with a frame around the cell in focus."""
    # Layers whose classes cross-validation cannot tell apart have separation units near a division by zero.
    first, last = state.shown or (0, len(directions.sites) - 1)
    rows = slice(first, last + 1)
    values, trusted = grid.values[rows], directions.separated()[rows]
    limit = robust_limit(values[trusted]) if any(trusted) else None
    figure = shift_map(
        values,
        list(grid.tokens),
        [site.layer for site in directions.sites[rows]],
        site=directions.sites[0].kind,
        unit="separation units",
        title="",
        roles=list(grid.roles),
        limit=limit,
        towards=_TOWARDS[state.concept],
        theme=theme,
    )
    column = focus_column(grid, state.focus_token)
    if column is not None and first <= state.focus_layer <= last:
        row = state.focus_layer - first
        frame = {"color": INK.on(theme), "width": 2}
        figure.add_shape(
            type="rect", x0=column - 0.5, x1=column + 0.5, y0=row - 0.5, y1=row + 0.5, line=frame, xref="x", yref="y"
        )
    return _for_panel(figure, top=34)


def focus_column(grid: TokenGrid, plain_position: int | None) -> int | None:
    """Return the column of the token in focus; None where the map does not hold it."""
    position = max(grid.plain_positions) if plain_position is None else plain_position
    return grid.plain_positions.index(position) if position in grid.plain_positions else None


def gap_figure(table: pd.DataFrame, state: ExplorerState, kind: str, *, theme: str = "light") -> go.Figure:
    """Return the gap of this prompt by layer, one line per arm, with the focus layer marked."""
    if state.shown is not None:
        table = table[table["layer"].between(*state.shown)]
    figure = layer_curves(
        table,
        y="gap",
        low=None,
        high=None,
        site=kind,
        title="",
        y_title="Awareness − refusal (separation units)",
        reference_lines=_class_means(table["gap"]),
        theme=theme,
    )
    if state.focus_layer in set(table["layer"]):
        figure.add_vline(x=state.focus_layer, line={"color": MUTED.on(theme), "width": 1, "dash": "dot"}, layer="below")
    figure.update_xaxes(dtick=max(1, 5 * round(table["layer"].nunique() / 40)), tick0=0)
    return _for_panel(figure, top=34, height=330)


def trajectory_figure(
    values: Mapping[str, Sequence[float]], concept: str, site: str, *, theme: str = "light"
) -> go.Figure:
    """Return the projection along the completions; it names steps, never the tokens, which may be harmful text.

    Args:
        values: per arm, the projection at the last prompt token and then at every generated token.
        concept: what is projected onto.
        site: where.
        theme: "light" or "dark".
    """
    rows = [
        (arm, step - 1, value) for arm, series in values.items() for step, value in enumerate(series) if value == value
    ]
    frame = pd.DataFrame(rows, columns=["arm", "token", "value"])
    figure = layer_curves(
        frame,
        x="token",
        low=None,
        high=None,
        site=site,
        title="",
        y_title=f"{concept.capitalize()} (separation units)",
        x_title="Generated token (−1: last prompt token)",
        reference_lines=_class_means(frame["value"]),
        theme=theme,
    )
    figure.update_traces(marker_size=4)
    if len(frame) and frame["token"].max() < 10:
        figure.update_xaxes(dtick=1)
    return _for_panel(figure, top=34, height=300)


def _class_means(values: pd.Series[float]) -> dict[str, float]:
    """Return the lines at 0 and 1, and only that at 0 where the labels of both would overlap."""
    far = float(values.max() - values.min()) > 12
    return {"0": 0.0} if far else {"0": 0.0, "1": 1.0}


def _for_panel(figure: go.Figure, *, top: int, height: int | None = None) -> go.Figure:
    """Drop title and page colour: the panel has headings of its own, and the notebook's theme shows through."""
    old = figure.layout.margin.t or top
    total = height or (figure.layout.height - old + top)
    figure.update_layout(
        title=None,
        margin={"t": top, "l": 58},
        height=total,
        paper_bgcolor=_SEE_THROUGH,
        plot_bgcolor=_SEE_THROUGH,
        legend={"y": 1.01, "yanchor": "bottom"},
        uirevision="kept",
    )
    return figure


def next_token_html(table: pd.DataFrame, before: str, after: str) -> str:
    """Return the raised and lowered next tokens as one small table."""
    if table.empty:
        return "<p class='sgx-note'>No logit changes: this steering does not act on the prompt's tokens.</p>"
    parts = []
    for change, heading in (("raised", "Raised"), ("lowered", "Lowered")):
        rows = table[table["change"] == change]
        cells = "".join(
            f"<tr><td class='sgx-token'>{html.escape(visible(str(token)))}</td>"
            f"<td>{difference:+.2f}</td><td>{_percent(float(before_p))}</td>"
            f"<td>{_percent(float(after_p))}</td></tr>"
            for token, difference, before_p, after_p in zip(
                *(rows[name] for name in ("token", "difference", "probability_before", "probability_after")),
                strict=True,
            )
        )
        parts.append(
            f"<table class='sgx-table'><thead><tr><th>{heading}</th><th title='difference of log-probabilities'>"
            f"Δ log p</th><th>{html.escape(before)}</th><th>{html.escape(after)}</th></tr></thead>"
            f"<tbody>{cells}</tbody></table>"
        )
    return f"<div class='sgx-pair'>{''.join(parts)}</div>"


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f} %" if probability >= 0.0005 else "&lt; 0.1 %"


def focus_html(table: pd.DataFrame, directions: Directions, layer: int) -> str:
    """Return the token in focus, by arm, as a table."""
    rows = []
    for row in table.itertuples():
        if str(row.token) == "" and str(row.role) == "":
            rows.append(f"<tr><td>{_arm(str(row.arm))}</td><td colspan='3'>no matching token</td></tr>")
            continue
        rows.append(
            f"<tr><td>{_arm(str(row.arm))}</td><td class='sgx-token'>{html.escape(visible(str(row.token)))}</td>"
            f"<td>{row.raw:+.3g}</td><td>{row.separation_units:+.2f}</td></tr>"
        )
    head = f"<tr><th>arm</th><th>token</th><th>raw</th><th>{html.escape(directions.concept)} (sep. units)</th></tr>"
    return f"<table class='sgx-table'><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _arm(name: str) -> str:
    shade = ARM_STYLES[name].shade
    return f"<span class='sgx-arm' style='--l:{shade.light};--d:{shade.dark}'>{html.escape(name)}</span>"


def arm_heading(name: str) -> str:
    """Return an arm's name in its colour, for both themes."""
    return _arm(name)
