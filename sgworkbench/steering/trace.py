"""Projections of every token while the model writes, onto chosen directions, with the token's role.

A hook at each site projects the tokens of a forward pass onto the directions at once and keeps one float per token and
direction; activations are not kept. It reads after steering, as every reading here does. The value of a generated token
is the residual stream *at* that token, which exists once the token has been fed back to the model; the end token never
is, and has no row (neither has the last token of an answer that fills the model's context).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgworkbench.analysis.capture import reading
from sgworkbench.analysis.directions import Directions
from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError, require_type
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting.rendering import RenderedPrompt
from sgworkbench.prompting.token_batch import TokenBatch, current_batch
from sgworkbench.steering.generation import Generation, GenerationSettings, generate
from sgworkbench.steering.hooks import Intervention, steering
from sgworkbench.steering.roles import RoleTracker

COLUMNS = (
    "arm", "prompt_id", "position", "step", "token", "role", "phase", "concept", "site", "layer", "raw",
    "separation_units",
)  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """Projections by token.

    Attributes:
        table: one row per arm, prompt, token, concept and site; columns as in `COLUMNS`. `step` counts from the first
            generated token: 0 is that one, -1 the last prompt token.
        generations: the answers by arm, in the order of the prompts.
        directions: what was projected onto.
    """

    table: pd.DataFrame
    generations: dict[str, list[Generation]]
    directions: tuple[Directions, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """Return the long table."""
        return self.table.copy()

    def end_of_reasoning(self) -> pd.DataFrame:
        """Return the step of the first answer token per arm and prompt; missing where no answer was reached.

        Columns: arm, prompt_id, reasoned (whether the model wrote reasoning at all), step.
        """
        written = self.table[self.table["step"] >= 0]
        rows = []
        for (arm, prompt), group in written.groupby(["arm", "prompt_id"], sort=False):
            answer = group.loc[group["role"] == "answer", "step"]
            reasoned = bool((group["role"] == "reasoning").any())
            rows.append((arm, prompt, reasoned, float(answer.min()) if len(answer) else float("nan")))
        return pd.DataFrame(rows, columns=["arm", "prompt_id", "reasoned", "step"])

    def plot(self, prompt_id: str | None = None, **options: Any) -> Any:
        """Return the projection along the generation, of one prompt or of the mean over prompts.

        `options`: see `plotting.trace.generation_trace`; `concept` and `site` choose among several.
        """
        from sgworkbench.plotting.trace import generation_trace

        return generation_trace(self.table, prompt_id=prompt_id, **options)

    def _repr_html_(self) -> str:
        arms = ", ".join(self.generations)
        n = self.table["prompt_id"].nunique()
        return (
            f"<b>Trace</b> of {n} prompts, arms {arms}: {len(self.table)} projections<br>"
            "next: <code>.plot()</code>, <code>.plot(prompt_id)</code>, <code>.to_dataframe()</code>"
        )


def trace_generation(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    directions: Directions | Sequence[Directions],
    settings: GenerationSettings | None = None,
    *,
    sites: Sequence[Site] | None = None,
    interventions: Intervention | Sequence[Intervention] = (),
    arm: str = "plain",
    prompt_tokens: bool = True,
    max_batch_tokens: int | None = None,
    report: Reporter = silent,
) -> Trace:
    """Generate answers and project every token on the way.

    The answers are those of `generate` with the same settings.

    Args:
        loaded: the model.
        rendered: the prompts.
        directions: one or several concepts.
        settings: how to decode.
        sites: where to read; all sites of the directions by default.
        interventions: steering during the generation, besides what is active already.
        arm: name of the arm in the table.
        prompt_tokens: also list the prompt's tokens.
        max_batch_tokens: as in `generate`.
        report: progress callback.

    Raises:
        WorkbenchError: no prompts, no fitted direction at a chosen site, two directions of one concept and site, or as
            `generate` and `steering`.
    """
    concepts = (directions,) if isinstance(directions, Directions) else tuple(directions)
    readers = _readers(concepts, sites, loaded)
    chosen = settings or GenerationSettings()
    ids = [item.prompt.id for item in rendered]
    if len(set(ids)) < len(ids):
        raise WorkbenchError("A trace tells prompts apart by their ids; make them differ, one trace per arm.")
    longest = max((len(item) for item in rendered), default=0)
    # One token more, so that the last one asked for is fed back and read; it is cut off again below.
    extra = int(longest + chosen.max_new_tokens < loaded.identity.context_length)
    recorders = {site: _Recorder(reader, loaded.identity.device) for site, reader in readers.items()}
    steps = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    hooks: dict[str, Callable[[Tensor], None]] = {site.hook_name: each.read for site, each in recorders.items()}
    with steering(loaded, steps) if steps else nullcontext(), reading(loaded.model, hooks):
        longer = generate(
            loaded,
            rendered,
            replace(chosen, max_new_tokens=chosen.max_new_tokens + extra),
            max_batch_tokens=max_batch_tokens,
            report=report,
            task=f"tracing, {arm}",
        )
    answers = [_shortened(loaded, each, chosen.max_new_tokens) for each in longer]
    collected = {site: recorder.collected() for site, recorder in recorders.items()}
    frames = []
    for row, (item, answer) in enumerate(zip(rendered, answers, strict=True)):
        facts = _token_facts(loaded, item, answer, arm)
        start = 0 if prompt_tokens else len(item)
        stop = len(item) + len(answer.token_ids) - answer.finished
        for site, (rows, positions, values) in collected.items():
            first, last = np.searchsorted(rows, [row, row + 1])
            mine = slice(first, last)
            kept = (positions[mine] >= start) & (positions[mine] < stop)
            frames.append(_rows_at(facts, positions[mine][kept], values[mine][kept], site, readers[site]))
    return Trace(pd.concat(frames, ignore_index=True)[list(COLUMNS)], {arm: answers}, concepts)


def join_traces(traces: Sequence[Trace]) -> Trace:
    """Put the traces of several arms into one.

    Raises:
        WorkbenchError: no traces, an arm given twice, or traces of other directions.
    """
    if not traces:
        raise WorkbenchError("Joining traces needs at least one.")
    generations: dict[str, list[Generation]] = {}
    for trace in traces:
        for arm, answers in trace.generations.items():
            if arm in generations:
                raise WorkbenchError(f"The arm {arm!r} occurs in two of the traces; name every arm once.")
            generations[arm] = answers
        if [d.describe() for d in trace.directions] != [d.describe() for d in traces[0].directions]:
            raise WorkbenchError("The traces were made with different directions; join only traces of the same ones.")
    table = pd.concat([trace.table for trace in traces], ignore_index=True)
    return Trace(table, generations, traces[0].directions)


@dataclass(frozen=True)
class _Reader:
    """The directions of one site, stacked: one column per concept."""

    concepts: tuple[str, ...]
    units: Float[Tensor, "d_model concept"]
    zero: Float[Tensor, "concept"]
    separation: Float[Tensor, "concept"]


def _readers(concepts: Sequence[Directions], sites: Sequence[Site] | None, loaded: LoadedModel) -> dict[Site, _Reader]:
    if not concepts:
        raise WorkbenchError("A trace needs at least one set of directions to project onto.")
    found: dict[Site, list[Directions]] = {}
    for each in concepts:
        require_type(each, Directions, "fitted directions", "fit them with awareness_directions(...) or another method")
        for site in each.sites if sites is None else sites:
            each.at(site)
            site.check(loaded.identity.n_layers)
            if each.concept in [other.concept for other in found.get(site, [])]:
                raise WorkbenchError(f"Two directions of the concept {each.concept!r} at {site}; rename one of them.")
            found.setdefault(site, []).append(each)
    readers = {}
    for site, members in sorted(found.items()):
        index = [each.sites.index(site) for each in members]
        pairs = list(zip(members, index, strict=True))
        readers[site] = _Reader(
            tuple(each.concept for each in members),
            torch.stack([each.unit[i] for each, i in pairs], dim=1),
            torch.stack([each.zero[i] for each, i in pairs]),
            torch.stack([each.separation[i] for each, i in pairs]),
        )
    return readers


class _Recorder:
    """Collects the projections at one site, on the model's device until the end."""

    def __init__(self, reader: _Reader, device: str) -> None:
        self._units = reader.units.to(device)
        self._kept: list[tuple[TokenBatch, Tensor]] = []

    def read(self, stream: Tensor) -> None:
        batch = current_batch()
        if batch is not None:
            self._kept.append((batch, stream.float() @ self._units))

    def collected(
        self,
    ) -> tuple[Int[np.ndarray, " token"], Int[np.ndarray, " token"], Float[np.ndarray, "token concept"]]:
        """Return prompt index, position and projections of all real tokens seen, by prompt and position."""
        rows, positions, values = [], [], []
        for batch, projected in self._kept:
            real = batch.is_real
            rows.append(batch.rows[:, None].expand_as(batch.positions)[real].cpu().numpy())
            positions.append(batch.positions[real].cpu().numpy())
            values.append(projected[real].cpu().numpy())
        row, position, value = np.concatenate(rows), np.concatenate(positions), np.concatenate(values)
        order = np.lexsort((position, row))
        row, position, value = row[order], position[order], value[order]
        # A batch that ran out of memory was run again: of a token seen twice, the second reading counts.
        last = np.append((np.diff(row) != 0) | (np.diff(position) != 0), True)
        return row[last], position[last], value[last]


