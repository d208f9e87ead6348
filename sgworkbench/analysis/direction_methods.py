"""Ways to find the direction between two classes of activations, by name, all giving `Directions`.

Each method gives one unit vector per site, turned so that the positive class projects higher; origin and separation
are the class means along it, as for every other direction, so that all methods read in the same separation units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from sgworkbench.analysis.directions import Directions
from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError, unknown_name

OneSite = Callable[[np.ndarray, np.ndarray], np.ndarray]

# A separation below this share of the activations' norm is rounding noise, as in `directions_between`.
_SMALLEST_SHARE = 1e-6


def _mean_difference(
    positive: Float[np.ndarray, "positive d_model"], negative: Float[np.ndarray, "negative d_model"]
) -> Float[np.ndarray, " d_model"]:
    """Difference of the class means (Arditi et al. 2024, arXiv 2406.11717)."""
    return np.asarray(positive.mean(0) - negative.mean(0))


def _pca_diff(
    positive: Float[np.ndarray, "positive d_model"], negative: Float[np.ndarray, "negative d_model"]
) -> Float[np.ndarray, " d_model"]:
    """First principal component of the centred pairwise differences.

    Warning: centring removes the mean difference, which is the shift itself. What is left is how the pairs differ from
    one another, so the cosine with the mean difference is about 0 and the sign is arbitrary; here it is turned by the
    class means, which hardly differ along it. Published with Self-Guard's code as one way to make its vectors; an
    ablation, never a default.
    """
    if len(positive) != len(negative):
        raise WorkbenchError(
            f"pca_diff needs pairs: as many positive as negative activations, in the same order; found {len(positive)} "
            f"and {len(negative)}."
        )
    difference = positive - negative
    return _first_component(difference - difference.mean(0))


def _pca_classes(
    positive: Float[np.ndarray, "positive d_model"], negative: Float[np.ndarray, "negative d_model"]
) -> Float[np.ndarray, " d_model"]:
    """First principal component of both classes around the midpoint of their means.

    As `pca_center` in repeng (Vogel 2024), for classes that need not be pairs. It is the direction between the classes
    only where they differ more than they vary; classes count equally, whatever their sizes.
    """
    middle = (positive.mean(0) + negative.mean(0)) / 2
    parts = [(values - middle) / np.sqrt(len(values)) for values in (positive, negative)]
    return _first_component(np.concatenate(parts))


def _logistic(
    positive: Float[np.ndarray, "positive d_model"], negative: Float[np.ndarray, "negative d_model"]
) -> Float[np.ndarray, " d_model"]:
    """Normal of a logistic regression's boundary: standardised features, L2 penalty with C = 1, balanced classes.

    Read on raw activations, the normal is w / sigma. Caveat: it is the best reading direction, not the direction in
    which the classes move; steering with it can do little.
    """
    values, label = _stacked(positive, negative)
    scaler = StandardScaler().fit(values)
    probe = LogisticRegression(C=1.0, class_weight="balanced", max_iter=2000)
    probe.fit(scaler.transform(values), label)
    return np.asarray(probe.coef_[0] / scaler.scale_)


def _lda(
    positive: Float[np.ndarray, "positive d_model"], negative: Float[np.ndarray, "negative d_model"]
) -> Float[np.ndarray, " d_model"]:
    """Fisher's linear discriminant, without shrinkage (singular value solver).

    Caveat: with fewer activations than dimensions the within-class scatter is singular and the discriminant fits the
    training set perfectly; `whitened_mean_difference` shrinks it.
    """
    values, label = _stacked(positive, negative)
    return np.asarray(LinearDiscriminantAnalysis(solver="svd").fit(values, label).coef_[0])


def _whitened_mean_difference(
    positive: Float[np.ndarray, "positive d_model"], negative: Float[np.ndarray, "negative d_model"]
) -> Float[np.ndarray, " d_model"]:
    """Inverse within-class covariance times the mean difference, the covariance shrunk after Ledoit and Wolf (2004).

    The optimal linear reading for classes of equal covariance; with the raw covariance it would be `lda`.
    """
    residuals = np.concatenate([values - values.mean(0) for values in (positive, negative)])
    covariance, _ = ledoit_wolf(residuals, assume_centered=True)
    difference = positive.mean(0) - negative.mean(0)
    solved, *_ = np.linalg.lstsq(covariance, difference, rcond=None)
    return np.asarray(solved)


DIRECTION_METHODS: Mapping[str, OneSite] = {
    "mean_difference": _mean_difference,
    "pca_diff": _pca_diff,
    "pca_classes": _pca_classes,
    "logistic": _logistic,
    "lda": _lda,
    "whitened_mean_difference": _whitened_mean_difference,
}
"""Functions from the two classes' activations at one site (float64, items first) to a vector, by name."""

