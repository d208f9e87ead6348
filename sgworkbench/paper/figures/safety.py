"""Safety, over-refusal, utility and model scale: published numbers, and ours beside them."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from sgworkbench.paper.figures.base import (
    MEASURED,
    MODELS,
    PUBLISHED,
    STYLES,
    PaperFigure,
    measured_line,
    our_arm,
    published_line,
)
from sgworkbench.paper.figures.panels import curves, dots, grid
from sgworkbench.paper.measured import Measured
from sgworkbench.paper.published import published
from sgworkbench.plotting.theme import OTHER_SERIES
from sgworkbench.statistics import rate

_SIZES = {"Qwen3-4B": 4.0, "Qwen3-8B": 8.0, "Qwen3-14B": 14.0}
_WILSON = "whiskers: 95 % Wilson intervals, n in the table and on hover"
_JUDGES = (
    "Judges as published: Llama-Guard-3-8B (HarmBench, AdvBench, GCG, H-CoT), fine-tuned Mistral (SORRY-Bench), "
    "gpt-4o-mini (PAIR), WildGuard (over-refusal)."
)


def rows_of(table: pd.DataFrame, panel: str) -> pd.DataFrame:
    """Return published rows in the form panels draw: panel, series, x (the model), value, low, high, n, source."""
    ordered = table.assign(order=table["model"].map({name: index for index, name in enumerate(MODELS)}))
    rows = ordered.sort_values("order", kind="stable")
    return pd.DataFrame(
        {
            "source": PUBLISHED,
            "model": rows["model"],
            "panel": panel,
            "benchmark": rows["benchmark"],
            "series": [our_arm(arm) for arm in rows["arm"]],
            "x": rows["model"],
            "value": rows["value"],
            "low": rows["low"] if "low" in rows else float("nan"),
            "high": rows["high"] if "high" in rows else float("nan"),
            "n": rows["n"],
            "judge": rows.get("judge", ""),
        }
    )


def with_wilson(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with Wilson intervals from its columns count and n."""
    found = [rate(int(k), int(n)) for k, n in zip(table["count"], table["n"], strict=True)]
    return table.assign(low=[each.low for each in found], high=[each.high for each in found])


def our_rates(measured: Measured, panel: str) -> pd.DataFrame:
    """Return our compliance with harmful and refusal of harmless prompts, in the same form."""
    rows = measured.table("rates")
    names = {"complied": "harmful:<br>complied", "over_refusal": "harmless:<br>refused"}
    return pd.DataFrame(
        {
            "source": MEASURED,
            "model": measured.model,
            "panel": panel,
            "benchmark": rows["quantity"].map(
                {"complied": measured.settings.harmful, "over_refusal": measured.settings.harmless}
            ),
            "series": rows["arm"],
            "x": rows["quantity"].map(names),
            "value": rows["value"],
            "low": rows["low"],
            "high": rows["high"],
            "n": rows["n"],
            "judge": measured.facts["judge"],
            "incoherent": rows["incoherent"],
            "unparsed": rows["unparsed"],
        }
    )


def _incoherent(measured: Measured) -> str:
    rows = measured.table("rates")
    return (
        f"ours: {int(rows['incoherent'].sum())} incoherent and {int(rows['unparsed'].sum())} unjudged answers left out"
    )


