"""Attention of the fast path: who may look at whom, rotary positions, and PyTorch's fused attention.

Masks and positions come from the attention mask of a row, not from columns, so pads may stand anywhere, also between
a shared prefix and the rest of a prompt, and a sliding window counts tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """The columns of one forward pass.

    Attributes:
        past: columns before the first query.
        positions: position of every column's token in its own row, cached columns first; one row stands for all when
            there are no pads.
        is_real: False at pads; None when there are none.
    """

    past: int
    positions: Int[Tensor, "batch all"]
    is_real: Bool[Tensor, "batch all"] | None

    @classmethod
    def of(cls, new: int, past: int, attention_mask: Int[Tensor, "batch all"] | None, device: Any) -> Columns:
        """Number the columns: by the count of tokens up to each, or from 0 without a mask."""
        if attention_mask is None or bool(attention_mask.all()):
            return cls(past, torch.arange(past + new, device=device)[None], None)
        positions = (attention_mask.cumsum(dim=1) - 1).clamp_(min=0)
        return cls(past, positions, attention_mask.bool())

    @property
    def total(self) -> int:
        """Number of columns, cached ones included."""
        return self.positions.shape[1]

    @property
    def new(self) -> int:
        """Number of columns that are queries."""
        return self.total - self.past


def attention_bias(
    columns: Columns, window: int | None, dtype: torch.dtype
) -> Float[Tensor, "#batch 1 query key"] | None:
    """Return what is added to attention scores: 0 where a query may look, minus infinity elsewhere.

    Every column may look at itself, so that what stands at pads stays finite. None stands for plain causal attention:
    all columns are queries, or the last one is and sees everything.

    Args:
        columns: the columns of the pass.
        window: a token sees itself and the `window` - 1 tokens before it; None for all.
        dtype: of the scores.
    """
    # No window is as good as one that spans all columns.
    width = columns.total if window is None else window
    narrow = columns.total > width
    if columns.is_real is None and not narrow and (columns.past == 0 or columns.new == 1):
        return None
    column = torch.arange(columns.total, device=columns.positions.device)
    queries = column[columns.past :, None]
    allowed = (column <= queries)[None]
    if columns.is_real is not None:
        allowed = allowed & columns.is_real[:, None, :]
    if narrow:
        distance = columns.positions[:, columns.past :, None] - columns.positions[:, None, :]
        allowed = allowed & (distance < width)
    allowed = allowed | (column == queries)
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill_(~allowed, float("-inf"))[:, None]


def rotation(
    attn: Any, columns: Columns
) -> tuple[Float[Tensor, "#batch new 1 rotary"], Float[Tensor, "#batch new 1 rotary"]]:
    """Return cosine and signed sine of the new columns' positions, from an attention module's own tables.

    The first half of the sine is negated, so that a rotation is x cos + swap(x) sin with the halves swapped.
    """
    if columns.total > attn.rotary_cos.shape[0]:
        attn._extend_rotary_embeddings(min(attn.cfg.n_ctx, max(columns.total, 2 * attn.rotary_cos.shape[0])))
    positions = columns.positions[:, columns.past :]
    cos, sin = attn.rotary_cos[positions], attn.rotary_sin[positions]
    half = sin.shape[-1] // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    return cos[:, :, None], signed[:, :, None]


def rotate(x: Float[Tensor, "batch new head d_head"], turn: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions (Su et al. 2021, arXiv 2104.09864) to the first dimensions of every head."""
    cos, signed_sin = turn
    rotary = cos.shape[-1]
    turning = x if rotary == x.shape[-1] else x[..., :rotary]
    swapped = torch.roll(turning, rotary // 2, -1)
    turned = (turning * cos).addcmul_(swapped, signed_sin)
    return turned if turning is x else torch.cat([turned, x[..., rotary:]], dim=-1)


def attend(
    queries: Float[Tensor, "batch new head d_head"],
    keys: Float[Tensor, "batch kv_head all d_head"],
    values: Float[Tensor, "batch kv_head all d_head"],
    bias: Float[Tensor, "#batch 1 new all"] | None,
    *,
    scale: float,
) -> Float[Tensor, "batch new head*d_head"]:
    """Softmax attention with grouped keys and values; the heads come out side by side.

    Args:
        queries: rotated.
        keys: rotated, cached ones included; each serves head / kv_head neighbouring query heads.
        values: likewise.
        bias: from `attention_bias`.
        scale: multiplies the scores.
    """
    batch, new, n_heads, d_head = queries.shape
    kv_heads, total = keys.shape[1:3]
    if new == 1:
        # One query sees the same keys from all heads of a group, so the group can stand where queries stand.
        grouped = queries.reshape(batch, kv_heads, n_heads // kv_heads, d_head)
        mixed = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=scale)
        return mixed.reshape(batch, 1, n_heads * d_head)
    queries = queries.transpose(1, 2)
    is_grouped = kv_heads != n_heads
    if is_grouped and queries.device.type != "cpu" and (bias is not None or queries.dtype == torch.float32):
        # Only the kernel without a bias, in half precision, groups by itself there; the others would build all scores.
        keys, values = (part.repeat_interleave(n_heads // kv_heads, dim=1) for part in (keys, values))
        is_grouped = False
    mixed = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=bias,
        is_causal=bias is None and new == total,
        scale=scale,
        enable_gqa=is_grouped,
    )
    return mixed.transpose(1, 2).reshape(batch, new, n_heads * d_head)
