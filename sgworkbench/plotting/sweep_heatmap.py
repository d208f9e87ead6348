"""Heatmaps of sweeps over layers and coefficients, with incoherent cells hatched and the unsteered runs named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sgworkbench.plotting.layout import finish
from sgworkbench.plotting.sweep_tables import COHERENT_SHARE, grid_table, in_order, one_slice, reference_table
from sgworkbench.plotting.sweep_text import (
    chosen_metrics,
    counts_text,
    dose_title,
    model_name,
    reference_text,
    short,
    sites_text,
    slice_text,
)
from sgworkbench.plotting.theme import (
    ARMS,
    BEHAVIOUR,
    INK,
    MISSING,
    NULL,
    OTHER_SERIES,
    PAGE,
    Shade,
    check_theme,
    diverging_scale,
)

if TYPE_CHECKING:
    from sgworkbench.evaluation.sweep.result import SweepResult

_ROW = 17


def heatmap_table(result: SweepResult, metric: str | Sequence[str] | None = None, **where: Any) -> pd.DataFrame:
    """Return the table behind `heatmap`: one row per cell and metric; see `grid_table`.

    Raises:
        WorkbenchError: as `heatmap`.
    """
    free = () if "n_steered_layers" in where else ("n_steered_layers",)
    return grid_table(result, chosen_metrics(result, metric), one_slice(result, where, free=free))


def heatmap(
    result: SweepResult, metric: str | Sequence[str] | None = None, *, theme: str = "light", **where: Any
) -> go.Figure:
    """Draw layer x coefficient, one panel per metric.

    Colours: log-odds and projections around the unsteered run of the same condition, towards refusal or away from it;
    rates from 0 to 1; KL and perplexity from least to most. Cells with less than `COHERENT_SHARE` coherent answers are
    hatched; cells without a value are grey. Under every panel's name stand the values of vanilla and prompt only.

    Args:
        result: a sweep.
        metric: one metric or up to four; by default refusal, over-refusal, KL and coherence, from answers where there
            are any and else from the screen.
        theme: "light" or "dark".
        where: the slice to draw, for example `vector="mean_shift"`; needed where an axis has several values.

    Raises:
        WorkbenchError: an unknown metric, an axis with several values that was not fixed, or more than four metrics.
    """
    from sgworkbench.evaluation.sweep.result import ANSWER_COLUMNS, SCREEN_COLUMNS

    check_theme(theme)
    table = heatmap_table(result, metric, **where)
    metrics = list(dict.fromkeys(table["metric"]))
    references = reference_table(result, metrics)
    firsts: dict[str, int] = dict(zip(table["layers"], table["first_layer"], strict=True))
    layers, doses = in_order(list(table["layers"]), firsts), sorted(set(table["dose"]))
    known = {**SCREEN_COLUMNS, **ANSWER_COLUMNS}
    titles = [f"{short(known[name].title)}<br>{reference_text(references, name)}" for name in metrics]
    gap = 0.03 + 0.05 * (len(metrics) > 1)
    figure = make_subplots(
        cols=len(metrics), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=gap if len(metrics) > 1 else 0
    )
    figure.update_annotations(font={"size": 12.5, "color": INK.on(theme)}, yshift=6)
    for column, name in enumerate(metrics, start=1):
        part = table[table["metric"] == name]
        wide = part.pivot(index="layers", columns="dose", values="value").reindex(index=layers, columns=doses)
        rate = part.pivot(index="layers", columns="dose", values="coherent_rate").reindex(index=layers, columns=doses)
        hover = part.pivot(index="layers", columns="dose", values="cell_id").reindex(index=layers, columns=doses)
        texts = {row["cell_id"]: _hover(row) for row in part.to_dict("records")}
        domain = figure.get_subplot(1, column).xaxis.domain
        figure.add_heatmap(
            x=list(range(len(doses))),
            y=list(range(len(layers))),
            z=wide.to_numpy(dtype=float),
            text=[[texts.get(cell, "not in the grid") for cell in row] for row in hover.to_numpy()],
            hovertemplate="%{text}<extra></extra>",
            xgap=1,
            ygap=1,
            colorbar={
                "x": domain[1] + 0.006,
                "xanchor": "left",
                "thickness": 9,
                "len": 1.0,
                "outlinewidth": 0,
                "tickfont": {"size": 11},
                "nticks": 6,
            },
            **_colours(name, wide.to_numpy(dtype=float), _middle(result, part, name), theme),
            row=1,
            col=column,
        )
        _hatch(figure, rate.to_numpy(dtype=float) < COHERENT_SHARE, column, theme)
        figure.update_xaxes(
            tickvals=list(range(len(doses))),
            ticktext=[f"{dose:g}" for dose in doses],
            tickangle=-90 if len(doses) > 6 else 0,
            range=[-0.5, len(doses) - 0.5],
            showgrid=False,
            title_text=dose_title(table),
            row=1,
            col=column,
        )
    step = max(1, len(layers) // 30)
    figure.update_yaxes(range=[-0.5, len(layers) - 0.5], showgrid=False, ticks="")
    figure.update_yaxes(
        tickvals=list(range(0, len(layers), step)),
        ticktext=layers[::step],
        title_text="Layer" if (table["n_steered_layers"] == 1).all() else "Layers",
        row=1,
        col=1,
    )
    figure.update_layout(plot_bgcolor=MISSING.on(theme))
    words = [] if (table["n_steered_layers"] == 1).all() else ["rows are sets of layers steered together"]
    if table["coherent_rate"].notna().any():
        words.append(f"hatched: less than {100 * COHERENT_SHARE:.0f} % of the answers coherent")
    else:
        words.append("no answers, so coherence is not known")
    if table["value"].isna().any():
        words.append("grey: not answered, or no such dose")
    return finish(
        figure,
        theme=theme,
        title=f"Layer x coefficient, {model_name(result)}, written at {sites_text(table)}",
        subtitle=f"{slice_text(table)}; {counts_text(result, metrics)}; {'; '.join(words)}",
        plot_height=max(220, _ROW * len(layers)),
        bottom=76,
        right=70,
        above=44,
    )


def _hover(row: dict[str, Any]) -> str:
    """Return what the pointer shows over a cell."""
    lines = [f"layers {row['layers']}, dose {row['dose']:g} (alpha {row['alpha']:.3g})"]
    interval = "" if np.isnan(row["low"]) else f" ({row['low']:.3f} to {row['high']:.3f})"
    lines.append("no value" if np.isnan(row["value"]) else f"{row['metric']} {row['value']:.3f}{interval}")
    if not np.isnan(row["n"]):
        lines.append(f"n = {int(row['n'])}")
    if not np.isnan(row["coherent_rate"]):
        lines.append(f"{100 * row['coherent_rate']:.0f} % coherent")
    return "<br>".join(lines)


def _middle(result: SweepResult, part: pd.DataFrame, metric: str) -> float:
    """Return the value of the unsteered run of the condition that is drawn; 0 where there is none."""
    rows = result.reference[result.reference["condition"] == part["condition"].iloc[0]]
    return float(rows[metric].iloc[0]) if len(rows) and pd.notna(rows[metric].iloc[0]) else 0.0


def _colours(metric: str, values: np.ndarray, middle: float, theme: str) -> dict[str, Any]:
    if "log_odds" in metric or "projection" in metric:
        spread = float(np.nanmax(np.abs(values - middle))) if np.isfinite(values).any() else 1.0
        spread = spread or 1.0
        return {"colorscale": diverging_scale(theme), "zmin": middle - spread, "zmax": middle + spread}
    scale = [[0, PAGE.on(theme)], [1, _sequential(metric).on(theme)]]
    if "rate" in metric or metric.startswith("top1"):
        return {"colorscale": scale, "zmin": 0, "zmax": 1}
    # The lowest value stays visible against the page, and one broken cell must not hide all others.
    return {"colorscale": scale, "zmin": 0, "zmax": _high_end(values)}


def _sequential(metric: str) -> Shade:
    if metric.startswith("refusal_rate"):
        return BEHAVIOUR["refused"].shade
    if metric.startswith(("coherent", "top1")):
        return OTHER_SERIES[1].shade
    return NULL if metric == "perplexity" else OTHER_SERIES[2].shade


def _high_end(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite, 0.95)) or 1.0 if len(finite) else 1.0


def _hatch(figure: go.Figure, incoherent: np.ndarray, column: int, theme: str) -> None:
    """Draw three strokes over every incoherent cell; heatmaps have no patterns of their own."""
    x: list[float | None] = []
    y: list[float | None] = []
    for row, cell in np.argwhere(incoherent):
        for start, end in (((-0.5, 0.0), (0.0, 0.5)), ((-0.5, -0.5), (0.5, 0.5)), ((0.0, -0.5), (0.5, 0.0))):
            x += [cell + start[0], cell + end[0], None]
            y += [row + start[1], row + end[1], None]
    if x:
        line = {"color": ARMS["plain"].shade.on(theme), "width": 1}
        figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False, row=1, col=column)
