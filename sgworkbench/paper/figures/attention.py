"""Attention to the reminder along the generation, and from the answer to the prompt, with steering active."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sgworkbench.errors import unknown_name
from sgworkbench.paper.figures.base import (
    MEASURED,
    PUBLISHED,
    STYLES,
    PaperFigure,
    measured_line,
    our_arm,
    published_line,
)
from sgworkbench.paper.figures.gap import need
from sgworkbench.paper.figures.panels import curves, dots, grid, heat
from sgworkbench.paper.measured import Measured
from sgworkbench.paper.published import published
from sgworkbench.plotting.attention import amount_scale
from sgworkbench.plotting.labels import shortened, visible
from sgworkbench.plotting.layout import plotly_text

_REMINDERS = ("user_suffix", "user_prefix", "system", "prefill")
"""Where a safety prompt can be, in the order in which it is looked for."""


def reminder_attention(
    measured: Measured | None, span: str | None = None, layers: tuple[int, ...] | None = None
) -> PaperFigure:
    """Attention per reminder token along the generation.

    Args:
        measured: our side.
        span: which span of ours; any role of a token. By default the reminder after the request, or what the safety
            prompt puts elsewhere.
        layers: which layers of ours; all that were measured by default.

    Raises:
        WorkbenchError: a span or layer that was not measured.
    """
    items = published("attention", version="final")
    parts = []
    windows = {"first_quarter_mean": "first quarter", "mean": "all", "last_quarter_mean": "last quarter"}
    for (model, benchmark), rows in items.groupby(["model", "benchmark"], sort=False):
        for measure, words in windows.items():
            for arm, own in rows.groupby("arm", sort=False):
                values = own[measure].to_numpy(dtype=float)
                parts.append(
                    {
                        "source": PUBLISHED,
                        "model": model,
                        "panel": f"{model}, {benchmark}, last layer<br>published",
                        "series": our_arm(str(arm)),
                        "x": words,
                        "value": float(values.mean()),
                        "low": float(values.min()),
                        "high": float(values.max()),
                        "n": len(values),
                        "span": "reminder suffix",
                    }
                )
    table = pd.DataFrame(parts)
    titles = list(dict.fromkeys(table["panel"]))
    measured_on = [published_line("Qwen3-4B, 8B")]
    curves_table = None
    if measured is not None:
        rows = measured.table("attention")
        if span is None:
            span = next((name for name in _REMINDERS if name in set(rows["span"])), _REMINDERS[0])
        if span not in set(rows["span"]):
            raise unknown_name("span", span, {str(each) for each in rows["span"]})
        known = sorted({int(layer) for layer in rows["layer"]})
        for wanted in layers or ():
            if wanted not in known:
                raise unknown_name("measured layer", str(wanted), [str(each) for each in known])
        chosen = rows[(rows["span"] == span) & rows["layer"].isin(layers or known)]
        curves_table = chosen.rename(columns={"arm": "series", "step": "x"}).assign(
            source=MEASURED,
            model=measured.model,
            panel=[f"{measured.model}, layer {each}<br>measured here" for each in chosen["layer"]],
        )
        titles += list(dict.fromkeys(curves_table["panel"]))
        measured_on.append(measured_line(measured))
    # One row of published panels and one of ours.
    columns = max(3, len(titles) - 3)
    blank = [" " * (1 + index) for index in range(columns - 3)] if columns > 3 else []
    panels = grid([*titles[:3], *blank, *titles[3:]], columns, row_height=230, spacing=0.06)
    for name in blank:
        row, column = panels.places[name]
        panels.figure.update_xaxes(visible=False, row=row, col=column)
        panels.figure.update_yaxes(visible=False, row=row, col=column)
    dots(panels, table, STYLES, percent=False)
    if curves_table is not None:
        curves(panels, curves_table, STYLES, markers=False, x_title="token that looks")
        table = pd.concat([table, curves_table], ignore_index=True)
    panels.figure.update_yaxes(rangemode="tozero", exponentformat="power", tickfont={"size": 10.5})
    panels.figure.update_yaxes(title_text="attention per token", title_standoff=2, col=1)
    where = "" if measured is None else f"; ours: span {span}, mean over heads, ribbons 95 % t interval over prompts"
    figure = panels.finish(
        "Attention to the reminder along the generation",
        f"Published: mean of 3 to 5 items by part of the generation, whiskers from the lowest to the highest "
        f"item{where}",
        bottom=60,
    )
    caption = (
        "Attention weight on one reminder token, mean over heads and over the tokens of the span; published at the "
        "last "
        f"layer only. Mean over items under steering against prompt only: {_changes()}. Outputs of the two arms differ "
        "in length, and the mean falls with length. Attention is a reading, not an explanation."
    )
    return PaperFigure(
        "attention-reminder",
        "Attention to the reminder along the generation",
        figure,
        table,
        caption,
        tuple(measured_on),
    )


def _changes() -> str:
    means = published("attention_means", version="final")
    words = []
    for (model, benchmark), rows in means.groupby(["model", "benchmark"], sort=False):
        by_arm = rows.set_index("arm")["mean"]
        change = by_arm["self-guard"] / by_arm["self-reminder"] - 1
        words.append(f"{change:+.0%} on {model}, {benchmark} (n = {int(rows['n'].iloc[0])})".replace("-", "−", 1))
    return ", ".join(words)


def response_map(measured: Measured | None) -> PaperFigure:
    """Attention from every written token to the tokens of instruction and reminder, steering hooks active."""
    ours = need(measured)
    rows = ours.table("attention_maps")
    layer = int(rows["layer"].iloc[0])
    table = pd.DataFrame(
        {
            "source": MEASURED,
            "model": ours.model,
            "panel": rows["arm"],
            "x": [
                f"{column:03d} {shortened(visible(str(key)), 12)}"
                for column, key in zip(rows["position"] - rows["position"].min(), rows["key"], strict=True)
            ],
            "y": [
                f"{step + 1:02d} {shortened(visible(str(query)), 12)}"
                for step, query in zip(rows["step"], rows["query"], strict=True)
            ],
            "value": rows["attention"],
            "role": rows["role"],
            "layer": layer,
        }
    )
    arms = list(dict.fromkeys(table["panel"]))
    words = {"prompted": "prompted: safety prompt only", "both": "both: steering active"}
    table["panel"] = table["panel"].map(lambda arm: words.get(arm, arm))
    end = float(np.nanpercentile(table["value"], 99)) or 1.0
    panels = grid([words.get(arm, arm) for arm in arms], 1, row_height=260)
    heat(panels, table, amount_scale(), limits=(0, end), bar="attention, mean over heads", percent=False)
    for arm in arms:
        row, column = panels.places[words.get(arm, arm)]
        part = table[table["panel"] == words.get(arm, arm)]
        for axis, update in (("x", panels.figure.update_xaxes), ("y", panels.figure.update_yaxes)):
            names = list(dict.fromkeys(part[axis]))
            update(
                tickvals=names,
                ticktext=[plotly_text(name.split(" ", 1)[1]) for name in names],
                tickfont={"size": 10},
                row=row,
                col=column,
            )
    panels.figure.update_xaxes(tickangle=-90)
    panels.figure.update_yaxes(autorange="reversed", title_text="token that looks", title_standoff=4)
    figure = panels.finish(
        f"Attention from the answer to instruction and reminder, {ours.model}, layer {layer}",
        "Measured here on one harmless prompt; first row: the last prompt token; read while the arm's steering hooks "
        "are "
        f"active; colours end at the 99th percentile, {end:.2g}",
        bottom=110,
        right=110,
    )
    caption = (
        "Mean over heads. A row need not sum to one: system message, template and earlier written tokens hold the "
        "rest. "
        "One prompt illustrates, it does not test anything. No such map was published as numbers."
    )
    return PaperFigure(
        "attention-map", "Response-to-instruction attention", figure, table, caption, (measured_line(ours),)
    )
