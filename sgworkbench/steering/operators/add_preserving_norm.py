"""Norm-preserving addition:  h' = (h + alpha v_l) |h| / |h + alpha v_l|.

Turns every token towards v_l without making it longer, so that later blocks, which read the stream relative to its
norm, see the rest of it shrink instead of staying in place. Source: the `normalize` option of control vectors in
repeng (Vogel 2024), after representation engineering (Zou et al. 2023, arXiv 2310.01405).
Caveat: the effect saturates: for a large alpha every token becomes v_l at its own length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.site import Site
from sgworkbench.steering.operators.add import Add
from sgworkbench.steering.operators.base import per_row, widened
from sgworkbench.steering.operators.registry import register_operator


@register_operator
@dataclass(frozen=True)
class AddPreservingNorm(Add):
    """Add a fixed vector at each site, as `Add` does, and scale the sum back to the token's own norm."""

    name = "add_preserving_norm"

    def change(self, stream: Float[Tensor, "batch pos d_model"], site: Site) -> Float[Tensor, "#batch #pos d_model"]:
        """Return the rescaled sum minus h; a sum of length zero has no direction and leaves the token as it is."""
        wide = widened(stream)
        added = wide + per_row(self.coefficient) * self.vectors[site].to(wide)[None, None]
        length = added.norm(dim=-1, keepdim=True)
        scaled = added * (wide.norm(dim=-1, keepdim=True) / length)
        return torch.where(length > 0, scaled - wide, torch.zeros_like(wide)).to(stream.dtype)
