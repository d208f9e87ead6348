"""The framework diagram: what is read, what is added where, and what comes of it, with values of a run."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sgworkbench.paper.figures.base import (
    MEASURED,
    PUBLISHED,
    STYLES,
    PaperFigure,
    measured_line,
    our_arm,
    published_line,
)
from sgworkbench.paper.measured import Measured
from sgworkbench.paper.published import published
from sgworkbench.plotting.layout import finish
from sgworkbench.plotting.theme import ARMS, AXIS, INK, MUTED, PAGE, ROLES

_ARMS = tuple(ARMS)
_TOP, _BOTTOM = 62.0, 0.0


def framework(measured: Measured | None) -> PaperFigure:
    """Both stages, the vector's origin and the results of the four arms."""
    table = _results(measured)
    canvas = _Canvas()
    _vector_row(canvas, measured)
    _inference_row(canvas, measured)
    _result_rows(canvas, table)
    figure = canvas.figure
    figure.update_xaxes(visible=False, range=[-0.4, 100.4], fixedrange=True)
    figure.update_yaxes(visible=False, range=[_BOTTOM, _TOP], fixedrange=True)
    named = "published settings, Qwen3-8B" if measured is None else f"values of a run on {measured.model}"
    finish(
        figure,
        theme="light",
        title=f"Prompt, then steer: the method with {named}",
        subtitle="The vector goes on top of the prompted run; prompt only and steer only are its controls",
        plot_height=470,
        bottom=16,
    )
    figure.update_layout(margin={"l": 16, "r": 16})
    lines = [published_line("Qwen3-8B at 0.5 on layer 20")]
    if measured is not None:
        lines.append(measured_line(measured))
    caption = (
        "Gap: awareness minus refusal in separation units, harmful test prompts, at the layer where both directions "
        "separate best; 0 acts on what it knows, 1 knows and complies. Rates with n; intervals are in the table. A "
        "dash "
        "was not measured."
    )
    return PaperFigure("framework", "Framework", figure, table, caption, tuple(lines))


class _Canvas:
    """Boxes, arrows and text on a plane of 100 x 62."""

    def __init__(self) -> None:
        self.figure = go.Figure(go.Scatter(x=[None], y=[None], showlegend=False, hoverinfo="skip"))

    def box(
        self, x: float | int, y: float | int, width: float | int, height: float | int, text: str, fill: str = PAGE.light
    ) -> None:
        line = {"color": AXIS.light, "width": 1.2}
        self.figure.add_shape(type="rect", x0=x, x1=x + width, y0=y, y1=y + height, line=line, fillcolor=fill)
        self.text(x + width / 2, y + height / 2, text)

    def text(
        self,
        x: float | int,
        y: float | int,
        text: str,
        *,
        colour: str = INK.light,
        size: float | int = 12,
        anchor: str = "center",
    ) -> None:
        self.figure.add_annotation(
            x=x, y=y, text=text, showarrow=False, font={"size": size, "color": colour}, align="center", xanchor=anchor
        )  # fmt: skip

    def arrow(
        self, x0: float | int, y0: float | int, x1: float | int, y1: float | int, colour: str = MUTED.light
    ) -> None:
        self.figure.add_annotation(
            x=x1, y=y1, ax=x0, ay=y0, xref="x", yref="y", axref="x", ayref="y", text="", showarrow=True, arrowhead=2,
            arrowwidth=1.6, arrowcolor=colour,
        )  # fmt: skip


def _vector_row(canvas: _Canvas, measured: Measured | None) -> None:
    steered = ARMS["steered"].shade.light
    if measured is None:
        prompts, reading, vector = "STAR-1 prompts x (star1000)", "resid_post[20]", "v<sub>20</sub>, not normalised"
    else:
        facts = measured.facts
        layer = facts["layers"][-1]
        prompts = f"{facts['n_train']} harmful training prompts x"
        reading = f"resid_post[{layer}]"
        share = facts["fraction_of_residual"][-1]
        vector = (
            f"|v<sub>{layer}</sub>| = {facts['vector_norms'][-1]:.1f}<br>"
            f"{facts['alpha']:g} |v| is {share:.0%} of the residual norm"
        )
    canvas.text(0, 60.4, "<b>The vector</b>, once, on other prompts", colour=MUTED.light, anchor="left")
    canvas.box(0, 49, 22, 9, f"{prompts},<br>each with and without s")
    canvas.arrow(22, 53.5, 27, 53.5)
    canvas.box(27, 49, 27, 9, f"h<sub>l</sub>(s + x) and h<sub>l</sub>(x)<br>last prompt token, {reading}")
    canvas.arrow(54, 53.5, 59, 53.5)
    canvas.box(59, 49, 18, 9, "v<sub>l</sub> = mean of<br>h<sub>l</sub>(s + x) − h<sub>l</sub>(x)")
    canvas.text(78.5, 53.5, vector, colour=steered, anchor="left")


