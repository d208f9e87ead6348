"""The method's own quick checks: does the shift stay in the safety-relevant subspace, and is everything else kept?

    inside(v) = |P v|^2 / |v|^2,      outside = 1 - inside,

P the projector onto the span of the fitted directions (refusal, awareness) and, if asked for, of the first principal
components of the paired harmful-minus-harmless differences. A random vector has k/d of its squared norm inside a
k-dimensional subspace on average, distributed as Beta(k/2, (d-k)/2); that null stands beside every share.

Caveat: a share outside is no harm by itself (the subspace is what was fitted, not all that matters for safety), and
directions fitted on the vector's own prompts flatter the share inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import beta, norm
from torch import Tensor

from sgworkbench.analysis import Directions, Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.statistics import minimal_detectable_difference
from sgworkbench.steering import SteeringVector

# Singular values below this share of the largest add no dimension to the subspace.
_RANK_TOLERANCE = 1e-6
MARGIN = 0.05
"""Loss that counts as kept: five points of a rate, five per cent of any other value."""


@dataclass(frozen=True)
class SubspaceShare:
    """Share of a steering vector's squared norm inside and outside a subspace, per layer.

    Attributes:
        table: one row per layer: layer, site, norm, k (dimensions of the subspace), d_model, inside, outside,
            null_inside (k/d), null_low and null_high (central 95 % of random vectors), p_value (a random vector has at
            least this share inside).
        spanned_by: what the subspace is made of, in words.
    """

    table: pd.DataFrame
    spanned_by: str

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per layer."""
        return self.table.copy()

    def _repr_html_(self) -> str:
        first, last = self.table["layer"].iloc[[0, -1]]
        return (
            f"<b>Share of the shift outside the safety-relevant subspace</b> ({self.spanned_by}), layers {first} to "
            f"{last}: {100 * self.table['outside'].mean():.0f} % on average; a random vector "
            f"{100 * (1 - self.table['null_inside'].mean()):.0f} %"
        )


def subspace_share(
    vector: SteeringVector,
    directions: Sequence[Directions],
    *,
    differences: Mapping[Site, Float[Tensor, "pair d_model"]] | None = None,
    n_components: int = 0,
) -> SubspaceShare:
    """Measure how much of a vector lies outside the safety-relevant subspace, where it was read.

    Args:
        vector: the steering vector.
        directions: fitted directions, such as awareness and refusal; layers at whose read site any of them is missing
            are left out.
        differences: harmful minus harmless activations of pairs, by site; for principal components.
        n_components: principal components (of the centred differences) to add to the subspace.

    Raises:
        WorkbenchError: no directions and no components, no common layer, another width, or too few pairs.
    """
    if n_components < 0 or bool(n_components) != bool(differences):
        raise WorkbenchError(
            f"Principal components need differences and a number of them; found n_components={n_components} and "
            f"{'no ' if not differences else ''}differences."
        )
    if not directions and not n_components:
        raise WorkbenchError("A subspace needs at least one direction or principal component.")
    rows = []
    for layer in vector.layers:
        site = vector.read_site(layer)
        if any(site not in each.sites for each in directions) or (differences and site not in differences):
            continue
        spanning = [each.at(site)[None] for each in directions]
        if differences:
            spanning.append(_components(differences[site], n_components, site))
        if any(part.shape[-1] != vector.values.shape[-1] for part in spanning):
            raise WorkbenchError(
                f"The steering vector has width {vector.values.shape[-1]}, but the directions at {site} have another; "
                "they belong to another model."
            )
        basis = _basis(torch.cat(spanning).double())
        rows.append((layer, str(site), *_share(vector.at(layer).double(), basis)))
    if not rows:
        raise WorkbenchError(
            f"No layer of the steering vector (read at {vector.read_kind}) has all the directions; fit them at its "
            "sites."
        )
    columns = [
        "layer", "site", "norm", "k", "d_model", "inside", "outside", "null_inside", "null_low", "null_high", "p_value"
    ]  # fmt: skip
    named = [f"{each.concept} ({each.source})" for each in directions]
    if n_components:
        named.append(f"{n_components} principal components of harmful minus harmless pairs")
    return SubspaceShare(pd.DataFrame(rows, columns=columns), "; ".join(named))


