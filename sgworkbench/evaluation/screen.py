"""The forward screen: what every layer and coefficient does to the first answer token, without generating.

A steered run equals the unsteered one up to the site it writes to. So the unsteered stream is computed once per batch
of prompts and kept at every layer, and each cell's run resumes there. Tokens that all prompts begin with are steered
and run once per cell instead of once per prompt, and a single position is unembedded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgworkbench.analysis.capture import reading
from sgworkbench.analysis.shared_prefix import SHORTEST_PREFIX, shared_length
from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.refusal_score import refusal_log_odds
from sgworkbench.models import LoadedModel
from sgworkbench.models.engine import run_blocks
from sgworkbench.models.engine_checks import prefix_sharing_reason
from sgworkbench.models.kv_cache import PreallocatedCache
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting.rendering import RenderedPrompt
from sgworkbench.prompting.token_batch import check_lengths, length_sorted_batches, pad_prompts
from sgworkbench.steering import SteeringVector
from sgworkbench.steering.generation import unembed


@torch.inference_mode()
def screen_layers(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    vector: SteeringVector,
    layers: Iterable[int],
    alphas: Sequence[float],
    refusal_tokens: Sequence[int],
    *,
    max_batch_tokens: int = 2048,
    report: Reporter = silent,
) -> pd.DataFrame:
    """Measure every layer x coefficient cell of additive steering at all prompt tokens.

    Args:
        loaded: the model, without active steering.
        rendered: the prompts.
        vector: the vectors and their protocol.
        layers: layers of the grid.
        alphas: raw coefficients of the grid.
        refusal_tokens: first tokens of refusals (see `refusal_score.first_tokens`).
        max_batch_tokens: padded tokens of one pass; the kept streams take layers x max_batch_tokens x d_model floats.
        report: progress callback.

    Returns:
        One row per cell, layers outermost: layer, alpha, log_odds (mean refusal log-odds), kl (mean KL divergence of
        the first answer token from the unsteered run, nats), top1 (share of prompts whose likeliest token stays).

    Raises:
        WorkbenchError: an empty grid, a layer without a vector, or prompts that do not fit.
    """
    chosen = list(layers)
    if not chosen or not alphas:
        raise WorkbenchError("The grid is empty; give at least one layer and one coefficient.")
    check_lengths(rendered, loaded.identity.context_length)
    sites = {layer: vector.write_site(layer) for layer in chosen}
    if any(site.kind == "resid_mid" for site in sites.values()):
        raise WorkbenchError(
            "The screen resumes between blocks, so it takes vectors written to resid_pre or resid_post."
        )
    scores = np.zeros((len(chosen), len(alphas), len(rendered), 3))
    lengths = [len(item) for item in rendered]
    batches = list(length_sorted_batches(lengths, max_tokens=max_batch_tokens))
    names = {site.hook_name for site in sites.values()}
    done = 0
    for rows in batches:
        batch = pad_prompts([rendered[row] for row in rows], side="right", device=loaded.identity.device)
        split = shared_length(batch) if len(rows) > 1 and prefix_sharing_reason(loaded) is None else 0
        split = split if split >= SHORTEST_PREFIX else 0
        prefix, rest = _unsteered(loaded, batch.token_ids, split, names)
        last = batch.last_prompt - split
        clean = torch.log_softmax(_last_logits(loaded, rest[_FINAL], last).double(), -1)
        for index, layer in enumerate(chosen):
            site = sites[layer]
            first = layer if site.kind == "resid_pre" else layer + 1
            vectors = vector.at(layer).to(rest[site.hook_name])
            for column, alpha in enumerate(alphas):
                added = alpha * vectors
                cache = None
                if split and first < loaded.identity.n_layers:
                    cache = PreallocatedCache(loaded.model.cfg, 1, split, loaded.identity.device)
                    run_blocks(loaded, prefix[site.hook_name] + added, cache=cache, start_at_layer=first)
                    cache.freeze()
                stream = rest[site.hook_name] + added
                if first < loaded.identity.n_layers:
                    stream = run_blocks(loaded, stream, cache=cache, start_at_layer=first)
                logits = _last_logits(loaded, stream, last)
                scores[index, column, rows] = _scores(logits, clean, refusal_tokens)
            done += 1
            report("screen", done, len(batches) * len(chosen))
    return pd.DataFrame(
        [(layer, alpha, *scores[i, j].mean(0)) for i, layer in enumerate(chosen) for j, alpha in enumerate(alphas)],
        columns=["layer", "alpha", "log_odds", "kl", "top1"],
    )


_FINAL = "final"


def _unsteered(
    loaded: LoadedModel, token_ids: Int[Tensor, "batch pos"], split: int, names: set[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run a batch without steering; return the streams at the named hook points, of the shared tokens and of the rest.

    The stream after the last block is kept under `_FINAL`.
    """
    kept: list[dict[str, Tensor]] = []
    cache = PreallocatedCache(loaded.model.cfg, 1, split, loaded.identity.device) if split else None
    for ids in (token_ids[:1, :split], token_ids[:, split:]):
        streams: dict[str, Tensor] = {}
        if ids.shape[1]:
            with reading(loaded.model, {name: _keeper(streams, name) for name in names}):
                streams[_FINAL] = run_blocks(loaded, ids, cache=cache)
        if cache is not None:
            cache.freeze()
        kept.append(streams)
    return kept[0], kept[1]


def _keeper(streams: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    def keep(stream: Tensor) -> None:
        streams[name] = stream.clone()

    return keep


def _last_logits(
    loaded: LoadedModel, stream: Float[Tensor, "batch pos d_model"], last: Tensor
) -> Float[Tensor, "batch d_vocab"]:
    rows = torch.arange(len(stream), device=stream.device)
    return unembed(loaded, stream[rows, last][:, None])[:, 0]


def _scores(
    logits: Float[Tensor, "row d_vocab"], clean: Float[Tensor, "row d_vocab"], refusal_tokens: Sequence[int]
) -> Float[np.ndarray, "row 3"]:
    steered = torch.log_softmax(logits.double(), -1)
    kl = (clean.exp() * (clean - steered)).sum(-1)
    same = (logits.argmax(-1) == clean.argmax(-1)).double()
    odds = refusal_log_odds(logits, refusal_tokens).double()
    return torch.stack([odds, kl, same], -1).cpu().numpy()
