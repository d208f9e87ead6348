"""What figures of sweeps say in words: which metrics, which slice, how many prompts, which judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from sgworkbench.errors import WorkbenchError
from sgworkbench.plotting.layout import plotly_text

if TYPE_CHECKING:
    from sgworkbench.evaluation.sweep.result import SweepResult

DEFAULT_METRICS = (
    "refusal_rate_harmful",
    "refusal_rate_harmless",
    "refusal_log_odds_harmful",
    "refusal_log_odds_harmless",
    "kl_from_plain_harmless",
    "kl_harmless",
    "coherent_rate",
)
"""What a grid is read by: refusal, over-refusal, KL and coherence; those that were measured are drawn."""
_MAX_METRICS = 4
WORDS = {"vanilla": "vanilla", "prompt-only": "prompt only"}
"""How the unsteered arms are called in figures."""


def chosen_metrics(result: SweepResult, metric: str | Sequence[str] | None) -> list[str]:
    """Return the metrics to draw; by default safety, over-refusal, KL and coherence as far as they were measured."""
    if isinstance(metric, str):
        return [metric]
    if metric is not None:
        if not 1 <= len(metric) <= _MAX_METRICS:
            raise WorkbenchError(f"A figure shows one to {_MAX_METRICS} metrics side by side, found {len(metric)}.")
        return list(metric)
    found = [name for name in DEFAULT_METRICS if name in result.metrics]
    if "kl_from_plain_harmless" in found and "kl_harmless" in found:
        found.remove("kl_harmless")
    if "refusal_rate_harmful" in found and result.steered["refusal_rate_harmful"].notna().any():
        return [name for name in found if not name.startswith("refusal_log_odds")]
    return [name for name in found if not name.startswith(("refusal_rate", "coherent"))] or result.metrics[:1]


def model_name(result: SweepResult) -> str:
    """Return the model's name, for titles."""
    return plotly_text(str((result.facts.get("model") or {}).get("name", "unknown model")))


def sites_text(table: pd.DataFrame) -> str:
    """Return the kind of site that the cells of a table write to."""
    protocols = list(dict.fromkeys(table["protocol"]))
    names = {"same-site": "resid_post", "official": "resid_pre", "official-padded": "resid_pre"}
    return " or ".join(dict.fromkeys(names.get(name, name) for name in protocols))


def slice_text(table: pd.DataFrame) -> str:
    """Return in words which cells a table holds."""
    parts = []
    for column, words in (
        ("vector", "vector"), ("operator", "operator"), ("protocol", "protocol"), ("selector", "tokens"),
        ("gate", "gate"), ("condition", "condition"),
    ):  # fmt: skip
        found = list(dict.fromkeys(table[column]))
        if len(found) == 1 and found[0] not in ("none", ""):
            parts.append(f"{words} {found[0]}")
    return plotly_text(", ".join(parts)).capitalize() if parts else "All cells"


def counts_text(result: SweepResult, metrics: Sequence[str]) -> str:
    """Return how many prompts stand behind the metrics, and the judge where answers were judged."""
    from sgworkbench.evaluation.sweep.result import ANSWER_COLUMNS

    spec = result.facts.get("spec") or {}
    split = spec.get("split", "held-out")
    first = result.cells.iloc[0]
    text = f"n = {int(first['n_harmful'])} harmful and {int(first['n_harmless'])} harmless {split} prompts"
    judged = [name for name in metrics if name in ANSWER_COLUMNS]
    if not judged:
        return text
    answers = spec.get("answers") or {}
    counts = [
        int(result.cells[f"refusal_rate_{label}_n"].max()) if f"refusal_rate_{label}_n" in result.cells else 0
        for label in ("harmful", "harmless")
    ]
    asked = f"n = {counts[0]} harmful and {counts[1]} harmless {split} prompts answered"
    # A line break inside the judge's name would read as two names.
    judge = str(answers.get("judge", "unknown")).replace("-", "\u2011")
    words = f"{answers.get('max_new_tokens', '?')} tokens, judge {judge}"
    return f"{asked} ({words})" if len(judged) == len(metrics) else f"{text}; {asked} ({words})"


def short(title: str) -> str:
    """Return a metric's title without words that a heading can do without."""
    words = {
        " prompts": "",
        "Over-refusal: refused, harmless": "Over-refusal, harmless",
        "the unsteered run": "unsteered",
    }
    for long, brief in words.items():
        title = title.replace(long, brief)
    return title


def dose_title(table: pd.DataFrame) -> str:
    """Return the name of the dose axis."""
    units = {"raw": "coefficient (raw)", "fraction_of_residual": "share of the residual norm", "target_kl": "KL (nats)"}
    return units.get(str(table["dose_unit"].iloc[0]), "no coefficient")


def reference_text(references: pd.DataFrame, metric: str) -> str:
    """Return the values of the unsteered runs in small print."""
    rows = references[references["metric"] == metric].dropna(subset=["value"])
    parts = [f"{WORDS.get(row['arm'], row['arm'])} {row['value']:.2f}" for row in rows.to_dict("records")]
    return f'<span style="font-size:11px">{", ".join(parts) or "no unsteered run"}</span>'