def safety_comparison(measured: Measured | None) -> PaperFigure:
    """Attack success and fulfilment of every arm, with over-refusal beside it."""
    safety = published("safety", main=True, subset="all")
    over = published("over_refusal", main=True)
    parts = []
    for benchmark in ("HarmBench", "SORRY-Bench", "AdvBench", "GCG-AdvBench", "PAIR-AdvBench", "H-CoT"):
        rows = safety[safety["benchmark"] == benchmark]
        metric = "fulfilled" if rows["metric"].iloc[0] == "fulfilment" else "attack success"
        parts.append(rows_of(rows, f"{benchmark}: {metric}<br>published"))
    parts.append(rows_of(over[over["benchmark"] == "XSTest"], "XSTest safe: over-refusal<br>published"))
    measured_on = [published_line()]
    note = ""
    if measured is not None:
        parts.append(our_rates(measured, f"{measured.model}<br>measured here, {measured.facts['judge']}"))
        measured_on.append(measured_line(measured))
        note = f"; {_incoherent(measured)}"
    table = pd.concat(parts, ignore_index=True)
    panels = grid(list(dict.fromkeys(table["panel"])), 4, row_height=200, spacing=0.05)
    dots(panels, table, STYLES)
    figure = panels.finish(
        "Safety by arm, with over-refusal beside it",
        f"Lower is better everywhere; {_WILSON}{note}",
        bottom=48,
    )
    caption = (
        f"{_JUDGES} The published Self-Guard safety runs use another wording of the reminder than the prompt-only arm, "
        "so their difference is not a pure steering effect. Benchmarks, judges and models of the two sides differ: "
        "compare arms within a panel, not panels with each other. An arm without a dot was not published."
    )
    return PaperFigure("safety-comparison", "Main safety comparison", figure, table, caption, tuple(measured_on))


def harmbench_subsets(measured: Measured | None) -> PaperFigure:
    """HarmBench by subset: the difference between prompt only and both is nearly all copyright."""
    safety = published("safety", main=True, benchmark="HarmBench")
    parts = [
        rows_of(with_wilson(safety[safety["subset"] == subset]), f"HarmBench {subset}<br>published")
        for subset in ("standard", "contextual", "copyright")
    ]
    table = pd.concat(parts, ignore_index=True)
    panels = grid(list(dict.fromkeys(table["panel"])), 3, row_height=240)
    dots(panels, table, STYLES)
    figure = panels.finish(
        "HarmBench by subset: where the published differences come from",
        f"Attack success, judge Llama-Guard-3-8B; lower is better; {_WILSON}",
        bottom=48,
    )
    caption = (
        "Standard 200, contextual 100 (run without their context) and copyright 100 items. Once the safety prompt is "
        "there, nearly all remaining unsafe answers are copyright items."
    )
    return PaperFigure("harmbench-subsets", "HarmBench by subset", figure, table, caption, (published_line(),))


