"""Rates per arm with their intervals: refusals of harmful and of harmless prompts, always side by side."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sgworkbench.errors import WorkbenchError
from sgworkbench.plotting.checks import numeric_column, require_columns, require_ordered, require_some_finite
from sgworkbench.plotting.layout import finish, titled
from sgworkbench.plotting.theme import CONTENT, check_theme, series_styles

_OFFSET = 0.13


def refusal_rates(
    frame: pd.DataFrame,
    *,
    title: str,
    site: str | None = None,
    subtitle: str | None = None,
    y_title: str = "Refusal rate",
    theme: str = "light",
) -> go.Figure:
    """Dots with whiskers: one group per arm, one dot per content class.

    Args:
        frame: columns "arm" (plain, prompted, steered, both), "content" (harmful, harmless), "rate", "low",
            "high" (fractions of 1) and "n" (answers judged); one row per arm and content class.
        title: what is seen, with the judge named.
        site: where steering was written, for the title; None when no arm was steered.
        subtitle: context, such as the kind of interval, the judge and how many answers were left out.
        y_title: name of the rate.
        theme: "light" or "dark".

    The number of answers stands under every arm.

    Raises:
        WorkbenchError: missing columns, an unknown arm or content class, rates outside 0-1, an interval that does
            not hold its rate, a repeated arm and content class, or no finite rate.
    """
    check_theme(theme)
    require_columns(frame, ["arm", "content", "rate", "low", "high", "n"], "table of rates")
    rate, low, high = (numeric_column(frame, column, "table of rates") for column in ("rate", "low", "high"))
    count = numeric_column(frame, "n", "table of rates")
    require_some_finite(rate, "table of rates")
    require_ordered(low, rate, high, "table of rates")
    if np.nanmin(low) < -1e-9 or np.nanmax(high) > 1 + 1e-9:
        raise WorkbenchError("Rates and their intervals are fractions between 0 and 1; found a value outside.")
    arms = list(series_styles("arm", [str(arm) for arm in frame["arm"]]))
    contents = series_styles("content", [str(content) for content in frame["content"]])
    if frame.duplicated(["arm", "content"]).any():
        raise WorkbenchError("The table of rates holds two rows for the same arm and content class; pool them first.")

    figure = go.Figure()
    counts: dict[str, dict[str, int]] = {arm: {} for arm in arms}
    for content, style in contents.items():
        of_content = (frame["content"].astype(str) == content).to_numpy()
        own = np.flatnonzero(of_content)
        own = own[np.argsort([arms.index(str(frame["arm"].iloc[row])) for row in own])]
        names = [str(frame["arm"].iloc[row]) for row in own]
        for name, row in zip(names, own, strict=True):
            counts[name][content] = 0 if np.isnan(count[row]) else int(count[row])
        shift = (_OFFSET if content == "harmless" else -_OFFSET) if len(contents) > 1 else 0.0
        colour = style.shade.on(theme)
        figure.add_trace(
            go.Scatter(
                x=[arms.index(name) + shift for name in names],
                y=rate[own],
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": high[own] - rate[own],
                    "arrayminus": rate[own] - low[own],
                    "color": colour,
                    "thickness": 2,
                    "width": 6,
                },
                mode="markers+text",
                marker={"color": colour, "size": 12, "symbol": style.symbol, "line": {"color": colour, "width": 2}},
                text=[f"\u2002{value:.0%}\u2002" if np.isfinite(value) else "" for value in rate[own]],
                textposition="middle left" if shift < 0 else "middle right",
                textfont={"size": 12},
                customdata=[
                    [name, counts[name][content], low[row], high[row]] for name, row in zip(names, own, strict=True)
                ],
                hovertemplate=(
                    "<b>%{customdata[0]}</b><br>%{y:.1%} (%{customdata[2]:.1%} to %{customdata[3]:.1%})"
                    f"<br>n = %{{customdata[1]}}<extra>{content}</extra>"
                ),
                name=f"{content} prompts",
                legendgroup=content,
            )
        )
    figure.update_xaxes(
        tickmode="array",
        tickvals=list(range(len(arms))),
        ticktext=[_tick(arm, counts[arm]) for arm in arms],
        range=[-0.55, len(arms) - 0.45],
        showgrid=False,
    )
    figure.update_yaxes(title_text=y_title, tickformat=".0%", range=[-0.03, 1.03], tickvals=[0, 0.25, 0.5, 0.75, 1])
    return finish(
        figure,
        theme=theme,
        title=title if site is None else titled(title, site),
        subtitle=subtitle,
        plot_height=330,
        legend_entries=[f"{content} prompts" for content in contents],
        bottom=72,
    )


def _tick(arm: str, counts: dict[str, int]) -> str:
    """Name of the arm over its numbers of answers; one number when both content classes have the same."""
    if len(set(counts.values())) == 1 and len(counts) == len(CONTENT):
        return f"<b>{arm}</b><br>n = {next(iter(counts.values()))} each"
    return f"<b>{arm}</b><br>" + "<br>".join(f"{content} n = {n}" for content, n in counts.items())
