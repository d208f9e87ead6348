"""The steering file of lm-evaluation-harness (`--model steered`, `steer_path=FILE.pt`).

Form: `{hookpoint: {"action": "add", "steering_vector": tensor, "steering_coefficient": number, "bias": None,
"head_index": None}}`; hook points are module names below the base model, `layers.20` for most families, `h.20` for
GPT-2.
Semantics: coefficient times vector is added to the output of that module, here block k (resid_post[k]), for every
token. The coefficient is a field of its own, so nothing is multiplied in when writing; when reading it is.
Caveat: release 0.4.9 of the harness adds the last entry's vector at every hook point of a file with several layers;
0.4.9.2 and later are right.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.interchange.facts import VectorFacts, block_output, checked_row, vector_from_sites
from sgworkbench.interchange.torch_archive import read_torch
from sgworkbench.steering.vector import SteeringVector
from sgworkbench.tensor_files import atomic_path

_FACTS = "sgworkbench"
_HOOKPOINT = re.compile(r"(?:layers|h)\.(0|[1-9]\d{0,4})")


def is_lm_eval(content: Any) -> bool:
    """Whether the content of a `.pt` file is a steering file of lm-evaluation-harness."""
    return isinstance(content, dict) and any(
        isinstance(entry, dict) and "steering_vector" in entry for entry in content.values()
    )


def read_lm_eval(path: Path) -> SteeringVector:
    """Read a steering file.

    Raises:
        WorkbenchError: as `read_torch`, or entries that are not additions to the output of a block.
    """
    return from_config(read_torch(path), repr(str(path)))


def from_config(content: Any, where: str) -> SteeringVector:
    """Return the steering vector of a loaded steering file, its coefficients multiplied in.

    Raises:
        WorkbenchError: entries that are not additions to the output of a block, or unequal coefficients in a file that
            says it has one.
    """
    if not isinstance(content, dict) or not content:
        raise WorkbenchError(f"Expected entries by hook point in {where}, found {type(content).__name__}.")
    vectors: dict[Site, torch.Tensor] = {}
    coefficients: dict[str, float] = {}
    texts, kinds = set(), set()
    for hookpoint, entry in content.items():
        found = _HOOKPOINT.fullmatch(hookpoint) if isinstance(hookpoint, str) else None
        if found is None:
            raise WorkbenchError(
                f"The hook point {str(hookpoint)[:60]!r} in {where} is not the output of a block (layers.k or h.k), so "
                "it is no site of the residual stream."
            )
        site = Site(int(found[1]))
        if site in vectors:
            raise WorkbenchError(f"{where} holds layer {site.layer} twice.")
        row = _addition(entry, f"{hookpoint} of {where}")
        coefficient = _coefficient(entry.get("steering_coefficient", 1.0), f"{hookpoint} of {where}")
        kinds.add(str(row.dtype).removeprefix("torch."))
        vectors[site] = coefficient * checked_row(row, f"{hookpoint} of {where}")
        coefficients[str(site)] = coefficient
        texts.add(entry.get(_FACTS))
    text = texts.pop() if len(texts) == 1 else None
    facts = VectorFacts.from_text(text, where) if isinstance(text, str) else None
    origin: dict[str, Any] = {"format": "lm-eval", "dtype": ", ".join(sorted(kinds)), "coefficients": coefficients}
    if len(set(coefficients.values())) == 1:
        scale = next(iter(coefficients.values()))
        origin["scale"] = scale
        if facts is not None and scale != 1.0:
            earlier = facts.provenance.get("scale", 1.0)
            earlier = _coefficient(earlier, f"the record of facts in {where}")
            facts = facts.model_copy(update={"provenance": {**facts.provenance, "scale": earlier * scale}})
    return vector_from_sites(vectors, facts, where, origin)


def write_lm_eval(vector: SteeringVector, path: Path, coefficient: float = 1.0) -> None:
    """Write a steering file; `coefficient` becomes the field the harness multiplies by.

    Raises:
        WorkbenchError: a site that is not the output of a block.
    """
    prefix = "h" if (vector.provenance.get("model") or {}).get("architecture") == "gpt2" else "layers"
    text = VectorFacts.of(vector).to_text()
    entries = {}
    for layer, row in zip(vector.layers, vector.values, strict=True):
        site = block_output(vector.write_site(layer))
        if site.kind != "resid_post":
            raise WorkbenchError(
                f"{vector.write_site(layer)} is not the output of a block, the only site lm-evaluation-harness can "
                "steer; choose other layers with --layers or another protocol."
            )
        entries[f"{prefix}.{site.layer}"] = {
            "action": "add",
            "steering_vector": row.detach().cpu().float().clone(),
            "steering_coefficient": float(coefficient),
            "bias": None,
            "head_index": None,
            _FACTS: text,
        }
    with atomic_path(path) as temporary:
        torch.save(entries, temporary)


def _addition(entry: Any, where: str) -> torch.Tensor:
    if not isinstance(entry, dict) or not isinstance(entry.get("steering_vector"), torch.Tensor):
        raise WorkbenchError(f"Expected an entry with 'steering_vector' at {where}, found {type(entry).__name__}.")
    action = entry.get("action", "add")
    if action != "add":
        raise WorkbenchError(f"The action at {where} is {str(action)[:40]!r}; only 'add' is a steering vector.")
    for field in ("bias", "head_index"):
        if entry.get(field) is not None:
            raise WorkbenchError(
                f"The entry at {where} has a {field}, so it is not an addition to the residual stream."
            )
    vector: torch.Tensor = entry["steering_vector"]
    return vector


def _coefficient(value: Any, where: str) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise WorkbenchError(f"The coefficient at {where} is {str(value)[:40]!r}; expected a finite number.")
    return float(value)
