"""Writing a protocol study: tables, vectors, figures, manifest and one page."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from sgworkbench.evaluation.protocol_study import REFERENCE, ProtocolStudy
from sgworkbench.plotting import figure_div, plotlyjs_script, save_figure
from sgworkbench.progress import Reporter, silent
from sgworkbench.runs import RunDirectory, environment
from sgworkbench.tensor_files import write_text


def write_protocol_study(
    study: ProtocolStudy, run: RunDirectory, *, images: bool = True, report: Reporter = silent
) -> tuple[Path, list[str]]:
    """Write everything a protocol study found into its run directory.

    Files: report.html, manifest.json, geometry.csv, cosines.csv, effects.csv, figures/ (HTML, CSV and, where a browser
    is found, PNG); the vectors are in vectors/.

    Returns the path of the page and notes for the user.
    """
    for name, table in (("geometry", study.geometry), ("cosines", study.cosines), ("effects", study.effects)):
        write_text(run.path / f"{name}.csv", table.to_csv(index=False))
    geometry, effects = study.geometry, study.effects
    figures: dict[str, tuple[Any, pd.DataFrame]] = {
        "cosine": (study.plot_geometry("cosine"), geometry),
        "norm_ratio": (study.plot_geometry("norm_ratio"), geometry),
    }
    for metric in ("refusal_shift", "kl", "top1"):
        figures[metric] = (study.plot_effects(metric), effects[effects["metric"] == metric])
    notes: list[str] = []
    for done, (name, (figure, frame)) in enumerate(figures.items()):
        report("writing figures", done, len(figures))
        formats = ("html", "png") if images else ("html",)
        saved = save_figure(figure, run.path / "figures" / name, formats, frame, include_plotlyjs="directory")
        notes += [note for note in saved.notes if note not in notes]
    report("writing figures", len(figures), len(figures))
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        resources.files("sgworkbench.reporting").joinpath("protocol_report.html.j2").read_text(encoding="utf-8")
    )
    page = run.path / "report.html"
    html = template.render(
        plotlyjs=plotlyjs_script(),
        figures={
            name: figure_div(figure, follow_color_scheme=True, div_id=name) for name, (figure, _) in figures.items()
        },
        study=study,
        comparisons=comparisons(study).to_dict("records"),
        environment=environment(),
    )
    write_text(page, html)
    run.write_manifest({"model": study.model, "prompts": study.prompts, "seed": study.config.seed})
    return page, notes


def comparisons(study: ProtocolStudy) -> pd.DataFrame:
    """Return each vector against the reference at the strongest coefficient, one row per vector and steered layer.

    Columns: vector, factor, layer, write_site, cosine, norm_ratio, and the paired change of each metric with interval.
    """
    strongest = max(study.config.alphas, key=abs)
    effects = study.effects[(study.effects["alpha"] == strongest) & (study.effects["vector"] != REFERENCE)]
    wide = effects.pivot(index=["vector", "layer"], columns="metric", values=["change", "change_low", "change_high"])
    wide.columns = wide.columns.map(lambda pair: f"{pair[1]}_{pair[0]}")
    columns = ["vector", "factor", "layer", "write_site", "cosine", "norm_ratio"]
    order = effects[["vector", "layer"]].drop_duplicates()
    return order.merge(study.geometry[columns], on=["vector", "layer"]).merge(
        wide.reset_index(), on=["vector", "layer"]
    )
