"""How much attention goes where: mass from chosen tokens to the spans of a prompt, reduced inside the hook.

The pattern of one layer is [batch, head, query, key]; what is kept of it is one number per query, head and span.
Reading patterns needs `hook_pattern`, which only HookedTransformer's own forward calls, so the engine leaves its fast
path by itself while a recorder is attached. Whatever steering is active on the model applies.

Attention is a reading, not an explanation: the mass on a token says where a head looks, not what it takes from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgworkbench.analysis.capture import Positions, resolve_positions, run_prefill
from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting.rendering import ROLES, RenderedPrompt
from sgworkbench.prompting.token_batch import (
    PAD,
    TokenBatch,
    check_lengths,
    current_batch,
    length_sorted_batches,
    pad_prompts,
)

Heads = Literal["mean", "each"]
Spans = Literal["roles"] | Sequence[Mapping[str, Sequence[int]]]
"""`roles`, or for every prompt the token indices of named spans."""

GENERATED, OTHER = "generated", "other prompt tokens"
"""Besides named spans: what the model has written, and prompt tokens in no named span."""

COLUMNS = ("prompt_id", "position", "step", "layer", "head", "span", "mass", "n_tokens")


class AttentionRecorder:
    """Read-only hooks on attention patterns that keep the mass on each span.

    In a prefill the queries are the chosen tokens of every prompt, in a decode step the token just written. The masses
    of one query sum to 1.

    Args:
        loaded: the model.
        rendered: the prompts, in the order of the announced batches' `rows`.
        layers: which layers.
        queries: token indices of every prompt, for the prefill.
        heads: `mean` over heads, or `each`.
        spans: `roles`, or named spans for every prompt; a token may be in one span only.

    Raises:
        WorkbenchError: a layer outside the model, prompts with one id, spans for another number of prompts,
            overlapping spans or spans outside their prompt.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        rendered: Sequence[RenderedPrompt],
        layers: Sequence[int],
        queries: Sequence[Sequence[int]],
        *,
        heads: Heads = "mean",
        spans: Spans = "roles",
    ) -> None:
        n_layers = loaded.identity.n_layers
        if not layers:
            raise WorkbenchError("Reading attention needs at least one layer.")
        for layer in layers:
            if not 0 <= layer < n_layers:
                raise WorkbenchError(f"Layer {layer} is outside the model, which has {n_layers} layers.")
        if heads not in ("mean", "each"):
            raise unknown_name("choice of heads", str(heads), ("mean", "each"))
        if len({item.prompt.id for item in rendered}) < len(rendered):
            raise WorkbenchError("Attention tells prompts apart by their ids; make them differ.")
        self._layers = sorted(set(layers))
        self._heads = heads
        self._rendered = list(rendered)
        self._by_role = isinstance(spans, str)
        if isinstance(spans, str):
            if spans != "roles":
                raise unknown_name("choice of spans", spans, ("roles",))
            self.names: tuple[str, ...] = ROLES
            rows = [[ROLES.index(role) for role in item.roles] for item in rendered]
        else:
            self.names, rows = _named_spans(rendered, spans)
        device = loaded.identity.device
        self._span_of = torch.full((len(rendered), loaded.identity.context_length), -1, dtype=torch.long)
        self._is_query = torch.zeros(self._span_of.shape, dtype=torch.bool)
        for row, (indices, wanted) in enumerate(zip(rows, queries, strict=True)):
            self._span_of[row, : len(indices)] = torch.tensor(indices)
            self._is_query[row, list(wanted)] = True
        self._span_of, self._is_query = self._span_of.to(device), self._is_query.to(device)
        self._seen: TokenBatch | None = None
        self._kept: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []

    def readers(self) -> dict[str, Callable[[Tensor], None]]:
        """Return hook points and functions, to be attached with `analysis.capture.reading`."""
        return {f"blocks.{layer}.attn.hook_pattern": self._reader(layer) for layer in self._layers}

    def _reader(self, layer: int) -> Callable[[Tensor], None]:
        def read(pattern: Tensor) -> None:
            batch = current_batch()
            if batch is not None:
                self._reduce(layer, pattern, batch)

        return read

    def _reduce(self, layer: int, pattern: Float[Tensor, "batch head query key"], batch: TokenBatch) -> None:
        if batch is not self._seen:
            self._learn_generated(batch)
            self._seen = batch
        keys = _key_positions(batch, pattern.shape[-1])
        spans = self._span_of[batch.rows[:, None], keys.clamp(min=0)].masked_fill(keys == PAD, -1)
        member = torch.nn.functional.one_hot(spans + 1, len(self.names) + 1)[..., 1:].float()
        wanted = batch.is_real
        if batch.phase == "prefill":
            wanted = wanted & self._is_query[batch.rows[:, None], batch.positions.clamp(min=0)]
        row, column = wanted.nonzero(as_tuple=True)
        attended = pattern[row, :, column].float()
        if self._heads == "mean":
            attended = attended.mean(dim=1, keepdim=True)
        mass = torch.einsum("qhk,qks->qhs", attended, member[row])
        # A query sees its own token and those before it; later ones are in no span as far as it is concerned.
        visible = keys[row] <= batch.positions[row, column][:, None]
        n_tokens = (member[row] * visible[..., None]).sum(dim=1)
        self._kept.append((layer, batch.rows[row], batch.positions[row, column], mass, n_tokens))

    def _learn_generated(self, batch: TokenBatch) -> None:
        if batch.phase == "decode":
            index = batch.roles if self._by_role else torch.full_like(batch.roles, self.names.index(GENERATED))
            self._span_of[batch.rows[:, None], batch.positions] = index

    def table(self) -> pd.DataFrame:
        """Return what was read: one row per prompt, query, layer, head and span that holds a token; see `COLUMNS`.

        `step` counts from the first generated token: 0 is that one, -1 the last prompt token. `head` is missing for the
        mean over heads. `n_tokens` is the size of the span as the query sees it.
        """
        frames = []
        ends = np.array([len(item) for item in self._rendered])
        ids = np.array([item.prompt.id for item in self._rendered], dtype=object)
        for layer, rows, positions, mass, n_tokens in self._kept:
            who, where = rows.cpu().numpy(), positions.cpu().numpy()
            n_queries, n_heads, n_spans = mass.shape
            per_query = n_heads * n_spans
            head = np.tile(np.repeat(np.arange(n_heads), n_spans), n_queries)
            frames.append(
                pd.DataFrame(
                    {
                        "row": np.repeat(who, per_query),
                        "prompt_id": np.repeat(ids[who], per_query),
                        "position": np.repeat(where, per_query),
                        "step": np.repeat(where - ends[who], per_query),
                        "layer": layer,
                        "head": pd.array(head, dtype="Int64")
                        if self._heads == "each"
                        else pd.array([None] * len(head), dtype="Int64"),
                        "span": np.tile(np.array(self.names, dtype=object), n_queries * n_heads),
                        "mass": mass.reshape(-1).cpu().numpy(),
                        "n_tokens": n_tokens[:, None].expand(-1, n_heads, -1).reshape(-1).long().cpu().numpy(),
                    }
                )
            )
        if not frames:
            raise WorkbenchError("No attention was read; run the model while the recorder is attached.")
        joined = pd.concat(frames, ignore_index=True)
        order = joined["span"].map({name: index for index, name in enumerate(self.names)})
        joined = joined.assign(order=order).sort_values(["row", "position", "layer", "head", "order"], kind="stable")
        return joined[joined["n_tokens"] > 0][list(COLUMNS)].reset_index(drop=True)


