"""What a vector file should say beside its numbers, and how a steering vector is built from sites and such facts.

Most formats have room for a remark. There the facts go, as JSON, so that a vector comes back as it was: which layers
it was read at, where it is written, what scale is in its values already. Files of other programs have no such remark;
their vectors are then taken to have been read where they are added, and the provenance says that this is assumed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from sgworkbench.analysis.site import Site, SiteKind
from sgworkbench.errors import WorkbenchError
from sgworkbench.interchange.strict_json import parse_json
from sgworkbench.steering.vector import Protocol, SteeringVector

MAX_WIDTH = 2**20
"""Widest residual stream a file may declare; the largest models have 2 ** 14."""

LayerIndex = Annotated[int, Field(strict=True, ge=0, lt=100_000)]


class VectorFacts(BaseModel):
    """The facts of a steering vector that its numbers do not show.

    Attributes:
        format: version of this record.
        layers: block indices the vectors were read at, in the order of the vectors.
        read_kind: kind of site they were read at.
        protocol: where they are written.
        provenance: the vector's own provenance; `scale` is the coefficient its values have been multiplied by.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["sgworkbench-vector-facts-1"] = "sgworkbench-vector-facts-1"
    layers: tuple[LayerIndex, ...] = Field(min_length=1)
    read_kind: SiteKind
    protocol: Protocol
    provenance: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def of(cls, vector: SteeringVector) -> VectorFacts:
        """Return the facts of a vector."""
        return cls(
            layers=vector.layers,
            read_kind=vector.read_kind,
            protocol=vector.protocol,
            provenance=json.loads(json.dumps(dict(vector.provenance))),
        )

    def to_text(self) -> str:
        """Return the facts as one line of JSON."""
        return json.dumps(self.model_dump())

    def with_values(self, values: Float[Tensor, "layer d_model"]) -> SteeringVector:
        """Return the steering vector of these facts and values.

        Raises:
            WorkbenchError: layers given twice, or another number of layers than values.
        """
        return SteeringVector(self.layers, values, self.read_kind, self.protocol, self.provenance)

    def sites(self) -> tuple[Site, ...]:
        """Return where each vector is written, named as the output of a block where it is one.

        Raises:
            WorkbenchError: layers given twice.
        """
        vector = self.with_values(torch.zeros(len(self.layers), 1))
        return tuple(block_output(vector.write_site(layer)) for layer in vector.layers)

    @classmethod
    def from_object(cls, raw: object, where: str) -> VectorFacts:
        """Check facts found in a file.

        Raises:
            WorkbenchError: something is missing, unknown or of another type.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the record"
            raise WorkbenchError(f"The facts stored in {where} are damaged: {place}: {first['msg']}.") from None

    @classmethod
    def from_text(cls, text: str, where: str) -> VectorFacts:
        """Read what `to_text` wrote.

        Raises:
            WorkbenchError: not JSON, or as `from_object`.
        """
        return cls.from_object(parse_json(text, f"the record of facts in {where}"), where)


def block_output(site: Site) -> Site:
    """Return the same point of the residual stream named as a block's output, where it is one."""
    return Site(site.layer - 1) if site.kind == "resid_pre" and site.layer > 0 else site


def vector_from_sites(
    vectors: Mapping[Site, Tensor],
    facts: VectorFacts | None,
    where: str,
    origin: Mapping[str, Any],
) -> SteeringVector:
    """Build a steering vector from what a file adds at which site.

    Args:
        vectors: what is added, per write site, named as block outputs where possible; any tensors, as they were
            found in the file.
        facts: what the file says about itself, if it was written here.
        where: the file, for messages.
        origin: format, data type and the like, kept in the provenance of vectors without facts.

    Raises:
        WorkbenchError: no vector, unequal widths, NaN, facts that contradict the file, or sites of several kinds.
    """
    checked = {site: checked_row(row, f"{site} of {where}") for site, row in vectors.items()}
    if not checked:
        raise WorkbenchError(f"{where} holds no vector.")
    widths = {len(row) for row in checked.values()}
    if len(widths) > 1:
        raise WorkbenchError(f"{where} holds vectors of different widths: {', '.join(map(str, sorted(widths)))}.")
    if facts is None:
        kinds = {site.kind for site in checked}
        if len(kinds) > 1:
            raise WorkbenchError(
                f"{where} holds sites of the kinds {', '.join(sorted(kinds))}; one vector has one kind of site."
            )
        ordered = sorted(checked)
        return checked_vector(
            SteeringVector(
                tuple(site.layer for site in ordered),
                torch.stack([checked[site] for site in ordered]),
                kinds.pop(),
                "same-site",
                {"interchange": {**origin, "read_site": "not recorded in the file; taken to be where it is added"}},
            ),
            where,
        )
    sites = facts.sites()
    if set(sites) != set(checked):
        raise WorkbenchError(
            f"The facts stored in {where} name other sites than its vectors ({', '.join(map(str, sorted(checked)))}); "
            "it was changed after it was written."
        )
    return checked_vector(facts.with_values(torch.stack([checked[site] for site in sites])), where)


def checked_row(row: Tensor, where: str) -> Float[Tensor, "d_model"]:
    """Return one vector in float32, on the CPU.

    Raises:
        WorkbenchError: not a dense vector of real floating-point numbers, too wide, or not finite.
    """
    if row.layout is not torch.strided or row.device.type != "cpu" or not row.dtype.is_floating_point:
        raise WorkbenchError(f"Expected a dense floating-point vector at {where}, found {row.dtype} ({row.layout}).")
    if row.dim() != 1 or not 0 < len(row) <= MAX_WIDTH:
        raise WorkbenchError(f"Expected a vector of length d_model at {where}, found the shape {list(row.shape)}.")
    wide = row.detach().double()
    if not torch.isfinite(wide).all():
        raise WorkbenchError(f"The vector at {where} holds NaN or infinite values; extract it again.")
    single = wide.float()
    if not torch.isfinite(single).all():
        raise WorkbenchError(f"The vector at {where} holds values too large for float32.")
    return single


def checked_vector(vector: SteeringVector, where: str) -> SteeringVector:
    """Check what a file may have put into a vector's provenance, which later code relies on.

    Raises:
        WorkbenchError: provenance or its entry `model` is not a mapping, or layers or counts are not whole numbers.
    """
    if not isinstance(vector.provenance, Mapping):
        raise WorkbenchError(f"The provenance in {where} is not a mapping; the file is damaged.")
    model = vector.provenance.get("model")
    if model is not None and not isinstance(model, Mapping):
        raise WorkbenchError(f"The provenance in {where} describes its model as {type(model).__name__}, not a mapping.")
    for key in ("n_layers", "d_model"):
        value = (model or {}).get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise WorkbenchError(f"The provenance in {where} gives {key} as {value!r}; expected a whole number.")
    n_layers, width = (model or {}).get("n_layers"), (model or {}).get("d_model")
    if any(isinstance(layer, bool) or layer < 0 for layer in vector.layers):
        raise WorkbenchError(f"The layers in {where} are not whole numbers from 0 on: {list(vector.layers)}.")
    if n_layers is not None and max(vector.layers) >= n_layers:
        raise WorkbenchError(
            f"{where} has a vector for layer {max(vector.layers)}, but says that its model has {n_layers} layers."
        )
    if width is not None and width != vector.values.shape[-1]:
        raise WorkbenchError(
            f"{where} has vectors of width {vector.values.shape[-1]}, but says that its model has width {width}."
        )
    return vector
