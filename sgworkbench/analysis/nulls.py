"""What the same measurement gives for directions that mean nothing.

Two nulls go with every figure: random directions of equal norm, which ignore the data, and directions fitted to
shuffled labels, which keep the data's anisotropy. Both are cheap, because all of them are projected at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError

RANDOM = "random directions"
SHUFFLED = "shuffled labels"


def random_unit_directions(n: int, n_sites: int, d_model: int, *, seed: int = 0) -> Float[Tensor, "null site d_model"]:
    """Return directions drawn uniformly from the unit sphere, independent at every site."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, n_sites, d_model, generator=generator)
    return torch.nn.functional.normalize(drawn, dim=-1)


def shuffled_unit_directions(
    values: Float[Tensor, "item site d_model"],
    label: Int[Tensor, "item"],
    *,
    n: int,
    strata: Int[Tensor, "item"] | None = None,
    min_per_class: int = 1,
    seed: int = 0,
) -> Float[Tensor, "null site d_model"]:
    """Return difference-in-means directions after shuffling the labels, within strata when given.

    Args:
        values: training activations.
        label: 1 or 0 per item.
        n: how many shuffles.
        strata: group of each item; labels move only within a group, which keeps the groups' class sizes, and the
            difference is taken within groups as `refusal_directions` does.
        min_per_class: items of both labels a group needs to count; give the value the real direction was fitted with.
        seed: seed of the shuffles.

    Raises:
        WorkbenchError: no group holds enough items of both labels.
    """
    generator = torch.Generator().manual_seed(seed)
    group = torch.zeros_like(label) if strata is None else strata
    weights = torch.zeros(n, len(label), dtype=torch.float32)
    for stratum in sorted(set(group.tolist())):
        members = (group == stratum).nonzero().squeeze(1)
        n_one = int(label[members].sum())
        n_zero = len(members) - n_one
        if min(n_one, n_zero) < max(1, min_per_class):
            continue
        effective = n_one * n_zero / len(members)
        for index in range(n):
            order = members[torch.randperm(len(members), generator=generator)]
            weights[index, order[:n_one]] = effective / n_one
            weights[index, order[n_one:]] = -effective / n_zero
    if not weights.any():
        raise WorkbenchError(
            f"Shuffling labels needs a group with at least {max(1, min_per_class)} items of both labels; found none "
            f"among {len(label)} items."
        )
    difference = torch.einsum("ni,isd->nsd", weights, values.float())
    return torch.nn.functional.normalize(difference, dim=-1, eps=1e-30)


@dataclass(frozen=True)
class NullBand:
    """Central 95 % range of a statistic under a null, per site.

    Attributes:
        name: which null.
        sites: the sites.
        low: 2.5 % quantile.
        high: 97.5 % quantile.
        n: how many null directions.
    """

    name: str
    sites: tuple[Site, ...]
    low: Float[np.ndarray, " site"]
    high: Float[np.ndarray, " site"]
    n: int

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per site: name, layer, low, high, n."""
        return pd.DataFrame(
            {
                "name": self.name,
                "layer": [site.layer for site in self.sites],
                "low": self.low,
                "high": self.high,
                "n": self.n,
            }
        )


def null_band(name: str, sites: tuple[Site, ...], statistics: Float[Tensor, "null site"]) -> NullBand:
    """Summarise a statistic over null directions by its central 95 % range per site.

    Raises:
        WorkbenchError: no null directions.
    """
    if len(statistics) == 0:
        raise WorkbenchError(f"The null band of {name} needs at least one null direction, found none; raise n_null.")
    values = statistics.double().numpy()
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    return NullBand(name, sites, low, high, len(values))
