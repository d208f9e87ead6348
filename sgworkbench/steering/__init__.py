"""Steering vectors and operators, applied through hook points, and generation under them."""

from sgworkbench.steering.attention_trace import AttentionMap, attention_map, join_attention, trace_attention
from sgworkbench.steering.audit import Audit, audit
from sgworkbench.steering.conditional import awareness_gated
from sgworkbench.steering.dose import KlCalibration, alpha_for_fraction, alpha_for_kl, dose_table, mean_first_token_kl
from sgworkbench.steering.gate import Condition, FittedThreshold, Gate, fit_threshold
from sgworkbench.steering.generation import Generation, GenerationSettings, generate
from sgworkbench.steering.hooks import Intervention, steering
from sgworkbench.steering.layers import choose_layers, choose_sites
from sgworkbench.steering.operators import (
    OPERATORS,
    Ablate,
    Add,
    AddPreservingNorm,
    AffineConceptEdit,
    Clamp,
    NullSpace,
    NullSpaceFit,
    Operator,
    Rotate,
    fit_null_space,
    get_operator,
    moments_of,
    register_operator,
)
from sgworkbench.steering.recipe import GateSpec, InterventionSpec, SelectorSpec, SteeringRecipe
from sgworkbench.steering.selector import Selector
from sgworkbench.steering.trace import Trace, join_traces, trace_generation
from sgworkbench.steering.vector import PROTOCOLS, SteeringVector

__all__ = [
    "OPERATORS",
    "PROTOCOLS",
    "Ablate",
    "Add",
    "AddPreservingNorm",
    "AffineConceptEdit",
    "AttentionMap",
    "Audit",
    "Clamp",
    "Condition",
    "FittedThreshold",
    "Gate",
    "GateSpec",
    "Generation",
    "GenerationSettings",
    "Intervention",
    "InterventionSpec",
    "KlCalibration",
    "NullSpace",
    "NullSpaceFit",
    "Operator",
    "Rotate",
    "Selector",
    "SelectorSpec",
    "SteeringRecipe",
    "SteeringVector",
    "Trace",
    "alpha_for_fraction",
    "alpha_for_kl",
    "attention_map",
    "audit",
    "awareness_gated",
    "choose_layers",
    "choose_sites",
    "dose_table",
    "fit_null_space",
    "fit_threshold",
    "generate",
    "get_operator",
    "join_attention",
    "join_traces",
    "mean_first_token_kl",
    "moments_of",
    "register_operator",
    "steering",
    "trace_attention",
    "trace_generation",
]
