"""Model families: how each Hugging Face configuration becomes a HookedTransformerConfig.

TransformerLens chooses architectures by model name. Here the configuration file decides, so a folder may be called
anything, and dimensions need not be those of a published model. One entry per `model_type`; a setting that
TransformerLens cannot represent is refused by name instead of being ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained import weight_conversions
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

from sgworkbench.errors import WorkbenchError
from sgworkbench.models.rope import rope_fields

_ACTIVATION_NAMES = {"swish": "silu", "gelu_python": "gelu"}


@dataclass(frozen=True)
class Architecture:
    """One supported family.

    Attributes:
        original_architecture: the name TransformerLens' components test for.
        fields: from the text configuration to the family's HookedTransformerConfig fields.
        convert: TransformerLens' weight conversion: (transformers model, HookedTransformerConfig) -> state dict.
    """

    original_architecture: str
    fields: Callable[[Any], dict[str, Any]]
    convert: Callable[[Any, HookedTransformerConfig], dict[str, torch.Tensor]]


def _decoder_fields(config: Any) -> dict[str, Any]:
    """Fields shared by every rotary, RMS-normed, gated decoder."""
    n_heads = int(config.num_attention_heads)
    d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return {
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": n_heads,
        "d_head": int(d_head),
        "d_mlp": config.intermediate_size,
        "d_vocab": config.vocab_size,
        "eps": config.rms_norm_eps,
        "act_fn": _activation(getattr(config, "hidden_act", None) or config.hidden_activation),
        "n_key_value_heads": int(config.num_key_value_heads or n_heads),
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": _rotary_dim(config, int(d_head)),
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "initializer_range": config.initializer_range,
    }


def _activation(name: str) -> str:
    name = _ACTIVATION_NAMES.get(name, name)
    if name not in SUPPORTED_ACTIVATIONS:
        raise WorkbenchError(f"The configuration asks for the activation {name!r}, which TransformerLens lacks.")
    return name


def _rotary_dim(config: Any, d_head: int) -> int:
    parameters = getattr(config, "rope_parameters", None) or {}
    factor = float(parameters.get("partial_rotary_factor") or 1.0)
    if factor != 1.0 and config.model_type != "phi3":
        raise WorkbenchError(
            f"The configuration rotates only {factor:g} of each head, which is supported for phi3 models only."
        )
    return int(d_head * factor)


def _attention_fields(config: Any, windowed: Sequence[bool]) -> dict[str, Any]:
    """Sliding windows and rope, given which layers have a window."""
    fields: dict[str, Any] = {}
    if any(windowed):
        fields["use_local_attn"] = True
        fields["window_size"] = int(config.sliding_window)
        fields["attn_types"] = ["local" if local else "global" for local in windowed]
    return fields | rope_fields(config, global_layers=not all(windowed), local_layers=any(windowed))


def _layer_windows(config: Any) -> list[bool]:
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise WorkbenchError(f"The configuration has layers of type {sorted(unknown)}, which are not supported.")
    windowed = [kind == "sliding_attention" and bool(config.sliding_window) for kind in kinds]
    if getattr(config, "use_bidirectional_attention", False):
        raise WorkbenchError("The configuration asks for bidirectional attention; only causal models are supported.")
    return windowed


def _uniform_windows(config: Any) -> list[bool]:
    return [bool(config.sliding_window)] * int(config.num_hidden_layers)


def _refuse(config: Any, *flags: str) -> None:
    for flag in flags:
        if getattr(config, flag, False):
            raise WorkbenchError(
                f"The configuration sets {flag}, which TransformerLens' {config.model_type} conversion drops."
            )


def _ungrouped_as_none(fields: dict[str, Any]) -> dict[str, Any]:
    """Plain multi-head attention avoids repeating keys and values at every step."""
    if fields["n_key_value_heads"] == fields["n_heads"]:
        fields["n_key_value_heads"] = None
    return fields


def _llama(config: Any) -> dict[str, Any]:
    _refuse(config, "attention_bias", "mlp_bias")
    plain = [False] * config.num_hidden_layers
    return _ungrouped_as_none(_decoder_fields(config) | _attention_fields(config, plain))


def _mistral(config: Any) -> dict[str, Any]:
    if getattr(config, "layer_types", None):
        raise WorkbenchError("A mistral configuration with layer_types is not supported; only uniform windows are.")
    return _decoder_fields(config) | _attention_fields(config, _uniform_windows(config))


def _qwen2(config: Any) -> dict[str, Any]:
    return _decoder_fields(config) | _attention_fields(config, _layer_windows(config))


def _qwen3(config: Any) -> dict[str, Any]:
    _refuse(config, "attention_bias")
    fields = _decoder_fields(config) | _attention_fields(config, _layer_windows(config))
    # GroupedQueryAttention and Attention both normalise queries and keys per head.
    return _ungrouped_as_none(fields | {"use_qk_norm": True})


def _phi3(config: Any) -> dict[str, Any]:
    fields = _decoder_fields(config) | _attention_fields(config, _uniform_windows(config))
    return _ungrouped_as_none(fields)


def _olmo3(config: Any) -> dict[str, Any]:
    _refuse(config, "attention_bias")
    fields = _decoder_fields(config) | _attention_fields(config, _layer_windows(config))
    if fields["n_heads"] * fields["d_head"] != fields["d_model"]:
        raise WorkbenchError(
            f"An olmo3 model needs num_attention_heads x head_dim = hidden_size here, found "
            f"{fields['n_heads']} x {fields['d_head']} and {fields['d_model']}."
        )
    return _ungrouped_as_none(fields)


def _gemma2(config: Any) -> dict[str, Any]:
    _refuse(config, "attention_bias")
    fields = _decoder_fields(config) | _attention_fields(config, _layer_windows(config))
    fields |= {"use_normalization_before_and_after": True, "attn_scale": math.sqrt(config.query_pre_attn_scalar)}
    # -1 is TransformerLens' value for "no soft cap".
    fields["attn_scores_soft_cap"] = config.attn_logit_softcapping or -1.0
    fields["output_logits_soft_cap"] = config.final_logit_softcapping or -1.0
    return fields


def _gemma3(config: Any) -> dict[str, Any]:
    return _gemma2(config) | {"use_qk_norm": True}


def _gpt2(config: Any) -> dict[str, Any]:
    _refuse(config, "add_cross_attention")
    return {
        "d_model": config.n_embd,
        "n_layers": config.n_layer,
        "n_heads": config.n_head,
        "d_head": config.n_embd // config.n_head,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "d_vocab": config.vocab_size,
        "eps": config.layer_norm_epsilon,
        "act_fn": _activation(config.activation_function),
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
        "use_attn_scale": bool(config.scale_attn_weights),
        "scale_attn_by_inverse_layer_idx": bool(config.scale_attn_by_inverse_layer_idx),
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "initializer_range": config.initializer_range,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", _llama, weight_conversions.convert_llama_weights),
    "mistral": Architecture("MistralForCausalLM", _mistral, weight_conversions.convert_mistral_weights),
    "qwen2": Architecture("Qwen2ForCausalLM", _qwen2, weight_conversions.convert_qwen2_weights),
    "qwen3": Architecture("Qwen3ForCausalLM", _qwen3, weight_conversions.convert_qwen3_weights),
    "phi3": Architecture("Phi3ForCausalLM", _phi3, weight_conversions.convert_phi3_weights),
    "gpt2": Architecture("GPT2LMHeadModel", _gpt2, weight_conversions.convert_gpt2_weights),
    "olmo3": Architecture("Olmo3ForCausalLM", _olmo3, weight_conversions.convert_olmo3_weights),
    "gemma2": Architecture("Gemma2ForCausalLM", _gemma2, weight_conversions.convert_gemma_weights),
    "gemma3_text": Architecture("Gemma3ForCausalLM", _gemma3, weight_conversions.convert_gemma_weights),
    "gemma3": Architecture("Gemma3ForConditionalGeneration", _gemma3, weight_conversions.convert_gemma_weights),
}
"""The supported families by the `model_type` of their config.json."""


def architecture_for(model_type: str) -> Architecture:
    """Look a family up.

    Raises:
        WorkbenchError: naming the family found and listing the supported ones.
    """
    if model_type not in ARCHITECTURES:
        raise WorkbenchError(
            f"Models of type {model_type!r} are not supported; supported families: {', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[model_type]


def text_config(config: Any) -> Any:
    """Return the language model's part of a multimodal configuration, or the configuration itself."""
    return getattr(config, "text_config", None) or config


def maximum_context(config: Any) -> int:
    """Return the longest context in tokens that the model's own configuration allows."""
    return int(text_config(config).max_position_embeddings)


def hooked_config(
    config: Any, *, context_length: int, dtype: torch.dtype, device: str, name: str
) -> HookedTransformerConfig:
    """Build the HookedTransformerConfig of a Hugging Face configuration.

    Args:
        config: the loaded transformers configuration.
        context_length: n_ctx, at most `maximum_context(config)`.
        dtype: of the weights.
        device: a torch device name.
        name: stored as `cfg.model_name`.

    Raises:
        WorkbenchError: for an unsupported family or setting.
    """
    architecture = architecture_for(config.model_type)
    fields = architecture.fields(text_config(config))
    return HookedTransformerConfig(
        **fields,
        n_ctx=context_length,
        dtype=dtype,
        device=device,
        model_name=name,
        original_architecture=architecture.original_architecture,
        init_weights=False,
        # A rendered chat template already carries its BOS; TransformerLens would put a second one in front.
        default_prepend_bos=False,
    )
