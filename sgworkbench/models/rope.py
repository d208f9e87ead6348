"""Rotary position settings: from a Hugging Face configuration to TransformerLens' fields, or a clear refusal.

Transformers names a rope variant by `rope_type`; TransformerLens has one group of fields per variant and applies
some of them to global attention layers only. Every combination that TransformerLens cannot express is an error
here, because the numbers would be plausible and wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sgworkbench.errors import WorkbenchError

Rope = Mapping[str, Any]
"""One entry of a configuration's `rope_parameters`."""


def rope_fields(config: Any, *, global_layers: bool, local_layers: bool) -> dict[str, Any]:
    """Translate `config.rope_parameters` into fields of HookedTransformerConfig.

    Args:
        config: a transformers configuration; its rope parameters are either one mapping for all layers or one
            mapping per layer type ("full_attention", "sliding_attention").
        global_layers: whether any layer attends to everything before it.
        local_layers: whether any layer has a sliding window.

    Raises:
        WorkbenchError: for a rope variant, or a mixture of variants, that TransformerLens cannot represent.
    """
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in parameters or "sliding_attention" in parameters:
        everywhere = parameters.get("full_attention") or {"rope_type": "default"}
        local = parameters.get("sliding_attention") or {"rope_type": "default"}
    else:
        everywhere = local = parameters
    if not global_layers:
        everywhere = local
    if not local_layers:
        local = everywhere

    kind, local_kind = _rope_type(everywhere), _rope_type(local)
    fields: dict[str, Any] = {"rotary_base": _theta(everywhere)}
    if local_layers and _theta(local) != _theta(everywhere):
        fields["rotary_base_local"] = _theta(local)

    if local_kind not in ("default", kind):
        raise _mixture(kind, local_kind)
    if kind == "linear":
        # rotary_scaling_factor is ignored on local layers, which is right only when those are unscaled.
        if local_layers and local_kind == "linear":
            raise _mixture(kind, local_kind)
        fields["rotary_scaling_factor"] = float(everywhere["factor"])
    elif kind == "llama3":
        if local_layers and local_kind == "default":
            raise _mixture(kind, local_kind)
        fields |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": float(everywhere["factor"]),
            "NTK_by_parts_low_freq_factor": float(everywhere["low_freq_factor"]),
            "NTK_by_parts_high_freq_factor": float(everywhere["high_freq_factor"]),
            "NTK_original_ctx_len": int(everywhere["original_max_position_embeddings"]),
        }
    elif kind == "yarn":
        fields |= _yarn_fields(everywhere, config)
        fields["yarn_global_attn_only"] = local_layers and local_kind == "default"
    return fields


def _rope_type(rope: Rope) -> str:
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise WorkbenchError(
            f"The configuration asks for {kind!r} rope scaling, which TransformerLens cannot represent; "
            "supported: default, linear, llama3, yarn."
        )
    return kind


def _mixture(kind: str, local_kind: str) -> WorkbenchError:
    return WorkbenchError(
        f"The configuration combines {kind!r} rope on global layers with {local_kind!r} rope on sliding-window "
        "layers, which TransformerLens cannot represent."
    )


def _theta(rope: Rope) -> float:
    theta = rope.get("rope_theta")
    if theta is None:
        raise WorkbenchError("The configuration has rotary positions but no rope_theta; add it to config.json.")
    return float(theta)


def _yarn_fields(rope: Rope, config: Any) -> dict[str, Any]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071) with the defaults transformers applies to absent values."""
    original = int(rope["original_max_position_embeddings"])
    factor = rope.get("factor")
    factor = float(factor) if factor is not None else config.max_position_embeddings / original
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = _magnitude(factor, mscale) / _magnitude(factor, mscale_all)
        else:
            attention_factor = _magnitude(factor, 1.0)
    return {
        "use_yarn_rope": True,
        "yarn_factor": factor,
        "yarn_attention_factor": float(attention_factor),
        "yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
        "yarn_original_max_position_embeddings": original,
        "yarn_truncate": bool(rope.get("truncate", True)),
    }


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * float(scale) * math.log(factor) + 1.0
