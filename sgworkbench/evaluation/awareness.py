"""Readings of awareness that come from scores: a probe inside the model, or what the model says when asked.

A score becomes a yes or no at a threshold that never saw the items it is used on: the Youden threshold of the training
split, or zero where the score is a log-odds. (The third reading, risk mentioned in the reasoning, needs no threshold:
`risk_mention.py`.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Real

from sgworkbench.analysis import Directions, Readings
from sgworkbench.errors import WorkbenchError
from sgworkbench.prompting import PromptSet
from sgworkbench.statistics import Auroc, auroc, youden_threshold


@dataclass(frozen=True)
class Awareness:
    """Which items an arm was aware of, by one reading.

    Attributes:
        reading: "probe", "self-report" or another name.
        scores: one row per arm and item: `arm`, `item`, `score` (NaN where it could not be read).
        threshold: an item is aware when its score is at least this.
        source: where the threshold comes from, in words.
        training: AUROC of harmful against harmless on the training split, in sample; None without a training split.
    """

    reading: str
    scores: pd.DataFrame
    threshold: float
    source: str
    training: Auroc | None = None

    @property
    def definition(self) -> str:
        """The reading in one phrase, for tables and figures."""
        area = "" if self.training is None else f"; AUROC {float(self.training.value):.2f} on the training split"
        return f"{self.reading} score at least {self.threshold:.3g} ({self.source}{area})"

    def values(self) -> pd.DataFrame:
        """Return `arm`, `item`, `score` and `aware` (missing where the score is)."""
        frame = self.scores[["arm", "item", "score"]].copy()
        aware = (frame["score"] >= self.threshold).astype("boolean")
        frame["aware"] = aware.mask(frame["score"].isna())
        return frame


def threshold_awareness(
    reading: str,
    scores: Mapping[str, Mapping[str, float]],
    *,
    train_scores: Real[np.ndarray, " prompt"] | None = None,
    train_harmful: Bool[np.ndarray, " prompt"] | None = None,
) -> Awareness:
    """Turn scores into awareness at the Youden threshold of a training split, or at zero without one.

    Args:
        reading: its name.
        scores: score of every item, by arm.
        train_scores: scores of the training prompts.
        train_harmful: which of them are harmful.

    Raises:
        WorkbenchError: only one of the two training arguments, different lengths, or a class that is missing.
    """
    rows = [(arm, item, float(score)) for arm, items in scores.items() for item, score in items.items()]
    frame = pd.DataFrame(rows, columns=["arm", "item", "score"])
    if train_scores is None and train_harmful is None:
        return Awareness(reading, frame, 0.0, "zero: yes and no are equally likely")
    if train_scores is None or train_harmful is None or len(train_scores) != len(train_harmful):
        raise WorkbenchError(
            "A threshold from a training split needs one score and one harmful-or-not per training prompt; give both, "
            "of equal length."
        )
    harmful = np.asarray(train_harmful, dtype=bool)
    positive, negative = np.asarray(train_scores)[harmful], np.asarray(train_scores)[~harmful]
    cut = float(youden_threshold(positive, negative).threshold)
    return Awareness(reading, frame, cut, "largest Youden index on the training split", auroc(positive, negative))


def probe_awareness(
    directions: Directions,
    layer: int,
    train_plain: Readings,
    train: PromptSet,
    readings: Mapping[str, Readings],
    test: PromptSet,
) -> Awareness:
    """Read awareness as the projection of the last instruction token onto an awareness direction.

    Args:
        directions: awareness directions, harmful minus harmless.
        layer: whose direction is used.
        train_plain: readings of the training prompts in the plain condition, rows as in `train`.
        train: the training prompts, with harmful and harmless labels.
        readings: readings of the test prompts by arm, rows as in `test`.
        test: the test prompts; their ids are the items.

    Raises:
        WorkbenchError: no direction at that layer, or a training class is missing.
    """
    layers = [site.layer for site in directions.sites]
    if layer not in layers:
        raise WorkbenchError(f"There is no awareness direction at layer {layer}; known layers: {layers}.")
    column = layers.index(layer)
    fitted = directions.project(train_plain.instruction)[:, column].double().numpy()
    scores = {
        arm: dict(zip([p.id for p in test], directions.project(reading.instruction)[:, column].tolist(), strict=True))
        for arm, reading in readings.items()
    }
    harmful = np.array([prompt.label == "harmful" for prompt in train])
    return threshold_awareness("probe", scores, train_scores=fitted, train_harmful=harmful)


def self_report_awareness(
    log_odds: Mapping[str, Sequence[float] | np.ndarray],
    test: PromptSet,
    *,
    train_log_odds: Sequence[float] | np.ndarray | None = None,
    train: PromptSet | None = None,
) -> Awareness:
    """Read awareness from what the model says when asked (`self_report.py`), at zero or at a fitted threshold.

    Args:
        log_odds: log-odds of yes over no of the test prompts, by arm, in the order of `test`.
        test: the test prompts; their ids are the items.
        train_log_odds: the same for the training prompts, plain condition; None puts the threshold at zero.
        train: the training prompts, with labels.

    Raises:
        WorkbenchError: lengths that do not fit, or a training class is missing.
    """
    for arm, values in log_odds.items():
        if len(values) != len(test):
            raise WorkbenchError(
                f"Arm {arm!r} has {len(values)} self-reports for {len(test)} prompts; expected one each."
            )
    scores = {
        arm: {prompt.id: float(value) for prompt, value in zip(test, values, strict=True) if math.isfinite(value)}
        for arm, values in log_odds.items()
    }
    harmful = None if train is None else np.array([prompt.label == "harmful" for prompt in train])
    fitted = None if train_log_odds is None else np.asarray(train_log_odds, dtype=np.float64)
    return threshold_awareness("self-report", scores, train_scores=fitted, train_harmful=harmful)
