"""The engine: a HookedTransformer's blocks, run fast, with the hook points of the residual stream alive.

HookedTransformer normalises the stream three times a block, builds the whole matrix of attention scores, rotates all
cached keys at every decoded token and copies grouped keys and values for every query head. `run_blocks` reads the same
weights and computes the same function without that: one norm per sublayer, PyTorch's fused attention, keys stored
rotated. Every forward pass first asks `fast_path_reason`; where it names a reason, HookedTransformer's own forward
runs instead, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities.activation_functions import gelu_new
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

from sgworkbench.errors import WorkbenchError
from sgworkbench.models.engine_attention import Columns, attend, attention_bias, rotate, rotation
from sgworkbench.models.engine_checks import fast_path_reason
from sgworkbench.models.identity import LoadedModel
from sgworkbench.models.kv_cache import PreallocatedCache

# Looking whether a bias is all zeros pays off when it spares a pass over at least this many tokens.
_MANY_TOKENS = 64


def run_blocks(
    loaded: LoadedModel,
    inputs: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
    *,
    attention_mask: Int[Tensor, "batch all"] | None = None,
    cache: PreallocatedCache | None = None,
    start_at_layer: int | None = None,
    stop_at_layer: int | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """Run blocks of a model and return the residual stream after them; nothing is normalised or unembedded.

    Hooks on hook_embed, hook_pos_embed, hook_resid_pre, hook_attn_out, hook_resid_mid, hook_mlp_out and
    hook_resid_post run on the fast path; a hook anywhere else sends the pass to HookedTransformer. What stands at pads
    is finite, and otherwise without meaning.

    Args:
        loaded: the model.
        inputs: token ids; or, with `start_at_layer`, the residual stream that enters that block.
        attention_mask: 1 for tokens and 0 for pads, for all columns: those in the cache and then those of `inputs`.
            Positions count the tokens of a row, so pads may stand anywhere. None means that no token has a pad before
            it: there are no pads, or they all stand on the right.
        cache: keys and values of earlier columns; those of `inputs` are added, unless it is frozen.
        start_at_layer: the first block to run; None embeds `inputs` and starts with block 0.
        stop_at_layer: the first block not to run; None runs all that follow.

    Raises:
        WorkbenchError: a mask of another shape than cache and inputs have together, or a cache filled on the fast
            path when something has since been attached to the model that needs HookedTransformer.
    """
    n_layers = loaded.identity.n_layers
    layers = range(n_layers)[start_at_layer:stop_at_layer]
    past = cache.entries[layers[0]].past_keys.shape[1] if cache is not None and layers else 0
    batch, new = inputs.shape[:2]
    if attention_mask is not None and attention_mask.shape != (batch, past + new):
        raise WorkbenchError(
            f"The attention mask must cover all columns, cached ones first: expected {(batch, past + new)}, "
            f"found {tuple(attention_mask.shape)}."
        )
    reason = fast_path_reason(loaded)
    if cache is None or cache.rotated is not False:
        if reason is None:
            return _run_fast(loaded.model, inputs, attention_mask, cache, start_at_layer, layers, past)
        if cache is not None and cache.rotated:
            raise WorkbenchError(
                f"The cache was filled on the fast path, which cannot go on ({reason}); attach hooks before the first "
                "token of a generation, or run it inside slow_path()."
            )
    return _run_hooked(loaded.model, inputs, attention_mask, cache, start_at_layer, stop_at_layer, past)


def _run_hooked(
    model: Any,
    inputs: Tensor,
    attention_mask: Tensor | None,
    cache: PreallocatedCache | None,
    start_at_layer: int | None,
    stop_at_layer: int | None,
    past: int,
) -> Tensor:
    """Let HookedTransformer do it. It takes the mask of the new columns when it embeds, and of all when it does not."""
    mask = attention_mask
    if cache is not None:
        cache.rotated = False
        if mask is None:
            mask = torch.ones(inputs.shape[0], past + inputs.shape[1], dtype=torch.long, device=inputs.device)
        if start_at_layer is None:
            cache.previous_attention_mask = mask[:, :past]
            mask = mask[:, past:]
        else:
            cache.previous_attention_mask = mask
    # prepend_bos and padding_side are stated because the class's defaults would change the tokens or the mask.
    stream: Tensor = model(
        inputs,
        attention_mask=mask,
        past_kv_cache=cache,
        start_at_layer=start_at_layer,
        stop_at_layer=model.cfg.n_layers if stop_at_layer is None else stop_at_layer,
        prepend_bos=False,
        padding_side="right",
    )
    return stream


def _run_fast(
    model: Any,
    inputs: Tensor,
    attention_mask: Tensor | None,
    cache: PreallocatedCache | None,
    start_at_layer: int | None,
    layers: range,
    past: int,
) -> Tensor:
    cfg = model.cfg
    stream = _embed(model, inputs, past, attention_mask) if start_at_layer is None else inputs
    columns = Columns.of(inputs.shape[1], past, attention_mask, inputs.device)
    biases: dict[int | None, Tensor | None] = {}
    rotations: dict[str, tuple[Tensor, Tensor]] = {}
    is_rotary = cfg.positional_embedding_type == "rotary"
    for layer in layers:
        block = model.blocks[layer]
        attn = block.attn
        window = cfg.window_size if attn.attn_type == "local" else None
        if window not in biases:
            biases[window] = attention_bias(columns, window, stream.dtype)
        if is_rotary and attn.attn_type not in rotations:
            # All blocks of one attention type have the same table.
            rotations[attn.attn_type] = rotation(attn, columns)
        stream = _block(
            block,
            stream,
            entry=None if cache is None else cache.entries[layer],
            bias=biases[window],
            turn=rotations.get(attn.attn_type),
        )
    if cache is not None and not cache.frozen:
        cache.rotated = True
        if attention_mask is None:
            attention_mask = torch.ones(inputs.shape[0], past + inputs.shape[1], dtype=torch.long, device=inputs.device)
        cache.previous_attention_mask = attention_mask
    return stream


def _embed(model: Any, ids: Tensor, past: int, attention_mask: Tensor | None) -> Tensor:
    stream: Tensor = model.hook_embed(model.embed(ids))
    if model.cfg.positional_embedding_type == "standard":
        stream = stream + model.hook_pos_embed(model.pos_embed(ids, past, attention_mask))
    return stream


def _block(
    block: Any, stream: Tensor, *, entry: Any, bias: Tensor | None, turn: tuple[Tensor, Tensor] | None
) -> Tensor:
    """One transformer block; values that went through a hook point are never changed in place."""
    cfg = block.cfg
    norm_after = cfg.original_architecture in POST_NORM_ARCHITECTURES
    before_and_after = cfg.use_normalization_before_and_after
    resid_pre = block.hook_resid_pre(stream)
    attn_out = _attention(block.attn, resid_pre if norm_after else _norm(block.ln1, resid_pre), entry, bias, turn)
    if before_and_after:
        attn_out = _norm(block.ln1_post, attn_out)
    if norm_after:
        attn_out = _norm(block.ln1, attn_out)
    resid_mid = block.hook_resid_mid(resid_pre + block.hook_attn_out(attn_out))
    mlp_out = _mlp(block.mlp, resid_mid if norm_after else _norm(block.ln2, resid_mid), cfg.gated_mlp)
    if before_and_after:
        mlp_out = _norm(block.ln2_post, mlp_out)
    if norm_after:
        mlp_out = _norm(block.ln2, mlp_out)
    resid_post: Tensor = block.hook_resid_post(resid_mid + block.hook_mlp_out(mlp_out))
    return resid_post


def _norm(norm: Any, x: Tensor) -> Tensor:
    """Layer norm or RMS norm over the last dimension, by the kind of module."""
    weight = norm.w
    shape = weight.shape
    if hasattr(norm, "b"):
        return F.layer_norm(x, shape, weight, norm.b, norm.eps)
    return F.rms_norm(x, shape, weight, norm.eps)


def _attention(
    attn: Any, x: Tensor, entry: Any, bias: Tensor | None, turn: tuple[Tensor, Tensor] | None
) -> Float[Tensor, "batch pos d_model"]:
    cfg = attn.cfg
    batch, pos, d_model = x.shape
    grouped = cfg.n_key_value_heads is not None
    weights = (attn.W_Q, attn._W_K, attn._W_V) if grouped else (attn.W_Q, attn.W_K, attn.W_V)
    offsets = (attn.b_Q, attn._b_K, attn._b_V) if grouped else (attn.b_Q, attn.b_K, attn.b_V)
    # A view in the layout of models/layout.py; a copy, and still right, in any other.
    queries, keys, values = (
        F.linear(x, weight.transpose(1, 2).reshape(-1, d_model), _unless_zero(offset.view(-1), x))
        for weight, offset in zip(weights, offsets, strict=True)
    )
    per_head = cfg.use_qk_norm
    if attn.q_norm is not None and not per_head:
        # OLMo normalises over all heads at once.
        queries, keys = _norm(attn.q_norm, queries), _norm(attn.k_norm, keys)
    queries, keys, values = (part.view(batch, pos, -1, cfg.d_head) for part in (queries, keys, values))
    if per_head:
        queries, keys = _norm(attn.q_norm, queries), _norm(attn.k_norm, keys)
    if turn is not None:
        queries, keys = rotate(queries, turn), rotate(keys, turn)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if entry is not None:
        keys, values = entry.extend(keys, values)
    mixed = attend(queries, keys, values, bias, scale=1.0 / float(attn.attn_scale))
    return F.linear(mixed, attn.W_O.permute(2, 0, 1).reshape(d_model, -1), _unless_zero(attn.b_O, x))


def _mlp(mlp: Any, x: Tensor, gated: bool) -> Float[Tensor, "batch pos d_model"]:
    if not gated:
        d_model = x.shape[-1]
        hidden = torch.addmm(mlp.b_in, x.reshape(-1, d_model), mlp.W_in)
        return torch.addmm(mlp.b_out, _activate(mlp.act_fn, hidden), mlp.W_out).view(x.shape)
    hidden = _activate(mlp.act_fn, F.linear(x, mlp.W_gate.T)).mul_(F.linear(x, mlp.W_in.T))
    b_in = _unless_zero(mlp.b_in, x)
    if b_in is not None:
        hidden.add_(b_in)
    return F.linear(hidden, mlp.W_out.T, _unless_zero(mlp.b_out, x))


def _activate(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if activation is F.silu:
        return F.silu(x, inplace=True)
    if activation is gelu_new:
        return F.gelu(x, approximate="tanh")
    return activation(x)


def _unless_zero(bias: Tensor, x: Tensor) -> Tensor | None:
    """Return a bias, or None where it is known to be all zeros, as in families without biases.

    The values are looked at every time, because a bias may be edited in place between two passes; on a device whose
    values cannot be read without waiting, adding zeros is cheaper.
    """
    if x.device.type == "cpu" and x.shape[0] * x.shape[1] >= _MANY_TOKENS and not bias.any():
        return None
    return bias
