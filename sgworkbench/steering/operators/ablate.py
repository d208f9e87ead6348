"""Directional ablation:  h' = h - r (r . h),  r a unit direction.

Source: Arditi et al. 2024 (arXiv 2406.11717), who ablate one direction at every layer to remove refusal.
Caveat: ablating at one site only leaves later blocks free to write the direction again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.site import Site
from sgworkbench.steering.operators.base import Ingredients, Operator, checked_directions, projection
from sgworkbench.steering.operators.registry import register_operator


@register_operator
@dataclass(frozen=True)
class Ablate(Operator):
    """Remove the component along a direction at each site.

    Attributes:
        directions: direction per site; scaled to unit length here.
    """

    name = "ablate"
    directions: dict[Site, Float[Tensor, "d_model"]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "directions", checked_directions(self.name, self.directions))

    @classmethod
    def build(cls, given: Ingredients) -> Ablate:
        """Make it from directions; it has no coefficient."""
        given.known_parameters()
        given.no_coefficient()
        directions = given.need_directions()
        return cls({site: directions.at(site) for site in given.sites})

    @property
    def by_site(self) -> Mapping[Site, Float[Tensor, "d_model"]]:
        """The unit directions."""
        return self.directions

    def change(self, stream: Float[Tensor, "batch pos d_model"], site: Site) -> Float[Tensor, "#batch #pos d_model"]:
        """Return -r (r . h)."""
        unit = self.directions[site].to(stream.device)
        return (-projection(stream, unit) * unit).to(stream.dtype)
