"""Refusal directions, from every source the project knows (METHOD: the source of a refusal direction matters)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sgworkbench.analysis.directions import (
    Directions,
    directions_between,
    mean_difference_directions,
    require_finite,
)
from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError


def refusal_directions(
    values: Float[Tensor, "item site d_model"],
    refused: Bool[Tensor, "item"],
    condition: Int[Tensor, "item"],
    content: Int[Tensor, "item"],
    sites: tuple[Site, ...],
    *,
    min_per_class: int = 5,
    min_strata: int = 1,
    provenance: Mapping[str, Any] | None = None,
) -> Directions:
    """Return refused minus complied, read at the last prompt token, without rediscovering the safety prompt.

    Refusals come mostly from prompted runs and compliance from plain ones, so a pooled difference would mostly be the
    difference of the prompts. The default is therefore a difference *within* each stratum (condition x content class),
    averaged over the strata that hold at least `min_per_class` of both, with weights n_refused n_complied / n, the
    inverse variance of a difference of means. With fewer than `min_strata` such strata the pooled difference is
    returned, and without enough of both outcomes overall, harmful minus harmless content; `source` says which.

    Args:
        values: activations at the last prompt token.
        refused: whether the model's own answer to the item was judged a refusal.
        condition: index of the prompt condition of each item; 0 is the plain one.
        content: 1 for harmful content, 0 for harmless.
        sites: sites of the second axis.
        min_per_class: refused and complied items a stratum needs to count.
        min_strata: strata needed for the stratified source.
        provenance: facts to record.

    Raises:
        WorkbenchError: no source applies (too few of everything), lists of unequal length, or an activation that is
            not finite.
    """
    if not len(values) == len(refused) == len(condition) == len(content):
        raise WorkbenchError(
            f"Expected one outcome, condition and content class per activation, found {len(values)} activations, "
            f"{len(refused)} outcomes, {len(condition)} conditions and {len(content)} content classes."
        )
    require_finite(values, "activations for the refusal direction")
    min_per_class = max(1, min_per_class)
    facts: dict[str, Any] = dict(provenance or {})
    counts = _count_strata(refused, condition, content)
    facts["strata"] = [
        {"condition": int(c), "content": "harmful" if k else "harmless", "refused": n_refused, "complied": n_complied}
        for c, k, n_refused, n_complied in counts
    ]
    usable = [(c, k) for c, k, n_refused, n_complied in counts if min(n_refused, n_complied) >= min_per_class]
    common = {"concept": "refusal", "read_at": "last_prompt", "sites": sites}
    if len(usable) >= max(1, min_strata):
        one = torch.zeros(values.shape[1:], dtype=torch.float64)
        zero = torch.zeros_like(one)
        total = 0.0
        for c, k in usable:
            member = (condition == c) & (content == k)
            n_refused, n_complied = int((member & refused).sum()), int((member & ~refused).sum())
            weight = n_refused * n_complied / (n_refused + n_complied)
            one += weight * values[member & refused].double().mean(0)
            zero += weight * values[member & ~refused].double().mean(0)
            total += weight
        facts |= {"fit": "stratified", "strata_used": len(usable), "min_per_class": min_per_class}
        source = "refused minus complied within condition x content"
        return directions_between(one / total, zero / total, source=source, provenance=facts, **common)  # type: ignore[arg-type]
    n_refused, n_complied = int(refused.sum()), int((~refused).sum())
    if min(n_refused, n_complied) >= min_per_class:
        source = "refused minus complied, pooled over conditions (confounded with the prompt)"
        facts["fit"] = "pooled"
        return mean_difference_directions(values[refused], values[~refused], source=source, provenance=facts, **common)  # type: ignore[arg-type]
    plain = condition == 0
    harmful, harmless = plain & (content == 1), plain & (content == 0)
    if min(int(harmful.sum()), int(harmless.sum())) >= 2:
        source = "harmful minus harmless content (fallback: too few refusals or compliances)"
        facts["fit"] = "content"
        return mean_difference_directions(values[harmful], values[harmless], source=source, provenance=facts, **common)  # type: ignore[arg-type]
    raise WorkbenchError(
        f"A refusal direction needs at least {min_per_class} refused and as many complied answers, or two harmful "
        f"and two harmless prompts; found {n_refused} refused, {n_complied} complied, {int(harmful.sum())} harmful "
        f"and {int(harmless.sum())} harmless. Use more training prompts."
    )


def _count_strata(
    refused: Bool[Tensor, "item"], condition: Int[Tensor, "item"], content: Int[Tensor, "item"]
) -> list[tuple[int, int, int, int]]:
    counts = []
    for c in sorted(set(condition.tolist())):
        for k in sorted(set(content.tolist())):
            member = (condition == c) & (content == k)
            counts.append((c, k, int((member & refused).sum()), int((member & ~refused).sum())))
    return counts


def content_directions(
    harmful: Float[Tensor, "harmful site d_model"],
    harmless: Float[Tensor, "harmless site d_model"],
    sites: tuple[Site, ...],
    provenance: Mapping[str, Any] | None = None,
) -> Directions:
    """Return harmful minus harmless content at the last prompt token (Arditi et al.), chosen by name."""
    return mean_difference_directions(
        harmful,
        harmless,
        concept="refusal",
        source="harmful minus harmless content",
        read_at="last_prompt",
        sites=sites,
        provenance=provenance,
    )


def unembedding_directions(
    unembedding: Float[Tensor, "d_model d_vocab"],
    refusal_tokens: tuple[int, ...],
    compliance_tokens: tuple[int, ...],
    zero: Float[Tensor, "site d_model"],
    one: Float[Tensor, "site d_model"],
    sites: tuple[Site, ...],
    provenance: Mapping[str, Any] | None = None,
) -> Directions:
    """Return the unembedding difference of refusal and compliance openings, the same direction at every site.

    Args:
        unembedding: the matrix W_U.
        refusal_tokens: first tokens of refusals.
        compliance_tokens: first tokens of compliant answers.
        zero: class mean per site to call 0 (harmless or complied).
        one: class mean per site to call 1 (harmful or refused).
        sites: sites of the class means.
        provenance: facts to record.

    Raises:
        WorkbenchError: a token list is empty, both lists are the same, or a token is not in the vocabulary.
    """
    if not refusal_tokens or not compliance_tokens or set(refusal_tokens) == set(compliance_tokens):
        raise WorkbenchError(
            "The unembedding direction needs first tokens of both refusals and compliant answers, and they must differ."
        )
    outside = [t for t in (*refusal_tokens, *compliance_tokens) if not 0 <= t < unembedding.shape[1]]
    if outside:
        raise WorkbenchError(f"Token {outside[0]} is not in the vocabulary of {unembedding.shape[1]} tokens.")
    columns = unembedding.double().cpu()
    difference = columns[:, list(refusal_tokens)].mean(1) - columns[:, list(compliance_tokens)].mean(1)
    unit = (difference / difference.norm()).expand(len(sites), -1)
    distance = torch.einsum("sd,sd->s", one.double() - zero.double(), unit)
    # A direction on which the classes are not in the stated order has no separation unit.
    separation = torch.where(distance > 0, distance, torch.full_like(distance, float("nan")))
    return Directions(
        "refusal",
        "unembedding difference of refusal and compliance openings",
        "last_prompt",
        sites,
        unit.float().contiguous(),
        zero.float(),
        separation.float(),
        dict(provenance or {}),
    )