def _components(pairs: Float[Tensor, "pair d_model"], n: int, site: Site) -> Float[Tensor, "component d_model"]:
    if len(pairs) <= n:
        raise WorkbenchError(f"{n} principal components need more than {n} pairs; found {len(pairs)} at {site}.")
    centred = pairs.double() - pairs.double().mean(0)
    found: Tensor = torch.linalg.svd(centred, full_matrices=False).Vh
    return found[:n].float()


def _basis(spanning: Float[Tensor, "vector d_model"]) -> Float[Tensor, "k d_model"]:
    """Return an orthonormal basis of the span; a zero row adds nothing."""
    found = torch.linalg.svd(spanning, full_matrices=False)
    smallest = _RANK_TOLERANCE * found.S.max().clamp_min(1e-30)
    basis: Tensor = found.Vh[found.S.gt(smallest)]
    return basis


def _share(v: Float[Tensor, "d_model"], basis: Float[Tensor, "k d_model"]) -> tuple[float | int, ...]:
    k, d = len(basis), len(v)
    length = float(v.norm())
    inside = float((basis @ v).square().sum()) / length**2 if length > 0 else float("nan")
    if not 0 < k < d:
        return length, k, d, inside, 1 - inside, k / d, k / d, k / d, float("nan")
    null = beta(k / 2, (d - k) / 2)
    low, high = null.ppf([0.025, 0.975])
    return length, k, d, inside, 1 - inside, k / d, float(low), float(high), float(null.sf(inside))


def performance_kept(costs: pd.DataFrame, *, margin: float = MARGIN, power: float = 0.8) -> pd.DataFrame:
    """Judge, per arm and metric, whether non-safety performance is kept.

    A metric is `kept` when the whole interval of its difference from vanilla lies above a loss of `margin`, `lost` when
    the interval lies below no change, `lost, but less than the margin` when both hold, and `undecided` otherwise: then
    there were too few items. Divergences are not performance and have no row.

    Args:
        costs: the table of `measure_costs`.
        margin: the loss that still counts as kept: absolute for rates, relative to vanilla's value otherwise.
        power: of the smallest detectable loss.

    Returns one row per arm and metric: arm, metric, n, vanilla, value, loss, loss_low, loss_high (losses are positive
    when the arm is worse), margin, detectable (smallest loss that `n` items show with this power, two-sided 5 %; for
    rates with uncorrelated arms, the cautious end), verdict.

    Raises:
        WorkbenchError: a margin that is not positive, or a table without the columns needed.
    """
    if not margin > 0:
        raise WorkbenchError(f"A margin must be positive, found {margin}.")
    needed = {"arm", "metric", "n", "vanilla", "value", "difference", "difference_low", "difference_high", "better"}
    if missing := sorted(needed - set(costs.columns)):
        raise WorkbenchError(f"Expected the table of measure_costs; it lacks {', '.join(missing)}.")
    rows = []
    for row in costs[costs["better"].isin(["higher", "lower"]) & costs["difference"].notna()].to_dict("records"):
        is_rate = bool(row["is_rate"])
        sign = -1.0 if row["better"] == "higher" else 1.0
        ends = sorted((sign * row["difference_low"], sign * row["difference_high"]))
        allowed = margin if is_rate else margin * abs(row["vanilla"])
        if is_rate:
            detectable = minimal_detectable_difference(int(row["n"]), row["vanilla"], power).decrease
        else:
            # The interval's half width is 1.96 standard errors.
            error = (ends[1] - ends[0]) / 2 / norm.ppf(0.975)
            detectable = float(error * (norm.ppf(0.975) + norm.ppf(power)))
        rows.append(
            {
                "arm": row["arm"],
                "metric": row["metric"],
                "n": row["n"],
                "vanilla": row["vanilla"],
                "value": row["value"],
                "loss": sign * row["difference"],
                "loss_low": ends[0],
                "loss_high": ends[1],
                "margin": allowed,
                "detectable": detectable,
                "verdict": _verdict(ends[0], ends[1], allowed),
            }
        )
    return pd.DataFrame(rows)


def _verdict(low: float, high: float, margin: float) -> str:
    if np.isnan(low) or np.isnan(high):
        return "undecided"
    if high < margin:
        return "lost, but less than the margin" if low > 0 else "kept"
    return "lost" if low > 0 else "undecided"
