"""Fitting awareness directions, and refusal directions from the model's own answers, with their cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from sgworkbench.analysis import (
    Directions,
    Readings,
    awareness_directions,
    content_directions,
    refusal_directions,
    unembedding_directions,
)
from sgworkbench.analysis.gap import strata_index, text_hash
from sgworkbench.analysis.nulls import shuffled_unit_directions
from sgworkbench.analysis.separation import cross_validated_auroc
from sgworkbench.evaluation.behaviour import ArmSpec, answer
from sgworkbench.evaluation.refusal_score import COMPLIANCE_OPENINGS, REFUSAL_OPENINGS, first_tokens
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting import PromptCondition, PromptSet, Renderer
from sgworkbench.runs import RunDirectory
from sgworkbench.steering import GenerationSettings

RefusalSource = Literal["judged", "content", "unembedding"]


def training_facts(loaded: LoadedModel, prompts: PromptSet) -> dict[str, Any]:
    """Return what directions remember of their training: the model, the prompts, and a hash of every text.

    `measure_gap` refuses prompts whose hash is among them.
    """
    return {
        "model": loaded.identity.to_dict(),
        "train": prompts.summary(),
        "train_texts_sha256": [text_hash(text) for text in prompts.texts],
    }


def fit_awareness(
    plain: Readings, prompts: PromptSet, *, seed: int = 0, provenance: Mapping[str, Any] | None = None
) -> Directions:
    """Fit awareness directions on labelled training prompts, and cross-validate them.

    Args:
        plain: activations of the prompts in the plain condition.
        prompts: harmful and harmless prompts, in the order of the activations.
        seed: seed of the folds.
        provenance: facts to record.

    Raises:
        WorkbenchError: one of the classes is empty.
    """
    harmful = torch.tensor([prompt.label == "harmful" for prompt in prompts])
    directions = awareness_directions(
        plain.instruction[harmful], plain.instruction[~harmful], plain.sites, dict(provenance or {})
    )
    return directions.with_separation(cross_validated_auroc(plain.instruction, harmful, pair_index(prompts), seed=seed))


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
            directions = content_directions(one, zero, plain.sites, facts)
            area = cross_validated_auroc(plain.prompt, harmful, pair_index(prompts), seed=seed)
            return directions.with_separation(area), null
        refusal, compliance = (first_tokens(loaded, openings) for openings in (REFUSAL_OPENINGS, COMPLIANCE_OPENINGS))
        weights = loaded.model.W_U
        means = (zero.mean(0), one.mean(0))
        return unembedding_directions(weights, refusal, compliance, *means, plain.sites, facts), null
    settings = GenerationSettings(max_new_tokens=max_new_tokens)

    def answers(arm: ArmSpec) -> Callable[[], pd.DataFrame]:
        return lambda: answer(loaded, renderer, prompts, arm, settings, judge, report=report, task="training answers")

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
    # The null repeats the fit that was made: within strata, pooled, or on the content of the plain prompts.
    fit = directions.provenance["fit"]
    used = which == 0 if fit == "content" else torch.ones_like(refused)
    label = (content if fit == "content" else refused.long())[used]
    strata = strata_index(which, content) if fit == "stratified" else None
    null = shuffled_unit_directions(
        values[used],
        label,
        n=n_null,
        strata=strata,
        min_per_class=directions.provenance.get("min_per_class", 1),
        seed=seed + 1,
    )
    group = torch.cat([pair_index(prompts)] * 2)[known]
    area = cross_validated_auroc(values[used], label.bool(), group[used], strata=strata, seed=seed)
    return directions.with_separation(area), null


def pair_index(prompts: PromptSet) -> Int[Tensor, "prompt"]:
    """Return one number per prompt, the same for a harmful request and its look-alike."""
    keys = [prompt.pair or prompt.id for prompt in prompts]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([numbers[key] for key in keys])
