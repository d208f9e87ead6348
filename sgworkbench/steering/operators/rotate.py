"""Angular steering:  h' = h - P h + |P h| (cos(theta) b1 + sin(theta) b2).

(b1, b2) is an orthonormal basis of the plane of two directions: b1 along the first, b2 the part of the second that is
orthogonal to it; P projects onto the plane. With `relative`, theta is added to the token's own angle in the plane
instead of replacing it. Norms, and everything outside the plane, stay. Angles count from b1 towards b2, in degrees.
Source: Vu and Nguyen 2025, "Angular steering" (arXiv 2510.26243). Their adaptive variant, which turns only tokens with
a positive component along b1, is this operator behind a gate decided per token with threshold 0.
Caveat: a token without a component in the plane has no angle and stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.steering.operators.base import (
    Coefficient,
    Ingredients,
    Operator,
    checked_coefficient,
    checked_directions,
    count_prompts,
    per_row,
    projection,
    widened,
)
from sgworkbench.steering.operators.registry import register_operator

Turn = Literal["target", "relative"]
TURNS: tuple[Turn, ...] = get_args(Turn)
# Sine of the angle below which two directions span no plane: float32 rounding decides it there.
_SMALLEST_SINE = 1e-4


@register_operator
@dataclass(frozen=True)
class Rotate(Operator):
    """Turn the component in a plane to an angle, or by an angle, at each site.

    Attributes:
        first: direction per site from which angles count; scaled to unit length here.
        second: direction per site that opens the plane; made orthogonal to `first` and of unit length here.
        angle: degrees; one number, or one per prompt.
        turn: `target` sets the angle in the plane, `relative` adds to it.
    """

    name = "rotate"
    first: dict[Site, Float[Tensor, "d_model"]]
    second: dict[Site, Float[Tensor, "d_model"]]
    angle: Coefficient
    turn: Turn = "target"

    def __post_init__(self) -> None:
        if self.turn not in TURNS:
            raise unknown_name("turn", str(self.turn), TURNS)
        first, second = (checked_directions(self.name, each) for each in (self.first, self.second))
        if set(first) != set(second):
            raise WorkbenchError("A rotation needs both directions of its plane at the same sites.")
        for site, other in second.items():
            one, two = first[site].double(), other.double()
            rest = two - (two @ one) * one
            if float(rest.norm()) < _SMALLEST_SINE:
                raise WorkbenchError(f"The two directions at {site} are parallel and span no plane; choose another.")
            # Twice, because one pass leaves a remainder along `first` when the two are nearly parallel.
            rest = rest / rest.norm()
            rest = rest - (rest @ one) * one
            second[site] = (rest / rest.norm()).to(other.dtype)
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "second", second)
        object.__setattr__(self, "angle", checked_coefficient(self.name, self.angle))

    @classmethod
    def build(cls, given: Ingredients) -> Rotate:
        """Make it from directions and a second vector that opens the plane; the coefficient is the angle in degrees."""
        turn = given.known_parameters("turn").get("turn", "target")
        directions = given.need_directions()
        first = {site: directions.at(site) for site in given.sites}
        return cls(first, given.need_second("the second direction of its plane"), given.coefficient, turn)  # type: ignore[arg-type]

    @property
    def by_site(self) -> Mapping[Site, Float[Tensor, "d_model"]]:
        """The first direction of the plane."""
        return self.first

    @property
    def n_prompts(self) -> int | None:
        """How many prompts it holds an angle each for."""
        return count_prompts(self.angle)

    def change(self, stream: Float[Tensor, "batch pos d_model"], site: Site) -> Float[Tensor, "#batch #pos d_model"]:
        """Return the turned component in the plane minus the token's own."""
        wide = widened(stream)
        one, two = self.first[site].to(wide), self.second[site].to(wide)
        x, y = projection(wide, one), projection(wide, two)
        degrees = per_row(self.angle)
        theta = degrees.to(wide) if isinstance(degrees, Tensor) else wide.new_tensor(degrees)
        cosine, sine = torch.cos(theta * (math.pi / 180)), torch.sin(theta * (math.pi / 180))
        if self.turn == "target":
            radius = torch.hypot(x, y)
            new_x, new_y = radius * cosine, radius * sine
        else:
            new_x, new_y = x * cosine - y * sine, x * sine + y * cosine
        return ((new_x - x) * one + (new_y - y) * two).to(stream.dtype)
