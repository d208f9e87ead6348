"""Layer and coefficient: the published sweep and ours, always with coherence; dose-response."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sgworkbench.paper.figures.base import MEASURED, PUBLISHED, PaperFigure, measured_line, published_line
from sgworkbench.paper.figures.panels import curves, grid, heat
from sgworkbench.paper.measured import Measured
from sgworkbench.paper.published import published
from sgworkbench.plotting.theme import BEHAVIOUR, CONTENT, MUTED, OTHER_SERIES, PAGE, SeriesStyle
from sgworkbench.statistics import rate

MOSTLY = 0.5
"""Share of incoherent answers from which a cell is crossed out."""


def _published_cells() -> pd.DataFrame:
    cells = published("sweep").dropna(subset=["layer"])
    # A published output passes the part of the coherence gate that was recorded when it is neither degenerate nor left
    # its reasoning open; both shares are known, not their overlap, so the larger one bounds the incoherent share.
    incoherent = np.maximum(cells["degenerate"], 1 - cells["closed_reasoning"])
    return cells.assign(incoherent=incoherent).sort_values(["layer", "strength"])


def _our_cells(measured: Measured) -> pd.DataFrame:
    cells = measured.table("sweep")
    steered = cells[cells["vector"] != "none"].copy()
    steered["complied"] = 1 - steered["refusal_rate_harmful"]
    steered["complied_low"] = 1 - steered["refusal_rate_harmful_high"]
    steered["complied_high"] = 1 - steered["refusal_rate_harmful_low"]
    steered["incoherent"] = 1 - steered["coherent_rate"]
    return steered.sort_values(["first_layer", "alpha"])


def _cells(frame: pd.DataFrame, source: str, model: str, panel: str, value: str, across: str) -> pd.DataFrame:
    layer = "layer" if source == PUBLISHED else "first_layer"
    n = "n" if source == PUBLISHED else "refusal_rate_harmful_n"
    return pd.DataFrame(
        {
            "source": source,
            "model": model,
            "panel": panel,
            "quantity": value,
            "x": frame[across],
            "y": frame[layer].astype(int),
            "value": frame[value].astype(float),
            "n": frame[n],
            "mark": frame["incoherent"] >= MOSTLY,
        }
    )


def sweep_grid(measured: Measured | None) -> PaperFigure:
    """Layer x coefficient: harmful answers beside incoherence, incoherent cells crossed out."""
    cells = _published_cells()
    unsafe = [_cells(cells, PUBLISHED, "Qwen3-8B", "Qwen3-8B: judged unsafe<br>published", "value", "strength")]
    broken = [_cells(cells, PUBLISHED, "Qwen3-8B", "Qwen3-8B: incoherent<br>published", "incoherent", "strength")]
    measured_on = [published_line("Qwen3-8B")]
    titles = [unsafe[0]["panel"].iloc[0], broken[0]["panel"].iloc[0]]
    if measured is not None:
        ours = _our_cells(measured)
        for parts, value, words in ((unsafe, "complied", "complied, harmful"), (broken, "incoherent", "incoherent")):
            panel = f"{measured.model}: {words}<br>measured here"
            parts.append(_cells(ours, MEASURED, measured.model, panel, value, "alpha"))
            titles.append(panel)
        measured_on.append(measured_line(measured))
    panels = grid(titles, 2, row_height=300, spacing=0.09)
    bars = 2
    harm: list[list[float | str]] = [[0.0, PAGE.light], [1.0, BEHAVIOUR["complied"].shade.light]]
    grey: list[list[float | str]] = [[0.0, PAGE.light], [1.0, MUTED.light]]
    heat(panels, pd.concat(unsafe), harm, limits=(0, 1), bar="unsafe or complied", n_bars=bars)
    heat(panels, pd.concat(broken), grey, limits=(0, 1), bar="incoherent", bar_index=1, n_bars=bars)
    panels.figure.update_xaxes(title_text="strength of the unit vector", title_standoff=4, row=1)
    panels.figure.update_yaxes(title_text="layer", title_standoff=4, col=1)
    if measured is not None:
        panels.figure.update_xaxes(title_text="coefficient, raw", title_standoff=4, row=2)
    figure = panels.finish(
        "Layer and coefficient: harmful answers, and whether they are answers at all",
        "Crosses: at least half of the outputs are incoherent, so the rate means nothing; dashes: not run",
        bottom=60,
        right=110,
    )
    table = pd.concat([*unsafe, *broken], ignore_index=True)
    caption = (
        "Published: thinking-intervention pca_diff unit vectors on 100 HarmBench items, judge Llama-Guard-3-8B, which "
        "calls gibberish unsafe; incoherent there means zlib ratio below 0.15 or reasoning never closed, whichever "
        "share is larger. Ours: the safety shift (mean difference, raw coefficient) on plain prompts of the validation "
        "split; compliance among judged answers, coherence gate of this package. Strengths of the two are in "
        "different units."
    )
    if measured is not None:
        n = int(_our_cells(measured)["refusal_rate_harmful_n"].max())
        caption += f" Ours: up to {n} harmful prompts a cell; read and written at resid_post."
    return PaperFigure("sweep", "Layer and coefficient sweep", figure, table, caption, tuple(measured_on))


_DOSE_STYLES = {
    "unsafe": SeriesStyle("harmful: unsafe or complied", BEHAVIOUR["complied"].shade, "solid", "triangle-down"),
    "over_refusal": SeriesStyle("harmless: refused", BEHAVIOUR["refused"].shade, "dash", "square"),
    "incoherent": SeriesStyle("incoherent", MUTED, "dot", "x"),
    "harmful": SeriesStyle("refusal log-odds, harmful", CONTENT["harmful"].shade, "solid", "circle"),
    "harmless": SeriesStyle("refusal log-odds, harmless", CONTENT["harmless"].shade, "dash", "diamond"),
    "kl": SeriesStyle("KL, harmless (nats)", OTHER_SERIES[0].shade, "dashdot", "cross"),
}


def dose_response(measured: Measured | None) -> PaperFigure:
    """What one layer gives at growing coefficients."""
    cells = _published_cells()
    rows = cells[cells["layer"] == 20]
    intervals = [rate(int(k), int(n)) for k, n in zip(rows["count"], rows["n"], strict=True)]
    shown = "Qwen3-8B, layer 20<br>published"
    facts = {"source": PUBLISHED, "model": "Qwen3-8B", "panel": shown, "layer": 20}
    parts = [
        pd.DataFrame(
            {
                **facts,
                "series": "unsafe",
                "x": rows["strength"],
                "value": rows["value"],
                "low": [each.low for each in intervals],
                "high": [each.high for each in intervals],
                "n": rows["n"],
            }
        ),
        pd.DataFrame(
            {**facts, "series": "incoherent", "x": rows["strength"], "value": rows["incoherent"], "n": rows["n"]}
        ),
    ]
    rates, scores = [shown], []
    measured_on = [published_line("Qwen3-8B")]
    if measured is not None:
        ours = _our_cells(measured)
        layer = int(measured.facts["layers"][-1])
        at = ours[ours["first_layer"] == layer]
        panel = f"{measured.model}, layer {layer}<br>measured here"
        rates.append(panel)
        facts = {"source": MEASURED, "model": measured.model, "panel": panel, "layer": layer}
        for series, column in (("unsafe", "complied"), ("over_refusal", "refusal_rate_harmless")):
            counted = "refusal_rate_harmful_n" if series == "unsafe" else "refusal_rate_harmless_n"
            parts.append(_series(at, facts, series, column, counted))
        incoherent = pd.DataFrame(
            {
                **facts,
                "series": "incoherent",
                "x": at["alpha"],
                "value": at["incoherent"],
                "low": 1 - at["coherent_rate_high"],
                "high": 1 - at["coherent_rate_low"],
                "n": at["coherent_rate_n"],
            }
        )
        parts.append(incoherent)
        first_token = f"{measured.model}, layer {layer}: first token<br>measured here"
        scores.append(first_token)
        facts = {**facts, "panel": first_token}
        for series, column, counted in (
            ("harmful", "refusal_log_odds_harmful", "n_harmful"),
            ("harmless", "refusal_log_odds_harmless", "n_harmless"),
            ("kl", "kl_harmless", "n_harmless"),
        ):
            parts.append(_series(at, facts, series, column, counted))
        measured_on.append(measured_line(measured))
    table = pd.concat(parts, ignore_index=True)
    panels = grid([*rates, *scores], 3, row_height=280)
    curves(panels, table[table["panel"].isin(rates)], _DOSE_STYLES, percent=True, x_title="coefficient")
    panels.figure.update_xaxes(title_text="strength of the unit vector", type="log", row=1, col=1)
    if scores:
        curves(panels, table[table["panel"].isin(scores)], _DOSE_STYLES, x_title="coefficient, raw")
        panels.figure.update_yaxes(title_text="nats", title_standoff=2, row=1, col=3)
    figure = panels.finish(
        "Dose-response of steering at one layer",
        "Ribbons: 95 % intervals (Wilson for rates, bootstrap for scores); steering alone, no safety prompt",
        bottom=60,
    )
    caption = (
        "Published: unit pca_diff vectors, 100 HarmBench items, judge Llama-Guard-3-8B; its share judged unsafe climbs "
        "where outputs fall apart, which is not a return of compliance. Ours: the safety shift added at every token "
        "of plain prompts, written where it was read (resid_post)."
    )
    return PaperFigure("dose-response", "Dose-response", figure, table, caption, tuple(measured_on))


def _series(rows: pd.DataFrame, facts: dict[str, object], series: str, column: str, counted: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            **facts,
            "series": series,
            "x": rows["alpha"],
            "value": rows[column],
            "low": rows[f"{column}_low"],
            "high": rows[f"{column}_high"],
            "n": rows[counted],
        }
    )
