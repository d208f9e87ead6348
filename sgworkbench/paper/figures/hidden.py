"""Maps of hidden states: plain, prompted and steered, harmful and harmless."""

from __future__ import annotations

import plotly.graph_objects as go

from sgworkbench.paper.figures.base import MEASURED, PaperFigure, measured_line
from sgworkbench.paper.figures.gap import need
from sgworkbench.paper.figures.panels import grid
from sgworkbench.paper.measured import Measured
from sgworkbench.plotting.theme import ARMS


def hidden_states_map(measured: Measured | None) -> PaperFigure:
    """PCA, and UMAP where it was available, of the last prompt token's residual stream."""
    ours = need(measured)
    table = ours.table("hidden").assign(source=MEASURED, model=ours.model)
    pca = table[table["map"] == "PCA"].iloc[0]
    titles = {"PCA": "PCA", "UMAP": "UMAP, seed fixed"}
    present = [name for name in titles if name in set(table["map"])]
    panels = grid([titles[name] for name in present], 2, row_height=380, spacing=0.08)
    for name in present:
        row, column = panels.places[titles[name]]
        for arm, style in ARMS.items():
            for content, symbol in (("harmful", "circle"), ("harmless", "circle-open")):
                part = table[(table["map"] == name) & (table["arm"] == arm) & (table["content"] == content)]
                label = f"{arm}, {content}"
                panels.figure.add_trace(
                    go.Scatter(
                        x=part["x"],
                        y=part["y"],
                        mode="markers",
                        marker={"color": style.shade.light, "symbol": symbol, "size": 7, "opacity": 0.8},
                        name=label,
                        legendgroup=label,
                        showlegend=panels.legend_once(label, label),
                        hovertemplate=f"prompt %{{customdata}}<extra>{label}</extra>",
                        customdata=part["item"],
                        meta={"drawn": "y", "axis": "y"},
                    ),
                    row=row,
                    col=column,
                )
    row, column = panels.places["PCA"]
    panels.figure.update_xaxes(title_text=f"component 1 ({pca['x_share']:.0%} of variance)", row=row, col=column)
    panels.figure.update_yaxes(title_text=f"component 2 ({pca['y_share']:.0%} of variance)", row=row, col=column)
    if "UMAP" in present:
        row, column = panels.places[titles["UMAP"]]
        panels.figure.update_xaxes(title_text="no unit; distances between groups mean little", row=row, col=column)
        panels.figure.update_yaxes(showticklabels=False, row=row, col=column)
    n = int(table["item"].nunique()) // 2
    missing = "" if "UMAP" in present else "; UMAP needs the extra 'maps' and was not drawn"
    figure = panels.finish(
        f"Hidden states of the last prompt token, {ours.model}, {pca['site']}",
        f"Measured here, {n} harmful (filled) and {n} harmless (open) test prompts in four arms{missing}",
        bottom=60,
    )
    caption = (
        "Both maps are fitted on all points of all arms, without scaling. PCA axes are linear and keep their share of "
        "the "
        "variance; UMAP keeps neighbourhoods, not distances. No coordinates were published."
    )
    return PaperFigure("hidden-states", "PCA and UMAP of hidden states", figure, table, caption, (measured_line(ours),))