def _named_spans(
    rendered: Sequence[RenderedPrompt], spans: Sequence[Mapping[str, Sequence[int]]]
) -> tuple[tuple[str, ...], list[list[int]]]:
    if len(spans) != len(rendered):
        raise WorkbenchError(f"Expected named spans for {len(rendered)} prompts, found {len(spans)}.")
    names = tuple(dict.fromkeys(name for each in spans for name in each))
    if not names:
        raise WorkbenchError("Named spans need at least one name, such as {'reminder': [40, 41, 42]}.")
    taken = {GENERATED, OTHER} & set(names)
    if taken:
        raise WorkbenchError(f"The span name {taken.pop()!r} is used for what is in no named span; choose another.")
    rows = []
    for item, each in zip(rendered, spans, strict=True):
        indices = [len(names) + 1] * len(item)
        for name, positions in each.items():
            for position in positions:
                if not 0 <= position < len(item):
                    raise WorkbenchError(
                        f"Token index {position} of span {name!r} is outside prompt {item.prompt.id!r}, which has "
                        f"{len(item)} tokens."
                    )
                if indices[position] != len(names) + 1:
                    raise WorkbenchError(f"Token {position} of prompt {item.prompt.id!r} is in two spans; keep one.")
                indices[position] = names.index(name)
        rows.append(indices)
    return (*names, GENERATED, OTHER), rows


