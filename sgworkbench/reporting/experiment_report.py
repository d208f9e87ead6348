"""Writing an experiment: figures and a self-contained page beside the tables of its run; no completion is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import plotly.graph_objects as go

from sgworkbench.evaluation.costs.quick_checks import performance_kept
from sgworkbench.evaluation.experiment.result import ExperimentResult
from sgworkbench.plotting import figure_div, plotlyjs_script, save_figure
from sgworkbench.progress import Reporter, silent
from sgworkbench.runs import environment
from sgworkbench.tensor_files import write_text

# The two-by-two figures become unreadable beyond this many arms; the table is always there.
_GAP_FIGURES = 3


def write_experiment(
    result: ExperimentResult, *, images: bool = True, report: Reporter = silent
) -> tuple[Path, list[str]]:
    """Write report.html and figures/ (HTML, CSV and, where a browser is found, PNG) into the run directory.

    The tables are there already; every file is replaced whole.

    Args:
        result: what `run_experiment` returned, or `ExperimentResult.load` read.
        images: also write PNG files.
        report: told about finished figures.

    Returns the path of the page and notes for the user (for example, that no browser was found for PNG files).
    """
    figures = _figures(result)
    notes: list[str] = []
    formats = ("html", "png") if images else ("html",)
    for done, (name, (figure, frame)) in enumerate(figures.items()):
        report("writing figures", done, len(figures))
        saved = save_figure(figure, result.path / "figures" / name, formats, frame, include_plotlyjs="directory")
        notes += [note for note in saved.notes if note not in notes]
    report("writing figures", len(figures), len(figures))
    page = result.path / "report.html"
    write_text(page, _page(result, {name: figure for name, (figure, _) in figures.items()}))
    return page, notes


def _figures(result: ExperimentResult) -> dict[str, tuple[go.Figure, pd.DataFrame]]:
    figures: dict[str, tuple[go.Figure, pd.DataFrame]] = {}
    tradeoff = result.tradeoff
    if not tradeoff.dropna(subset=["safety", "over_refusal"]).empty:
        figures["tradeoff"] = (result.plot_tradeoff(), tradeoff)
    figures["rates"] = (result.plot_rates(), result.summary_table())
    for number, ((reading, prompt_set), gap) in enumerate(result.gaps.items()):
        if number < _GAP_FIGURES and gap.table["n"].sum():
            name = f"behavioural_gap_{reading}_{prompt_set}".replace(" ", "_")
            figures[name] = (gap.plot_table(), gap.table)
    return figures


def _page(result: ExperimentResult, figures: dict[str, go.Figure]) -> str:
    loader = jinja2.PackageLoader("sgworkbench", "reporting")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader).get_template(
        "experiment_report.html.j2"
    )
    rates = result.rates
    everything = rates[rates["category"] == "all"]
    costs = result.costs
    conditions = result.arms.drop_duplicates("arm")
    wordings = conditions[conditions["condition"] != "plain"].drop_duplicates(["system", "prefix", "suffix", "prefill"])
    headline: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in _rows(result.summary_table()):
        headline.setdefault(row["arm"], {})[row["prompt_set"], row["label"]] = row
    page: str = template.render(
        plotlyjs=plotlyjs_script(),
        figures={name: figure_div(figure, follow_color_scheme=True, div_id=name) for name, figure in figures.items()},
        config=result.config,
        facts=result.facts,
        judge=result.judge,
        gated=result.config.coherence.gate,
        refusals=result.knows_refusals,
        headline=headline,
        columns=list(next(iter(headline.values()))),
        metrics=" or ".join(dict.fromkeys(row["metric"] for cells in headline.values() for row in cells.values())),
        arms=_rows(result.arms),
        wordings=_rows(wordings),
        rates=_rows(everything),
        categories=_rows(result.categories()),
        comparisons=_rows(result.headline_comparisons()),
        other_comparisons=_rows(
            result.comparisons[
                (result.comparisons["judge"] == result.judge)
                & (result.comparisons["gated"] != result.config.coherence.gate)
            ]
        ),
        coherence=_rows(result.coherence),
        openings=_rows(result.gate_openings),
        gaps=[(reading, prompt_set, gap) for (reading, prompt_set), gap in result.gaps.items()],
        costs=[] if costs is None else _rows(costs),
        kept=[] if costs is None else _rows(performance_kept(costs)),
        subspace=[] if result.subspace is None else _rows(result.subspace),
        seconds=sum(result.facts["seconds"].values()),
        environment=environment(),
    )
    return page


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]
