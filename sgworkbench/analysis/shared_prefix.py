"""Running the tokens that all prompts begin with, usually the safety system prompt, once instead of once per prompt.

A causal model computes the same keys and values for equal first tokens, whatever follows. So those tokens are run with
a batch of one, under whatever steering is active, and every row attends to the result. It is exact up to the rounding
of sums in another order, and is left out wherever a hook may tell rows or columns apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor

from sgworkbench.models import LoadedModel
from sgworkbench.models.engine import run_blocks
from sgworkbench.models.engine_checks import prefix_sharing_reason
from sgworkbench.models.kv_cache import PreallocatedCache
from sgworkbench.prompting.rendering import RenderedPrompt
from sgworkbench.prompting.token_batch import PAD, TokenBatch, announced_batch

# A shorter prefix is not worth a forward pass of its own.
SHORTEST_PREFIX = 8


@dataclass(frozen=True)
class SharedPrefix:
    """The first tokens of all prompts, already run.

    Attributes:
        tokens: the tokens, one row without pads.
        cache: their keys and values, one row, frozen.
    """

    tokens: TokenBatch
    cache: PreallocatedCache

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.tokens.token_ids.shape[1]

    def fits(self, batch: TokenBatch) -> bool:
        """Whether all rows of a padded batch begin with these tokens, in the same roles, and go on after them."""
        return int(batch.last_prompt.min()) >= self.length and all(
            bool((_from_first_token(theirs, batch)[:, : self.length] == ours).all())
            for theirs, ours in ((batch.token_ids, self.tokens.token_ids), (batch.roles, self.tokens.roles))
        )

    def rest(self, batch: TokenBatch) -> TokenBatch:
        """Return a padded batch without the prefix: its columns are cut off, prefix tokens left over become pads.

        Positions stay absolute, so hooks and selectors see no difference.
        """
        columns = slice(self.length, None)
        positions, roles = batch.positions[:, columns], batch.roles[:, columns]
        shared = positions < self.length
        return replace(
            batch,
            token_ids=batch.token_ids[:, columns],
            positions=positions.masked_fill(shared, PAD),
            roles=roles.masked_fill(shared, PAD),
        )


@torch.inference_mode()
def run_shared_prefix(
    loaded: LoadedModel, batch: TokenBatch, *, stop_at_layer: int | None = None, longest: int | None = None
) -> SharedPrefix | None:
    """Run the tokens all rows of a padded batch begin with.

    Args:
        loaded: the model, with or without active steering.
        batch: prompt tokens, padded on either side; every row keeps its last token out of the prefix.
        stop_at_layer: the first block not to run; None runs all.
        longest: upper bound on the length of the prefix; None for none.

    Returns:
        None where nothing would be gained or a hook forbids it (see `prefix_sharing_reason`).
    """
    length = shared_length(batch)
    if longest is not None:
        length = min(length, longest)
    if length < SHORTEST_PREFIX or len(batch.rows) < 2 or prefix_sharing_reason(loaded) is not None:
        return None
    first = _first_row(batch, length)
    cache = PreallocatedCache(loaded.model.cfg, 1, length, batch.token_ids.device)
    with announced_batch(first):
        run_blocks(loaded, first.token_ids, cache=cache, stop_at_layer=stop_at_layer)
    cache.freeze()
    return SharedPrefix(first, cache)


def shared_length(batch: TokenBatch) -> int:
    """Return how many tokens, with their roles, all rows begin with; the shortest row's last token never counts."""
    ids, roles = (_from_first_token(part, batch) for part in (batch.token_ids, batch.roles))
    longest = int(batch.last_prompt.min())
    alike = ((ids == ids[:1]) & (roles == roles[:1])).all(dim=0)[:longest]
    return int(alike.long().cumprod(dim=0).sum())


def _first_row(batch: TokenBatch, length: int) -> TokenBatch:
    """Return the first `length` tokens of the first row, as a batch of one row without pads."""
    ids, positions, roles = (
        _from_first_token(part, batch)[:1, :length] for part in (batch.token_ids, batch.positions, batch.roles)
    )
    # Any value beyond the prefix tells selectors the same thing: the last prompt token is yet to come.
    return TokenBatch(ids, positions, roles, batch.last_prompt[:1], batch.rows[:1], batch.phase)


def _from_first_token(values: Tensor, batch: TokenBatch) -> Tensor:
    """Shift rows to the left so that each begins with its first token; what follows a row's last token is arbitrary."""
    n_columns = values.shape[1]
    pads = batch.is_real.long().argmax(dim=1, keepdim=True)
    columns = torch.arange(n_columns, device=values.device) + pads
    return values.gather(1, columns.clamp(max=n_columns - 1))


def longest_prefix(rendered: Sequence[RenderedPrompt], wanted: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, ending before the first token that is read in any of them."""
    # What the first and the last in lexicographic order share, all share.
    first, last = min(item.token_ids for item in rendered), max(item.token_ids for item in rendered)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return min([common, *(index for indices in wanted for index in indices)])
