"""Two vector files side by side: per layer, the cosine of their vectors and the ratio of their norms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from sgworkbench.errors import WorkbenchError
from sgworkbench.steering.vector import SteeringVector


@dataclass(frozen=True)
class VectorComparison:
    """What `compare_vectors` found.

    Attributes:
        layers: layers both vectors have.
        cosines: cosine of the two vectors of each layer; NaN where one of them is zero.
        norms: L2 norm of the first and of the second.
        only_first: layers only the first vector has.
        only_second: layers only the second vector has.
    """

    layers: tuple[int, ...]
    cosines: tuple[float, ...]
    norms: tuple[tuple[float, float], ...]
    only_first: tuple[int, ...]
    only_second: tuple[int, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per common layer: cosine, both norms, and norm_ratio = second / first."""
        first, second = (np.array([pair[index] for pair in self.norms]) for index in (0, 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = second / first
        return pd.DataFrame(
            {
                "layer": self.layers,
                "cosine": self.cosines,
                "norm_first": first,
                "norm_second": second,
                "norm_ratio": ratio,
            }
        )

    def _repr_html_(self) -> str:
        table: str = self.to_dataframe().to_html(index=False, float_format=lambda value: f"{value:.4f}")
        return f"<b>Vectors compared</b> at {len(self.layers)} common layers{table}"


def compare_vectors(first: SteeringVector, second: SteeringVector) -> VectorComparison:
    """Compare two vectors layer by layer, by the layer they were read at, in float64.

    Raises:
        WorkbenchError: another width, another kind of site, or no layer in common.
    """
    widths = first.values.shape[-1], second.values.shape[-1]
    if widths[0] != widths[1]:
        raise WorkbenchError(f"The vectors have widths {widths[0]} and {widths[1]}; they belong to different models.")
    if first.read_kind != second.read_kind:
        raise WorkbenchError(
            f"The vectors were read at {first.read_kind} and {second.read_kind}; vectors of one kind of site compare."
        )
    common = tuple(sorted(set(first.layers) & set(second.layers)))
    if not common:
        raise WorkbenchError(
            f"The vectors have no layer in common: {sorted(first.layers)} and {sorted(second.layers)}."
        )
    cosines, norms = [], []
    for layer in common:
        a, b = first.at(layer).double(), second.at(layer).double()
        pair = float(a.norm()), float(b.norm())
        cosines.append(float(a @ b) / (pair[0] * pair[1]) if pair[0] * pair[1] else float("nan"))
        norms.append(pair)
    return VectorComparison(
        common,
        tuple(cosines),
        tuple(norms),
        tuple(sorted(set(first.layers) - set(common))),
        tuple(sorted(set(second.layers) - set(common))),
    )
