"""The unsteered residual stream of many prompts, moved forward block by block as a screen asks for later layers.

A steered run equals the unsteered one up to the first site it writes to. So cells are screened in the order of that
site, and only the stream at the current point is kept: memory does not grow with the number of layers, and all cells
together cost one unsteered forward pass. Tokens that all prompts begin with are one row for all of them. Openings whose
probability is scored stand in rows of their own behind their prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sgworkbench.analysis.shared_prefix import SHORTEST_PREFIX, longest_prefix
from sgworkbench.evaluation.sweep.caches import BlockCaches
from sgworkbench.models import LoadedModel
from sgworkbench.models.engine import run_blocks
from sgworkbench.prompting.rendering import RenderedPrompt
from sgworkbench.prompting.token_batch import PAD, TokenBatch, length_sorted_batches, pad_prompts, role_index
from sgworkbench.steering.roles import RoleTracker

Continuations = Sequence[Sequence[tuple[int, ...]]]
"""Per prompt, the token ids of texts whose probability as the start of its answer is scored."""


@dataclass(frozen=True)
class ContinuationRows:
    """The scored texts of a batch of prompts, without the last token of each, which only has to be predicted.

    Attributes:
        tokens: one row per text, padded on the right; phase "decode".
        owner: row of its prompt in the batch.
        index: index of the text in the flat list of all prompts' texts.
        mask: True for tokens, over the columns of prefix, prompt and text.
    """

    tokens: TokenBatch
    owner: Int[Tensor, "text"]
    index: Int[Tensor, "text"]
    mask: Bool[Tensor, "text all"]

    def take(self, kept: Int[Tensor, "kept"], n_rows: int) -> ContinuationRows:
        """Return the texts of some of the batch's rows, which are then counted anew."""
        new = torch.full((n_rows,), -1, device=kept.device)
        new[kept] = torch.arange(len(kept), device=kept.device)
        chosen = new[self.owner] >= 0
        return ContinuationRows(
            rows_of(self.tokens, chosen), new[self.owner[chosen]], self.index[chosen], self.mask[chosen]
        )


@dataclass(frozen=True)
class PromptRows:
    """A batch of prompts behind the shared prefix.

    Attributes:
        rest: their tokens after the prefix, padded on the right; positions are absolute.
        last: column of the last prompt token in `rest`.
        texts: the texts scored after them; None when there are none of two tokens or more.
    """

    rest: TokenBatch
    last: Int[Tensor, "row"]
    texts: ContinuationRows | None

    def take(self, kept: Int[Tensor, "kept"]) -> PromptRows:
        """Return some of the rows."""
        n_rows = len(self.last)
        texts = None if self.texts is None else self.texts.take(kept, n_rows)
        return PromptRows(
            rows_of(self.rest, kept), self.last[kept], texts if texts is not None and len(texts.owner) else None
        )


def rows_of(batch: TokenBatch, rows: Int[Tensor, "kept"] | Bool[Tensor, "row"]) -> TokenBatch:
    """Return some rows of a batch."""
    return replace(
        batch,
        token_ids=batch.token_ids[rows],
        positions=batch.positions[rows],
        roles=batch.roles[rows],
        last_prompt=batch.last_prompt[rows],
        rows=batch.rows[rows],
    )


