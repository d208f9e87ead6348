"""The usual number for activation patching: the refusal log-odds of the first answer token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.patching import Metric
from sgworkbench.analysis.patching_grid import PatchingGrid, patch_grid
from sgworkbench.evaluation.refusal_score import REFUSAL_OPENINGS, first_tokens, refusal_log_odds
from sgworkbench.models import LoadedModel
from sgworkbench.prompting import PromptCondition, PromptSet, Renderer


def refusal_metric(loaded: LoadedModel, openings: Sequence[str] = REFUSAL_OPENINGS) -> Metric:
    """Return a metric for patching: refusal log-odds from logits [row, d_vocab].

    Raises:
        WorkbenchError: no openings.
    """
    tokens = first_tokens(loaded, openings)

    def metric(logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, "row"]:
        return refusal_log_odds(logits, tokens)

    return metric


def patch_refusal(
    loaded: LoadedModel, renderer: Renderer, prompts: PromptSet, condition: PromptCondition, **options: Any
) -> PatchingGrid:
    """Patch a grid and read the refusal log-odds; `options` (kind, mode, layers ...): see `patch_grid`."""
    metric = refusal_metric(loaded)
    return patch_grid(loaded, renderer, prompts, condition, metric, metric_name="refusal log-odds", **options)
