"""Norm-preserving addition:  h' = (h + alpha v_l) |h| / |h + alpha v_l|.

Turns every token towards v_l without making it longer, so that later blocks, which read the stream relative to its
norm, see the rest of it shrink instead of staying in place. Source: the `normalize` option of control vectors in
repeng (Vogel 2024), after representation engineering (Zou et al. 2023, arXiv 2310.01405).
Caveat: the effect saturates: for a large alpha every token becomes v_l at its own length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.site import Site
from sgworkbench.steering.operators.base import (
    Coefficient,
    Operator,
    checked_coefficient,
    checked_vectors,
    count_prompts,
    per_row,
    widened,
)
from sgworkbench.steering.operators.registry import register_operator


@register_operator
@dataclass(frozen=True)
class AddPreservingNorm(Operator):
    """Add a fixed vector at each site and scale the sum back to the token's own norm.

    Attributes:
        vectors: vector per site, not yet scaled.
        coefficient: alpha, the same at every site; one number, or one per prompt.
    """

    name = "add_preserving_norm"
    vectors: dict[Site, Float[Tensor, "d_model"]]
    coefficient: Coefficient

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", checked_vectors(self.name, self.vectors))
        object.__setattr__(self, "coefficient", checked_coefficient(self.name, self.coefficient))

    @property
    def by_site(self) -> Mapping[Site, Float[Tensor, "d_model"]]:
        """The vectors."""
        return self.vectors

    @property
    def n_prompts(self) -> int | None:
        """How many prompts it holds a coefficient each for."""
        return count_prompts(self.coefficient)

    def change(self, stream: Float[Tensor, "batch pos d_model"], site: Site) -> Float[Tensor, "#batch #pos d_model"]:
        """Return the rescaled sum minus h; a sum of length zero has no direction and leaves the token as it is."""
        wide = widened(stream)
        added = wide + per_row(self.coefficient) * self.vectors[site].to(wide)[None, None]
        length = added.norm(dim=-1, keepdim=True)
        scaled = added * (wide.norm(dim=-1, keepdim=True) / length)
        return torch.where(length > 0, scaled - wide, torch.zeros_like(wide)).to(stream.dtype)
