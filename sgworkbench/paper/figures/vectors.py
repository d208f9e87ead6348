"""Vectors: geometry of the published 4B vector and ours, and what wording, data and method change."""

from __future__ import annotations

import pandas as pd

from sgworkbench.paper.figures.base import MEASURED, PUBLISHED, PaperFigure, measured_line, published_line
from sgworkbench.paper.figures.gap import need
from sgworkbench.paper.figures.panels import curves, grid, heat
from sgworkbench.paper.measured import Measured
from sgworkbench.paper.published import published
from sgworkbench.plotting.layout import plotly_text
from sgworkbench.plotting.theme import OTHER_SERIES, SeriesStyle, diverging_scale

_PUBLISHED_STYLE, _OUR_STYLE = OTHER_SERIES[0], OTHER_SERIES[1]


def geometry(measured: Measured | None) -> PaperFigure:
    """Norms by depth, cosines between layers, and cosines with vectors made otherwise."""
    vector = published("vectors")
    in_stream = vector[vector["read_site"].str.startswith("resid_post")]
    depth = (in_stream["key"] + 1) / (vector["key"].max() + 1)
    norm, neighbour = "norm of v by depth", "cosine with the layer before"
    facts = {"source": PUBLISHED, "model": "Qwen3-4B", "series": "published", "layer": in_stream["key"], "x": depth}
    parts = [
        pd.DataFrame({**facts, "panel": norm, "value": in_stream["norm"]}),
        pd.DataFrame({**facts, "panel": neighbour, "value": in_stream["cosine_with_previous"]}),
    ]
    styles = {"published": _style("Qwen3-4B star1000 (published)", _PUBLISHED_STYLE)}
    titles, maps = [norm, neighbour], []
    measured_on = [published_line("Qwen3-4B vector star1000_selfreminder, statistics of the file")]
    if measured is not None:
        own = measured.table("vector")
        n_layers = int(measured.facts["model"]["n_layers"])
        facts = {
            "source": MEASURED, "model": measured.model, "series": "ours", "layer": own["layer"],
            "x": (own["layer"] + 1) / n_layers,
        }  # fmt: skip
        parts.append(pd.DataFrame({**facts, "panel": norm, "value": own["norm"]}))
        parts.append(pd.DataFrame({**facts, "panel": neighbour, "value": own["cosine_with_previous"]}))
        styles["ours"] = _style(f"{measured.model} (measured here)", _OUR_STYLE)
        between = "cosines between layers<br>" + f"{measured.model}, measured here"
        pairs = measured.table("layer_cosines")
        maps.append(
            pd.DataFrame({"panel": between, "x": pairs["second"], "y": pairs["first"], "value": pairs["cosine"]})
        )
        made = "cosine with the reference vector<br>" + f"{measured.model}, measured here"
        others = measured.table("geometry")
        others = others[~others["vector"].isin(["reference", "protocol official"])]
        maps.append(
            pd.DataFrame(
                {
                    "panel": made,
                    "x": others["layer"],
                    "y": [_short(name) for name in others["vector"]],
                    "value": others["cosine"],
                }
            )
        )
        titles += [between, made]
        measured_on.append(measured_line(measured))
    lines = pd.concat(parts, ignore_index=True)
    panels = grid(titles, 2, row_height=280, spacing=0.2 if maps else 0.09)
    curves(panels, lines, styles, x_title="relative depth, (layer + 1) / layers")
    panels.figure.update_yaxes(type="log", row=1, col=1)
    tables = [lines]
    for index, each in enumerate(maps):
        heat(
            panels, each, diverging_scale(), limits=(-1, 1), bar="cosine", percent=False, bar_index=1, n_bars=2,
            x_title="layer", y_title="layer" if index == 0 else "",
        )  # fmt: skip
        assert measured is not None
        tables.append(each.assign(source=MEASURED, model=measured.model, series="ours"))
    for trace in panels.figure.data:
        if trace.type == "heatmap":
            trace.showscale = trace is [t for t in panels.figure.data if t.type == "heatmap"][-1]
    panels.figure.update_yaxes(nticks=8, tickfont={"size": 10.5})
    panels.figure.update_xaxes(nticks=10, tickfont={"size": 10.5})
    figure = panels.finish(
        "Geometry of the steering vectors",
        "Mean difference at the last prompt token, resid_post, not normalised; published: key l is the output of "
        "block l",
        bottom=60,
        right=90 if maps else 24,
    )
    caption = (
        "One coefficient is another dose at every layer, because norms grow with depth. The last published key is "
        "taken "
        "after the final norm and is left out. The published vector very likely carries the padding fault. Reference "
        "of "
        "the cosines: same-site, first wording, harmful prompts; the random direction is the control."
    )
    return PaperFigure(
        "vector-geometry", "Vector geometry", figure, pd.concat(tables, ignore_index=True), caption, tuple(measured_on)
    )