def _inference_row(canvas: _Canvas, measured: Measured | None) -> None:
    steered, prompted = ARMS["steered"].shade.light, ARMS["prompted"].shade.light
    alpha, where = ("0.5", "block 20 (published: its input)")
    if measured is not None:
        alpha, where = f"{measured.facts['alpha']:g}", ", ".join(measured.facts["write_sites"])
    canvas.text(0, 44.4, "<b>Inference</b>", colour=MUTED.light, anchor="left")
    canvas.box(0, 31, 13, 9, "request x", ROLES["instruction"].light)
    canvas.arrow(13, 35.5, 18, 35.5)
    canvas.box(18, 31, 22, 9, "system message,<br>request x, reminder", ROLES["user_suffix"].light)
    canvas.text(29, 42, "<b>1</b> safety prompt: s + x", colour=prompted)
    canvas.arrow(40, 35.5, 45, 35.5)
    for index in range(8):
        at = index == 4
        canvas.figure.add_shape(
            type="rect",
            x0=45 + 3.4 * index,
            x1=47.6 + 3.4 * index,
            y0=31,
            y1=40,
            line={"color": steered if at else AXIS.light, "width": 2 if at else 1},
            fillcolor=ROLES["user_prefix"].light if at else ROLES["template"].light,
        )
    canvas.arrow(60, 49, 60, 40.4, steered)
    canvas.text(61.2, 45, f"<b>2</b> add {alpha} v<sub>l</sub> at {where}, every token", colour=steered, anchor="left")
    canvas.text(58.4, 29.2, "residual stream, block by block", colour=MUTED.light, size=11)
    canvas.arrow(72.4, 35.5, 77.5, 35.5)
    canvas.box(77.5, 31, 22, 9, "answer: refuses harm,<br>still helps otherwise?", ROLES["answer"].light)


def _result_rows(canvas: _Canvas, table: pd.DataFrame) -> None:
    start, step = 50.0, 15.0
    canvas.text(0, 25, "<b>What comes of it</b>", colour=MUTED.light, anchor="left")
    for index, arm in enumerate(_ARMS):
        canvas.text(start + step * index, 25, f"<b>{arm}</b>", colour=STYLES[arm].shade.light)
    for index, (label, rows) in enumerate(table.groupby("label", sort=False)):
        y = 20.6 - 4.4 * index
        canvas.figure.add_shape(
            type="line", x0=0, x1=100, y0=y + 2.2, y1=y + 2.2, line={"color": "#E6E8EB", "width": 1}
        )
        canvas.text(0, y, str(label), anchor="left")
        shown = dict(zip(rows["arm"], rows["shown"], strict=True))
        for place, arm in enumerate(_ARMS):
            canvas.text(start + step * place, y, shown.get(arm, "–"), size=12.5)


def _results(measured: Measured | None) -> pd.DataFrame:
    """Return the values in the diagram: source, model, label, arm, value, low, high, n, shown."""
    rows: list[dict[str, object]] = []

    def add(source: str, model: str, label: str, arm: str, found: Any, form: str) -> None:
        value = float(found["value"])
        shown = f"{value:{form}}" if value == value else "–"
        facts = {"source": source, "model": model, "label": label, "arm": arm, "value": value}
        rows.append({**facts, "low": found["low"], "high": found["high"], "n": int(found["n"]), "shown": shown})

    if measured is not None:
        layer = measured.facts["shown_layer"]
        gap = measured.table("gap")
        for _, found in gap[(gap["quantity"] == "gap") & (gap["layer"] == layer)].iterrows():
            label = f"{measured.model}, measured here: gap at layer {layer}, n = {int(found['n'])}"
            add(MEASURED, measured.model, label, found["arm"], found, ".2f")
        rates = measured.table("rates")
        for quantity, words in (
            ("complied", "harmful requests answered"),
            ("over_refusal", "harmless requests refused"),
        ):
            part = rates[rates["quantity"] == quantity]
            low, high = int(part["n"].min()), int(part["n"].max())
            n = f"n = {low}" if low == high else f"n = {low} to {high}"
            for _, found in part.iterrows():
                label = f"{measured.model}, measured here: {words}, {n}"
                add(MEASURED, measured.model, label, found["arm"], found, ".0%")
    for name, benchmark, words in (
        ("safety", "HarmBench", "HarmBench attack success"),
        ("over_refusal", "XSTest", "XSTest over-refusal"),
    ):
        found_rows = published(name, model="Qwen3-8B", benchmark=benchmark, main=True)
        if name == "safety":
            found_rows = found_rows[found_rows["subset"] == "all"]
        for _, found in found_rows.iterrows():
            if our_arm(found["arm"]) in _ARMS:
                label = f"Qwen3-8B, published: {words}, n = {int(found['n'])}"
                add(PUBLISHED, "Qwen3-8B", label, our_arm(found["arm"]), found, ".1%")
    return pd.DataFrame(rows)
