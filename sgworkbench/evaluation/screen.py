"""The forward screen: what every layer and coefficient does to the first answer token, without generating.

A steered run equals the unsteered one up to the site it writes to. So the unsteered stream is computed once per batch
of prompts and kept at every layer; each layer's run resumes there, with all its coefficients as rows of one batch, and
unembeds a single position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.capture import reading
from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.refusal_score import refusal_log_odds
from sgworkbench.models import LoadedModel
from sgworkbench.models.engine import run_blocks
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
    max_batch_tokens: int = 1024,
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
        max_batch_tokens: padded tokens of one unsteered pass; a resumed pass holds `len(alphas)` times as many. The
            kept streams take layers x max_batch_tokens x d_model floats.
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
    coefficients = torch.tensor(alphas, device=loaded.identity.device)
    lengths = [len(item) for item in rendered]
    batches = list(length_sorted_batches(lengths, max_tokens=max_batch_tokens))
    done = 0
    for rows in batches:
        batch = pad_prompts([rendered[row] for row in rows], side="right", device=loaded.identity.device)
        streams: dict[str, Tensor] = {}
        names = {site.hook_name for site in sites.values()}
        with reading(loaded.model, {name: _keeper(streams, name) for name in names}):
            final = run_blocks(loaded, batch.token_ids)
        last = batch.last_prompt
        clean = torch.log_softmax(_last_logits(loaded, final, last).double(), -1)
        for index, layer in enumerate(chosen):
            site = sites[layer]
            added = coefficients[:, None] * vector.at(layer).to(coefficients)
            stream = streams[site.hook_name]
            grid = stream[None] + added[:, None, None].to(stream)
            resumed = grid.flatten(0, 1)
            first = layer if site.kind == "resid_pre" else layer + 1
            if first < loaded.identity.n_layers:
                resumed = run_blocks(loaded, resumed, start_at_layer=first)
            logits = _last_logits(loaded, resumed, last.repeat(len(alphas)))
            scores[index][:, rows] = _scores(logits, clean, len(alphas), refusal_tokens)
            done += 1
            report("screen", done, len(batches) * len(chosen))
    return pd.DataFrame(
        [(layer, alpha, *scores[i, j].mean(0)) for i, layer in enumerate(chosen) for j, alpha in enumerate(alphas)],
        columns=["layer", "alpha", "log_odds", "kl", "top1"],
    )


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
    logits: Float[Tensor, "cell_row d_vocab"],
    clean: Float[Tensor, "row d_vocab"],
    n_alphas: int,
    refusal_tokens: Sequence[int],
) -> Float[np.ndarray, "alpha row 3"]:
    by_cell = logits.reshape(n_alphas, len(clean), -1)
    steered = torch.log_softmax(by_cell.double(), -1)
    kl = (clean.exp() * (clean - steered)).sum(-1)
    same = (by_cell.argmax(-1) == clean.argmax(-1)).double()
    odds = refusal_log_odds(by_cell, refusal_tokens).double()
    return torch.stack([odds, kl, same], -1).cpu().numpy()