_IN_WORDS = {
    "mean_difference": "mean difference",
    "pca_diff": "first component of the centred differences (not the shift)",
    "pca_classes": "first component of both classes",
    "logistic": "logistic probe",
    "lda": "linear discriminant",
    "whitened_mean_difference": "whitened mean difference (Ledoit-Wolf)",
}


def fit_directions(
    method: str,
    positive: Float[Tensor, "positive site d_model"],
    negative: Float[Tensor, "negative site d_model"],
    *,
    sites: tuple[Site, ...],
    concept: str,
    read_at: str,
    provenance: Mapping[str, Any] | None = None,
) -> Directions:
    """Fit the directions of every site with one method.

    A site at which the classes do not differ along the vector that was found gets a zero direction and a separation of
    NaN, as `directions_between` does.

    Args:
        method: one of `DIRECTION_METHODS`. `pca_diff` is an ablation and not the shift between the classes: see there.
        positive: activations of the class called 1.
        negative: activations of the class called 0; for `pca_diff` the partners of `positive`, in order.
        sites: sites of the second axis.
        concept: what is separated.
        read_at: position selector the activations were read with.
        provenance: facts to record.

    Raises:
        WorkbenchError: unknown method, fewer than two items of a class, activations that are not finite or belong to
            other sites, or unpaired classes for `pca_diff`.
    """
    if method not in DIRECTION_METHODS:
        raise unknown_name("direction method", str(method), DIRECTION_METHODS)
    for name, values in (("positive", positive), ("negative", negative)):
        if len(values) < 2:
            raise WorkbenchError(f"The {concept} direction needs at least two {name} examples; found {len(values)}.")
        if values.shape[1] != len(sites):
            raise WorkbenchError(f"The {name} activations are of {values.shape[1]} sites, but {len(sites)} were named.")
        if not torch.isfinite(values).all():
            raise WorkbenchError(f"The {name} activations for the {concept} direction hold NaN or infinite values.")
    fit = DIRECTION_METHODS[method]
    one, zero = positive.double().cpu().numpy(), negative.double().cpu().numpy()
    units = np.zeros(one.shape[1:])
    separations = np.full(len(sites), np.nan)
    for index in range(len(sites)):
        units[index], separations[index] = _oriented(fit, one[:, index], zero[:, index])
    facts = {
        "method": method,
        "n_positive": len(one),
        "n_negative": len(zero),
        **(provenance or {}),
    }
    return Directions(
        concept,
        _IN_WORDS.get(method, method),
        read_at,
        sites,
        torch.from_numpy(units).float(),
        torch.from_numpy(zero.mean(0)).float(),
        torch.from_numpy(separations).float(),
        facts,
    )


def _oriented(
    fit: OneSite, positive: Float[np.ndarray, "positive d_model"], negative: Float[np.ndarray, "negative d_model"]
) -> tuple[Float[np.ndarray, " d_model"], float]:
    """Return the unit direction with the positive class on its positive side, and the distance of the class means."""
    difference = positive.mean(0) - negative.mean(0)
    scale = max(float(np.linalg.norm(positive.mean(0))), float(np.linalg.norm(negative.mean(0))), 1e-30)
    nothing = np.zeros_like(difference), float("nan")
    spread = max(float(np.abs(values - values.mean(0)).max()) for values in (positive, negative))
    if max(spread, float(np.linalg.norm(difference))) <= _SMALLEST_SHARE * scale:
        return nothing
    vector = fit(positive, negative)
    norm = float(np.linalg.norm(vector))
    if not np.isfinite(norm) or norm <= 1e-30:
        return nothing
    unit = vector / norm
    separation = float(unit @ difference)
    if abs(separation) <= _SMALLEST_SHARE * scale:
        return nothing
    return (unit, separation) if separation > 0 else (-unit, -separation)


def _stacked(
    positive: Float[np.ndarray, "positive d_model"], negative: Float[np.ndarray, "negative d_model"]
) -> tuple[Float[np.ndarray, "item d_model"], np.ndarray]:
    return np.concatenate([positive, negative]), np.repeat([1, 0], [len(positive), len(negative)])


def _first_component(centred: Float[np.ndarray, "item d_model"]) -> Float[np.ndarray, " d_model"]:
    return np.asarray(np.linalg.svd(centred, full_matrices=False)[2][0])
