"""The general path of a screen: any intervention, one forward pass with hooks per batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgworkbench.analysis.capture import reading
from sgworkbench.evaluation.sweep.caches import copied_rows
from sgworkbench.evaluation.sweep.measures import Collected, Readout, ScreenSetup, log_probability_rows
from sgworkbench.evaluation.sweep.streams import Continuations, scored_texts
from sgworkbench.models import LoadedModel
from sgworkbench.models.engine import run_blocks
from sgworkbench.models.kv_cache import PreallocatedCache
from sgworkbench.prompting.rendering import RenderedPrompt
from sgworkbench.prompting.token_batch import announced_batch, length_sorted_batches, pad_prompts
from sgworkbench.steering import Intervention, steering

Score = Callable[[Float[Tensor, "row d_model"], Int[Tensor, "row"], Collected], None]


def run_general(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    continuations: Continuations,
    interventions: Sequence[Intervention],
    setup: ScreenSetup,
    score: Score,
    collected: Collected,
) -> None:
    """Measure interventions with `steering` hooks; pads stand on the left, so that scored texts follow their prompt.

    Args:
        loaded: the model.
        rendered: the prompts.
        continuations: texts scored after each prompt.
        interventions: what acts, in this order.
        setup: what is measured.
        score: takes the final residual stream at the last prompt token.
        collected: where the numbers go.
    """
    with steering(loaded, interventions):
        for rows in length_sorted_batches([len(item) for item in rendered], max_tokens=setup.max_batch_tokens):
            _run_batch(loaded, rendered, continuations, rows, setup, score, collected)


def _run_batch(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    continuations: Continuations,
    rows: list[int],
    setup: ScreenSetup,
    score: Score,
    collected: Collected,
) -> None:
    device = loaded.identity.device
    batch = pad_prompts([rendered[row] for row in rows], side="left", device=device, rows=rows)
    width = batch.token_ids.shape[1]

    def read(stream: Tensor, readout: Readout) -> None:
        column = torch.full((len(rows),), width - 1, device=stream.device)
        if readout.at == "last_instruction":
            behind = [len(rendered[row]) - rendered[row].last_instruction_position for row in rows]
            column = width - torch.tensor(behind, device=stream.device)
        here = stream[torch.arange(len(rows), device=stream.device), column]
        collected.read(readout.name, batch.rows, here, setup)

    by_site: dict[str, list[Readout]] = {}
    for readout in setup.readouts:
        by_site.setdefault(readout.site.hook_name, []).append(readout)

    def reader(found: Sequence[Readout]) -> Callable[[Tensor], None]:
        def read_all(stream: Tensor) -> None:
            for readout in found:
                read(stream, readout)

        return read_all

    readers = {name: reader(found) for name, found in by_site.items()}
    texts = scored_texts(loaded, rendered, continuations, rows, batch)
    cache = PreallocatedCache(loaded.model.cfg, len(rows), width, device) if texts is not None else None
    with reading(loaded.model, readers), announced_batch(batch):
        stream = run_blocks(loaded, batch.token_ids, attention_mask=batch.is_real.long(), cache=cache)
    score(stream[:, -1], batch.rows, collected)
    if cache is None or texts is None:
        return
    # All texts in one pass: a latched gate's memory must be that of the prompt for each of them.
    copied = copied_rows(cache, loaded.model.cfg, texts.owner, texts.mask)
    with announced_batch(texts.tokens):
        stream = run_blocks(loaded, texts.tokens.token_ids, attention_mask=texts.mask.long(), cache=copied)
    flat = [ids for each in continuations for ids in each]
    collected.add_texts(log_probability_rows(loaded, stream, texts.tokens.is_real, texts.index, flat), texts.index)
