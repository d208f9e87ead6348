"""From a transformers model in memory to an unprocessed HookedTransformer on the same weights.

The state dict is assigned, not copied: both models share their tensors, so that the self-check costs no second
copy of the weights, and the memory order is the one transformers multiplies with.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sgworkbench.errors import WorkbenchError
from sgworkbench.models.architectures import architecture_for, hooked_config
from sgworkbench.models.layout import use_fast_layout

# Buffers that HookedTransformer computes itself.
_BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos")


def hooked_from_transformers(reference: Any, *, context_length: int, name: str) -> HookedTransformer:
    """Build a HookedTransformer from a loaded transformers model: no folding, no centring, fast memory layout.

    Args:
        reference: a transformers causal language model of a supported family, on its final device.
        context_length: tokens, at most the model's own maximum.
        name: stored as `cfg.model_name`.

    Raises:
        WorkbenchError: for a family, setting or weight that TransformerLens cannot represent.
    """
    config = reference.config
    cfg = hooked_config(
        config, context_length=context_length, dtype=reference.dtype, device=str(reference.device), name=name
    )
    model = _empty_model(cfg)
    with torch.no_grad():
        state = architecture_for(config.model_type).convert(reference, cfg)
        _assign(model, state)
        use_fast_layout(model)
    model.move_model_modules_to_device()
    return model.eval().requires_grad_(False)


def _empty_model(cfg: HookedTransformerConfig) -> HookedTransformer:
    with warnings.catch_warnings():
        # Known and pinned: this package requires transformer-lens < 4.
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        return HookedTransformer(cfg, tokenizer=None, move_to_device=False)


def _assign(model: HookedTransformer, state: dict[str, Tensor]) -> None:
    """Put every converted weight into the model; anything left over or left out is an error."""
    parameters = dict(model.named_parameters())
    unknown = sorted(key for key in state if key not in parameters and bool(state[key].any()))
    left_out = [key for key in parameters if key not in state]
    # Biases a family does not have stay at the zeros they are created with.
    absent = sorted(key for key in left_out if not key.rsplit(".", 1)[-1].lstrip("_").startswith("b"))
    misshapen = sorted(
        key for key, weight in state.items() if key in parameters and weight.shape != parameters[key].shape
    )
    for problem, keys in (("extra", unknown), ("missing", absent), ("misshapen", misshapen)):
        if keys:
            raise WorkbenchError(
                f"This model does not fit TransformerLens' {model.cfg.original_architecture}: {problem} weight "
                f"{keys[0]} ({len(keys)} in all)."
            )
    ready = {}
    for key, weight in state.items():
        if key in parameters:
            ready[key] = weight.detach().to(device=model.cfg.device, dtype=model.cfg.dtype)
    if ready["unembed.W_U"].data_ptr() == ready["embed.W_E"].data_ptr():
        # Tied embeddings: editing one in place must not change the other, as everywhere in TransformerLens.
        ready["unembed.W_U"] = ready["unembed.W_U"].clone()
    ready |= {key: parameters[key].detach().to(model.cfg.device) for key in left_out}
    ready |= {key: buffer for key, buffer in model.named_buffers() if key.rsplit(".", 1)[-1] in _BUFFERS}
    model.load_state_dict(ready, strict=True, assign=True)
