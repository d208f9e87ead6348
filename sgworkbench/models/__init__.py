"""Models: loading by name, folder, GGUF file or "demo"; identity; self-check against transformers; memory layout.

Only this room imports HookedTransformer; the others speak its hook interface.
"""

from sgworkbench.models.identity import LoadedModel, ModelIdentity, ParityReport
from sgworkbench.models.layout import use_fast_layout
from sgworkbench.models.loading import load_model, load_tokenizer
from sgworkbench.models.reference import load_reference
from sgworkbench.models.self_check import compare_with_transformers

__all__ = [
    "LoadedModel",
    "ModelIdentity",
    "ParityReport",
    "compare_with_transformers",
    "load_model",
    "load_reference",
    "load_tokenizer",
    "use_fast_layout",
]
