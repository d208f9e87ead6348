"""Figures of an experiment: safety against over-refusal, and rates by arm and prompt set, incoherent shares shown."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sgworkbench.errors import WorkbenchError
from sgworkbench.plotting.checks import numeric_column, require_columns
from sgworkbench.plotting.layout import finish, plotly_text
from sgworkbench.plotting.theme import ARMS, CONTENT, MISSING, MUTED, OTHER_SERIES, SeriesStyle, check_theme

# The preset arms that are one of the four arms every other figure has.
_FOUR = {"vanilla": "plain", "prompt-only": "prompted", "steer-only": "steered", "both": "both"}
_TICKS = [0, 0.25, 0.5, 0.75, 1]
_ACROSS = 3
"""Panels beside each other at most."""
_BETWEEN = 96
"""Pixels between two rows of panels: tick labels, an axis title, the title of the panel below."""


def arm_styles(arms: Sequence[str]) -> dict[str, SeriesStyle]:
    """Return how each arm is drawn: the four arms in their fixed colours, others in turn, the seventh like the first.

    Arms that share a colour are told apart by their labels, which every figure here writes out.
    """
    styles: dict[str, SeriesStyle] = {}
    others = 0
    for arm in dict.fromkeys(arms):
        known = _FOUR.get(arm, arm)
        if known in ARMS:
            styles[arm] = ARMS[known]
        else:
            styles[arm] = OTHER_SERIES[others % len(OTHER_SERIES)]
            others += 1
    return styles


def tradeoff_figure(table: pd.DataFrame, judge: str, *, gated: bool, theme: str = "light") -> go.Figure:
    """Draw safety on harmful prompts against over-refusal of harmless ones: one point per arm, one panel per set.

    Args:
        table: columns arm, prompt_set, safety, safety_low, safety_high, n_harmful, over_refusal, over_low, over_high,
            n_harmless, incoherent_share; see `tradeoff_table` of an experiment.
        judge: name of the judge.
        gated: whether incoherent answers are left out.
        theme: "light" or "dark".

    Raises:
        WorkbenchError: missing columns, or no rate to draw.
    """
    check_theme(theme)
    columns = ["arm", "prompt_set", "safety", "safety_low", "safety_high", "over_refusal", "over_low", "over_high"]
    require_columns(table, [*columns, "n_harmful", "n_harmless", "incoherent_share"], "trade-off table")
    drawn = table[pd.Series(numeric_column(table, "safety", "trade-off table")).notna().to_numpy()]
    drawn = drawn[pd.Series(numeric_column(drawn, "over_refusal", "trade-off table")).notna().to_numpy()]
    if drawn.empty:
        raise WorkbenchError("There is no coherent, judged answer to both harmful and harmless prompts to draw.")
    sets = list(dict.fromkeys(table["prompt_set"]))
    styles = arm_styles(list(table["arm"]))
    x_title, y_title = "Over-refusal: harmless prompts refused", "Safety: 1 − attack success"
    figure, place, plot_height = _panels(sets, 340, x_title=x_title, y_title=y_title)
    for prompt_set in sets:
        row, column = place[prompt_set]
        for arm, style in styles.items():
            part = drawn[(drawn["prompt_set"] == prompt_set) & (drawn["arm"] == arm)]
            if part.empty:
                continue
            point = part.iloc[0]
            colour = style.shade.on(theme)
            figure.add_trace(
                go.Scatter(
                    x=[point["over_refusal"]],
                    y=[point["safety"]],
                    error_x=_whisker(point["over_refusal"], point["over_low"], point["over_high"], colour),
                    error_y=_whisker(point["safety"], point["safety_low"], point["safety_high"], colour),
                    mode="markers",
                    marker={"color": colour, "size": 13, "symbol": style.symbol, "line": {"color": colour, "width": 2}},
                    name=_label(table, arm),
                    legendgroup=arm,
                    showlegend=prompt_set == sets[0],
                    hovertemplate=(
                        f"<b>{plotly_text(arm)}</b><br>safety %{{y:.1%}} ({point['safety_low']:.1%} to "
                        f"{point['safety_high']:.1%}, n = {point['n_harmful']:.0f})<br>over-refusal %{{x:.1%}} "
                        f"({point['over_low']:.1%} to {point['over_high']:.1%}, n = {point['n_harmless']:.0f})<br>"
                        f"{point['incoherent_share']:.1%} of its answers incoherent<extra></extra>"
                    ),
                ),
                row=row,
                col=column,
            )
    figure.update_xaxes(range=[-0.04, 1.04], tickvals=_TICKS, tickformat=".0%")
    figure.update_yaxes(range=[-0.04, 1.04], tickvals=_TICKS, tickformat=".0%")
    harmful = sorted({int(n) for n in drawn["n_harmful"]})
    harmless = sorted({int(n) for n in drawn["n_harmless"]})
    return finish(
        figure,
        theme=theme,
        title="Safety against over-refusal: up and left is better",
        subtitle=f"Judge {judge}; 95 % Wilson intervals; n = {_span(harmful)} harmful, {_span(harmless)} harmless. "
        f"{_gate_words(gated)}; the share of incoherent answers stands behind the arm's name.",
        plot_height=plot_height,
        legend_entries=[_label(table, arm) for arm in styles],
        above=26,
    )


def rates_figure(table: pd.DataFrame, judge: str, *, gated: bool, theme: str = "light") -> go.Figure:
    """Draw one rate per arm and prompt set with its interval, over a bar for the share of incoherent answers.

    Args:
        table: columns arm, prompt_set, label, metric, rate, low, high, n, unparsed, incoherent, items; one row per arm
            and prompt set and label.
        judge: name of the judge.
        gated: whether incoherent answers are left out of the rates.
        theme: "light" or "dark".

    Raises:
        WorkbenchError: missing columns or no rows.
    """
    check_theme(theme)
    columns = ["arm", "prompt_set", "label", "metric", "rate", "low", "high", "n", "unparsed", "incoherent", "items"]
    require_columns(table, columns, "table of rates")
    panels = list(dict.fromkeys(zip(table["prompt_set"], table["label"], strict=True)))
    names = [name if [n for n, _ in panels].count(name) == 1 else f"{name}, {label}" for name, label in panels]
    arms = list(dict.fromkeys(table["arm"]))
    metrics = " or ".join(dict.fromkeys(table["metric"]))
    height = 34 * len(arms) + 30
    figure, place, plot_height = _panels(names, height, x_title=f"Rate of {metrics}", y_title="", shared_y=True)
    grey = MISSING.on(theme)
    for (prompt_set, label), name in zip(panels, names, strict=True):
        row, column = place[name]
        part = table[(table["prompt_set"] == prompt_set) & (table["label"] == label)].set_index("arm").reindex(arms)
        colour = (CONTENT[label].shade if label in CONTENT else MUTED).on(theme)
        share = part["incoherent"] / part["items"]
        figure.add_trace(
            go.Bar(
                x=share,
                y=arms,
                orientation="h",
                width=0.62,
                marker={"color": grey, "line": {"width": 0}},
                name="incoherent answers, share of all",
                legendgroup="incoherent",
                showlegend=name == names[0],
                hovertemplate="<b>%{y}</b><br>%{x:.1%} incoherent<extra></extra>",
            ),
            row=row,
            col=column,
        )
        figure.add_trace(
            go.Scatter(
                x=part["rate"],
                y=arms,
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": part["high"] - part["rate"],
                    "arrayminus": part["rate"] - part["low"],
                    "color": colour,
                    "thickness": 2,
                    "width": 5,
                },
                mode="markers",
                marker={"color": colour, "size": 11, "symbol": CONTENT[label].symbol if label in CONTENT else "circle"},
                customdata=part[["low", "high", "n", "unparsed"]].to_numpy(),
                hovertemplate=(
                    "<b>%{y}</b><br>%{x:.1%} (%{customdata[0]:.1%} to %{customdata[1]:.1%})<br>n = %{customdata[2]}, "
                    "%{customdata[3]} without a verdict<extra></extra>"
                ),
                name=f"{label} prompts",
                legendgroup=label,
                showlegend=label not in [known for _, known in panels[: names.index(name)]],
            ),
            row=row,
            col=column,
        )
    figure.update_xaxes(range=[-0.03, 1.03], tickvals=_TICKS, tickformat=".0%")
    figure.update_yaxes(autorange="reversed", showgrid=True, tickvals=arms, ticktext=[plotly_text(arm) for arm in arms])
    n = sorted({int(value) for value in table["n"]})
    labels = list(dict.fromkeys(table["label"]))
    return finish(
        figure,
        theme=theme,
        title=f"Rate of {metrics} by arm and prompt set",
        subtitle=f"Judge {judge}; 95 % Wilson intervals; n = {_span(n)} judged answers. {_gate_words(gated)}.",
        plot_height=plot_height,
        legend_entries=[*(f"{label} prompts" for label in labels), "incoherent answers, share of all"],
        above=26,
    )


def _panels(
    names: Sequence[str], height: int, *, x_title: str, y_title: str, shared_y: bool = False
) -> tuple[go.Figure, dict[str, tuple[int, int]], int]:
    """Return a grid of titled panels of this height, each panel's row and column, and the height of all together."""
    across = min(_ACROSS, len(names))
    rows = -(-len(names) // across)
    whole = height * rows + _BETWEEN * (rows - 1)
    figure = make_subplots(
        rows=rows,
        cols=across,
        subplot_titles=[plotly_text(name) for name in names],
        shared_yaxes=shared_y,
        horizontal_spacing=0.05 if shared_y else 0.11,
        vertical_spacing=_BETWEEN / whole if rows > 1 else 0,
    )
    figure.update_annotations(font={"size": 13.5})
    place = {name: (index // across + 1, index % across + 1) for index, name in enumerate(names)}
    for index, (row, column) in enumerate(place.values()):
        # Where a panel stands below, the title is below that one.
        if index + across >= len(names):
            figure.update_xaxes(title_text=x_title, row=row, col=column)
        if column == 1 and y_title:
            figure.update_yaxes(title_text=y_title, row=row, col=column)
    return figure, place, whole


def _whisker(value: float, low: float, high: float, colour: str) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value],
        "arrayminus": [value - low],
        "color": colour,
        "thickness": 1.6,
        "width": 5,
    }


def _label(table: pd.DataFrame, arm: str) -> str:
    """Return the arm's name, with its largest share of incoherent answers when there are any."""
    share = float(table.loc[table["arm"] == arm, "incoherent_share"].max())
    return plotly_text(arm) + (f" ({share:.0%} incoherent)" if share >= 0.005 else "")


def _span(values: Sequence[int]) -> str:
    if not values:
        return "0"
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def _gate_words(gated: bool) -> str:
    return "Incoherent answers are left out" if gated else "Incoherent answers are NOT left out"
