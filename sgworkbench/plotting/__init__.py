"""Figures of the workbench: tidy frames and arrays in, editable plotly figures or self-contained HTML out."""

from __future__ import annotations

from sgworkbench.plotting.attention import attention_map_figure, attention_trace_figure
from sgworkbench.plotting.distributions import projection_distributions
from sgworkbench.plotting.export import SavedFigure, figure_div, plotlyjs_script, save_figure
from sgworkbench.plotting.layer_curves import layer_curves
from sgworkbench.plotting.layout import retheme
from sgworkbench.plotting.notebook import show
from sgworkbench.plotting.rates import refusal_rates
from sgworkbench.plotting.shift_map import shift_map
from sgworkbench.plotting.theme import ARMS, BEHAVIOUR, CONTENT, ROLES, TEMPLATES
from sgworkbench.plotting.tokens import coloured_tokens_html, role_tokens_html
from sgworkbench.plotting.trace import generation_trace

__all__ = [
    "ARMS",
    "BEHAVIOUR",
    "CONTENT",
    "ROLES",
    "TEMPLATES",
    "SavedFigure",
    "attention_map_figure",
    "attention_trace_figure",
    "coloured_tokens_html",
    "figure_div",
    "generation_trace",
    "layer_curves",
    "plotlyjs_script",
    "projection_distributions",
    "refusal_rates",
    "retheme",
    "role_tokens_html",
    "save_figure",
    "shift_map",
    "show",
]
