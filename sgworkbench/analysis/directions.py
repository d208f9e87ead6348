"""Directions in the residual stream, and projections onto them in raw and in separation units.

A direction separates two classes of activations. Its projection is reported as

    P(h) = u . (h - origin) / separation,

with `u` the unit direction, `origin` the mean of the class called 0 and `separation` the distance between the two class
means along `u`, all from the training split: 0 and 1 are the class means, so layers and models compare (METHOD,
"projections in separation units").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError, require_type
from sgworkbench.statistics import Auroc
from sgworkbench.tensor_files import read_tensors, write_tensors

_FORMAT = "sgworkbench-directions-1"
# Below this norm a mean difference is rounding noise (identical tokens give identical activations at early sites).
_SMALLEST_NORM = 1e-6


@dataclass(frozen=True)
class Directions:
    """One unit direction per site for one concept.

    Attributes:
        concept: "awareness" or "refusal", or a user's own word.
        source: how it was found, in words that figures can show.
        read_at: position selector the activations were read with.
        sites: where; the order of the first axis of all tensors.
        unit: unit directions, float32; a zero row marks a site where the classes do not differ.
        origin: mean activation of the class called 0, float32.
        separation: distance of the two class means along `unit`; NaN where the direction is zero.
        provenance: JSON-serialisable facts: data hashes, sizes, strata, validation.
    """

    concept: str
    source: str
    read_at: str
    sites: tuple[Site, ...]
    unit: Float[Tensor, "site d_model"]
    origin: Float[Tensor, "site d_model"]
    separation: Float[Tensor, "site"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def project(self, values: Float[Tensor, "*batch site d_model"]) -> Float[Tensor, "*batch site"]:
        """Return raw projections `u . h` of activations at these sites, in float32.

        Raises:
            WorkbenchError: activations of other sites or of another width.
        """
        require_type(values, Tensor, "activations as a torch tensor", "convert arrays with torch.from_numpy")
        if values.shape[-2:] != self.unit.shape:
            raise WorkbenchError(
                f"Expected activations of shape (..., sites, d_model) = (..., {self.unit.shape[0]}, "
                f"{self.unit.shape[1]}), found {tuple(values.shape)}; read them at the sites of the directions."
            )
        return torch.einsum("...sd,sd->...s", values.to(self.unit), self.unit)

    def in_separation_units(self, values: Float[Tensor, "*batch site d_model"]) -> Float[Tensor, "*batch site"]:
        """Return projections with the class means at 0 and 1; NaN where the classes do not differ."""
        return (self.project(values) - self.zero) / self.separation

    @property
    def zero(self) -> Float[Tensor, "site"]:
        """Raw projection of the class mean called 0."""
        return torch.einsum("sd,sd->s", self.origin, self.unit)

    def at(self, site: Site) -> Float[Tensor, "d_model"]:
        """Return the unit direction at one site.

        Raises:
            WorkbenchError: the site is not among these directions' sites.
        """
        if site not in self.sites:
            raise WorkbenchError(f"There is no {self.concept} direction at {site}; sites: {span(self.sites)}.")
        return self.unit[self.sites.index(site)]

    @property
    def validated(self) -> bool | None:
        """Whether a causal check confirmed the direction; None when none was made."""
        return self.provenance.get("validated")

    def with_separation(self, area: Auroc | None) -> Directions:
        """Return a copy that records the cross-validated AUROC of its classes on the training split."""
        if area is None:
            return self
        return self.with_provenance(cross_validated_auroc=area.value.tolist(), cross_validated_low=area.low.tolist())

    def separated(self) -> list[bool]:
        """Return, per site, whether cross-validation separates the classes better than chance (95 % interval).

        Where it does not, separation units divide by noise. True everywhere when no cross-validation was recorded.
        """
        recorded = self.provenance.get("cross_validated_low")
        return [True] * len(self.sites) if recorded is None else [low > 0.5 for low in recorded]

    def with_provenance(self, **facts: Any) -> Directions:
        """Return a copy with further facts recorded."""
        return replace(self, provenance={**self.provenance, **facts})

    def describe(self) -> str:
        """Return one line naming concept, source and validation, as figures print it."""
        state = {True: "validated", False: "NOT validated", None: "not checked causally"}[self.validated]
        return f"{self.concept} direction: {self.source}, {state}"

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per site: site, layer, separation, norm of the origin."""
        return pd.DataFrame(
            {
                "site": [str(site) for site in self.sites],
                "layer": [site.layer for site in self.sites],
                "separation": self.separation.tolist(),
                "origin_norm": self.origin.norm(dim=-1).tolist(),
            }
        )

    def packed(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors and the metadata that a file holds.

        Raises:
            WorkbenchError: the provenance is not JSON-serialisable.
        """
        try:
            provenance = json.dumps(dict(self.provenance))
        except (TypeError, ValueError) as error:
            raise WorkbenchError(f"The provenance must hold plain JSON values to be saved: {error}.") from None
        metadata = {
            "format": _FORMAT,
            "concept": self.concept,
            "source": self.source,
            "read_at": self.read_at,
            "sites": json.dumps([str(site) for site in self.sites]),
            "provenance": provenance,
        }
        return {"unit": self.unit, "origin": self.origin, "separation": self.separation}, metadata

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with all facts in its metadata, atomically.

        Raises:
            WorkbenchError: the file cannot be written, or the provenance is not JSON-serialisable.
        """
        write_tensors(path, *self.packed())

    @classmethod
    def load(cls, path: str | Path) -> Directions:
        """Read a file written by `save`.

        Raises:
            WorkbenchError: missing, truncated or foreign file.
        """
        return cls.unpacked(*read_tensors(path, _FORMAT, ("unit", "origin", "separation")), path=path)

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, path: str | Path) -> Directions:
        """Return what `packed` took apart; `path` names the file in errors.

        Raises:
            WorkbenchError: tensors and metadata that do not belong together.
        """
        try:
            sites = tuple(Site.parse(text) for text in json.loads(metadata["sites"]))
            provenance = json.loads(metadata["provenance"])
            concept, source, read_at = (metadata[name] for name in ("concept", "source", "read_at"))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, WorkbenchError) as error:
            raise WorkbenchError(f"{str(path)!r} has damaged metadata ({error}); fit the directions again.") from None
        unit, origin, separation = (tensors[name] for name in ("unit", "origin", "separation"))
        expected = (len(sites), unit.shape[-1] if unit.dim() else 0)
        if (
            (tuple(unit.shape), tuple(origin.shape), tuple(separation.shape)) != (expected, expected, expected[:1])
            or any(tensor.dtype != torch.float32 for tensor in (unit, origin, separation))
            or not isinstance(provenance, dict)
            or provenance.get("validated") not in (None, True, False)
        ):
            raise WorkbenchError(
                f"{str(path)!r} is damaged: its tensors, {len(sites)} sites and provenance do not belong together; "
                "fit the directions again."
            )
        return cls(concept, source, read_at, sites, unit, origin, separation, provenance)

    def _repr_html_(self) -> str:
        norm = self.separation
        return (
            f"<b>{self.describe()}</b><br>read at {self.read_at}, sites {span(self.sites)}, "
            f"separation {norm.nanmean():.2f} on average<br>"
            "next: <code>.project(h)</code>, <code>.in_separation_units(h)</code>, <code>.to_dataframe()</code>"
        )