def trade_off(measured: Measured | None) -> PaperFigure:
    """Over-refusal across, unsafe answers upwards: every added stage buys one with the other."""
    safety = published("safety", main=True, subset="all")
    over = published("over_refusal", main=True)
    parts = []
    for benchmark, refused in (("HarmBench", "XSTest"), ("SORRY-Bench", "XSTest"), ("HarmBench", "FORTRESS-benign")):
        unsafe = rows_of(safety[safety["benchmark"] == benchmark], f"{benchmark} against {refused}<br>published")
        cost = rows_of(over[over["benchmark"] == refused], "").set_index(["model", "series"])
        both = unsafe.set_index(["model", "series"]).join(
            cost[["value", "low", "high", "n"]].add_prefix("over_refusal_"), how="inner"
        )
        parts.append(both.reset_index())
    measured_on = [published_line()]
    if measured is not None:
        rows = our_rates(measured, f"{measured.model}<br>measured here, {measured.facts['judge']}")
        harmful, harmless = (
            rows[rows["x"].str.startswith(f"{label}:")].set_index(["model", "series"])
            for label in ("harmful", "harmless")
        )
        joined = harmful.join(harmless[["value", "low", "high", "n"]].add_prefix("over_refusal_"))
        parts.append(joined.reset_index())
        measured_on.append(measured_line(measured))
    table = pd.concat(parts, ignore_index=True)
    panels = grid(list(dict.fromkeys(table["panel"])), 4, row_height=300, spacing=0.055)
    for arm in (each for each in STYLES if each in set(table["series"])):
        panels.shown[arm] = STYLES[arm].label
        panels.figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker={"color": STYLES[arm].shade.light, "size": 10, "symbol": "square"},
            name=STYLES[arm].label,
            legendgroup=arm,
        )
    symbols = {"Qwen3-4B": "circle", "Qwen3-8B": "square", "Qwen3-14B": "diamond"}
    for panel, part in table.groupby("panel", sort=False):
        row, column = panels.places[str(panel)]
        for model_name, group in part.groupby("model", sort=False):
            path = group.set_index("series").reindex(["plain", "prompted", "both"]).dropna(subset=["value"])
            panels.figure.add_scatter(
                x=path["over_refusal_value"],
                y=path["value"],
                mode="lines",
                line={"color": OTHER_SERIES[5].shade.light, "width": 1, "dash": "dot"},
                hoverinfo="skip",
                showlegend=False,
                row=row,
                col=column,
            )
            for point in group.to_dict("records"):
                style = STYLES[str(point["series"])]
                colour = style.shade.light
                panels.figure.add_trace(
                    go.Scatter(
                        x=[point["over_refusal_value"]],
                        y=[point["value"]],
                        error_x=_bars(
                            point["over_refusal_value"], point["over_refusal_low"], point["over_refusal_high"], colour
                        ),
                        error_y=_bars(point["value"], point["low"], point["high"], colour),
                        mode="markers",
                        marker={"color": colour, "size": 10, "symbol": symbols.get(str(model_name), "star")},
                        name=style.label,
                        legendgroup=str(point["series"]),
                        showlegend=False,
                        cliponaxis=False,
                        hovertemplate=f"{model_name}<br>over-refusal %{{x:.1%}}<br>unsafe %{{y:.1%}}"
                        f"<extra>{style.label}</extra>",
                        meta={"drawn": "value", "axis": "y"},
                    ),
                    row=row,
                    col=column,
                )
        panels.figure.update_xaxes(
            title_text="over-refusal", tickformat=".0%", rangemode="tozero", title_standoff=4, row=row, col=column
        )
        panels.figure.update_yaxes(tickformat=".0%", rangemode="tozero", row=row, col=column)
    panels.figure.update_yaxes(title_text="unsafe or fulfilled", row=1, col=1)
    figure = panels.finish(
        "The trade-off: unsafe answers against over-refusal",
        "Towards the lower left is better; circle Qwen3-4B, square 8B, diamond 14B, star another model; dotted lines "
        "join plain, prompted and both; whiskers: 95 % Wilson",
        bottom=60,
    )
    caption = (
        f"{_JUDGES} Every added stage lowers unsafe answers and raises over-refusal. FORTRESS-benign has no readable "
        "plain run, and its prompt-only runs lack a verdict for 65 to 109 of 500 answers. Ours: harmful prompts "
        "answered against harmless prompts refused, coherent answers only."
    )
    return PaperFigure("trade-off", "Over-refusal against safety", figure, table, caption, tuple(measured_on))


def _bars(value: float | int, low: float | int, high: float | int, colour: str) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value],
        "arrayminus": [value - low],
        "color": colour,
        "thickness": 1.2,
        "width": 3,
    }


