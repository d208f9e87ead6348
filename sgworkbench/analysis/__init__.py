"""Reading the residual stream: sites, activations, directions, shift and gap."""

from sgworkbench.analysis.capture import Activations, Moments, capture, capture_moments, capture_span_means
from sgworkbench.analysis.directions import (
    Directions,
    awareness_directions,
    mean_difference_directions,
)
from sgworkbench.analysis.gap import ARMS, GapResult, Readings, measure_gap, read_for_gap
from sgworkbench.analysis.refusal import content_directions, refusal_directions, unembedding_directions
from sgworkbench.analysis.shift import SafetyShift, ShiftMap, safety_shift, shift_map
from sgworkbench.analysis.site import SITE_KINDS, Site, all_sites, parse_layers

__all__ = [
    "ARMS",
    "SITE_KINDS",
    "Activations",
    "Directions",
    "GapResult",
    "Moments",
    "Readings",
    "SafetyShift",
    "ShiftMap",
    "Site",
    "all_sites",
    "awareness_directions",
    "capture",
    "capture_moments",
    "capture_span_means",
    "content_directions",
    "mean_difference_directions",
    "measure_gap",
    "parse_layers",
    "read_for_gap",
    "refusal_directions",
    "safety_shift",
    "shift_map",
    "unembedding_directions",
]
