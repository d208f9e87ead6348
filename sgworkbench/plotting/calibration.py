"""Figures of a calibration: the candidates against the budgets, and the winner on fresh items."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sgworkbench.errors import WorkbenchError
from sgworkbench.plotting.layout import finish, plotly_text
from sgworkbench.plotting.theme import ARMS, AXIS, CONTENT, check_theme, series_styles, with_alpha

if TYPE_CHECKING:
    from sgworkbench.evaluation.calibration.result import CalibrationResult

_ARM_STYLES = {"vanilla": ARMS["plain"], "prompt-only": ARMS["prompted"]}


def front_figure(result: CalibrationResult, *, theme: str = "light") -> go.Figure:
    """Draw refusals kept against over-refusal on the validation prompts: all candidates of the last stage.

    The shaded corner is what the budgets allow; the large star is the winner.
    """
    from sgworkbench.evaluation.calibration.outcomes import limits

    check_theme(theme)
    table = result.candidates
    figure = go.Figure()
    allowed = limits(result.spec.budgets, float(table["over_refusal_prompted"].iloc[0]))
    least = allowed.get("refusals_kept", (0.0, 1))[0]
    most = allowed.get("over_refusal", (1.0, -1))[0]
    figure.add_shape(
        type="rect",
        x0=-0.03,
        x1=most,
        y0=least,
        y1=1.03,
        line={"color": AXIS.on(theme), "width": 1, "dash": "dot"},
        fillcolor=with_alpha(CONTENT["harmless"].shade.on(theme), 0.14),
        layer="below",
    )
    families = list(dict.fromkeys(table["family"]))
    styles = series_styles("family", families)
    for family in families:
        part = table[table["family"] == family]
        colour = styles[family].shade.on(theme)
        figure.add_scatter(
            x=part["over_refusal"],
            y=part["refusals_kept"],
            mode="markers",
            name=family,
            marker={"color": with_alpha(colour, 0.75), "symbol": styles[family].symbol, "size": 9},
            customdata=part[["what", "coherent", "kl"]],
            hovertemplate=(
                "%{customdata[0]}<br>kept %{y:.2f}, over-refusal %{x:.2f}<br>coherent %{customdata[1]:.2f}, "
                "KL %{customdata[2]:.2f}<extra></extra>"
            ),
        )
    entries = list(families)
    for row in result.references.to_dict("records"):
        style = _ARM_STYLES[row["arm"]]
        name = str(row["arm"]).replace("-", " ")
        entries.append(name)
        figure.add_scatter(
            x=[row["over_refusal"]],
            y=[row["refusals_kept"]],
            mode="markers",
            name=name,
            marker={"color": style.shade.on(theme), "symbol": style.symbol, "size": 14},
        )
    if result.winner is not None:
        best = table.iloc[0]
        entries.append("winner")
        figure.add_scatter(
            x=[best["over_refusal"]],
            y=[best["refusals_kept"]],
            mode="markers",
            name="winner",
            marker={
                "symbol": "star-open",
                "size": 20,
                "color": styles[str(best["family"])].shade.on(theme),
                "line": {"width": 2},
            },
        )
    figure.update_xaxes(title_text="Over-refusal: harmless validation prompts refused", range=[-0.03, 1.03])
    figure.update_yaxes(title_text="Of prompt-only's refusals, kept", range=[-0.03, 1.05])
    n = table.iloc[0]
    return finish(
        figure,
        theme=theme,
        title=f"Candidates of the calibration, {plotly_text(_model(result))}, written at resid_post",
        subtitle=f"n = {int(n['refusals_kept_n'])} harmful prompts prompt-only refuses, {int(n['over_refusal_n'])} "
        f"harmless ones; {result.spec.long_tokens} tokens, judge {result.spec.judge}; shaded: what the budgets "
        "allow",
        plot_height=400,
        legend_entries=entries,
        bottom=66,
    )


def confirmation_figure(result: CalibrationResult, *, theme: str = "light") -> go.Figure:
    """Draw refusal rates with Wilson intervals on fresh items: one panel per set, one row per arm.

    Raises:
        WorkbenchError: nothing was confirmed.
    """
    check_theme(theme)
    if result.confirmation is None:
        raise WorkbenchError("No candidate kept to the budgets, so nothing was confirmed on fresh items.")
    rates = result.confirmation.rates
    sets = list(dict.fromkeys(zip(rates["set"], rates["label"], strict=True)))
    arms = list(dict.fromkeys(rates["arm"]))
    columns = min(2, len(sets))
    rows = -(-len(sets) // columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_yaxes=True,
        shared_xaxes=True,
        subplot_titles=[_set_title(rates, name, label) for name, label in sets],
        horizontal_spacing=0.05,
        vertical_spacing=0.16 if rows > 1 else 0,
    )
    figure.update_annotations(font={"size": 13})
    heights = {arm: len(arms) - 1 - index for index, arm in enumerate(arms)}
    for index, (name, label) in enumerate(sets):
        part = rates[(rates["set"] == name) & (rates["label"] == label)]
        style = CONTENT[label]
        colour = style.shade.on(theme)
        figure.add_scatter(
            x=part["rate"],
            y=[heights[arm] for arm in part["arm"]],
            error_x={
                "type": "data",
                "array": part["high"] - part["rate"],
                "arrayminus": part["rate"] - part["low"],
                "thickness": 1.6,
                "width": 4,
                "color": colour,
            },
            mode="markers+text",
            text=[f"  {refused}/{n}" for refused, n in zip(part["refused"], part["n"], strict=True)],
            textposition="top center",
            textfont={"size": 11},
            marker={"color": colour, "symbol": style.symbol, "size": 10},
            name=label,
            showlegend=False,
            hovertemplate="%{text} refused (%{x:.2f})<extra></extra>",
            row=index // columns + 1,
            col=index % columns + 1,
        )
        if index + columns >= len(sets):
            figure.update_xaxes(
                title_text="Refused", showticklabels=True, row=index // columns + 1, col=index % columns + 1
            )
    figure.update_xaxes(range=[-0.03, 1.03])
    figure.update_yaxes(
        range=[-0.5, len(arms) - 0.3], tickvals=list(heights.values()), ticktext=list(heights), showgrid=True
    )
    return finish(
        figure,
        theme=theme,
        title=f"Refusals on fresh items, {plotly_text(_model(result))}, written at resid_post",
        subtitle=f"{result.spec.long_tokens} tokens, judge {result.spec.judge}; 95 % Wilson intervals; budgets "
        f"hold for {', '.join(dict.fromkeys(rates.loc[rates['budgeted'], 'set']))}",
        plot_height=rows * (46 * len(arms)) + (rows - 1) * 60,
        bottom=62,
        above=22,
    )


def _set_title(rates: pd.DataFrame, name: str, label: str) -> str:
    rows = rates[(rates["set"] == name) & (rates["label"] == label)]
    known = label in str(name)
    return plotly_text(f"{name}{'' if known else f', {label}'} (n = {int(rows['n'].max())})")


def _model(result: CalibrationResult) -> str:
    return str((result.facts.get("model") or {}).get("name", "unknown model"))
