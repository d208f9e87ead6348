"""`.pt`: a dictionary of one tensor per layer.

Form: `{layer: tensor}`, keys 12, "12", "layer_12" or the like; written with whole numbers as keys and nothing else.
Semantics: the file says nothing about sites. Vectors are taken to be read and written at the output of block l;
anything else is refused when writing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.interchange.facts import vector_from_sites
from sgworkbench.interchange.layer_names import layer_keys
from sgworkbench.interchange.torch_archive import read_torch
from sgworkbench.steering.vector import SteeringVector
from sgworkbench.tensor_files import atomic_path


def read_torch_file(path: Path) -> SteeringVector:
    """Read a dictionary of tensors by layer.

    Raises:
        WorkbenchError: as `read_torch`, or not such a dictionary.
    """
    return from_dictionary(read_torch(path), repr(str(path)))


def from_dictionary(content: Any, where: str) -> SteeringVector:
    """Return the steering vector of a dictionary of tensors by layer.

    Raises:
        WorkbenchError: not such a dictionary.
    """
    if not isinstance(content, dict) or not content:
        what = (
            f"a tensor of shape {list(content.shape)}" if isinstance(content, torch.Tensor) else type(content).__name__
        )
        raise WorkbenchError(
            f"Expected a dictionary of one tensor per layer in {where}, found {what}; whether its first row is block 0 "
            "or the embedding cannot be known, so save it as {layer: tensor}."
        )
    keys = layer_keys(content, where)
    for layer, key in keys.items():
        if not isinstance(content[key], torch.Tensor):
            raise WorkbenchError(f"Expected a tensor at layer {layer} of {where}, found {type(content[key]).__name__}.")
    vectors = {Site(layer): content[key] for layer, key in keys.items()}
    kinds = ", ".join(sorted({str(row.dtype).removeprefix("torch.") for row in vectors.values()}))
    return vector_from_sites(vectors, None, where, {"format": "torch", "dtype": kinds})


def write_torch_file(vector: SteeringVector, path: Path) -> None:
    """Write `{layer: tensor}`.

    Raises:
        WorkbenchError: vectors read or written anywhere but at the outputs of their blocks.
    """
    for layer in vector.layers:
        if vector.read_site(layer) != Site(layer) or vector.write_site(layer) != Site(layer):
            raise WorkbenchError(
                f"A .pt file cannot say that a vector is read at {vector.read_site(layer)} and written to "
                f"{vector.write_site(layer)}; use .safetensors or .npz, or convert with --protocol same-site."
            )
    rows = vector.values.detach().cpu().float()
    with atomic_path(path) as temporary:
        torch.save({layer: row.clone() for layer, row in zip(vector.layers, rows, strict=True)}, temporary)