def utility(measured: Measured | None) -> PaperFigure:
    """Accuracy on utility benchmarks by arm."""
    scores = with_wilson(published("utility", main=True).dropna(subset=["count"]))
    parts = [
        rows_of(scores[scores["benchmark"] == name], f"{name}<br>published")
        for name in ("MMLU-Pro", "GPQA-diamond", "MATH-500", "AIME", "HumanEval")
    ]
    measured_on = [published_line()]
    if measured is not None:
        costs = measured.table("costs")
        rows = costs[costs["is_rate"].astype(bool) & costs["metric"].str.startswith("multiple_choice")]
        parts.append(
            pd.DataFrame(
                {
                    "source": MEASURED,
                    "model": measured.model,
                    "panel": f"{measured.model}, multiple choice<br>measured here",
                    "benchmark": "built-in multiple choice",
                    "series": rows["arm"],
                    "x": "by " + rows["metric"].str.removeprefix("multiple_choice_").str.replace("_", " "),
                    "value": rows["value"],
                    "low": rows["low"],
                    "high": rows["high"],
                    "n": rows["n"],
                    "judge": "log-probability of the options",
                }
            )
        )
        measured_on.append(measured_line(measured))
    table = pd.concat(parts, ignore_index=True)
    panels = grid(list(dict.fromkeys(table["panel"])), 3, row_height=190)
    dots(panels, table, STYLES)
    figure = panels.finish(
        "Utility by arm: accuracy",
        f"Higher is better; published: exact match{'' if measured is None else ', ours: likeliest option'}; {_WILSON}",
        bottom=48,
    )
    caption = (
        "Qwen3-4B HumanEval falls from 76 to 47 to 38 per cent mostly because answers lost their code fence, which the "
        "extraction needs. The published utility runs use a fourth wording of the reminder. AIME has 30 items, one is "
        "3.3 points. Ours: built-in multiple-choice items scored from log-probabilities, no generation."
    )
    return PaperFigure("utility", "Utility", figure, table, caption, tuple(measured_on))


def model_scale(measured: Measured | None) -> PaperFigure:
    """How the effects hold over model size."""
    safety = published("safety", main=True, subset="all")
    over = published("over_refusal", main=True)
    scores = published("utility", main=True)
    gap = published("behavioural_gap", main=True, benchmark="SORRY-Bench")
    aware = (gap["aware_share"] * gap["n"]).round()
    gap = with_wilson(
        gap.assign(count=(gap["aware_and_complied_share"] * gap["n"]).round(), n=aware.astype(int)).assign(
            value=gap["complied_given_aware"]
        )
    )
    means = scores.groupby(["model", "arm"], as_index=False).agg(value=("value", "mean"), n=("n", "sum"))
    means["benchmark"] = "mean of five"
    parts = [
        rows_of(safety[safety["benchmark"] == "HarmBench"], "HarmBench: attack success<br>published"),
        rows_of(safety[safety["benchmark"] == "SORRY-Bench"], "SORRY-Bench: fulfilled<br>published"),
        rows_of(gap, "SORRY-Bench: complied, given aware<br>published"),
        rows_of(over[over["benchmark"] == "XSTest"], "XSTest safe: over-refusal<br>published"),
        rows_of(means, "mean of five utility scores<br>published"),
    ]
    table = pd.concat(parts, ignore_index=True)
    table["x"] = table["model"].map(_SIZES)
    measured_on = [published_line()]
    titles = list(dict.fromkeys(table["panel"]))
    ours = None
    if measured is not None:
        ours = our_rates(measured, f"{measured.model}, other prompts and judge<br>measured here")
        titles.append(str(ours["panel"].iloc[0]))
        measured_on.append(measured_line(measured))
    panels = grid(titles, 3, row_height=190)
    curves(panels, table, STYLES, percent=True, x_title="parameters (billion)")
    panels.figure.update_xaxes(tickvals=list(_SIZES.values()), range=[3, 15])
    if ours is not None:
        dots(panels, ours, STYLES)
        table = pd.concat([table, ours], ignore_index=True)
    figure = panels.finish(
        "Generalisation over model scale",
        "Published Qwen3-4B, 8B and 14B; ribbons and whiskers: 95 % Wilson intervals"
        + ("" if ours is None else "; ours is one model, in a panel of its own"),
        bottom=60,
    )
    caption = (
        f"{_JUDGES} 'Aware' is a phrase proxy on the reasoning, and reasoning that echoes the safety prompt counts. "
        "8B is steered at 0.5 on layer 20, 4B and 14B at 0.3 on layers 30, 31 and 32: layer and dose differ between "
        "sizes, too. Utility means carry no interval, their benchmarks differ in size."
    )
    return PaperFigure("model-scale", "Generalisation over model scale", figure, table, caption, tuple(measured_on))
