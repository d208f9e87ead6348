"""Whether a model can run on the fast path, and if not, why.

The fast path computes what HookedTransformer's own forward computes, but only for what is listed here, and it calls
only the hook points of the residual stream. Anything else, a hook elsewhere, a patched forward, an exotic setting, is
found before every forward pass and sends it to HookedTransformer instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from transformer_lens import HookedTransformer
from transformer_lens.components import (
    Attention,
    GroupedQueryAttention,
    LayerNorm,
    RMSNorm,
    TransformerBlock,
)
from transformer_lens.components.mlps.gated_mlp import GatedMLP
from transformer_lens.components.mlps.mlp import MLP

from sgworkbench.models.identity import LoadedModel

BLOCK_HOOK_POINTS = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
)
"""The hook points of a block that the fast path calls."""

# Called as modules by both paths, so that hooks on them and inside them work.
_CALLED_MODULES = ("embed", "pos_embed", "hook_embed", "hook_pos_embed", "ln_final", "unembed")
_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_GLOBAL_HOOK_TABLES = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
# Settings that change the computation of a block; each must be off.
_UNSUPPORTED_FLAGS = (
    "attn_only",
    "parallel_attn_mlp",
    "use_attn_result",
    "use_split_qkv_input",
    "use_attn_in",
    "use_hook_mlp_in",
    "use_hook_tokens",
    "use_attention_sinks",
    "use_logn_attn",
    "use_dynamic_ntk_rope",
    "ungroup_grouped_query_attention",
    "load_in_4bit",
    "num_experts",
    "clip_qkv",
    "rotary_adjacent_pairs",
)
_COMPONENTS: dict[str, tuple[type, ...]] = {
    "attn": (Attention, GroupedQueryAttention),
    "mlp": (GatedMLP, MLP),
    "ln1": (RMSNorm, LayerNorm),
    "ln2": (RMSNorm, LayerNorm),
}

_SLOW: ContextVar[bool] = ContextVar("sgworkbench_slow_path", default=False)


@contextmanager
def slow_path() -> Iterator[None]:
    """Use HookedTransformer's own forward inside the block: the reference the fast path is tested against."""
    token = _SLOW.set(True)
    try:
        yield
    finally:
        _SLOW.reset(token)


def fast_path_reason(loaded: LoadedModel) -> str | None:
    """Say why the next forward pass would not take the fast path; None means that it will."""
    if _SLOW.get():
        return "slow_path() is active"
    if torch.is_grad_enabled():
        return "gradients are enabled, and the fast path works in place; use torch.inference_mode() or torch.no_grad()"
    return _unsupported_setting(loaded.model.cfg) or _unsupported_module(loaded.model)


def prefix_sharing_reason(loaded: LoadedModel) -> str | None:
    """Say why the tokens that all rows of a batch begin with must not be run once for all of them.

    A hook then sees the shared tokens in a pass of their own, with one row. That is right only for hooks that find
    tokens through the announced batch and treat all rows alike; they say so with an attribute `shares_prefix = True`
    on the function. Any other hook, of whatever origin, rules sharing out.
    """
    reason = fast_path_reason(loaded)
    if reason is not None:
        return reason
    model = loaded.model
    points = [block._modules[name] for block in model.blocks for name in BLOCK_HOOK_POINTS]
    points += [module for name in _CALLED_MODULES[:4] if name in model._modules for module in _tree(model, name)]
    for point in points:
        if not any(getattr(point, table) for table in _HOOK_TABLES):
            continue
        known = getattr(point, "fwd_hooks", [])
        attached = sum(len(getattr(point, table)) for table in _HOOK_TABLES)
        if len(known) != attached or not all(getattr(handle.user_hook, "shares_prefix", False) for handle in known):
            return f"a hook on {point.name} may depend on the row or the column of a token"
    return None


def _tree(model: Any, name: str) -> Iterator[Any]:
    yield from model._modules[name].modules()


def _unsupported_setting(cfg: Any) -> str | None:
    for flag in _UNSUPPORTED_FLAGS:
        if getattr(cfg, flag, None):
            return f"the configuration sets {flag}"
    if cfg.normalization_type not in ("RMS", "LN"):
        return f"normalization type {cfg.normalization_type!r}"
    if cfg.positional_embedding_type not in ("rotary", "standard"):
        return f"{cfg.positional_embedding_type} positions"
    if cfg.attn_scores_soft_cap and cfg.attn_scores_soft_cap > 0:
        return "attention scores have a soft cap"
    if cfg.attention_dir != "causal":
        return f"attention is {cfg.attention_dir}"
    if cfg.n_devices != 1:
        return "the model is spread over several devices"
    if cfg.is_layer_norm_activation():
        return "the MLP normalises inside its activation"
    return None


def _unsupported_module(model: Any) -> str | None:
    """Find a replaced module, a patched forward or a hook that the fast path would pass over."""
    if type(model).forward is not HookedTransformer.forward:
        return f"{type(model).__name__} has a forward of its own"
    if any(getattr(torch_module, table) for table in _GLOBAL_HOOK_TABLES):
        return "a global torch module hook is registered"
    for index, block in enumerate(model.blocks):
        modules = block._modules
        if type(block) is not TransformerBlock:
            return f"block {index} is a {type(block).__name__}"
        for name, expected in _COMPONENTS.items():
            if type(modules[name]) not in expected:
                return f"blocks.{index}.{name} is a {type(modules[name]).__name__}"
        if modules["attn"]._attention_dir_override:
            return f"blocks.{index}.attn is not causal"
    bypassed = _bypassed(model)
    return None if bypassed is None else f"a hook or a patched forward sits on {bypassed}"


def _bypassed(model: Any) -> str | None:
    """Return the name of a module with a hook or a patched forward among those the fast path does not call."""
    top = {name: child for name, child in model._modules.items() if name not in _CALLED_MODULES}
    waiting: list[tuple[str, Any]] = []
    if _is_touched(model):
        return "the model"
    waiting += top.items()
    while waiting:
        name, module = waiting.pop()
        state = module.__dict__
        # Read from __dict__, because this runs over a thousand modules before every forward pass.
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            return name
        children = state["_modules"]
        if children:
            is_block = type(module) is TransformerBlock
            for child_name, child in children.items():
                if child is not None and not (is_block and child_name in BLOCK_HOOK_POINTS):
                    waiting.append((f"{name}.{child_name}", child))
    return None


def _is_touched(module: Any) -> bool:
    return "forward" in module.__dict__ or any(getattr(module, table) for table in _HOOK_TABLES)
