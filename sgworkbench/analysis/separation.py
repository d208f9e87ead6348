"""Does a direction separate classes it was not fitted on? Cross-validation within the training split.

Where it does not, the distance between the class means is mostly noise, and separation units divide by it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sgworkbench.statistics import Auroc, auroc


def cross_validated_auroc(
    values: Float[Tensor, "item site d_model"],
    positive: Bool[Tensor, "item"],
    group: Int[Tensor, "item"],
    *,
    strata: Int[Tensor, "item"] | None = None,
    n_folds: int = 5,
    seed: int = 0,
) -> Auroc | None:
    """Return the AUROC, per site, of mean-difference directions on folds they were not fitted on.

    Within each stratum, scores are measured from the midpoint of the fitting items' class means, so that differences
    between strata (such as the safety prompt) neither help nor hurt.

    Args:
        values: training activations.
        positive: class of each item.
        group: items of one group (a pair of prompts, the same prompt in two conditions) share a fold.
        strata: as in `shuffled_unit_directions`; one stratum when None.
        n_folds: number of folds.
        seed: seed of the assignment of groups to folds.

    Returns:
        None when a class is too small to be held out.
    """
    groups = group.unique(sorted=True)  # type: ignore[no-untyped-call]
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    fold_of_group = torch.empty(len(groups), dtype=torch.long)
    fold_of_group[order] = torch.arange(len(groups)) % n_folds
    fold = fold_of_group[torch.searchsorted(groups, group)]
    stratum = torch.zeros_like(group) if strata is None else strata
    kept, scores = [], []
    for k in range(n_folds):
        fitting, held = fold != k, fold == k
        difference = _stratified_difference(values[fitting], positive[fitting], stratum[fitting])
        if difference is None:
            return None
        unit = torch.nn.functional.normalize(difference, dim=-1, eps=1e-30)
        for s in stratum[held].unique():  # type: ignore[no-untyped-call]
            one = fitting & (stratum == s) & positive
            zero = fitting & (stratum == s) & ~positive
            if not (one.any() and zero.any()):
                continue
            middle = (values[one].mean(0) + values[zero].mean(0)) / 2
            chosen = held & (stratum == s)
            scores.append(torch.einsum("isd,sd->is", values[chosen] - middle, unit))
            kept.append(positive[chosen])
    if not kept:
        return None
    labels, projected = torch.cat(kept).numpy(), torch.cat(scores).double().numpy()
    if labels.sum() < 2 or (~labels).sum() < 2:
        return None
    return auroc(projected[labels], projected[~labels])


def _stratified_difference(
    values: Float[Tensor, "item site d_model"], positive: Bool[Tensor, "item"], stratum: Int[Tensor, "item"]
) -> Float[Tensor, "site d_model"] | None:
    total = torch.zeros(values.shape[1:])
    weights = 0.0
    for s in stratum.unique():  # type: ignore[no-untyped-call]
        one, zero = (stratum == s) & positive, (stratum == s) & ~positive
        n_one, n_zero = int(one.sum()), int(zero.sum())
        if n_one and n_zero:
            weight = n_one * n_zero / (n_one + n_zero)
            total += weight * (values[one].mean(0) - values[zero].mean(0))
            weights += weight
    return total / weights if weights else None
