"""Null-space constrained steering:  h' = h + alpha v (w . h),  with w . h near 0 on harmless and near 1 on harmful.

AlphaSteer (Sheng et al. 2025, arXiv 2506.07022) learns a map M with M P h = v for every harmful activation h by ridge
regression, P the projector onto the directions in which harmless activations hardly vary from zero. Because the target
v is the same for every h, the ridge solution has rank one,

    M P = v w^T,   w = P (P S P + ridge I)^-1 P m,

with m the mean and S the second moment E[h h^T] of the harmful activations; so the vectors v and w are stored, not a
d_model x d_model matrix. P keeps the eigenvectors of the harmless second moment with the smallest eigenvalues, as many
as together hold at most `leak`^2 of its trace: the root mean square of |P h| over harmless h is then at most `leak`
times that of |h|.
Caveat: the null space of a few hundred harmless prompts is much larger than that of all of them; check the effect on
held-out harmless prompts, not on those of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.capture import Activations, Moments
from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.steering.operators.base import (
    Coefficient,
    Ingredients,
    Operator,
    checked_coefficient,
    checked_vectors,
    count_prompts,
    per_row,
    projection,
)
from sgworkbench.steering.operators.registry import register_operator


@register_operator
@dataclass(frozen=True)
class NullSpace(Operator):
    """Add a vector in proportion to a reading that is near zero on harmless activations, at each site.

    Attributes:
        vectors: v per site, not yet scaled.
        readers: w per site.
        coefficient: alpha, the same at every site; one number, or one per prompt.
    """

    name = "null_space"
    vectors: dict[Site, Float[Tensor, "d_model"]]
    readers: dict[Site, Float[Tensor, "d_model"]]
    coefficient: Coefficient = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", checked_vectors(self.name, self.vectors))
        object.__setattr__(self, "readers", checked_vectors(self.name, self.readers))
        object.__setattr__(self, "coefficient", checked_coefficient(self.name, self.coefficient))
        if set(self.vectors) != set(self.readers):
            raise WorkbenchError("Null-space steering needs a vector and a reader at the same sites.")

    @classmethod
    def build(cls, given: Ingredients) -> NullSpace:
        """Make it from vectors, readers (as second vectors) and a coefficient."""
        given.known_parameters()
        return cls(given.need_vectors(), given.need_second("the readers that a fit returns"), given.coefficient)

    @property
    def by_site(self) -> Mapping[Site, Float[Tensor, "d_model"]]:
        """The vectors."""
        return self.vectors

    @property
    def n_prompts(self) -> int | None:
        """How many prompts it holds a coefficient each for."""
        return count_prompts(self.coefficient)

    def gain(self, values: Float[Tensor, "item d_model"], site: Site) -> Float[Tensor, "item"]:
        """Return w . h: the share of alpha v that activations at a site would get."""
        return values.double() @ self.readers[site].double().to(values.device)

    def change(self, stream: Float[Tensor, "batch pos d_model"], site: Site) -> Float[Tensor, "#batch #pos d_model"]:
        """Return alpha v (w . h)."""
        scaled = per_row(self.coefficient) * self.vectors[site].to(stream.device)[None, None]
        return (projection(stream, self.readers[site]) * scaled).to(stream.dtype)


@dataclass(frozen=True)
class NullSpaceFit:
    """A fitted operator and how well the fit separates its own two sets.

    Attributes:
        operator: ready to steer with.
        table: one row per site: site, layer, dimensions of the null space, harmful_gain (mean of w . h; 1 would be
            the whole vector), harmless_gain (root mean square of w . h).
    """

    operator: NullSpace
    table: pd.DataFrame


def moments_of(activations: Activations) -> Moments:
    """Return mean and covariance of kept activations, in float64, as `capture_moments` does without keeping them.

    Raises:
        WorkbenchError: fewer than two tokens.
    """
    count = len(activations.values)
    if count < 2:
        raise WorkbenchError(f"A covariance needs at least two tokens, found {count}.")
    values = activations.values.double()
    centred = values - values.mean(0)
    scatter = torch.einsum("tsi,tsj->sij", centred, centred)
    return Moments(activations.sites, count, values.mean(0), scatter / (count - 1))


def fit_null_space(
    vectors: Mapping[Site, Tensor],
    harmless: Moments,
    harmful: Moments,
    *,
    coefficient: Coefficient = 1.0,
    leak: float = 0.05,
    ridge: float = 0.01,
) -> NullSpaceFit:
    """Fit the map of every site on training activations.

    Args:
        vectors: v per site: what a harmful activation is to get, for alpha 1.
        harmless: mean and covariance of harmless activations (`capture_moments(..., covariance=True)`).
        harmful: the same of harmful ones.
        coefficient: alpha of the operator.
        leak: largest root mean square share of a harmless activation's norm that the null space may hold.
        ridge: penalty relative to the mean eigenvalue of the harmful second moment inside the null space.

    Raises:
        WorkbenchError: moments without covariance, a site that was not read, settings out of range, or no null space.
    """
    if not 0 < leak < 1 or not ridge > 0:
        raise WorkbenchError(f"Expected a leak between 0 and 1 and a positive ridge, found {leak} and {ridge}.")
    readers: dict[Site, Tensor] = {}
    rows = []
    for site, vector in sorted(checked_vectors(NullSpace.name, vectors).items()):
        (_, quiet), (mean, loud) = (
            _second_moment(m, site, n) for m, n in ((harmless, "harmless"), (harmful, "harmful"))
        )
        values, basis = torch.linalg.eigh(quiet)
        held = values.clamp_min(0).cumsum(0)
        n_null = int((held <= leak**2 * held[-1]).sum())
        if n_null == 0:
            raise WorkbenchError(
                f"At {site} harmless activations fill every direction: none holds less than {leak:g} of their norm; "
                "raise leak or choose another site."
            )
        inside = basis[:, :n_null]
        second = inside.T @ loud @ inside
        penalty = ridge * second.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        solved = torch.linalg.solve(second + penalty * torch.eye(n_null, dtype=torch.float64), inside.T @ mean)
        reader = inside @ solved
        readers[site] = reader.to(vector.dtype)
        harmless_gain = float((reader @ quiet @ reader).clamp_min(0).sqrt())
        rows.append((str(site), site.layer, n_null, float(reader @ mean), harmless_gain))
    columns = ["site", "layer", "dimensions", "harmful_gain", "harmless_gain"]
    return NullSpaceFit(NullSpace(dict(vectors), readers, coefficient), pd.DataFrame(rows, columns=columns))


def _second_moment(
    moments: Moments, site: Site, what: str
) -> tuple[Float[Tensor, "d_model"], Float[Tensor, "d_model d_model"]]:
    """Return mean and E[h h^T]: about zero and not about the mean, since the map must vanish on h itself."""
    if moments.covariance is None:
        raise WorkbenchError(f"The {what} moments have no covariance; read them with covariance=True.")
    if site not in moments.sites:
        raise WorkbenchError(f"The {what} moments were not read at {site}.")
    index = moments.sites.index(site)
    mean = moments.mean[index]
    scatter = moments.covariance[index] * ((moments.count - 1) / moments.count)
    return mean, scatter + torch.outer(mean, mean)
