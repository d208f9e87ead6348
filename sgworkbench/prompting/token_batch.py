"""Padded batches that know, for every column of every row, which token of which prompt stands there.

Steering and reading depend on absolute positions and roles, never on columns. A forward pass made by this package
announces its batch through `announced_batch`, and hooks look it up with `current_batch`; so one hook serves
right-padded captures, left-padded prefills and single-token decode steps alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sgworkbench.errors import WorkbenchError
from sgworkbench.models.memory import is_out_of_memory, release_memory
from sgworkbench.prompting.rendering import ROLES, RenderedPrompt

Phase = Literal["prefill", "decode"]
Result = TypeVar("Result")
PAD = -1
_ROLE_INDEX = {role: index for index, role in enumerate(ROLES)}


@dataclass(frozen=True)
class TokenBatch:
    """One forward pass worth of tokens.

    Attributes:
        token_ids: ids; pads hold an arbitrary valid id.
        positions: absolute position of each token in its own sequence; -1 marks a pad.
        roles: index into `ROLES`; -1 marks a pad.
        last_prompt: absolute position of each row's last prompt token.
        rows: index of each row in the caller's list of prompts.
        phase: "prefill" for prompt tokens, "decode" for tokens the model has written.
    """

    token_ids: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    roles: Int[Tensor, "batch pos"]
    last_prompt: Int[Tensor, "batch"]
    rows: Int[Tensor, "batch"]
    phase: Phase = "prefill"

    @property
    def is_real(self) -> Bool[Tensor, "batch pos"]:
        """True where a token stands, False at pads."""
        return self.positions != PAD


def role_index(role: str) -> int:
    """Return the index of a role in `ROLES`."""
    return _ROLE_INDEX[role]  # type: ignore[index]


def pad_prompts(
    rendered: Sequence[RenderedPrompt],
    *,
    side: Literal["left", "right"],
    device: torch.device | str,
    rows: Sequence[int] | None = None,
    pad_id: int = 0,
) -> TokenBatch:
    """Pad rendered prompts to one length.

    Right padding needs no attention mask for a causal model (no real token can see a pad); left padding lets every row
    decode at the same column and keeps sliding windows exact, and needs the mask `is_real`.

    Args:
        rendered: the prompts of the batch.
        side: where the pads go.
        device: where the tensors go.
        rows: index of each prompt in the caller's list; counted from 0 when omitted.
        pad_id: id written at pads.

    Raises:
        WorkbenchError: no prompts.
    """
    if not rendered:
        raise WorkbenchError("No prompts were given; at least one is needed.")
    length = max(len(item) for item in rendered)
    ids = torch.full((len(rendered), length), pad_id, dtype=torch.long)
    positions = torch.full((len(rendered), length), PAD, dtype=torch.long)
    roles = torch.full((len(rendered), length), PAD, dtype=torch.long)
    for row, item in enumerate(rendered):
        n = len(item)
        columns = slice(0, n) if side == "right" else slice(length - n, length)
        ids[row, columns] = torch.tensor(item.token_ids)
        positions[row, columns] = torch.arange(n)
        roles[row, columns] = torch.tensor([role_index(role) for role in item.roles])
    return TokenBatch(
        ids.to(device),
        positions.to(device),
        roles.to(device),
        torch.tensor([len(item) - 1 for item in rendered]).to(device),
        torch.tensor(list(rows) if rows is not None else list(range(len(rendered)))).to(device),
    )


def length_sorted_batches(lengths: Sequence[int], *, max_tokens: int = 4096, max_rows: int = 64) -> Iterator[list[int]]:
    """Yield lists of indices, longest prompts first, each within `max_rows` rows and `max_tokens` padded tokens.

    Neighbours in length share a batch, so few pads are computed; a prompt longer than `max_tokens` gets its own batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        rows = max(1, min(max_rows, max_tokens // max(1, lengths[order[start]])))
        yield order[start : start + rows]
        start += rows


def run_batches(
    lengths: Sequence[int], run: Callable[[list[int]], Result], *, max_tokens: int, max_rows: int = 64
) -> Iterator[tuple[list[int], Result]]:
    """Run length-sorted batches and yield their indices and results; halve them when memory runs out.

    A batch that fails is run again in smaller ones, and later batches stay as small, so `run` must bear being called
    again with rows it has already seen.

    Args:
        lengths: tokens of each item.
        run: called with the indices of a batch.
        max_tokens: padded tokens of a batch.
        max_rows: rows of a batch.

    Raises:
        WorkbenchError: a single item does not fit into memory.
    """
    left = list(length_sorted_batches(lengths, max_tokens=max_tokens, max_rows=max_rows))
    while left:
        rows, failed = left[0], False
        try:
            result = run(rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = True
        if not failed:
            yield left.pop(0), result
            continue
        # Outside the handler, whose traceback keeps the failed pass's tensors alive.
        release_memory()
        longest = lengths[rows[0]]
        if len(rows) == 1:
            raise WorkbenchError(
                f"Memory ran out on a single prompt of {longest} tokens (answer included); use a shorter one, a "
                "smaller dtype or another device."
            )
        max_rows = (len(rows) + 1) // 2
        rest = [index for batch in left for index in batch]
        again = length_sorted_batches(
            [lengths[index] for index in rest], max_tokens=max_rows * longest, max_rows=max_rows
        )
        left = [[rest[index] for index in batch] for batch in again]


def check_lengths(rendered: Sequence[RenderedPrompt], context_length: int, *, new_tokens: int = 0) -> None:
    """Refuse prompts that do not fit the context.

    Raises:
        WorkbenchError: no prompts, or the longest plus `new_tokens` exceeds `context_length`.
    """
    if not rendered:
        raise WorkbenchError("No prompts were given; at least one is needed.")
    longest = max(rendered, key=len)
    if len(longest) + new_tokens > context_length:
        extra = f" plus {new_tokens} new tokens" if new_tokens else ""
        raise WorkbenchError(
            f"Prompt {longest.prompt.id!r} has {len(longest)} tokens{extra}, but the model was loaded with a context "
            f"of {context_length}; shorten it or load the model with a larger context_length (--context-length)."
        )


_CURRENT: ContextVar[TokenBatch | None] = ContextVar("sgworkbench_token_batch", default=None)


@contextmanager
def announced_batch(batch: TokenBatch) -> Iterator[None]:
    """Announce the batch of the forward pass made inside the block."""
    token = _CURRENT.set(batch)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_batch() -> TokenBatch | None:
    """Return the announced batch, or None in a forward pass that this package did not make."""
    return _CURRENT.get()
