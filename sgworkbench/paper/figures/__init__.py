"""Recipes of the paper figures: published numbers and our own measurements side by side, each with its table."""

from __future__ import annotations

from collections.abc import Sequence

from sgworkbench.errors import unknown_name
from sgworkbench.paper.figures.attention import reminder_attention, response_map
from sgworkbench.paper.figures.base import PaperFigure, Recipe
from sgworkbench.paper.figures.framework import framework
from sgworkbench.paper.figures.gap import behavioural, gap_by_layer, gap_by_token, layer_shift_map, trajectories
from sgworkbench.paper.figures.hidden import hidden_states_map
from sgworkbench.paper.figures.safety import harmbench_subsets, model_scale, safety_comparison, trade_off, utility
from sgworkbench.paper.figures.sweeps import dose_response, sweep_grid
from sgworkbench.paper.figures.vectors import ablation, geometry

FIGURES: tuple[Recipe, ...] = (
    Recipe("framework", "Framework", framework, ("facts", "gap", "rates")),
    Recipe("safety-comparison", "Main safety comparison", safety_comparison, ("facts", "rates")),
    Recipe("harmbench-subsets", "HarmBench by subset", harmbench_subsets),
    Recipe("trade-off", "Over-refusal against safety", trade_off, ("facts", "rates")),
    Recipe("utility", "Utility", utility, ("facts", "costs")),
    Recipe("sweep", "Layer and coefficient sweep", sweep_grid, ("facts", "sweep")),
    Recipe("dose-response", "Dose-response", dose_response, ("facts", "sweep")),
    Recipe("shift-map", "Layerwise shift map", layer_shift_map, ("facts", "shift_map"), has_published=False),
    Recipe("gap-by-layer", "Gap by layer, four arms", gap_by_layer, ("facts", "gap", "gap_nulls"), has_published=False),
    Recipe(
        "gap-by-token",
        "Gap by layer and by token, four arms",
        gap_by_token,
        ("facts", "gap", "trace_tokens"),
        has_published=False,
    ),
    Recipe("behavioural-gap", "Behavioural gap", behavioural, ("facts", "behaviour")),
    Recipe("attention-reminder", "Attention to the reminder along the generation", reminder_attention, ("attention",)),
    Recipe(
        "attention-map", "Response-to-instruction attention", response_map, ("attention_maps",), has_published=False
    ),
    Recipe("vector-geometry", "Vector geometry", geometry, ("facts", "vector", "layer_cosines", "geometry")),
    Recipe("wording-and-data", "Prompt-wording and data-set ablation", ablation, ("effects",), has_published=False),
    Recipe("model-scale", "Generalisation over model scale", model_scale, ("facts", "rates")),
    Recipe("trajectories", "Projection trajectories", trajectories, ("trajectories",), has_published=False),
    Recipe("hidden-states", "PCA and UMAP of hidden states", hidden_states_map, ("hidden",), has_published=False),
)
"""All figures, in the order of the index page."""


def choose_figures(names: Sequence[str] = ()) -> tuple[Recipe, ...]:
    """Return the named recipes in the order of `FIGURES`; all of them when none is named.

    Raises:
        WorkbenchError: an unknown name, with the nearest known one.
    """
    known = {recipe.name: recipe for recipe in FIGURES}
    for name in names:
        if name not in known:
            raise unknown_name("figure", name, known)
    return tuple(recipe for recipe in FIGURES if not names or recipe.name in names)


__all__ = ["FIGURES", "PaperFigure", "Recipe", "choose_figures"]