def span(sites: tuple[Site, ...]) -> str:
    """Return sites in a few characters, for messages."""
    return str(sites[0]) if len(sites) == 1 else f"{sites[0]} ... {sites[-1]} ({len(sites)})"


def directions_between(
    one: Float[Tensor, "site d_model"],
    zero: Float[Tensor, "site d_model"],
    *,
    concept: str,
    source: str,
    read_at: str,
    sites: tuple[Site, ...],
    provenance: Mapping[str, Any] | None = None,
) -> Directions:
    """Return the directions from class mean `zero` to class mean `one`."""
    difference = (one - zero).double()
    norm = difference.norm(dim=-1)
    known = norm > _SMALLEST_NORM * zero.double().norm(dim=-1).clamp_min(1e-30)
    unit = torch.where(known[:, None], difference / norm.clamp_min(1e-30)[:, None], torch.zeros_like(difference))
    separation = torch.where(known, norm, torch.full_like(norm, float("nan")))
    return Directions(
        concept, source, read_at, sites, unit.float(), zero.float(), separation.float(), dict(provenance or {})
    )


def mean_difference_directions(
    positive: Float[Tensor, "positive site d_model"],
    negative: Float[Tensor, "negative site d_model"],
    *,
    concept: str,
    source: str,
    read_at: str,
    sites: tuple[Site, ...],
    provenance: Mapping[str, Any] | None = None,
) -> Directions:
    """Return difference-in-means directions, positive minus negative (Arditi et al. 2024, arXiv 2406.11717).

    Raises:
        WorkbenchError: a class is empty, or an activation is not finite.
    """
    for name, values in (("positive", positive), ("negative", negative)):
        if len(values) == 0:
            raise WorkbenchError(f"The {concept} direction needs {name} examples; found none.")
        require_finite(values, f"{name} activations for the {concept} direction")
    facts = {"n_positive": len(positive), "n_negative": len(negative), **(provenance or {})}
    return directions_between(
        positive.double().mean(0),
        negative.double().mean(0),
        concept=concept,
        source=source,
        read_at=read_at,
        sites=sites,
        provenance=facts,
    )


def require_finite(values: Float[Tensor, "item site d_model"], what: str) -> None:
    """Raise a WorkbenchError when activations hold NaN or infinite values; `what` names them."""
    if not torch.isfinite(values).all():
        raise WorkbenchError(
            f"The {what} hold NaN or infinite values; load the model in a wider dtype, such as float32."
        )


def awareness_directions(
    harmful: Float[Tensor, "harmful site d_model"],
    harmless: Float[Tensor, "harmless site d_model"],
    sites: tuple[Site, ...],
    provenance: Mapping[str, Any] | None = None,
) -> Directions:
    """Return harmful minus harmless instructions, read at the last instruction token in the plain condition."""
    return mean_difference_directions(
        harmful,
        harmless,
        concept="awareness",
        source="harmful minus harmless instructions, plain condition",
        read_at="last_instruction",
        sites=sites,
        provenance=provenance,
    )
