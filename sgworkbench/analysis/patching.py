"""Activation patching between the plain and the prompted run: where the safety prompt's effect is carried.

One value of the base run is replaced by the value the source run has there, the rest of the model runs on, and a number
read from the logits of the first answer token says how far the outcome moved (Meng et al. 2022, arXiv 2202.05262; Zhang
and Nanda 2024, arXiv 2309.16042):

    score = (m(patched) - m(plain)) / (m(prompted) - m(plain)),    0 = as without the safety prompt, 1 = as with it.

`denoising` patches prompted values into the plain run and asks what suffices; `noising` patches plain values into the
prompted run and asks what is needed (1 there means that the patch changed nothing).

What patching aligned tokens can and cannot carry: the prompted run has tokens the plain run lacks (system message,
reminder, their template tokens). They have no partner and are never patched. A cell therefore shows what an aligned
token's value carries *by itself*; the attention of later tokens to the safety prompt's own tokens is not restored by
any single cell, and in the plain run those tokens are not there to be attended to. Values also carry their position: a
token that stands 60 places later in the prompted run brings that with it. Only at the last prompt token is everything
that reaches the answer in one place, which is why its residual stream scores 1 in the last layer by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgworkbench.analysis.capture import reading
from sgworkbench.analysis.components import norm_after_attention
from sgworkbench.analysis.logit_lens import lens_logits
from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.models import LoadedModel
from sgworkbench.models.engine import run_blocks
from sgworkbench.models.engine_checks import fast_path_reason
from sgworkbench.models.kv_cache import PreallocatedCache
from sgworkbench.prompting.rendering import RenderedPrompt

Metric = Callable[[Float[Tensor, "row d_vocab"]], Float[Tensor, "row"]]
"""From logits of the first answer token to one number per row, such as the refusal log-odds."""

PatchKind = Literal["embedding", "resid_post", "attn_out", "mlp_out", "heads"]
PATCH_KINDS: tuple[PatchKind, ...] = get_args(PatchKind)
_HOOKS = {
    "embedding": "blocks.{layer}.hook_resid_pre",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "heads": "blocks.{layer}.attn.hook_z",
}


@dataclass(frozen=True)
class Patch:
    """Values of the base run to be replaced by values of the source run.

    Attributes:
        kind: `embedding` (token and position embedding; layer 0), `resid_post` (output of a block), `attn_out` or
            `mlp_out` (what a sublayer adds to the residual stream), `heads` (mixed values of attention heads).
        layer: 0-based block.
        positions: pairs of token indices, base run first.
        heads: which heads, for `heads`; None for all.
    """

    kind: PatchKind
    layer: int
    positions: tuple[tuple[int, int], ...]
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in PATCH_KINDS:
            raise unknown_name("kind of patch", str(self.kind), PATCH_KINDS)
        if self.kind == "embedding" and self.layer != 0:
            raise WorkbenchError(f"Embeddings enter at layer 0, found layer {self.layer}; patch resid_post instead.")
        if self.heads is not None and self.kind != "heads":
            raise WorkbenchError(f"Only patches of kind 'heads' choose heads, not {self.kind!r}.")
        if not self.positions:
            raise WorkbenchError("A patch needs at least one pair of token indices.")

    @property
    def hook_name(self) -> str:
        """Name of the TransformerLens hook point whose value is replaced."""
        return _HOOKS[self.kind].format(layer=self.layer)


def require_bare(loaded: LoadedModel) -> None:
    """Refuse a model with hooks on it: a resumed pass would apply steering twice.

    Raises:
        WorkbenchError: naming one hook point that has a hook.
    """
    for name, point in loaded.model.hook_dict.items():
        if point._forward_hooks or point._forward_pre_hooks:
            raise WorkbenchError(
                f"Patching compares two runs of the bare model, but {name} has a hook; take steering and other hooks "
                "off first."
            )


@contextmanager
def replacing(model: Any, changes: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replace the values of hook points inside the block; the functions must not change their argument in place."""
    handles = []
    try:
        for name, change in changes.items():

            def forward_hook(_module: Any, _input: Any, output: Tensor, change: Any = change) -> Tensor:
                changed: Tensor = change(output)
                return changed

            handles.append(model.mod_dict[name].register_forward_hook(forward_hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def run_patched(
    loaded: LoadedModel, base: RenderedPrompt, source: RenderedPrompt, patches: Sequence[Patch]
) -> Float[Tensor, "pos d_model"]:
    """Run the base prompt with any set of patches from the source prompt, in one full pass.

    Returns the residual stream after the last block at every token of the base prompt; `lens_logits` of its last row
    are the patched logits of the first answer token. With no patches it is the base run itself.

    Raises:
        WorkbenchError: hooks on the model, a layer, head or token index that does not exist.
    """
    require_bare(loaded)
    for patch in patches:
        _check(patch, loaded, base, source)
    if not patches:
        return _run(loaded, base)
    taken: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        def read(value: Tensor) -> None:
            taken[name] = value[0].clone()

        return read

    with reading(loaded.model, {patch.hook_name: keep(patch.hook_name) for patch in patches}):
        _run(loaded, source)

    def change(name: str) -> Callable[[Tensor], Tensor]:
        mine = [patch for patch in patches if patch.hook_name == name]

        def replace(value: Tensor) -> Tensor:
            value = value.clone()
            for patch in mine:
                into, out_of = (list(side) for side in zip(*patch.positions, strict=True))
                if patch.heads is None:
                    value[0, into] = taken[name][out_of]
                else:
                    for head in patch.heads:
                        value[0, into, head] = taken[name][out_of, head]
            return value

        return replace

    with replacing(loaded.model, {patch.hook_name: change(patch.hook_name) for patch in patches}):
        return _run(loaded, base)


def patched_logits(
    loaded: LoadedModel, base: RenderedPrompt, source: RenderedPrompt, patches: Sequence[Patch]
) -> Float[Tensor, "d_vocab"]:
    """Return the logits of the first answer token of a patched run; arguments and errors as `run_patched`."""
    return lens_logits(loaded, run_patched(loaded, base, source, patches)[-1:])[0]


def _run(loaded: LoadedModel, rendered: RenderedPrompt) -> Float[Tensor, "pos d_model"]:
    ids = torch.tensor([rendered.token_ids], device=loaded.identity.device)
    return run_blocks(loaded, ids)[0]


def _check(patch: Patch, loaded: LoadedModel, base: RenderedPrompt, source: RenderedPrompt) -> None:
    n_layers, n_heads = loaded.identity.n_layers, loaded.identity.n_heads
    if not 0 <= patch.layer < n_layers:
        raise WorkbenchError(f"Layer {patch.layer} is outside the model, which has {n_layers} layers.")
    for head in patch.heads or ():
        if not 0 <= head < n_heads:
            raise WorkbenchError(f"Head {head} is outside the model, which has {n_heads} heads a layer.")
    for into, out_of in patch.positions:
        for index, item, name in ((into, base, "base"), (out_of, source, "source")):
            if not 0 <= index < len(item):
                raise WorkbenchError(f"Token index {index} is outside the {name} prompt, which has {len(item)} tokens.")


@dataclass(frozen=True)
class Cells:
    """Changes at one layer, each to be tried alone.

    Attributes:
        layer: 0-based block.
        change: what is added, a cell a row.
        columns: column of the resumed run each is added at.
    """

    layer: int
    change: Float[Tensor, "cell d_model"]
    columns: Int[Tensor, "cell"]


class PatchRunner:
    """Patches of one pair of prompts, one cell a row, each resumed from the layer it patches.

    Tokens before the first patched one cannot change, so they are run once; their keys and values are shared by all
    rows.

    Args:
        loaded: the model, without hooks.
        base: the run that is patched.
        source: the run the values come from.
        positions: pairs of token indices, base run first, in ascending order.
        layers: the layers to be patched.
        max_batch_tokens: bound on rows x columns of a pass.
    """

    @torch.inference_mode()
    def __init__(
        self,
        loaded: LoadedModel,
        base: RenderedPrompt,
        source: RenderedPrompt,
        positions: Sequence[tuple[int, int]],
        layers: Sequence[int],
        *,
        max_batch_tokens: int = 4096,
    ) -> None:
        self._loaded = loaded
        self._max_batch_tokens = max_batch_tokens
        self._layers = list(layers)
        self._into = [into for into, _ in positions]
        self._out_of = [out_of for _, out_of in positions]
        ids = torch.tensor([base.token_ids], device=loaded.identity.device)
        self._cache: PreallocatedCache | None = None
        self._first = 0
        if fast_path_reason(loaded) is None and min(self._into) > 0:
            self._first = min(self._into)
            self._cache = PreallocatedCache(loaded.model.cfg, 1, self._first, loaded.identity.device)
            run_blocks(loaded, ids[:, : self._first], cache=self._cache)
            self._cache.freeze()
        self._base = self._read(ids[:, self._first :], self._cache, None)
        self._source = self._read(torch.tensor([source.token_ids], device=ids.device), None, self._out_of)
        self._columns = torch.tensor(self._into, device=ids.device) - self._first

    def _read(
        self, ids: Tensor, cache: PreallocatedCache | None, columns: list[int] | None
    ) -> dict[tuple[str, int], Tensor]:
        """Run a prompt once and keep what cells are made of, at some columns or at all."""
        kept: dict[tuple[str, int], Tensor] = {}

        def keep(kind: str, layer: int) -> Callable[[Tensor], None]:
            def read(value: Tensor) -> None:
                kept[kind, layer] = (value[0] if columns is None else value[0, columns]).clone()

            return read

        kinds = ("resid_pre", "attn_out", "mlp_out", "resid_post")
        hooks = {f"blocks.{layer}.hook_{kind}": keep(kind, layer) for layer in self._layers for kind in kinds}
        with reading(self._loaded.model, hooks):
            final = run_blocks(self._loaded, ids, cache=cache)
        kept["final", 0] = final[0, -1:]
        return kept

    def logits(self, run: Literal["base", "source"]) -> Float[Tensor, "1 d_vocab"]:
        """Return the logits of the first answer token without any patch."""
        return lens_logits(self._loaded, (self._base if run == "base" else self._source)["final", 0])

    def cells(self, kind: PatchKind, layer: int) -> Cells:
        """Return what patching each of the positions changes, source minus base."""
        change = self._source[kind, layer] - self._base[kind, layer][self._columns]
        return Cells(layer, change, self._columns)

    def at_last_token(self, layer: int, change: Float[Tensor, "cell d_model"]) -> Cells:
        """Return changes at the last prompt token as cells."""
        last = len(next(iter(self._base.values()))) - 1
        return Cells(layer, change, self._columns.new_full((len(change),), last))

    def patched(self, kind: PatchKind, cells: Sequence[Cells]) -> Iterator[Float[Tensor, "cell d_vocab"]]:
        """Yield the logits of the first answer token with one change added at a time, a cell a row, in the order given.

        All cells go up through the model together, each joining at its own layer, so a block's weights are read once
        for many cells. Several batches come when one would exceed the bound on tokens.

        Args:
            kind: `resid_post`, `attn_out` or `mlp_out`.
            cells: the changes, layers ascending.
        """
        per_pass = max(1, self._max_batch_tokens // len(next(iter(self._base.values()))))
        waiting: list[Cells] = []
        room = per_pass
        for each in cells:
            start = 0
            while start < len(each.change):
                taken = slice(start, start + room)
                part = Cells(each.layer, each.change[taken], each.columns[taken])
                waiting.append(part)
                start, room = start + len(part.change), room - len(part.change)
                if room == 0:
                    yield self._climb(kind, waiting)
                    waiting, room = [], per_pass
        if waiting:
            yield self._climb(kind, waiting)

    @torch.inference_mode()
    def _climb(self, kind: PatchKind, cells: Sequence[Cells]) -> Float[Tensor, "cell d_vocab"]:
        n_layers = self._loaded.identity.n_layers
        stream: Tensor | None = None
        for layer in range(cells[0].layer, n_layers):
            joining = [each for each in cells if each.layer == layer]
            changes: dict[str, Callable[[Tensor], Tensor]] = {}
            if kind == "attn_out":
                # A change of an attention output still feeds the MLP of its block, so its cells enter below the block.
                n_before = 0 if stream is None else len(stream)
                stream = _stacked(stream, [self._rows(each, "resid_pre", add=False) for each in joining])
                changes = {f"blocks.{layer}.hook_attn_out": _adder(joining, n_before)} if joining else {}
            if stream is not None:
                with replacing(self._loaded.model, changes):
                    stream = run_blocks(
                        self._loaded, stream, cache=self._cache, start_at_layer=layer, stop_at_layer=layer + 1
                    )
            if kind != "attn_out":
                # A change of what an MLP adds is a change of the block's output.
                stream = _stacked(stream, [self._rows(each, "resid_post", add=True) for each in joining])
        assert stream is not None  # cells are never empty
        return lens_logits(self._loaded, stream[:, -1])

    def _rows(self, cells: Cells, kind: str, *, add: bool) -> Float[Tensor, "cell pos d_model"]:
        rows = self._base[kind, cells.layer].expand(len(cells.change), -1, -1).clone()
        if add:
            rows[torch.arange(len(rows), device=rows.device), cells.columns] += cells.change
        return rows


def _stacked(stream: Tensor | None, new: Sequence[Tensor]) -> Tensor | None:
    parts = [part for part in (stream, *new) if part is not None]
    return torch.cat(parts) if parts else None


def _adder(joining: Sequence[Cells], n_before: int) -> Callable[[Tensor], Tensor]:
    def add(value: Tensor) -> Tensor:
        value = value.clone()
        first = n_before
        for each in joining:
            rows = torch.arange(first, first + len(each.change), device=value.device)
            value[rows, each.columns] += each.change
            first += len(each.change)
        return value

    return add


@torch.inference_mode()
def head_changes(
    loaded: LoadedModel, base: RenderedPrompt, source: RenderedPrompt, layers: Sequence[int]
) -> dict[int, Float[Tensor, "head d_model"]]:
    """Return what swapping one head's mixed values at the last prompt token changes in its attention block's output.

    A norm behind the attention block (Gemma, OLMo) is applied to the block's output as patched.
    """
    mixed: list[dict[int, Tensor]] = []
    for item in (base, source):
        kept: dict[int, Tensor] = {}

        def keep(layer: int, kept: dict[int, Tensor] = kept) -> Callable[[Tensor], None]:
            def read(z: Tensor) -> None:
                kept[layer] = z[0, -1].clone()

            return read

        with reading(loaded.model, {f"blocks.{layer}.attn.hook_z": keep(layer) for layer in layers}):
            _run(loaded, item)
        mixed.append(kept)
    changes = {}
    for layer in layers:
        z_base, z_source = mixed[0][layer], mixed[1][layer]
        n_heads = len(z_base)
        swapped = z_base.expand(n_heads, -1, -1).clone()
        index = torch.arange(n_heads, device=swapped.device)
        swapped[index, index] = z_source
        outputs = _attention_output(loaded.model.blocks[layer], torch.cat([z_base[None], swapped]))
        changes[layer] = outputs[1:] - outputs[:1]
    return changes


def _attention_output(block: Any, z: Float[Tensor, "row head d_head"]) -> Float[Tensor, "row d_model"]:
    """Return what an attention block adds to the residual stream, from the mixed values of its heads."""
    out: Tensor = torch.einsum("rhc,hcd->rd", z, block.attn.W_O) + block.attn.b_O
    norm = norm_after_attention(block)
    if norm is None:
        return out
    normed: Tensor = norm[1](out[None])[0]
    return normed
