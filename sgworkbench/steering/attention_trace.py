"""Attention along a generation, with the steering hooks active: to spans of the prompt, or token by token.

A generated token looks back once it has been fed to the model again, so the last token of an answer has no row; the
first row, step -1, is the last prompt token, whose attention decides the first answer token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from sgworkbench.analysis.attention import GENERATED, OTHER, AttentionMass, AttentionRecorder, Heads, Spans
from sgworkbench.analysis.capture import reading
from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting.rendering import RenderedPrompt
from sgworkbench.steering.generation import Generation, GenerationSettings, generate
from sgworkbench.steering.hooks import Intervention, steering


def trace_attention(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    layers: Sequence[int],
    settings: GenerationSettings | None = None,
    *,
    heads: Heads = "mean",
    spans: Spans = "roles",
    interventions: Intervention | Sequence[Intervention] = (),
    arm: str = "plain",
    max_batch_tokens: int = 4096,
    report: Reporter = silent,
) -> tuple[AttentionMass, list[Generation]]:
    """Generate answers and read where the last prompt token and every written token look.

    Args:
        loaded: the model.
        rendered: the prompts.
        layers: which layers.
        settings: how to decode; the answers are those of `generate`.
        heads: `mean` over heads, or `each`.
        spans: `roles`, or named spans for every prompt.
        interventions: steering during the generation, besides what is active already.
        arm: written into the table's column `arm`.
        max_batch_tokens: as in `generate`.
        report: progress callback.

    Raises:
        WorkbenchError: as `AttentionRecorder`, `generate` and `steering`.
    """
    queries = [(item.last_prompt_position,) for item in rendered]
    recorder = AttentionRecorder(loaded, rendered, layers, queries, heads=heads, spans=spans)
    steps = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    with steering(loaded, steps) if steps else nullcontext(), reading(loaded.model, recorder.readers()):
        answers = generate(
            loaded, rendered, settings, max_batch_tokens=max_batch_tokens, report=report, task=f"attention, {arm}"
        )
    table = recorder.table()
    table.insert(0, "arm", arm)
    return AttentionMass(table, heads), answers


def join_attention(parts: Sequence[AttentionMass]) -> AttentionMass:
    """Put the traces of several arms into one.

    Raises:
        WorkbenchError: no traces, an arm given twice, or a mixture of means and single heads.
    """
    if not parts:
        raise WorkbenchError("Joining attention traces needs at least one.")
    arms = [arm for part in parts for arm in dict.fromkeys(part.table["arm"])]
    if len(set(arms)) < len(arms):
        raise WorkbenchError("An arm occurs in two of the attention traces; name every arm once.")
    if len({part.heads for part in parts}) > 1:
        raise WorkbenchError("Attention traces of single heads and of means over heads cannot be joined.")
    return AttentionMass(pd.concat([part.table for part in parts], ignore_index=True), parts[0].heads)


@dataclass(frozen=True)
class AttentionMap:
    """Attention from written tokens to chosen prompt tokens, of one prompt.

    Attributes:
        values: attention, mean over heads.
        layers: order of the first axis.
        queries: text of the tokens that look; the first is the last prompt token, the others were written.
        keys: text of the prompt tokens looked at.
        key_positions: their indices in the prompt.
        key_roles: their roles.
        arm: name of the arm.
    """

    values: Float[np.ndarray, "layer query key"]
    layers: tuple[int, ...]
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    key_positions: tuple[int, ...]
    key_roles: tuple[str, ...]
    arm: str

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per layer, query and key: layer, step, query, position, key, role, attention."""
        n_layers, n_queries, n_keys = self.values.shape
        return pd.DataFrame(
            {
                "layer": np.repeat(self.layers, n_queries * n_keys),
                "step": np.tile(np.repeat(np.arange(n_queries) - 1, n_keys), n_layers),
                "query": np.tile(np.repeat(np.array(self.queries, dtype=object), n_keys), n_layers),
                "position": np.tile(self.key_positions, n_layers * n_queries),
                "key": np.tile(np.array(self.keys, dtype=object), n_layers * n_queries),
                "role": np.tile(np.array(self.key_roles, dtype=object), n_layers * n_queries),
                "attention": self.values.reshape(-1),
            }
        )

    def plot(self, layer: int | None = None, **options: Any) -> Any:
        """Return the heatmap of one layer, or of the mean over layers; `options`: see `plotting.attention`."""
        from sgworkbench.plotting.attention import attention_map_figure

        return attention_map_figure(self, layer, **options)

    def _repr_html_(self) -> str:
        return (
            f"<b>Attention map</b>, {self.arm}: {len(self.queries)} tokens looking at {len(self.keys)} prompt tokens, "
            f"layers {list(self.layers)}<br>next: <code>.plot()</code>, <code>.to_dataframe()</code>"
        )


def attention_map(
    loaded: LoadedModel,
    item: RenderedPrompt,
    layers: Sequence[int],
    settings: GenerationSettings | None = None,
    *,
    roles: Sequence[str] = ("instruction",),
    interventions: Intervention | Sequence[Intervention] = (),
    arm: str = "plain",
) -> tuple[AttentionMap, Generation]:
    """Generate one answer and read how much every written token attends to every prompt token of some roles.

    Raises:
        WorkbenchError: no prompt token has one of the roles, or as `trace_attention`.
    """
    positions = [index for index, role in enumerate(item.roles) if role in roles]
    if not positions:
        raise unknown_name("role among the prompt's tokens", ", ".join(roles), set(item.roles))
    mass, answers = trace_attention(
        loaded,
        [item],
        layers,
        settings,
        spans=[{str(position): [position] for position in positions}],
        interventions=interventions,
        arm=arm,
    )
    rows = mass.table[~mass.table["span"].isin([GENERATED, OTHER])]
    chosen = sorted(set(layers))
    steps = sorted(set(rows["step"]))
    values = rows["mass"].to_numpy().reshape(len(steps), len(chosen), len(positions)).transpose(1, 0, 2)
    written = [loaded.tokenizer.decode([t], skip_special_tokens=False) for t in answers[0].token_ids[: len(steps) - 1]]
    shown = AttentionMap(
        np.ascontiguousarray(values, dtype=float),
        tuple(chosen),
        (item.tokens[-1], *written),
        tuple(item.tokens[position] for position in positions),
        tuple(positions),
        tuple(item.roles[position] for position in positions),
        arm,
    )
    return shown, answers[0]
