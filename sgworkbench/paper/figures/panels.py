"""Small multiples: dots with whiskers, curves with ribbons and heatmaps, drawn from one tidy table each.

Columns every table has: `panel` (title of its panel), `value`; dots and curves: `x`, `series`, `low`, `high`, `n`;
heatmaps: `x`, `y` and, where a cell is to be marked, `mark`. A value that is missing is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sgworkbench.plotting.layout import finish, plotly_text
from sgworkbench.plotting.theme import INK, MISSING, SeriesStyle, with_alpha

_ROW_GAP = 96
"""Pixels between two rows: tick labels, axis title and the title of the panel below."""
WIDTH = 1000


@dataclass
class Grid:
    """Panels in reading order on one figure; see `grid`."""

    figure: go.Figure
    places: dict[str, tuple[int, int]]
    row_height: int
    rows: int
    title_lines: int
    shown: dict[str, str]

    def legend_once(self, key: str, label: str) -> bool:
        """Whether this series still needs its legend entry; remembers that it got one."""
        is_new = key not in self.shown
        self.shown.setdefault(key, label)
        return is_new

    def finish(self, title: str, subtitle: str, **options: Any) -> go.Figure:
        """Set title, legend and margins; `options` go to `layout.finish`."""
        height = self.rows * self.row_height + (self.rows - 1) * _ROW_GAP
        return finish(
            self.figure,
            theme="light",
            title=title,
            subtitle=subtitle,
            plot_height=height,
            legend_entries=list(self.shown.values()),
            above=18 * self.title_lines + 8,
            **options,
        )


def grid(
    panels: Sequence[str], columns: int, *, row_height: int = 230, spacing: float = 0.06, shared_y: bool = False
) -> Grid:
    """Return empty panels; a title may hold one `<br>`."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    height = rows * row_height + (rows - 1) * _ROW_GAP
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[f"<b>{panel}</b>" for panel in panels],
        horizontal_spacing=spacing if columns > 1 else 0,
        vertical_spacing=_ROW_GAP / height if rows > 1 else 0,
        shared_yaxes=shared_y,
    )
    # Only panel titles are annotations so far; a smaller font keeps four of them apart at 1000 pixels.
    figure.update_annotations(font={"size": 12}, yanchor="bottom", yshift=3)
    places = {panel: (index // columns + 1, index % columns + 1) for index, panel in enumerate(panels)}
    lines = max(panel.count("<br>") + 1 for panel in panels)
    for panel in range(len(panels), rows * columns):
        where = {"row": panel // columns + 1, "col": panel % columns + 1}
        figure.update_xaxes(visible=False, **where)
        figure.update_yaxes(visible=False, **where)
    return Grid(figure, places, row_height, rows, lines, {})


def _error(rows: pd.DataFrame, colour: str) -> dict[str, Any] | None:
    if not {"low", "high"} <= set(rows.columns) or rows["low"].isna().all():
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": rows["high"] - rows["value"],
        "arrayminus": rows["value"] - rows["low"],
        "color": colour,
        "thickness": 1.5,
        "width": 3,
    }


def dots(panels: Grid, frame: pd.DataFrame, styles: Mapping[str, SeriesStyle], *, percent: bool = True) -> None:
    """Draw dots with whiskers at categories of `x`, the series side by side.

    The number of items is in the hover. Categories keep the table's order.
    """
    number = ".1%" if percent else ".3~g"
    for panel, part in frame.groupby("panel", sort=False):
        row, column = panels.places[str(panel)]
        categories = list(dict.fromkeys(part["x"]))
        present = [name for name in styles if name in set(part["series"])]
        width = min(0.18, 0.78 / max(1, len(present)))
        for index, name in enumerate(present):
            rows = part[(part["series"] == name) & part["value"].notna()]
            if rows.empty:
                continue
            style = styles[name]
            colour = style.shade.light
            offset = (index - (len(present) - 1) / 2) * width
            panels.figure.add_trace(
                go.Scatter(
                    x=[categories.index(each) + offset for each in rows["x"]],
                    y=rows["value"],
                    error_y=_error(rows, colour),
                    mode="markers",
                    marker={"color": colour, "size": 8, "symbol": style.symbol},
                    name=plotly_text(style.label),
                    legendgroup=name,
                    showlegend=panels.legend_once(name, style.label),
                    customdata=rows[["x", "n"]].assign(low=rows.get("low"), high=rows.get("high")).to_numpy(),
                    hovertemplate=f"%{{customdata[0]}}<br>%{{y:{number}}} (%{{customdata[2]:{number}}} to "
                    f"%{{customdata[3]:{number}}})<br>n = %{{customdata[1]}}<extra>{plotly_text(style.label)}</extra>",
                    meta={"drawn": "value", "axis": "y"},
                ),
                row=row,
                col=column,
            )
        panels.figure.update_xaxes(
            tickvals=list(range(len(categories))),
            ticktext=categories,
            tickfont={"size": 11},
            range=[-0.6, len(categories) - 0.4],
            showgrid=False,
            row=row,
            col=column,
        )
        if percent:
            top = float(np.nanmax(part[["value", "high"]].to_numpy(dtype=float)))
            panels.figure.update_yaxes(
                tickformat=".0%", range=[-0.02 * max(top, 0.1), max(1.06 * top, 0.1)], row=row, col=column
            )


def curves(
    panels: Grid,
    frame: pd.DataFrame,
    styles: Mapping[str, SeriesStyle],
    *,
    percent: bool = False,
    markers: bool = True,
    x_title: str = "",
    log_x: bool = False,
) -> None:
    """Draw lines with ribbons over a numeric `x`."""
    number = ".1%" if percent else ".3~g"
    for panel, part in frame.groupby("panel", sort=False):
        row, column = panels.places[str(panel)]
        for name, style in styles.items():
            rows = part[part["series"] == name].sort_values("x")
            if rows["value"].notna().sum() == 0:
                continue
            colour = style.shade.light
            bounded = rows[rows[["low", "high"]].notna().all(axis=1)] if "low" in rows else rows.iloc[:0]
            if len(bounded) > 1:
                panels.figure.add_trace(
                    go.Scatter(
                        x=[*bounded["x"], *bounded["x"][::-1]],
                        y=[*bounded["high"], *bounded["low"][::-1]],
                        mode="lines",
                        line={"width": 0},
                        fill="toself",
                        fillcolor=with_alpha(colour, 0.16),
                        hoverinfo="skip",
                        legendgroup=name,
                        showlegend=False,
                    ),
                    row=row,
                    col=column,
                )
            panels.figure.add_trace(
                go.Scatter(
                    x=rows["x"],
                    y=rows["value"],
                    mode="lines+markers" if markers else "lines",
                    line={"color": colour, "width": 2, "dash": style.dash},
                    marker={"color": colour, "size": 6, "symbol": style.symbol},
                    name=plotly_text(style.label),
                    legendgroup=name,
                    showlegend=panels.legend_once(name, style.label),
                    hovertemplate=f"%{{x}}<br>%{{y:{number}}}<extra>{plotly_text(style.label)}</extra>",
                    meta={"drawn": "value", "axis": "y"},
                ),
                row=row,
                col=column,
            )
        where = {"row": row, "col": column}
        panels.figure.update_xaxes(title_text=x_title, title_standoff=4, showgrid=False, **where)
        if log_x:
            panels.figure.update_xaxes(type="log", **where)
        if percent:
            top = float(np.nanmax(part[["value", "high"]].to_numpy(dtype=float)))
            panels.figure.update_yaxes(tickformat=".0%", range=[-0.03 * top, 1.06 * top], **where)


def heat(
    panels: Grid,
    frame: pd.DataFrame,
    scale: Sequence[Sequence[float | str]],
    *,
    limits: tuple[float | int, float | int],
    bar: str,
    percent: bool = True,
    bar_index: int = 0,
    n_bars: int = 1,
    x_title: str = "",
    y_title: str = "",
) -> None:
    """Draw heatmaps of one quantity on one colour scale; cells with a `mark` get a cross.

    Args:
        panels: where.
        frame: the table.
        scale: plotly colour scale.
        limits: ends of the scale.
        bar: title of the colour bar.
        percent: whether values are shares.
        bar_index: which of several colour bars, counted from the top.
        n_bars: how many there are.
        x_title: quantity across.
        y_title: quantity upwards.
    """
    for index, (panel, part) in enumerate(frame.groupby("panel", sort=False)):
        row, column = panels.places[str(panel)]
        xs, ys = _ordered(part["x"]), _ordered(part["y"])
        wide = part.pivot(index="y", columns="x", values="value").reindex(index=ys, columns=xs)
        values = wide.to_numpy(dtype=float)
        labels = (
            [str(x) if isinstance(x, str) else f"{x:g}" for x in xs],
            [str(y) if isinstance(y, str) else f"{y:g}" for y in ys],
        )
        length = 1 / n_bars - (0.06 if n_bars > 1 else 0)
        panels.figure.add_trace(
            go.Heatmap(
                z=values,
                x=labels[0],
                y=labels[1],
                zmin=limits[0],
                zmax=limits[1],
                colorscale=[list(stop) for stop in scale],
                showscale=index == 0,
                colorbar={
                    "title": {"text": bar, "side": "right", "font": {"size": 11.5}},
                    "tickformat": ".0%" if percent else ".3~g",
                    "thickness": 12,
                    "len": length,
                    "y": 1 - bar_index / n_bars,
                    "yanchor": "top",
                },
                xgap=1,
                ygap=1,
                hovertemplate=f"{x_title} %{{x}}<br>{y_title} %{{y}}<br>%{{z:{'.1%' if percent else '.3~g'}}}"
                "<extra></extra>",
                meta={"drawn": "value", "axis": "z"},
            ),
            row=row,
            col=column,
        )
        where = {"row": row, "col": column}
        panels.figure.update_xaxes(title_text=x_title, title_standoff=4, type="category", showgrid=False, **where)
        panels.figure.update_yaxes(title_text=y_title, title_standoff=4, type="category", showgrid=False, **where)
        empty = [(x, y) for (i, y), (j, x) in product(enumerate(ys), enumerate(xs)) if np.isnan(values[i, j])]
        _marks(panels, pd.DataFrame(empty, columns=["x", "y"]), where, "line-ew", MISSING.light)
        if "mark" in part:
            _marks(panels, part[part["mark"].fillna(False).astype(bool)], where, "x-thin", INK.light)


def _ordered(values: pd.Series[Any]) -> list[Any]:
    """Return the categories of an axis: numbers ascending, names as they come."""
    unique = list(dict.fromkeys(values))
    return unique if isinstance(unique[0], str) else sorted(unique)


def _marks(panels: Grid, rows: pd.DataFrame, where: dict[str, int], symbol: str, colour: str) -> None:
    if rows.empty:
        return
    panels.figure.add_trace(
        go.Scatter(
            x=[str(x) if isinstance(x, str) else f"{x:g}" for x in rows["x"]],
            y=[str(y) if isinstance(y, str) else f"{y:g}" for y in rows["y"]],
            mode="markers",
            marker={"symbol": symbol, "size": 7, "line": {"color": colour, "width": 1.6}},
            hoverinfo="skip",
            showlegend=False,
        ),
        **where,
    )
