"""Fitting refusal directions from the model's own answers, or from a source chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from sgworkbench.analysis import (
    Directions,
    Readings,
    content_directions,
    refusal_directions,
    unembedding_directions,
)
from sgworkbench.analysis.gap import strata_index
from sgworkbench.analysis.nulls import shuffled_unit_directions
from sgworkbench.evaluation.behaviour import ArmSpec, answer
from sgworkbench.evaluation.refusal_score import COMPLIANCE_OPENINGS, REFUSAL_OPENINGS, first_tokens
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting import PromptCondition, PromptSet, Renderer
from sgworkbench.runs import RunDirectory
from sgworkbench.steering import GenerationSettings

RefusalSource = Literal["judged", "content", "unembedding"]


def fit_refusal(
    loaded: LoadedModel,
    renderer: Renderer,
    prompts: PromptSet,
    condition: PromptCondition,
    plain: Readings,
    prompted: Readings,
    *,
    source: RefusalSource = "judged",
    judge: str = "arditi-substrings",
    max_new_tokens: int = 16,
    n_null: int = 200,
    seed: int = 0,
    run: RunDirectory | None = None,
    provenance: Mapping[str, Any] | None = None,
    report: Reporter = silent,
) -> tuple[Directions, Tensor]:
    """Fit refusal directions on training prompts, and the same to shuffled labels.

    With source `judged` the prompts are answered with and without the safety prompt, the answers judged, and
    `refusal_directions` (with its fallbacks) fitted; `content` and `unembedding` choose those sources by name.

    Args:
        loaded: the model.
        renderer: turns prompts into tokens.
        prompts: labelled training prompts, harmful and harmless.
        condition: the safety prompt.
        plain: activations of the prompts in the plain condition.
        prompted: activations of the same prompts under the safety prompt.
        source: where the direction comes from.
        judge: judge of the answers.
        max_new_tokens: length of the answers.
        n_null: how many shuffled fits.
        seed: seed of the shuffles.
        run: keeps finished answers, so that an interrupted fit resumes.
        provenance: facts to record.
        report: progress callback.

    Returns:
        The directions, and null x site x d_model unit directions of the shuffled fits.

    Raises:
        WorkbenchError: as `refusal_directions`.
    """
    facts = dict(provenance or {})
    harmful = torch.tensor([prompt.label == "harmful" for prompt in prompts])
    if source != "judged":
        null = shuffled_unit_directions(plain.prompt, harmful.long(), n=n_null, seed=seed + 1)
        one, zero = plain.prompt[harmful], plain.prompt[~harmful]
        if source == "content":
            return content_directions(one, zero, plain.sites, facts), null
        refusal, compliance = (first_tokens(loaded, openings) for openings in (REFUSAL_OPENINGS, COMPLIANCE_OPENINGS))
        weights = loaded.model.W_U
        means = (zero.mean(0), one.mean(0))
        return unembedding_directions(weights, refusal, compliance, *means, plain.sites, facts), null
    settings = GenerationSettings(max_new_tokens=max_new_tokens)

    def answers(arm: ArmSpec) -> Callable[[], pd.DataFrame]:
        return lambda: answer(loaded, renderer, prompts, arm, settings, judge, report=report)

    arms = (ArmSpec("plain", PromptCondition.plain()), ArmSpec("prompted", condition))
    tables = [run.table(f"train_answers_{arm.name}", answers(arm)) if run else answers(arm)() for arm in arms]
    outcome = pd.concat(tables, ignore_index=True)["refused"]
    known = torch.tensor(outcome.notna().tolist())
    refused = torch.tensor(outcome.fillna(False).astype(bool).tolist())[known]
    values = torch.cat([plain.prompt, prompted.prompt])[known]
    which = torch.arange(2).repeat_interleave(len(prompts))[known]
    content = torch.cat([harmful, harmful]).long()[known]
    facts |= {"judge": judge, "unjudged": int((~known).sum())}
    directions = refusal_directions(values, refused, which, content, plain.sites, provenance=facts)
    fit = directions.provenance["fit"]
    label = content if fit == "content" else refused.long()
    strata = strata_index(which, content) if fit == "stratified" else which
    return directions, shuffled_unit_directions(values, label, n=n_null, strata=strata, seed=seed + 1)