def ablation(measured: Measured | None) -> PaperFigure:
    """What wording, data set, protocol and method do to the vector's effect on held-out prompts."""
    ours = need(measured)
    effects = ours.table("effects")
    names = {
        "refusal_shift": "refusal log-odds, harmful: shift (nats)",
        "kl": "KL from unsteered, harmless (nats)",
    }
    rows = effects[effects["metric"].isin(names)]
    table = pd.DataFrame(
        {
            "source": MEASURED,
            "model": ours.model,
            "panel": rows["metric"].map(names),
            "series": [f"{alpha:g}" for alpha in rows["alpha"]],
            "y": [_short(name) for name in rows["vector"]],
            "factor": rows["factor"],
            "layer": rows["layer"],
            "value": rows["value"],
            "low": rows["low"],
            "high": rows["high"],
            "n": rows["n"],
            "change": rows["change"],
            "change_low": rows["change_low"],
            "change_high": rows["change_high"],
        }
    )
    table = table[table["layer"] == max(table["layer"])].reset_index(drop=True)
    order = list(dict.fromkeys(table["y"]))
    panels = grid(list(names.values()), 2, row_height=max(260, 30 * len(order)), spacing=0.03)
    alphas = list(dict.fromkeys(table["series"]))
    for column, title in enumerate(names.values(), start=1):
        for index, alpha in enumerate(alphas):
            part = table[(table["panel"] == title) & (table["series"] == alpha)]
            style = OTHER_SERIES[index]
            label = f"coefficient {alpha}"
            panels.figure.add_scatter(
                x=part["value"],
                y=[len(order) - 1 - order.index(name) + 0.14 - 0.28 * index for name in part["y"]],
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": part["high"] - part["value"],
                    "arrayminus": part["value"] - part["low"],
                    "color": style.shade.light,
                    "thickness": 1.5,
                    "width": 3,
                },
                mode="markers",
                marker={"color": style.shade.light, "symbol": style.symbol, "size": 8},
                name=label,
                legendgroup=alpha,
                showlegend=panels.legend_once(alpha, label),
                customdata=part[["y", "n", "change", "change_low", "change_high"]].to_numpy(),
                hovertemplate="%{customdata[0]}<br>%{x:.3f}, n = %{customdata[1]}<br>against the reference "
                "%{customdata[2]:.3f} (%{customdata[3]:.3f} to %{customdata[4]:.3f})<extra>" + label + "</extra>",
                meta={"drawn": "value", "axis": "x"},
                row=1,
                col=column,
            )
        panels.figure.add_vline(x=0, line={"width": 1, "color": "#8B929C"}, row=1, col=column)
        panels.figure.update_yaxes(
            tickvals=list(range(len(order))),
            ticktext=[plotly_text(name) for name in reversed(order)] if column == 1 else [""] * len(order),
            range=[-0.6, len(order) - 0.4],
            row=1,
            col=column,
        )
    layer = int(table["layer"].iloc[0])
    figure = panels.finish(
        f"Wording, data set, protocol and method: effect of the vector, {ours.model}",
        f"Measured here, steered at layer {layer}, plain prompts, {int(table['n'].iloc[0])} held-out prompts a class, "
        "95 % bootstrap intervals",
        bottom=50,
    )
    caption = (
        "Every vector differs from the reference in one factor. The published files hold no comparison of wordings or "
        "data sets on equal terms. official-padded has norms of its own; beside it the same directions with the norms "
        "of "
        "the reference, because another norm is another dose. pca_diff and the random direction have the reference's "
        "norms."
    )
    return PaperFigure(
        "wording-and-data", "Prompt-wording and data-set ablation", figure, table, caption, (measured_line(ours),)
    )


def _style(label: str, style: SeriesStyle) -> SeriesStyle:
    return SeriesStyle(label, style.shade, style.dash, style.symbol, style.pattern)


def _short(name: str) -> str:
    return name.replace("official-padded, norms of the reference", "padded, norms of the reference")