class UnsteeredStreams:
    """The unsteered streams at one point; point p is the input of block p, and the last one the final output.

    Attributes:
        split: number of tokens all prompts begin with that are run once.
        prefix_tokens: those tokens, one row; None without a prefix.
        batches: the prompts.
        point: where the streams stand.
        prefix: stream of the prefix.
        rest: stream of each batch.
        texts: stream of each batch's scored texts.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        rendered: Sequence[RenderedPrompt],
        continuations: Continuations,
        max_batch_tokens: int,
        *,
        share_prefix: bool = True,
    ) -> None:
        self._loaded = loaded
        self._device = torch.device(loaded.identity.device)
        first = rendered[0]
        self.split = 0
        if share_prefix and len(rendered) > 1:
            # Tokens that are read must not be among the shared ones.
            common = longest_prefix(rendered, [(item.last_instruction_position, len(item) - 1) for item in rendered])
            alike = [all(item.roles[i] == first.roles[i] for item in rendered) for i in range(common)]
            common = alike.index(False) if False in alike else common
            self.split = common if common >= SHORTEST_PREFIX else 0
        whole = pad_prompts([first], side="right", device=self._device)
        self.prefix_tokens = _columns(whole, slice(0, self.split)) if self.split else None
        self.batches: list[PromptRows] = []
        self._ids: list[Tensor] = []
        lengths = [len(item) - self.split for item in rendered]
        for rows in length_sorted_batches(lengths, max_tokens=max_batch_tokens):
            batch = pad_prompts([rendered[row] for row in rows], side="right", device=self._device, rows=rows)
            rest = _columns(batch, slice(self.split, None))
            texts = scored_texts(loaded, rendered, continuations, rows, batch)
            self.batches.append(PromptRows(rest, batch.last_prompt - self.split, texts))
            self._ids.append(batch.token_ids)
        self.point = -1
        self.prefix: Tensor | None = None
        self.rest: list[Tensor] = []
        self.texts: list[Tensor | None] = []

    def move_to(self, point: int) -> None:
        """Bring the streams to a point; going back starts again from the embedding."""
        if self.point < 0 or point < self.point:
            self._embed()
        for layer in range(self.point, point):
            self._run_block(layer)
        self.point = point

    def _embed(self) -> None:
        self.rest, self.texts = [], []
        for rows, ids in zip(self.batches, self._ids, strict=True):
            stream = run_blocks(self._loaded, ids, stop_at_layer=0)
            self.rest.append(stream[:, self.split :].contiguous())
            if self.split and not self.texts:
                self.prefix = stream[:1, : self.split].contiguous()
            self.texts.append(None if rows.texts is None else self._embedded_texts(rows.texts, ids))
        self.point = 0

    def _embedded_texts(
        self, texts: ContinuationRows, ids: Int[Tensor, "row pos"]
    ) -> Float[Tensor, "text new d_model"]:
        """Embed the texts where they stand, behind their prompts, because an embedding may depend on the position."""
        tokens = texts.tokens
        whole = torch.cat([ids[texts.owner], torch.zeros_like(tokens.token_ids)], dim=1)
        # Behind the prompt stand pads; the text is written over the first of them.
        where = torch.where(tokens.is_real, tokens.positions, whole.shape[1] - 1)
        whole = whole.scatter(1, where, tokens.token_ids)
        stream = run_blocks(self._loaded, whole, stop_at_layer=0)
        return stream.gather(1, where[..., None].expand(-1, -1, stream.shape[-1]))

    def _run_block(self, layer: int) -> None:
        prefix_caches = None
        if self.split and self.prefix is not None:
            prefix_caches = BlockCaches.empty([layer])
            self.prefix = run_segment(self._loaded, self.prefix, layer, layer + 1, prefix_caches)
        for i, rows in enumerate(self.batches):
            caches = past_of(prefix_caches, torch.zeros(len(rows.last), device=self._device).long(), rows, [layer])
            self.rest[i] = run_segment(self._loaded, self.rest[i], layer, layer + 1, caches)
            texts = self.texts[i]
            if rows.texts is not None and texts is not None and caches is not None:
                past = caches.looked_up(rows.texts.owner)
                self.texts[i] = run_segment(self._loaded, texts, layer, layer + 1, past, rows.texts.mask)

    def bytes(self) -> int:
        """Return the bytes of the streams at a point."""
        width = self._loaded.identity.d_model * self._loaded.model.W_U.element_size()
        tokens: int = self.split + sum(rows.rest.token_ids.numel() for rows in self.batches)
        tokens += sum(rows.texts.tokens.token_ids.numel() for rows in self.batches if rows.texts is not None)
        return int(tokens * width)


def scored_texts(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    continuations: Continuations,
    rows: Sequence[int],
    batch: TokenBatch,
) -> ContinuationRows | None:
    """Return the rows of the texts scored after a padded batch of prompts; None where no text has two tokens.

    Args:
        loaded: the model, for the roles of the tokens.
        rendered: all prompts.
        continuations: the texts of all prompts.
        rows: the prompts of the batch.
        batch: their tokens, padded on either side.
    """
    starts = [0]
    for texts in continuations:
        starts.append(starts[-1] + len(texts))
    found = [
        (local, starts[row] + k, ids)
        for local, row in enumerate(rows)
        for k, ids in enumerate(continuations[row])
        if len(ids) > 1
    ]
    if not found:
        return None
    shape = (len(found), max(len(ids) for _, _, ids in found) - 1)
    tokens, positions, roles = torch.zeros(shape).long(), torch.full(shape, PAD), torch.full(shape, PAD)
    for i, (local, _, ids) in enumerate(found):
        item, n = rendered[rows[local]], len(ids) - 1
        tracker = RoleTracker(loaded.tokenizer, item)
        tokens[i, :n] = torch.tensor(ids[:-1])
        positions[i, :n] = torch.arange(len(item), len(item) + n)
        roles[i, :n] = torch.tensor([role_index(tracker.role_of(token)) for token in ids[:-1]])
    device = batch.token_ids.device
    owner = torch.tensor([local for local, _, _ in found], device=device)
    index = torch.tensor([i for _, i, _ in found], device=device)
    after = TokenBatch(
        tokens.to(device),
        positions.to(device),
        roles.to(device),
        batch.last_prompt[owner],
        batch.rows[owner],
        "decode",
    )
    return ContinuationRows(after, owner, index, torch.cat([batch.is_real[owner], after.is_real], dim=1))


def past_of(
    prefix: BlockCaches | None, owner: Int[Tensor, "row"], rows: PromptRows, layers: Sequence[int]
) -> BlockCaches | None:
    """Return what the blocks of a batch look up, keeping its columns only where texts are scored after it."""
    keep = rows.texts is not None
    if prefix is not None:
        return prefix.looked_up(owner, keep=keep)
    return BlockCaches.empty(layers) if keep else None


def run_segment(
    loaded: LoadedModel,
    stream: Float[Tensor, "row pos d_model"],
    start: int,
    stop: int,
    caches: BlockCaches | None,
    mask: Bool[Tensor, "row all"] | None = None,
) -> Float[Tensor, "row pos d_model"]:
    """Run blocks `start` to `stop` - 1 on a stream; no block gives the stream itself."""
    if start == stop:
        return stream
    return run_blocks(
        loaded,
        stream,
        attention_mask=None if mask is None else mask.long(),
        cache=caches,
        start_at_layer=start,
        stop_at_layer=stop,
    )


def segments(points: Sequence[int]) -> list[tuple[int, int]]:
    """Return the stretches between neighbouring points, in order."""
    return list(pairwise(sorted(set(points))))


def _columns(batch: TokenBatch, columns: slice) -> TokenBatch:
    return replace(
        batch,
        token_ids=batch.token_ids[:, columns],
        positions=batch.positions[:, columns],
        roles=batch.roles[:, columns],
    )
