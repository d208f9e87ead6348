"""Which bias of a stock transformers model adds to which point of the residual stream.

A bias of the MLP's output projection adds to resid_post, one of the attention's output projection to resid_mid; both
act at every token, prompt and answer. Stock Llama has both behind configuration switches (`mlp_bias`,
`attention_bias`). Qwen2 has biases only on queries, keys and values, where they cannot add an arbitrary vector. But
apart from that its blocks are Llama's, so its weights are stored as a Llama with `attention_bias` (the output
projection's bias zero) and `mlp_bias`; the same goes for Mistral without a sliding window. Qwen3's query and key norms
exist in no Llama; it has a switch for the attention's output bias, so resid_mid can be baked there, resid_post cannot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError

_MODULES = {"resid_post": "mlp.down_proj", "resid_mid": "self_attn.o_proj"}
_REASONS = {
    "gpt2": "the biases that add to its residual stream hold values already, from which a vector could not be told",
    "phi3": "nothing that writes to its residual stream has a bias, and its joined projections are no Llama's",
    "olmo3": "what its blocks write is normalised before it is added, so a bias would not be added as it is",
    "gemma2": "what its blocks write is normalised before it is added, so a bias would not be added as it is",
    "gemma3": "what its blocks write is normalised before it is added, so a bias would not be added as it is",
    "gemma3_text": "what its blocks write is normalised before it is added, so a bias would not be added as it is",
}
_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class BakePlan:
    """How a model takes vectors into its biases.

    Attributes:
        config: the configuration of the checkpoint to be written.
        biases: parameter name for every site.
        new_parameters: endings of parameter names the original weights lack, zero unless they hold a vector.
        note: what changes besides the biases; empty when nothing does.
    """

    config: PretrainedConfig
    biases: dict[Site, str]
    new_parameters: tuple[str, ...]
    note: str = ""


def bake_plan(config: Any, sites: Iterable[Site]) -> BakePlan:
    """Say where each vector goes.

    Args:
        config: the model's transformers configuration.
        sites: where vectors are added, named as block outputs where they are one.

    Raises:
        WorkbenchError: with the reason, when a site or the architecture has no such bias.
    """
    chosen = sorted(sites)
    for site in chosen:
        if site.kind == "resid_pre":
            raise WorkbenchError(
                f"{site} is the embedding's output, where no bias exists; choose layers from 1 on, or another protocol."
            )
    biases = {site: f"model.layers.{site.layer}.{_MODULES[site.kind]}.bias" for site in chosen}
    kinds = {site.kind for site in chosen}
    if config.model_type == "llama":
        changed = LlamaConfig.from_dict(config.to_dict())
        return _switched(changed, biases, mlp="resid_post" in kinds, attention="resid_mid" in kinds, qkv=True)
    if config.model_type in ("qwen2", "mistral"):
        _refuse_windows(config)
        changed = _as_llama(config)
        qwen2 = config.model_type == "qwen2"
        plan = _switched(
            changed, biases, mlp="resid_post" in kinds, attention=qwen2 or "resid_mid" in kinds, qkv=not qwen2
        )
        return BakePlan(
            plan.config,
            plan.biases,
            plan.new_parameters,
            f"stored as a Llama, whose blocks are those of {config.model_type} and which has the bias it lacks",
        )
    if config.model_type == "qwen3":
        if "resid_post" in kinds:
            raise WorkbenchError(
                "Qwen3's MLP has no bias, and its query and key norms keep it from being stored as a Llama, so nothing "
                "can be added to resid_post by a checkpoint; steer with hooks, llama.cpp or lm-eval instead."
            )
        changed = type(config).from_dict(config.to_dict())
        changed.attention_bias = True
        return BakePlan(changed, biases, _attention_biases(qkv=True))
    reason = _REASONS.get(config.model_type, "its architecture was not examined for a bias that does it")
    raise WorkbenchError(
        f"No checkpoint can be baked for {config.model_type}: {reason}; it is done for llama, qwen2 and mistral (and "
        "qwen3 at resid_mid)."
    )


def _switched(config: PretrainedConfig, biases: dict[Site, str], *, mlp: bool, attention: bool, qkv: bool) -> BakePlan:
    config.mlp_bias = mlp
    config.attention_bias = attention
    new = tuple(f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")) if mlp else ()
    return BakePlan(config, biases, new + (_attention_biases(qkv=qkv) if attention else ()))


def _attention_biases(*, qkv: bool) -> tuple[str, ...]:
    return tuple(f"self_attn.{name}_proj.bias" for name in (("q", "k", "v", "o") if qkv else ("o",)))


def _as_llama(config: Any) -> LlamaConfig:
    fields = {name: getattr(config, name) for name in _SHARED_FIELDS if getattr(config, name, None) is not None}
    fields.setdefault("head_dim", config.hidden_size // config.num_attention_heads)
    return LlamaConfig(**fields, architectures=["LlamaForCausalLM"])


def _refuse_windows(config: Any) -> None:
    kinds = getattr(config, "layer_types", None) or []
    windowed = "sliding_attention" in kinds if kinds else bool(getattr(config, "sliding_window", None))
    if windowed:
        raise WorkbenchError(
            f"This {config.model_type} model uses sliding-window attention, which a Llama does not have, and its own "
            "architecture has no bias that adds to the residual stream; steer with hooks instead."
        )
