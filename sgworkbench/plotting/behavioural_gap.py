"""Figures of the behavioural gap: the two-by-two table as shares, and the rates with their intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sgworkbench.plotting.checks import require_columns
from sgworkbench.plotting.layout import finish, plotly_text
from sgworkbench.plotting.theme import BEHAVIOUR, INK, PAGE, with_alpha

# Aware in full colour, unaware pale and hatched: behaviour keeps its own colour in both.
_CELLS = (
    ("aware_complied", "aware, complied", "complied", 1.0, ""),
    ("unaware_complied", "not aware, complied", "complied", 0.38, "/"),
    ("aware_refused", "aware, refused", "refused", 1.0, ""),
    ("unaware_refused", "not aware, refused", "refused", 0.38, "/"),
)
_RATES = (
    ("aware", "P(aware)", "refused", "circle-open"),
    ("aware_and_complied", "P(aware and complied)", "complied", "diamond"),
    ("complied_given_aware", "P(complied | aware)", "complied", "triangle-down-open"),
)
_ROW = 46


def gap_table_figure(table: pd.DataFrame, reading: str, judge: str, *, theme: str = "light") -> go.Figure:
    """One bar per arm, cut into the four cells of the two-by-two table; the first is the gap.

    Args:
        table: `BehaviouralGap.table`.
        reading: how awareness was read.
        judge: who judged compliance.
        theme: "light" or "dark".

    Raises:
        WorkbenchError: a column is missing, or there is no row.
    """
    require_columns(table, ["arm", "n", "no_reading", *(cell for cell, *_ in _CELLS)], "table of the behavioural gap")
    arms = [_tick(str(arm), int(n)) for arm, n in zip(table["arm"], table["n"], strict=True)]
    n = table["n"].to_numpy(dtype=float)
    figure = go.Figure()
    for cell, label, behaviour, opacity, pattern in _CELLS:
        counts = table[cell].to_numpy(dtype=float)
        shares = np.divide(counts, n, out=np.full(len(n), np.nan), where=n > 0)
        colour = BEHAVIOUR[behaviour].shade.on(theme)
        figure.add_trace(
            go.Bar(
                y=arms,
                x=shares,
                orientation="h",
                name=label,
                marker={
                    "color": with_alpha(colour, opacity),
                    "line": {"color": PAGE.on(theme), "width": 2},
                    "pattern": {
                        "shape": pattern,
                        "fgcolor": colour,
                        "bgcolor": with_alpha(colour, 0.12),
                        "size": 9,
                        "fgopacity": 0.45,
                    },
                },
                text=[f"{int(c)}" if np.isfinite(s) and s >= 0.04 else "" for c, s in zip(counts, shares, strict=True)],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": PAGE.on(theme) if opacity == 1 else INK.on(theme), "size": 12},
                customdata=np.column_stack([counts, n]),
                hovertemplate="%{y}<br>%{customdata[0]:.0f} of %{customdata[1]:.0f} (%{x:.1%})<extra>"
                + label
                + "</extra>",
            )
        )
    figure.update_layout(barmode="stack", bargap=0.35, legend_traceorder="normal")
    figure.update_xaxes(
        title_text="Share of coherent answers with verdict and reading", tickformat=".0%", range=[0, 1.005]
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    return finish(
        figure,
        theme=theme,
        title="Aware of the risk, and what was done",
        subtitle=plotly_text(
            f"Awareness: {reading}. Compliance: {judge}. Numbers in the bars are answers; "
            "the first piece is the awareness-compliance gap."
        ),
        plot_height=_ROW * len(arms) + 30,
        legend_entries=[label for _, label, *_ in _CELLS],
    )


def gap_rates_figure(frame: pd.DataFrame, reading: str, judge: str, *, theme: str = "light") -> go.Figure:
    """Three dots per arm with their Wilson intervals: awareness, the gap, and compliance given awareness.

    Args:
        frame: rows of `BehaviouralGap.to_dataframe()` for one category.
        reading: how awareness was read.
        judge: who judged compliance.
        theme: "light" or "dark".

    Raises:
        WorkbenchError: a column is missing, or there is no row.
    """
    require_columns(frame, ["arm", "quantity", "value", "low", "high", "n"], "rates of the behavioural gap")
    arms = list(dict.fromkeys(frame["arm"].astype(str)))
    figure = go.Figure()
    for place, (quantity, label, behaviour, symbol) in enumerate(_RATES):
        part = frame[frame["quantity"] == quantity].set_index("arm").loc[arms]
        part = part[part["value"].notna()]
        colour = BEHAVIOUR[behaviour].shade.on(theme)
        value = part["value"].to_numpy(dtype=float)
        figure.add_trace(
            go.Scatter(
                x=value,
                y=[arms.index(arm) + 0.24 * (place - 1) for arm in part.index],
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": part["high"].to_numpy(dtype=float) - value,
                    "arrayminus": value - part["low"].to_numpy(dtype=float),
                    "color": colour,
                    "thickness": 2,
                    "width": 5,
                },
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 11, "line": {"color": colour, "width": 2}},
                name=label,
                customdata=np.column_stack([part["n"], part["low"], part["high"]]) if len(part) else None,
                hovertemplate=(
                    "%{x:.1%} (%{customdata[1]:.1%} to %{customdata[2]:.1%})<br>n = %{customdata[0]:.0f}<extra>"
                    + label
                    + "</extra>"
                ),
            )
        )
    figure.update_xaxes(title_text="Rate, with its Wilson interval", tickformat=".0%", range=[-0.02, 1.02])
    ticks = [_rate_tick(arm, frame) for arm in arms]
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(arms))),
        ticktext=ticks,
        range=[len(arms) - 0.5, -0.5],
        showgrid=False,
        ticks="",
    )
    return finish(
        figure,
        theme=theme,
        title="Awareness, and compliance in spite of it",
        subtitle=plotly_text(
            f"Awareness: {reading}. Compliance: {judge}. Given awareness, n is the number of aware answers."
        ),
        plot_height=max(150, 78 * len(arms) + 20),
        legend_entries=[label for _, label, *_ in _RATES],
    )


def _tick(arm: str, n: int) -> str:
    count = f"n = {n}" if n else "awareness not available"
    return f"<b>{plotly_text(arm)}</b><br>{count}"


def _rate_tick(arm: str, frame: pd.DataFrame) -> str:
    part = frame[frame["arm"].astype(str) == arm]
    counts = dict(zip(part["quantity"], part["n"], strict=True))
    n, aware = int(counts["aware"]), int(counts["complied_given_aware"])
    count = f"n = {n}, aware {aware}" if n else "awareness not available"
    return f"<b>{plotly_text(arm)}</b><br>{count}"
