"""A key-value cache that is allocated once, and from which finished rows can be dropped.

TransformerLens appends to its cache by concatenation, which copies the whole cache at every decoded token. This one
writes into buffers of the final size and hands out views of the filled part; attention code sees no difference.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache


class _Entry:
    """Keys and values of one block; `past_keys` and `past_values` are views of the filled columns."""

    def __init__(self, rows: int, columns: int, n_heads: int, d_head: int, device: Any, dtype: torch.dtype) -> None:
        self._keys = torch.empty(rows, columns, n_heads, d_head, device=device, dtype=dtype)
        self._values = torch.empty_like(self._keys)
        self._filled = 0
        self.frozen = False

    @property
    def past_keys(self) -> Float[Tensor, "batch past head d_head"]:
        return self._keys[:, : self._filled]

    @property
    def past_values(self) -> Float[Tensor, "batch past head d_head"]:
        return self._values[:, : self._filled]

    def append(
        self, new_keys: Float[Tensor, "batch new head d_head"], new_values: Float[Tensor, "batch new head d_head"]
    ) -> tuple[Float[Tensor, "batch all head d_head"], Float[Tensor, "batch all head d_head"]]:
        end = self._filled + new_keys.shape[1]
        self._keys[:, self._filled : end] = new_keys
        self._values[:, self._filled : end] = new_values
        self._filled = end
        return self.past_keys, self.past_values

    def keep_rows(self, rows: Int[Tensor, "kept"]) -> None:
        self._keys = self._keys[rows]
        self._values = self._values[rows]


class PreallocatedCache(TransformerLensKeyValueCache):  # type: ignore[misc]
    """A `TransformerLensKeyValueCache` for a known number of columns.

    Args:
        cfg: the model's configuration.
        rows: batch size.
        columns: prompt length plus tokens to generate.
        device: where the buffers go.
    """

    def __init__(self, cfg: Any, rows: int, columns: int, device: Any) -> None:
        n_heads = cfg.n_key_value_heads or cfg.n_heads
        entries: list[Any] = [
            _Entry(rows, columns, n_heads, cfg.d_head, device, cfg.dtype) for _ in range(cfg.n_layers)
        ]
        super().__init__(entries, torch.empty(rows, 0, dtype=torch.long, device=device))

    def keep_rows(self, rows: Int[Tensor, "kept"]) -> None:
        """Drop all rows but the given ones."""
        for entry in self.entries:
            entry.keep_rows(rows)
        self.previous_attention_mask: Tensor = self.previous_attention_mask[rows]
