"""Projections of the safety shift by layer, and held-out separation by layer, each with its nulls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sgworkbench.analysis.directions import Directions
from sgworkbench.analysis.nulls import RANDOM, SHUFFLED, NullBand, null_band, random_unit_directions
from sgworkbench.statistics import auroc, paired_bootstrap


@dataclass(frozen=True)
class LayerCurve:
    """A quantity by layer with intervals and null bands.

    Attributes:
        table: columns layer, value, low, high, n.
        nulls: bands on the same scale.
        quantity: what it is, with its unit.
    """

    table: pd.DataFrame
    nulls: tuple[NullBand, ...]
    quantity: str

    def nulls_dataframe(self) -> pd.DataFrame:
        """Return the null bands: name, layer, low, high, n."""
        return pd.concat([band.to_dataframe() for band in self.nulls], ignore_index=True)


def projected_shift(
    plain: Float[Tensor, "prompt site d_model"],
    prompted: Float[Tensor, "prompt site d_model"],
    direction: Directions,
    *,
    shuffled: Float[Tensor, "null site d_model"] | None = None,
    n_null: int = 200,
    seed: int = 0,
) -> LayerCurve:
    """Return the mean projection of the shift onto a direction, in separation units, with bootstrap intervals.

    Args:
        plain: activations without the safety prompt.
        prompted: activations of the same prompts with it.
        direction: what to project onto.
        shuffled: directions refitted to shuffled labels, for the second null.
        n_null: number of random directions.
        seed: seed of bootstrap and random directions.
    """
    difference = prompted - plain
    scaled = direction.project(difference) / direction.separation
    boot = paired_bootstrap(scaled.double().numpy(), seed=seed, missing="omit")
    table = pd.DataFrame(
        {
            "layer": [site.layer for site in direction.sites],
            "value": boot.mean,
            "low": boot.low,
            "high": boot.high,
            "n": boot.n,
        }
    )
    mean = difference.mean(0)
    drawn = random_unit_directions(n_null, len(direction.sites), mean.shape[-1], seed=seed)
    fits = [(RANDOM, drawn)] + ([] if shuffled is None else [(SHUFFLED, shuffled)])
    nulls = tuple(
        null_band(name, direction.sites, torch.einsum("nsd,sd->ns", units, mean) / direction.separation)
        for name, units in fits
    )
    return LayerCurve(table, nulls, f"shift along the {direction.concept} direction (separation units)")


def held_out_separation(
    values: Float[Tensor, "prompt site d_model"],
    positive: Bool[Tensor, "prompt"],
    direction: Directions,
    *,
    shuffled: Float[Tensor, "null site d_model"] | None = None,
    n_null: int = 200,
    seed: int = 0,
) -> LayerCurve:
    """Return the AUROC of a direction's projection on held-out prompts, by layer, with DeLong intervals.

    The bands hold the AUROC of random directions and of directions refitted to shuffled labels.

    Raises:
        WorkbenchError: one of the classes is empty.
    """
    mask = positive.numpy()
    scores = direction.project(values).double().numpy()
    area = auroc(scores[mask], scores[~mask])
    table = pd.DataFrame(
        {
            "layer": [site.layer for site in direction.sites],
            "value": area.value,
            "low": area.low,
            "high": area.high,
            "n": len(mask),
        }
    )
    drawn = random_unit_directions(n_null, len(direction.sites), values.shape[-1], seed=seed)
    fits = [(RANDOM, drawn)] + ([] if shuffled is None else [(SHUFFLED, shuffled)])
    nulls = []
    for name, units in fits:
        projected = torch.einsum("psd,nsd->pns", values, units).double().numpy()
        statistics = np.asarray(auroc(projected[mask], projected[~mask]).value)
        nulls.append(null_band(name, direction.sites, torch.from_numpy(statistics)))
    return LayerCurve(table, tuple(nulls), f"held-out AUROC of the {direction.concept} direction")


def best_layer(curve: LayerCurve) -> int:
    """Return the layer with the largest value; the lower one of a tie."""
    return int(curve.table.sort_values(["value", "layer"], ascending=[False, True])["layer"].iloc[0])
