"""`.svec`: the JSON of activation-steering, in which the paper's vectors are published.

Form: `{"model_type": ..., "directions": {"0": [...], ...}, "explained_variances": {"0": ..., ...}}`, keys 0-based.
Semantics: key l is the output of block l (resid_post[l]), except the last key, which is taken after the final norm. It
is not in residual-stream coordinates, so it is never used for steering, but it is written back with the rest. The file
does not say where its vectors are written; the published code writes them at the input of block l.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.interchange.facts import MAX_WIDTH, VectorFacts, checked_row, checked_vector
from sgworkbench.interchange.model_shape import ModelShape
from sgworkbench.interchange.strict_json import read_json
from sgworkbench.steering.vector import SteeringVector
from sgworkbench.tensor_files import write_text

_FACTS = "sgworkbench"


@dataclass(frozen=True)
class SvecDocument:
    """A `.svec` file with every field it has, for reading, and for writing back unchanged.

    Attributes:
        fields: the parsed document, in its own order; numbers are Python's, so none is rounded.
        where: the file, for messages.
    """

    fields: dict[str, Any]
    where: str = "the .svec document"

    def __post_init__(self) -> None:
        if not isinstance(self.fields.get("directions"), dict):
            raise _no_svec(self.where, self.fields)
        if not isinstance(self.fields.get("model_type"), str):
            raise WorkbenchError(f"{self.where} lacks 'model_type', the family its vectors were read from.")
        if not self.fields["directions"]:
            raise WorkbenchError(f"{self.where} holds no directions.")
        width = None
        for key, row in self.fields["directions"].items():
            if not re.fullmatch(r"0|[1-9]\d{0,4}", key):
                raise WorkbenchError(
                    f"Expected block numbers from 0 on as the keys of {self.where}, found {key[:40]!r}."
                )
            if not isinstance(row, list) or not row or len(row) > MAX_WIDTH:
                raise WorkbenchError(
                    f"Expected a list of numbers at key {key} of {self.where}, found {_described(row)}."
                )
            wrong = [value for value in row if type(value) not in (int, float)]
            if wrong:
                raise WorkbenchError(f"Key {key} of {self.where} holds {_described(wrong[0])} among its numbers.")
            if any(math.isnan(value) for value in row):
                raise WorkbenchError(f"Key {key} of {self.where} holds NaN; extract the vectors again.")
            width = width or len(row)
            if len(row) != width:
                raise WorkbenchError(
                    f"Key {key} of {self.where} has {len(row)} numbers, the keys before it have {width}; it is damaged."
                )

    @classmethod
    def load(cls, path: str | Path) -> SvecDocument:
        """Read a file.

        Raises:
            WorkbenchError: not JSON, cut short, hostile, or not in the form of a `.svec` file.
        """
        content = read_json(Path(path))
        if not isinstance(content, dict):
            raise _no_svec(repr(str(path)), content)
        return cls(content, repr(str(path)))

    def save(self, path: str | Path) -> None:
        """Write the document as Python's json writes it, atomically: an unchanged one gets its old bytes back."""
        write_text(path, json.dumps(self.fields))

    @property
    def keys(self) -> tuple[int, ...]:
        """Block numbers, ascending."""
        return tuple(sorted(int(key) for key in self.fields["directions"]))

    def row(self, key: int) -> Float[np.ndarray, "d_model"]:
        """Return the numbers of one key in float64."""
        return np.asarray(self.fields["directions"][str(key)], dtype=np.float64)

    def norms(self) -> dict[int, float]:
        """Return the L2 norm of every key, the one after the final norm included."""
        return {key: float(np.linalg.norm(self.row(key))) for key in self.keys}

    def facts(self) -> VectorFacts | None:
        """Return what this package recorded when it wrote the file, or None for a file of another program."""
        raw = self.fields.get(_FACTS)
        return None if raw is None else VectorFacts.from_object(raw, self.where)

    def after_final_norm(self, model: ModelShape | None = None) -> int | None:
        """Return the key that was taken after the final norm; None when the file has none.

        Without a model, the highest key of a foreign file is taken to be the model's last.
        """
        if self.facts() is not None:
            return None
        last = model.n_layers - 1 if model is not None else self.keys[-1]
        return last if last in self.keys else None

    def to_vector(self, model: ModelShape | None = None, layers: tuple[int, ...] | None = None) -> SteeringVector:
        """Return the vectors that are in residual-stream coordinates, read at the output of their block.

        Args:
            model: the model they are for, which tells which key is the last.
            layers: layers that will be used; only when they are named may other layers be missing in between.

        Raises:
            WorkbenchError: missing layers, or no usable key.
        """
        facts, last = self.facts(), self.after_final_norm(model)
        if facts is not None:
            if facts.read_kind != "resid_post" or set(facts.layers) != set(self.keys):
                raise WorkbenchError(f"The facts stored in {self.where} contradict its keys; it was changed since.")
            rows = torch.stack([self._single(layer) for layer in facts.layers])
            return checked_vector(facts.with_values(rows), self.where)
        if model is not None and self.keys[-1] >= model.n_layers:
            raise WorkbenchError(
                f"{self.where} has the key {self.keys[-1]}, but {model.name} has {model.n_layers} layers (0 to "
                f"{model.n_layers - 1}); it belongs to another model."
            )
        self._require_no_gap(layers)
        usable = tuple(key for key in self.keys if key != last)
        if not usable:
            raise WorkbenchError(
                f"{self.where} holds only key {last}, taken after the final norm; it cannot be used for steering."
            )
        interchange: dict[str, Any] = {
            "format": "svec",
            "dtype": "decimal text",
            "other_fields": [name for name in self.fields if name not in ("model_type", "directions")],
        }
        if last is not None:
            interchange["left_out"] = {
                "key": last,
                "norm": round(self.norms()[last], 6),
                "reason": "taken after the final norm, not in residual-stream coordinates",
            }
        origin: dict[str, Any] = {"architecture": self.fields["model_type"], "d_model": len(self.row(usable[0]))}
        if model is not None or self.keys == tuple(range(len(self.keys))):
            origin["n_layers"] = model.n_layers if model is not None else len(self.keys)
        rows = torch.stack([self._single(key) for key in usable])
        provenance = {"model": origin, "interchange": interchange}
        return checked_vector(SteeringVector(usable, rows, "resid_post", "same-site", provenance), self.where)

    @classmethod
    def from_vector(cls, vector: SteeringVector, model: ModelShape | None = None) -> SvecDocument:
        """Return the document of a steering vector; its facts go into one more field, which other readers ignore.

        Raises:
            WorkbenchError: vectors of another site than block outputs, a number of layers that is not known, or the
                last block, whose key means something else in this format.
        """
        known = vector.provenance.get("model") or {}
        n_layers = model.n_layers if model is not None else known.get("n_layers")
        if n_layers is None:
            raise WorkbenchError(
                "A .svec file needs the number of layers of the model, because its last key means something else, and "
                "this vector does not record it; name the model with --model."
            )
        keys = {}
        for layer, row in zip(vector.layers, vector.values, strict=True):
            site = vector.read_site(layer)
            if site.kind == "resid_post" and layer == n_layers - 1:
                raise WorkbenchError(
                    f"{site} is the output of the last block, whose .svec key is taken after the final norm, so it "
                    f"cannot be expressed; choose layers below it, for example with --layers 0-{n_layers - 2}."
                )
            keys[Site.svec_key(site, n_layers)] = [float(value) for value in row.double().tolist()]
        return cls(
            {
                "model_type": model.model_type if model is not None else str(known.get("architecture", "unknown")),
                "directions": keys,
                "explained_variances": dict.fromkeys(keys),
                _FACTS: VectorFacts.of(vector).model_dump(mode="json"),
            }
        )

    def _single(self, key: int) -> Float[torch.Tensor, "d_model"]:
        return checked_row(torch.from_numpy(self.row(key)), f"key {key} of {self.where}")

    def _require_no_gap(self, layers: tuple[int, ...] | None) -> None:
        missing = sorted(set(range(self.keys[0], self.keys[-1] + 1)) - set(self.keys))
        if missing and layers is None:
            shown = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
            raise WorkbenchError(
                f"{self.where} lacks layers {shown} between {self.keys[0]} and {self.keys[-1]}; if that is meant, name "
                "the layers to use with --layers."
            )


def read_svec(path: Path, model: ModelShape | None = None, layers: tuple[int, ...] | None = None) -> SteeringVector:
    """Read a `.svec` file as a steering vector; see `SvecDocument.load` and `.to_vector`."""
    return SvecDocument.load(path).to_vector(model, layers)


def write_svec(vector: SteeringVector, path: Path, model: ModelShape | None = None) -> None:
    """Write a steering vector as a `.svec` file; see `SvecDocument.from_vector`."""
    SvecDocument.from_vector(vector, model).save(path)


def _no_svec(where: str, found: object) -> WorkbenchError:
    return WorkbenchError(
        f"Expected the JSON object of a .svec file with 'model_type' and 'directions' in {where}, found "
        f"{_described(found)}."
    )


def _described(value: object) -> str:
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(repr(str(key)[:20]) for key in list(value)[:4]) or 'none'}"
    if isinstance(value, list):
        return f"a list of {len(value)} values"
    return f"the text {value[:20]!r}" if isinstance(value, str) else f"{type(value).__name__} {value!r}"[:60]
