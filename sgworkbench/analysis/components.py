"""The components that write into the residual stream, and what each writes along chosen directions.

Head k of a block writes z_k W_O[k], z_k being its mixed values. Heads are projected inside the hook through W_O folded
with the directions, so a [position, head, d_model] tensor is never built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

from sgworkbench.analysis.capture import run_prefill
from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.models import LoadedModel
from sgworkbench.prompting.rendering import RenderedPrompt
from sgworkbench.prompting.token_batch import check_lengths, length_sorted_batches, pad_prompts


@dataclass(frozen=True)
class Component:
    """Something that writes into the residual stream.

    Attributes:
        kind: `embedding`, `position_embedding`, `head`, `attention_bias` (output bias of an attention block) or `mlp`.
        layer: 0-based block; None for embeddings.
        head: 0-based head; None for everything else.
    """

    kind: str
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        if self.kind == "head":
            return f"L{self.layer}H{self.head}"
        if self.layer is None:
            return self.kind.replace("_", " ")
        return f"L{self.layer} {'MLP' if self.kind == 'mlp' else self.kind.replace('_', ' ')}"


def components_before(loaded: LoadedModel, site: Site) -> tuple[Component, ...]:
    """Return what has been added to the residual stream at a site, in the order of the forward pass.

    Raises:
        WorkbenchError: a site outside the model, or a norm after a sublayer whose contributions cannot be told apart.
    """
    site.check(loaded.identity.n_layers)
    cfg = loaded.model.cfg
    found = [Component("embedding")]
    if cfg.positional_embedding_type == "standard":
        found.append(Component("position_embedding"))
    for layer in range(site.layer + 1):
        norm_after_attention(loaded.model.blocks[layer])
        if layer == site.layer and site.kind == "resid_pre":
            break
        found += [Component("head", layer, head) for head in range(cfg.n_heads)]
        found.append(Component("attention_bias", layer))
        if layer == site.layer and site.kind == "resid_mid":
            break
        found.append(Component("mlp", layer))
    return tuple(found)


def norm_after_attention(block: Any) -> tuple[str, Any] | None:
    """Return name and module of the norm between a block's attention and the residual stream, where there is one.

    Raises:
        WorkbenchError: a norm behind which the contributions of single heads cannot be told apart.
    """
    if block.cfg.use_normalization_before_and_after:
        name = "ln1_post"
    elif block.cfg.original_architecture in POST_NORM_ARCHITECTURES:
        name = "ln1"
    else:
        return None
    norm = getattr(block, name)
    if hasattr(norm, "b") or not hasattr(norm, "w"):
        raise WorkbenchError(
            f"This model puts a {type(norm).__name__} after its attention; contributions of single heads are known "
            "only behind an RMS norm with a scale."
        )
    return name, norm


@torch.inference_mode()
def project_components(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    site: Site,
    directions: Float[Tensor, "direction d_model"],
    *,
    max_batch_tokens: int = 2048,
) -> tuple[Float[Tensor, "prompt component direction"], Float[Tensor, "prompt direction"]]:
    """Project every component's output, and the residual stream itself, onto directions at the last prompt token.

    Args:
        loaded: the model.
        rendered: the prompts.
        site: up to where; the components are those of `components_before`, in its order.
        directions: the directions, one a row.
        max_batch_tokens: padded tokens per forward pass.

    Returns:
        Projections by component, and of the whole residual stream at the site; float64 on the CPU.

    Raises:
        WorkbenchError: as `components_before`, no prompts, or a prompt longer than the context.
    """
    parts = components_before(loaded, site)
    check_lengths(rendered, loaded.identity.context_length)
    by_component = torch.zeros(len(rendered), len(parts), len(directions), dtype=torch.float64)
    whole = torch.zeros(len(rendered), len(directions), dtype=torch.float64)
    projector = _Projector(loaded, parts, directions)
    # The input of a block after the first is the output of the one before it, which has to run for it.
    stop = max(1, site.layer + (site.kind != "resid_pre"))
    for rows in length_sorted_batches([len(item) for item in rendered], max_tokens=max_batch_tokens):
        batch = pad_prompts([rendered[row] for row in rows], side="right", device=loaded.identity.device, rows=rows)
        readers = projector.readers(batch.last_prompt)
        hook = site.hook_name if site.layer < stop else f"blocks.{site.layer - 1}.hook_resid_post"
        readers[hook] = projector.reader_of_whole(batch.last_prompt)
        run_prefill(loaded, batch, readers, stop_at_layer=stop)
        by_component[rows], whole[rows] = projector.collected()
    return by_component, whole


class _Projector:
    """Hooks that turn the outputs of components at one token per row into projections onto fixed directions."""

    def __init__(
        self, loaded: LoadedModel, parts: tuple[Component, ...], directions: Float[Tensor, "direction d_model"]
    ) -> None:
        self._model = loaded.model
        self._parts = parts
        self._targets = directions.T.to(loaded.identity.device, torch.float32)
        self._attention: dict[int, list[Component]] = {}
        for part in parts:
            if part.kind in ("head", "attention_bias") and part.layer is not None:
                self._attention.setdefault(part.layer, []).append(part)
        self._folded: dict[int, tuple[Tensor, Tensor]] = {}
        self._values: dict[Component, Tensor] = {}
        self._scales: dict[int, Tensor] = {}
        self._whole = torch.empty(0)

    def readers(self, last: Tensor) -> dict[str, Callable[[Tensor], None]]:
        """Return hook points and functions for a batch whose rows end at columns `last`."""
        self._values, self._scales = {}, {}
        rows = torch.arange(len(last), device=last.device)
        hooks: dict[str, Callable[[Tensor], None]] = {}

        def write(part: Component) -> Callable[[Tensor], None]:
            def read(out: Tensor) -> None:
                # Position embeddings come with one row for all.
                at_last = out.expand(len(last), -1, -1)[rows, last]
                self._values[part] = at_last.float() @ self._targets

            return read

        for part in self._parts:
            if part.kind in ("embedding", "position_embedding"):
                hooks["hook_embed" if part.kind == "embedding" else "hook_pos_embed"] = write(part)
            elif part.kind == "mlp":
                hooks[f"blocks.{part.layer}.hook_mlp_out"] = write(part)
        for layer in self._attention:
            hooks[f"blocks.{layer}.attn.hook_z"] = self._heads_reader(layer, rows, last)
            norm = norm_after_attention(self._model.blocks[layer])
            if norm is not None:
                hooks[f"blocks.{layer}.{norm[0]}.hook_scale"] = self._scale_reader(layer, rows, last)
        return hooks

    def reader_of_whole(self, last: Tensor) -> Callable[[Tensor], None]:
        rows = torch.arange(len(last), device=last.device)

        def read(stream: Tensor) -> None:
            self._whole = stream[rows, last].float() @ self._targets

        return read

    def collected(self) -> tuple[Float[Tensor, "row component direction"], Float[Tensor, "row direction"]]:
        """Return what the last batch gave."""
        for layer, scale in self._scales.items():
            for part in self._attention[layer]:
                self._values[part] = self._values[part] / scale
        stacked = torch.stack([self._values[part] for part in self._parts], dim=1)
        return stacked.double().cpu(), self._whole.double().cpu()

    def _heads_reader(self, layer: int, rows: Tensor, last: Tensor) -> Callable[[Tensor], None]:
        def read(z: Tensor) -> None:
            heads, bias = self._fold(layer)
            projected = torch.einsum("bhc,hck->bhk", z[rows, last].float(), heads)
            for part in self._attention[layer]:
                self._values[part] = bias.expand(len(rows), -1) if part.head is None else projected[:, part.head]

        return read

    def _scale_reader(self, layer: int, rows: Tensor, last: Tensor) -> Callable[[Tensor], None]:
        def read(scale: Tensor) -> None:
            self._scales[layer] = scale[rows, last].float()

        return read

    def _fold(self, layer: int) -> tuple[Float[Tensor, "head d_head direction"], Float[Tensor, "direction"]]:
        """Return W_O and b_O of a block, seen along the directions through the norm behind them, if there is one."""
        if layer not in self._folded:
            attention = self._model.blocks[layer].attn
            norm = norm_after_attention(self._model.blocks[layer])
            targets = self._targets if norm is None else norm[1].w.float()[:, None] * self._targets
            heads = torch.einsum("hcd,dk->hck", attention.W_O.float(), targets)
            self._folded[layer] = heads, attention.b_O.float() @ targets
        return self._folded[layer]