def _shortened(loaded: LoadedModel, answer: Generation, n_tokens: int) -> Generation:
    """Cut an answer to a number of tokens; an answer that ended later counts as cut by the length."""
    if len(answer.token_ids) <= n_tokens:
        return answer
    kept = answer.token_ids[:n_tokens]
    text = loaded.tokenizer.decode(list(kept), skip_special_tokens=True)
    return replace(answer, text=text, token_ids=kept, finished=False)


def _token_facts(loaded: LoadedModel, item: RenderedPrompt, answer: Generation, arm: str) -> pd.DataFrame:
    """Return one row per token of prompt and answer, in order: what is the same at every site."""
    n_prompt, total = len(item), len(item) + len(answer.token_ids)
    written = [loaded.tokenizer.decode([token], skip_special_tokens=False) for token in answer.token_ids]
    return pd.DataFrame(
        {
            "arm": arm,
            "prompt_id": item.prompt.id,
            "position": np.arange(total),
            "step": np.arange(total) - n_prompt,
            "token": [*item.tokens, *written],
            "role": [*item.roles, *generated_roles(loaded.tokenizer, item, answer.token_ids)],
            "phase": np.where(np.arange(total) < n_prompt, "prefill", "decode"),
        }
    )


def _rows_at(
    facts: pd.DataFrame,
    positions: Int[np.ndarray, " token"],
    values: Float[np.ndarray, "token concept"],
    site: Site,
    reader: _Reader,
) -> pd.DataFrame:
    scaled = (values - reader.zero.numpy()) / reader.separation.numpy()
    return facts.iloc[np.repeat(positions, len(reader.concepts))].assign(
        concept=list(reader.concepts) * len(positions),
        site=str(site),
        layer=site.layer,
        raw=values.reshape(-1),
        separation_units=scaled.reshape(-1),
    )


def generated_roles(tokenizer: Any, item: RenderedPrompt, token_ids: Sequence[int]) -> list[str]:
    """Return `reasoning` or `answer` for every generated token.

    The same as the roles that selectors see while generating (`RoleTracker`), but for a beginning that only looked like
    the opening tag.
    """
    tracker = RoleTracker(tokenizer, item)
    roles = [tracker.role_of(int(token)) for token in token_ids]
    return list(roles) if tracker.reasoned else ["answer"] * len(roles)
