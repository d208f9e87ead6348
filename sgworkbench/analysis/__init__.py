"""Reading the residual stream: sites, activations, directions, shift and gap."""

from sgworkbench.analysis.attention import AttentionMass, attention_to_spans
from sgworkbench.analysis.attribution import ShiftAttribution, attribute_shift
from sgworkbench.analysis.capture import Activations, Moments, capture, capture_moments, capture_span_means
from sgworkbench.analysis.direction_methods import DIRECTION_METHODS, fit_directions
from sgworkbench.analysis.directions import (
    Directions,
    awareness_directions,
    mean_difference_directions,
)
from sgworkbench.analysis.gap import ARMS, GapResult, Readings, measure_gap, read_for_gap
from sgworkbench.analysis.logit_lens import LogitLens, lens_of_streams, lens_of_vectors
from sgworkbench.analysis.patching import Patch, patched_logits, run_patched
from sgworkbench.analysis.patching_grid import PatchingGrid, patch_grid
from sgworkbench.analysis.refusal import content_directions, refusal_directions, unembedding_directions
from sgworkbench.analysis.shift import SafetyShift, ShiftMap, safety_shift, shift_map
from sgworkbench.analysis.site import SITE_KINDS, Site, all_sites, parse_layers

__all__ = [
    "ARMS",
    "DIRECTION_METHODS",
    "SITE_KINDS",
    "Activations",
    "AttentionMass",
    "Directions",
    "GapResult",
    "LogitLens",
    "Moments",
    "Patch",
    "PatchingGrid",
    "Readings",
    "SafetyShift",
    "ShiftAttribution",
    "ShiftMap",
    "Site",
    "all_sites",
    "attention_to_spans",
    "attribute_shift",
    "awareness_directions",
    "capture",
    "capture_moments",
    "capture_span_means",
    "content_directions",
    "fit_directions",
    "lens_of_streams",
    "lens_of_vectors",
    "mean_difference_directions",
    "measure_gap",
    "parse_layers",
    "patch_grid",
    "patched_logits",
    "read_for_gap",
    "refusal_directions",
    "run_patched",
    "safety_shift",
    "shift_map",
    "unembedding_directions",
]
