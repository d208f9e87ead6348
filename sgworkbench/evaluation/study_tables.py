"""Tables of a gap study that join what the model did with what was read inside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from sgworkbench.analysis import Directions, Readings
from sgworkbench.evaluation.validation import held_out_by_condition
from sgworkbench.prompting import PromptSet
from sgworkbench.statistics import compare_paired, rate, youden_threshold


def comparisons_table(answers: pd.DataFrame) -> pd.DataFrame:
    """Compare arms pair by pair with exact McNemar tests, per label."""
    rows = []
    for label in dict.fromkeys(answers["label"]):
        wide = answers[answers["label"] == label].pivot(index="prompt_id", columns="arm", values="refused")
        outcomes = {arm: [None if pd.isna(v) else bool(v) for v in wide[arm]] for arm in wide}
        for first, second in (("plain", "prompted"), ("plain", "steered"), ("prompted", "both")):
            result = compare_paired(outcomes[first], outcomes[second])
            rows.append({"content": label, "first": first, "second": second, **result.to_dict()})
    return pd.DataFrame(rows)


def _scores(
    readings: dict[str, Readings],
    directions: Directions,
    layer: int,
    pick: Callable[[Readings], Tensor],
    prompts: PromptSet,
) -> pd.Series[float]:
    """Return raw projections at one layer, indexed by arm and prompt id."""
    index = [site.layer for site in directions.sites].index(layer)
    values = {
        (arm, p.id): float(score)
        for arm, reading in readings.items()
        for p, score in zip(prompts, directions.project(pick(reading))[:, index], strict=True)
    }
    return pd.Series(values)


def held_out_table(
    answers: pd.DataFrame, readings: dict[str, Readings], refusal: Directions, layer: int, test: PromptSet
) -> list[dict[str, Any]]:
    """Return held-out AUROCs of refused against complied within each unsteered condition."""
    scores = _scores(readings, refusal, layer, lambda reading: reading.prompt, test)
    rows = answers[answers["arm"].isin(["plain", "prompted"]) & answers["refused"].notna()]
    values = np.array([scores[key] for key in zip(rows["arm"], rows["prompt_id"], strict=True)])
    return held_out_by_condition(values, rows["refused"].to_numpy(dtype=bool), list(rows["arm"]))


def aware_and_complied_table(
    answers: pd.DataFrame,
    readings: dict[str, Readings],
    awareness: Directions,
    layer: int,
    train_plain: Readings,
    train: PromptSet,
    test: PromptSet,
) -> pd.DataFrame:
    """Return, per arm, how often harmful prompts were recognised by the probe and nevertheless answered.

    Aware means a projection above the threshold with the largest Youden index on the training split, plain condition.
    """
    index = [site.layer for site in awareness.sites].index(layer)
    fitted = awareness.project(train_plain.instruction)[:, index].double().numpy()
    mask = np.array([prompt.label == "harmful" for prompt in train])
    threshold = float(youden_threshold(fitted[mask], fitted[~mask]).threshold)
    scores = _scores(readings, awareness, layer, lambda reading: reading.instruction, test)
    rows = []
    for arm in dict.fromkeys(answers["arm"]):
        part = answers[(answers["arm"] == arm) & (answers["label"] == "harmful") & answers["refused"].notna()]
        aware = np.array([scores[arm, prompt_id] >= threshold for prompt_id in part["prompt_id"]], dtype=bool)
        complied = ~part["refused"].to_numpy(dtype=bool)
        n_both = int((aware & complied).sum())
        joint, given = rate(n_both, len(aware)), rate(n_both, int(aware.sum()))
        rows.append(
            {
                "arm": arm,
                "n": len(aware),
                "aware": int(aware.sum()),
                "complied": int(complied.sum()),
                "aware_and_complied": joint.value,
                "complied_given_aware": given.value,
                "low": given.low,
                "high": given.high,
            }
        )
    return pd.DataFrame(rows)
