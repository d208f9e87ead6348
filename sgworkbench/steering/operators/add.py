"""Additive steering:  h' = h + alpha v_l.

Source: stage two of Self-Guard (arXiv 2602.00707), with v_l the mean shift caused by the safety prompt; the same form
as activation addition (Turner et al. 2023, arXiv 2308.10248).
Caveat: the norm of v_l grows with depth, so one raw alpha is another dose at every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.site import Site
from sgworkbench.steering.operators.base import (
    Coefficient,
    Ingredients,
    Operator,
    checked_coefficient,
    checked_vectors,
    count_prompts,
    per_row,
)
from sgworkbench.steering.operators.registry import register_operator


@register_operator
@dataclass(frozen=True)
class Add(Operator):
    """Add a fixed vector at each site.

    Attributes:
        vectors: vector per site, not yet scaled.
        coefficient: alpha, the same at every site; one number, or one per prompt.
    """

    name = "add"
    vectors: dict[Site, Float[Tensor, "d_model"]]
    coefficient: Coefficient

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", checked_vectors(self.name, self.vectors))
        object.__setattr__(self, "coefficient", checked_coefficient(self.name, self.coefficient))

    @classmethod
    def build(cls, given: Ingredients) -> Add:
        """Make it from vectors and a coefficient."""
        given.known_parameters()
        return cls(given.need_vectors(), given.coefficient)

    @property
    def by_site(self) -> Mapping[Site, Float[Tensor, "d_model"]]:
        """The vectors."""
        return self.vectors

    @property
    def n_prompts(self) -> int | None:
        """How many prompts it holds a coefficient each for."""
        return count_prompts(self.coefficient)

    def change(self, stream: Float[Tensor, "batch pos d_model"], site: Site) -> Float[Tensor, "#batch #pos d_model"]:
        """Return alpha v_l."""
        return (per_row(self.coefficient) * self.vectors[site].to(stream.device)[None, None]).to(stream.dtype)
