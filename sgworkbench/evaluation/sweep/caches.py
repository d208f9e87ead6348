"""Keys and values for screening: of one block range only, and shared by many rows without a copy per row.

A cell's shared prefix has one row per coefficient, its prompts follow row by row, and the openings that are scored
follow each prompt. So a row's past is never its own: it is looked up when a block asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sgworkbench.models.kv_cache import CacheEntry, PreallocatedCache


class LookedUpEntry(CacheEntry):
    """Past keys and values of one block, of which each row of a batch takes those of one stored row.

    Attributes:
        kept_keys, kept_values: all columns of the batch that was run last, when `keep` is on.
    """

    def __init__(self, keys: Tensor, values: Tensor, owner: Int[Tensor, "row"], keep: bool) -> None:
        self._keys, self._values = keys, values
        self.filled = keys.shape[2]
        self.frozen = True
        self._owner = owner
        self._keep = keep
        self.kept_keys: Tensor | None = None
        self.kept_values: Tensor | None = None

    def extend(self, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the past of every row with its new columns behind it."""
        keys, values = (
            torch.cat([stored.index_select(0, self._owner), new], dim=2)
            for stored, new in ((self._keys, new_keys), (self._values, new_values))
        )
        if self._keep:
            self.kept_keys, self.kept_values = keys, values
        return keys, values


class EmptyEntry(CacheEntry):
    """No past; the new columns are kept for those who look them up later."""

    def __init__(self) -> None:
        self.frozen = True
        self.filled = 0
        self.kept_keys: Tensor | None = None
        self.kept_values: Tensor | None = None

    @property
    def past_keys(self) -> Tensor:
        """Nothing."""
        return torch.empty(0, 0, 0, 0)

    def extend(self, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new columns and return them."""
        # The caller's tensors are views into one projection; what is looked up later is read row by row.
        self.kept_keys, self.kept_values = new_keys.contiguous(), new_values.contiguous()
        return new_keys, new_values


class BlockCaches(PreallocatedCache):
    """A cache for the fast path whose entries are made per block, for some blocks only."""

    def __init__(self, entries: dict[int, Any]) -> None:
        self.entries: Any = entries
        self.previous_attention_mask = torch.empty(0, 0, dtype=torch.long)
        self.frozen = True
        self.rotated = True

    @classmethod
    def empty(cls, layers: Iterable[int]) -> BlockCaches:
        """Return a cache without a past for some blocks."""
        return cls({layer: EmptyEntry() for layer in layers})

    def looked_up(self, owner: Int[Tensor, "row"], *, keep: bool = False) -> BlockCaches:
        """Return a cache in which row i of a batch has the kept columns of row `owner[i]` as its past."""
        return BlockCaches(
            {
                layer: LookedUpEntry(entry.kept_keys, entry.kept_values, owner, keep)
                for layer, entry in self.entries.items()
            }
        )


def copied_rows(
    cache: PreallocatedCache, cfg: Any, owner: Int[Tensor, "row"], mask: Bool[Tensor, "row all"]
) -> PreallocatedCache:
    """Return a cache whose row i begins with the columns of row `owner[i]`, on whichever path it was filled.

    Args:
        cache: a filled cache.
        cfg: the model's configuration.
        owner: the row to begin with.
        mask: True where a column of the new rows will hold a token; its length gives the room.
    """
    copy = PreallocatedCache(cfg, len(owner), mask.shape[1], owner.device)
    for entry, stored in zip(copy.entries, cache.entries, strict=True):
        entry.append(stored.past_keys.index_select(0, owner), stored.past_values.index_select(0, owner))
    filled = copy.entries[0].filled
    copy.previous_attention_mask = mask[:, :filled].long()
    copy.rotated = cache.rotated
    return copy
