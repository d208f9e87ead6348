"""Completions token by token with their projections, and the scheduler that runs slow work in small steps.

No threads: steering lives in the model's hooks, and a second thread would let the user's own cells run under the
panel's steering. Work is an iterator whose steps each attach what they need and take it off again; between two steps
the notebook handles clicks, cells and the stop button.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis import Directions, Site
from sgworkbench.analysis.capture import reading
from sgworkbench.errors import WorkbenchError
from sgworkbench.models import LoadedModel
from sgworkbench.models.end_tokens import end_token_ids
from sgworkbench.models.kv_cache import PreallocatedCache
from sgworkbench.prompting.rendering import RenderedPrompt
from sgworkbench.prompting.token_batch import check_lengths, pad_prompts
from sgworkbench.steering import GenerationSettings, Intervention, steering
from sgworkbench.steering.generation import Sampler, choose_tokens, next_step, next_token_logits
from sgworkbench.steering.roles import RoleTracker


@dataclass(frozen=True)
class CompletionStep:
    """One decoding step.

    Attributes:
        step: 0 for the first generated token.
        token_id: the token chosen; None in the last step, which only reads the last token.
        text: the answer so far, special tokens left out.
        role: reasoning or answer; empty in the last step.
        finished: whether the model has ended its turn.
        projections: of the token before (at step 0, the last prompt token), by concept and layer, in separation units.
    """

    step: int
    token_id: int | None
    text: str
    role: str
    finished: bool
    projections: Mapping[str, Float[np.ndarray, " layer"]]


def stream_completion(
    loaded: LoadedModel,
    item: RenderedPrompt,
    settings: GenerationSettings,
    directions: Sequence[Directions],
    interventions: Sequence[Intervention] = (),
) -> Iterator[CompletionStep]:
    """Yield one step per generated token: the answer is that of `generate`, the projections those of a trace.

    Steering is attached within each step only, so that nothing else that runs between two steps is steered. Gates
    remember earlier steps and are refused.

    Args:
        loaded: the model.
        item: the prompt.
        settings: how to decode.
        directions: concepts to project onto, all at the same sites.
        interventions: steering.

    Raises:
        WorkbenchError: a prompt that does not fit the context with its answer, a gate, or logits that are not finite.
    """
    if any(each.gate is not None for each in interventions):
        raise WorkbenchError("A streamed completion cannot be gated; use wb.generate under wb.intervene(...).")
    check_lengths([item], loaded.identity.context_length, new_tokens=settings.max_new_tokens)
    return _steps(loaded, item, settings, directions, list(interventions))


def _steps(
    loaded: LoadedModel,
    item: RenderedPrompt,
    settings: GenerationSettings,
    directions: Sequence[Directions],
    interventions: list[Intervention],
) -> Iterator[CompletionStep]:
    device = loaded.identity.device
    sites = directions[0].sites
    last: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor], None]:
        def read(stream: Tensor) -> None:
            last[site] = stream[0, -1]

        return read

    readers = {site.hook_name: keep(site) for site in sites}
    cache = PreallocatedCache(loaded.model.cfg, 1, len(item) + settings.max_new_tokens, device)
    stop = set(end_token_ids(loaded)) if settings.stop_at_end_of_turn else set()
    tracker, sampler = RoleTracker(loaded.tokenizer, item), Sampler(settings, item)
    batch = pad_prompts([item], side="left", device=device)
    ids: list[int] = []
    fits = len(item) + settings.max_new_tokens < loaded.identity.context_length
    for step in range(settings.max_new_tokens + 1):
        steered = steering(loaded, interventions) if interventions else nullcontext()
        with torch.inference_mode(), steered, reading(loaded.model, readers):
            logits = next_token_logits(loaded, batch, cache)
            if not torch.isfinite(logits[:, : loaded.identity.d_vocab]).all():
                raise WorkbenchError("The logits hold NaN or infinite values under this steering; lower its strength.")
            token = int(choose_tokens(logits, [sampler], settings)[0])
            values = torch.stack([last[site] for site in sites]).float().cpu()
        projected = {each.concept: each.in_separation_units(values).numpy() for each in directions}
        if step == settings.max_new_tokens:
            yield CompletionStep(step, None, _text(loaded, ids), "", False, projected)
            return
        role = tracker.role_of(token)
        ids.append(token)
        finished = token in stop
        yield CompletionStep(step, token, _text(loaded, ids), role, finished, projected)
        if finished or (step == settings.max_new_tokens - 1 and not fits):
            return
        with torch.inference_mode():
            batch = next_step(batch, torch.tensor([token], device=device), [role])


def _text(loaded: LoadedModel, ids: list[int]) -> str:
    return str(loaded.tokenizer.decode(ids, skip_special_tokens=True))


class Scheduler:
    """Runs one piece of work at a time, in steps, on the notebook's event loop; new work replaces the old.

    Where no loop runs (scripts, tests), work is done before `start` returns.
    """

    def __init__(self, failed: Callable[[Exception], None], changed: Callable[[bool], None]) -> None:
        """Make an idle scheduler.

        Args:
            failed: called with what a step raised; the work ends there.
            changed: called with whether work is going on, whenever that changes.
        """
        self._failed = failed
        self._changed = changed
        self._task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether work is going on."""
        return self._task is not None and not self._task.done()

    def start(self, work: Iterator[Any]) -> None:
        """Begin a piece of work; what was going on is given up after its current step."""
        self.stop()
        self._changed(True)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._drain(work)
            return
        self._task = loop.create_task(self._run(work))

    def stop(self) -> None:
        """Give up the work after its current step."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
        self._task = None
        self._changed(False)

    async def _run(self, work: Iterator[Any]) -> None:
        mine = asyncio.current_task()
        try:
            for _ in work:
                await asyncio.sleep(0)
        except Exception as error:
            self._failed(error)
        if self._task is mine:
            self._changed(False)

    def _drain(self, work: Iterator[Any]) -> None:
        try:
            for _ in work:
                pass
        except Exception as error:
            self._failed(error)
        self._changed(False)
