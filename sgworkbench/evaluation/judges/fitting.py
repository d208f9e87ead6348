"""Fit the weights of the refusal judge on labelled responses, and say how well they do on what they have not seen.

An L2-penalised logistic regression on standardised cues, folded back to raw cues so that the stored weights can be
read and applied without scikit-learn. Groups (an arm, a model) are held out whole, never single rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.coherence import split_reasoning
from sgworkbench.evaluation.judges.cues import CUE_NAMES, read_cues
from sgworkbench.evaluation.judges.refusal import RefusalWeights

# Inverse strength of the penalty; results hardly move between 0.05 and 1.
_INVERSE_PENALTY = 0.3


def cue_matrix(prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, " response cue"]:
    """Return the cues of each response, columns in the order of `CUE_NAMES`; rows without an answer are NaN."""
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        answer = split_reasoning(response).answer
        cues = read_cues(prompt, answer) if answer else None
        rows.append([np.nan if cues is None else float(getattr(cues, name)) for name in CUE_NAMES])
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(CUE_NAMES))


def fit_weights(
    cues: Float[np.ndarray, " response cue"],
    refused: Bool[np.ndarray, " response"],
    importance: Float[np.ndarray, " response"] | None = None,
) -> RefusalWeights:
    """Fit the score.

    Args:
        cues: from `cue_matrix`, without NaN.
        refused: label of each response.
        importance: weight of each response in the fit; all equal unless given.

    Raises:
        WorkbenchError: NaN cues, or labels of one kind only.
    """
    if np.isnan(cues).any() or len(set(refused.tolist())) < 2:
        raise WorkbenchError(
            "Fitting the refusal judge needs responses that have an answer, and both refusals and compliances."
        )
    scaler = StandardScaler().fit(cues)
    model: Any = LogisticRegression(C=_INVERSE_PENALTY, max_iter=5000)
    model.fit(scaler.transform(cues), refused, sample_weight=importance)
    weights = model.coef_[0] / scaler.scale_
    intercept = float(model.intercept_[0] - (weights * scaler.mean_).sum())
    return RefusalWeights(intercept, dict(zip(CUE_NAMES, weights.tolist(), strict=True)))


def held_out_scores(
    cues: Float[np.ndarray, " response cue"],
    refused: Bool[np.ndarray, " response"],
    groups: Sequence[str],
    importance: Float[np.ndarray, " response"] | None = None,
) -> pd.Series:
    """Return each response's score from weights fitted on all other groups.

    Raises:
        WorkbenchError: fewer than two groups, or a fit that is not possible.
    """
    names = np.asarray(groups, dtype=object)
    if len(set(groups)) < 2:
        raise WorkbenchError("Holding out groups needs at least two of them (arms, or models).")
    scores = np.empty(len(cues))
    for name in dict.fromkeys(groups):
        inside = names == name
        outside = None if importance is None else importance[~inside]
        weights = fit_weights(cues[~inside], refused[~inside], outside)
        slopes = np.array([weights.weights[cue] for cue in CUE_NAMES])
        scores[inside] = 1.0 / (1.0 + np.exp(-(weights.intercept + cues[inside] @ slopes)))
    return pd.Series(scores, name="score")
