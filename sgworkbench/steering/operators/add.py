"""Additive steering:  h' = h + alpha v_l.

Source: stage two of Self-Guard (arXiv 2602.00707), with v_l the mean shift caused by the safety prompt; the same form
as activation addition (Turner et al. 2023, arXiv 2308.10248).
Caveat: the norm of v_l grows with depth, so one raw alpha is another dose at every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.site import Site
from sgworkbench.steering.operators.base import Operator


@dataclass(frozen=True)
class Add(Operator):
    """Add a fixed vector at each site.

    Attributes:
        vectors: vector per site, not yet scaled.
        coefficient: alpha, the same at every site.
    """

    name = "add"
    vectors: dict[Site, Float[Tensor, "d_model"]]
    coefficient: float

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the operator acts."""
        return tuple(sorted(self.vectors))

    @property
    def d_model(self) -> int:
        """Width of the residual stream it was made for."""
        return next(iter(self.vectors.values())).shape[-1]

    def change(self, stream: Float[Tensor, "batch pos d_model"], site: Site) -> Float[Tensor, "#batch #pos d_model"]:
        """Return alpha v_l."""
        return (self.coefficient * self.vectors[site]).to(stream)[None, None]
