"""The forward screen of a grid: what every layer and coefficient does to the first answer token, without generating.

A thin call of the sweep's engine (`sweep.engine`), for one vector and one condition; `sweep.run` screens whole grids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.sweep.engine import ScreenEngine, Variant
from sgworkbench.evaluation.sweep.measures import ScreenSetup
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting.rendering import RenderedPrompt
from sgworkbench.steering import SteeringVector


def screen_layers(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    vector: SteeringVector,
    layers: Iterable[int],
    alphas: Sequence[float],
    refusal_tokens: Sequence[int],
    *,
    max_batch_tokens: int = 2048,
    report: Reporter = silent,
) -> pd.DataFrame:
    """Measure every layer x coefficient cell of additive steering at all prompt tokens.

    Args:
        loaded: the model, without active steering.
        rendered: the prompts, of one condition.
        vector: the vectors and their protocol.
        layers: layers of the grid.
        alphas: raw coefficients of the grid.
        refusal_tokens: first tokens of refusals (see `refusal_score.first_tokens`).
        max_batch_tokens: padded tokens of one pass; memory is that of the prompts' streams at one layer and one pass.
        report: progress callback.

    Returns:
        One row per cell, layers outermost: layer, alpha, log_odds (mean refusal log-odds), kl (mean KL divergence of
        the first answer token from the unsteered run, nats), top1 (share of prompts whose likeliest token stays).

    Raises:
        WorkbenchError: an empty grid, a layer without a vector, or prompts that do not fit.
    """
    cells = [(layer, alpha) for layer in layers for alpha in alphas]
    if not cells:
        raise WorkbenchError("The grid is empty; give at least one layer and one coefficient.")
    for layer, _ in cells:
        vector.at(layer)
    setup = ScreenSetup(("refusal_log_odds", "kl", "top1"), tuple(refusal_tokens), max_batch_tokens=max_batch_tokens)
    engine = ScreenEngine(loaded, rendered, ["prompt"] * len(rendered), setup)
    variants = [Variant(str(i), (vector.intervention(*cell),)) for i, cell in enumerate(cells)]
    items = engine.run(variants, lambda done: report("screen", done, len(variants)))
    means = items.groupby("key", sort=False)[["refusal_log_odds", "kl", "top1"]].mean()
    table = pd.DataFrame(cells, columns=["layer", "alpha"])
    for column, name in (("log_odds", "refusal_log_odds"), ("kl", "kl"), ("top1", "top1")):
        table[column] = means[name].to_numpy()
    return table
