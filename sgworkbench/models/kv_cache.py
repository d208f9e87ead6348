"""A key-value cache that is allocated once, and from which finished rows can be dropped.

TransformerLens appends to its cache by concatenation, which copies the whole cache at every decoded token. This one
writes into buffers of the final size and hands out views of the filled part. Both paths of the engine can fill it:
HookedTransformer's attention stores keys as they are projected and rotates all of them again at every step, the fast
path stores them already rotated. A cache remembers which of the two its keys are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache


class CacheEntry:
    """Keys and values of one block, stored as [batch, head, column, d_head].

    Attributes:
        filled: columns that hold keys and values.
        frozen: new columns are handed out behind the stored ones but not kept; a frozen entry of one row serves a
            batch of any size.
    """

    def __init__(self, rows: int, columns: int, n_heads: int, d_head: int, device: Any, dtype: torch.dtype) -> None:
        self._keys = torch.empty(rows, n_heads, columns, d_head, device=device, dtype=dtype)
        self._values = torch.empty_like(self._keys)
        self.filled = 0
        self.frozen = False

    @property
    def past_keys(self) -> Float[Tensor, "batch past head d_head"]:
        """The filled keys, in the order of dimensions TransformerLens reads."""
        return self._keys[:, :, : self.filled].transpose(1, 2)

    @property
    def past_values(self) -> Float[Tensor, "batch past head d_head"]:
        """The filled values, in the order of dimensions TransformerLens reads."""
        return self._values[:, :, : self.filled].transpose(1, 2)

    def append(
        self, new_keys: Float[Tensor, "batch new head d_head"], new_values: Float[Tensor, "batch new head d_head"]
    ) -> tuple[Float[Tensor, "batch all head d_head"], Float[Tensor, "batch all head d_head"]]:
        """Add columns and return all of them: what TransformerLens' attention calls."""
        keys, values = self.extend(new_keys.transpose(1, 2), new_values.transpose(1, 2))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def extend(
        self, new_keys: Float[Tensor, "batch head new d_head"], new_values: Float[Tensor, "batch head new d_head"]
    ) -> tuple[Float[Tensor, "batch head all d_head"], Float[Tensor, "batch head all d_head"]]:
        """Add columns and return all of them: what the fast path calls."""
        if self.frozen:
            rows = new_keys.shape[0]
            past_keys, past_values = (
                stored[:, :, : self.filled].expand(rows, -1, -1, -1) for stored in (self._keys, self._values)
            )
            return torch.cat([past_keys, new_keys], dim=2), torch.cat([past_values, new_values], dim=2)
        end = self.filled + new_keys.shape[2]
        self._keys[:, :, self.filled : end] = new_keys
        self._values[:, :, self.filled : end] = new_values
        self.filled = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def start_with(self, prefix: CacheEntry) -> None:
        """Fill the first columns of every row with the columns of an entry of one row."""
        self._keys[:, :, : prefix.filled] = prefix._keys[:, :, : prefix.filled]
        self._values[:, :, : prefix.filled] = prefix._values[:, :, : prefix.filled]
        self.filled = prefix.filled

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Make `rows[i]` row i and forget the rest; only rows that move are copied, and only their filled columns."""
        for target, source in enumerate(rows):
            if source != target:
                self._keys[target, :, : self.filled] = self._keys[source, :, : self.filled]
                self._values[target, :, : self.filled] = self._values[source, :, : self.filled]
        self._keys, self._values = self._keys[: len(rows)], self._values[: len(rows)]


class PreallocatedCache(TransformerLensKeyValueCache):  # type: ignore[misc]
    """A `TransformerLensKeyValueCache` for a known number of columns.

    Args:
        cfg: the model's configuration.
        rows: batch size.
        columns: prompt length plus tokens to generate.
        device: where the buffers go.

    Attributes:
        rotated: whether the stored keys are rotated; None while the cache is empty.
        previous_attention_mask: 1 where a column of a row holds a token, 0 where it holds a pad; [batch, filled].
    """

    def __init__(self, cfg: Any, rows: int, columns: int, device: Any) -> None:
        n_heads = cfg.n_key_value_heads or cfg.n_heads
        entries: list[Any] = [
            CacheEntry(rows, columns, n_heads, cfg.d_head, device, cfg.dtype) for _ in range(cfg.n_layers)
        ]
        self.previous_attention_mask: Tensor
        super().__init__(entries, torch.empty(rows, 0, dtype=torch.long, device=device))
        self.rotated: bool | None = None

    def whole_mask(self, new: Bool[Tensor, "batch new"] | Int[Tensor, "batch new"]) -> Int[Tensor, "batch all"]:
        """Return the mask of all columns when `new` columns follow the filled ones; a frozen cache serves any batch."""
        past = self.previous_attention_mask
        return torch.cat([past.expand(new.shape[0], -1), new.long()], dim=1)

    def start_with(self, prefix: PreallocatedCache) -> None:
        """Begin every row of an empty cache with the columns of a cache of one row."""
        for entry, shared in zip(self.entries, prefix.entries, strict=True):
            entry.start_with(shared)
        rows = self.previous_attention_mask.shape[0]
        self.previous_attention_mask = prefix.previous_attention_mask.repeat(rows, 1)
        self.rotated = prefix.rotated

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Make `rows[i]` row i and drop all others.

        No row may be overwritten before it is read: every moved row must come from a higher index than any row it
        replaces, which `surviving_rows` sees to.
        """
        for entry in self.entries:
            entry.keep_rows(rows)
        self.previous_attention_mask = self.previous_attention_mask[list(rows)]


def surviving_rows(n_rows: int, finished: Sequence[int]) -> list[int]:
    """Return the rows left when some are finished, in the order that moves the fewest: the last ones fill the holes."""
    gone = set(finished)
    n_left = n_rows - len(gone)
    movers = [row for row in range(n_left, n_rows) if row not in gone]
    return [movers.pop() if row in gone else row for row in range(n_left)]
