"""Reading the vector back out of a checkpoint that `bake` wrote."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.interchange.facts import VectorFacts, vector_from_sites
from sgworkbench.interchange.strict_json import read_json
from sgworkbench.models.folder import weight_files
from sgworkbench.steering.vector import SteeringVector

FACTS_FILE = "steering_vector.json"
_MODULES = {"resid_post": "mlp.down_proj", "resid_mid": "self_attn.o_proj"}


def is_model_folder(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face model."""
    return (folder / "config.json").is_file()


def read_baked(folder: Path) -> SteeringVector:
    """Return what a baked checkpoint adds, at the sites it adds it.

    Raises:
        WorkbenchError: a model that was not baked here, or whose biases are missing.
    """
    where = repr(str(folder))
    record = folder / FACTS_FILE
    if not record.is_file():
        raise WorkbenchError(f"{where} is a model without a baked vector ({FACTS_FILE}); load it with --model instead.")
    facts = VectorFacts.from_object(read_json(record), where)
    wanted = {f"model.layers.{site.layer}.{_MODULES.get(site.kind, '')}.bias": site for site in facts.sites()}
    vectors: dict[Site, torch.Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            for name in set(opened.keys()) & set(wanted):
                vectors[wanted[name]] = opened.get_tensor(name)
    return vector_from_sites(vectors, facts, where, {"format": "baked"})