def _key_positions(batch: TokenBatch, n_keys: int) -> Int[Tensor, "batch key"]:
    """Return the absolute position of every key, pads -1.

    Cached columns are those right before the new ones: attaching a recorder rules out shared prefixes, after which pads
    could stand between them.
    """
    new = batch.positions.shape[1]
    if n_keys == new:
        return batch.positions
    past = torch.arange(n_keys - new, device=batch.positions.device) - (n_keys - new)
    earlier = (batch.positions[:, :1] + past).clamp(min=PAD)
    return torch.cat([earlier, batch.positions], dim=1)


@dataclass(frozen=True)
class AttentionMass:
    """Attention mass on spans, by query, layer and head.

    Attributes:
        table: columns as in `COLUMNS`; with several arms also `arm`.
        heads: `mean` or `each`.
    """

    table: pd.DataFrame
    heads: Heads

    def to_dataframe(self) -> pd.DataFrame:
        """Return the long table."""
        return self.table.copy()

    def mean_by_layer(self, per_token: bool = False) -> pd.DataFrame:
        """Return the mean mass over prompts and queries: layer, head, span (and arm), mass, n (queries).

        Args:
            per_token: divide by the number of tokens in the span first: the mean attention one of its tokens gets.
        """
        mass = self.table["mass"] / (self.table["n_tokens"] if per_token else 1)
        keys = [name for name in ("arm", "layer", "head", "span") if name in self.table]
        groups = self.table.assign(mass=mass).groupby(keys, dropna=False, sort=False)["mass"]
        return groups.agg(mass="mean", n="size").reset_index()

    def plot(self, span: str = "user_suffix", **options: Any) -> Any:
        """Return the mass on one span along the generation, one line per arm; `options`: see `plotting.attention`."""
        from sgworkbench.plotting.attention import attention_trace_figure

        return attention_trace_figure(self.table, span, **options)

    def _repr_html_(self) -> str:
        n, layers = self.table["prompt_id"].nunique(), sorted(set(self.table["layer"]))
        return (
            f"<b>Attention mass</b> on {', '.join(dict.fromkeys(self.table['span']))}: {n} prompts, layers {layers}, "
            f"heads: {self.heads}<br>next: <code>.mean_by_layer()</code>, <code>.plot(span)</code>, "
            "<code>.to_dataframe()</code>"
        )


def attention_to_spans(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    layers: Sequence[int],
    positions: Positions = "last_prompt",
    *,
    heads: Heads = "mean",
    spans: Spans = "roles",
    max_batch_tokens: int = 2048,
    report: Reporter = silent,
) -> AttentionMass:
    """Read where chosen prompt tokens look; for tokens the model writes see `steering.attention_trace`.

    Args:
        loaded: the model; active steering applies.
        rendered: the prompts.
        layers: which layers.
        positions: which tokens' attention to read (see `capture.resolve_positions`).
        heads: `mean` over heads, or `each`.
        spans: `roles`, or named spans for every prompt.
        max_batch_tokens: padded tokens per forward pass.
        report: progress callback.

    Raises:
        WorkbenchError: as `AttentionRecorder`, or no prompts, or a prompt longer than the context.
    """
    check_lengths(rendered, loaded.identity.context_length)
    wanted = resolve_positions(rendered, positions)
    recorder = AttentionRecorder(loaded, rendered, layers, wanted, heads=heads, spans=spans)
    done, task = 0, "reading attention"
    report(task, 0, len(rendered))
    for rows in length_sorted_batches([len(item) for item in rendered], max_tokens=max_batch_tokens):
        batch = pad_prompts([rendered[row] for row in rows], side="right", device=loaded.identity.device, rows=rows)
        run_prefill(loaded, batch, recorder.readers(), stop_at_layer=max(layers) + 1)
        done += len(rows)
        report(task, done, len(rendered))
    return AttentionMass(recorder.table(), heads)
