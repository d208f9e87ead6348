"""Directional ablation:  h' = h - r (r . h),  r a unit direction.

Source: Arditi et al. 2024 (arXiv 2406.11717), who ablate one direction at every layer to remove refusal.
Caveat: ablating at one site only leaves later blocks free to write the direction again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.site import Site
from sgworkbench.steering.operators.base import Operator


@dataclass(frozen=True)
class Ablate(Operator):
    """Remove the component along a unit direction at each site.

    Attributes:
        directions: unit direction per site.
    """

    name = "ablate"
    directions: dict[Site, Float[Tensor, "d_model"]]

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the operator acts."""
        return tuple(sorted(self.directions))

    @property
    def d_model(self) -> int:
        """Width of the residual stream it was made for."""
        return next(iter(self.directions.values())).shape[-1]

    def change(self, stream: Float[Tensor, "batch pos d_model"], site: Site) -> Float[Tensor, "#batch #pos d_model"]:
        """Return -r (r . h)."""
        unit = self.directions[site].to(stream)
        return -torch.einsum("bpd,d->bp", stream, unit)[..., None] * unit
