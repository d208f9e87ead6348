"""The gap study: from two sets of prompts and a safety prompt to directions, vector, gap, answers and controls.

Order of work: everything that is fitted (awareness and refusal directions, their scales, the steering vector, the
awareness threshold) comes from the training split, and so does the layer at which arms are compared; the awareness
layer and the causal check use the validation split; everything else that is reported comes from the test split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from sgworkbench.analysis import (
    Directions,
    GapResult,
    Readings,
    SafetyShift,
    ShiftMap,
    Site,
    all_sites,
    measure_gap,
    parse_layers,
    read_for_gap,
    shift_map,
)
from sgworkbench.analysis.gap import NullFit
from sgworkbench.analysis.nulls import shuffled_unit_directions
from sgworkbench.analysis.projection import LayerCurve, best_layer, held_out_separation, projected_shift
from sgworkbench.analysis.shift import shift_from_readings
from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.behaviour import ArmSpec, answer, four_arms, refusal_rates
from sgworkbench.evaluation.direction_fitting import fit_awareness, fit_refusal, training_facts
from sgworkbench.evaluation.study_config import StudyConfig
from sgworkbench.evaluation.study_tables import aware_and_complied_table, comparisons_table, held_out_table
from sgworkbench.evaluation.validation import CausalCheck, causal_check
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting import PromptCondition, PromptSet, Renderer, concatenate
from sgworkbench.runs import RunDirectory
from sgworkbench.steering import GenerationSettings, SteeringVector, steering

# The published setting for the 8B model, as a share of its depth: layer 20 of 36.
PUBLISHED_LAYER, PUBLISHED_DEPTH = 20, 36


@dataclass(frozen=True)
class StudyResult:
    """Everything a gap study found.

    Attributes:
        config: what was asked.
        model: identity of the model.
        condition: the safety prompt.
        layers: layers steered.
        awareness_layer: layer at which the awareness direction separates the validation split best.
        shown_layer: layer for comparing the arms: of those that steering can reach, the one where both directions
            separate best in cross-validation on the training split.
        shift: the safety shift on the training harmful prompts.
        vector: the steering vector made of it.
        shift_map: projection of the shift per layer and token, harmful test prompts.
        gap: awareness, refusal and gap of the test prompts in the four arms.
        separation: held-out AUROC of the awareness direction by layer, with nulls.
        projected: projection of the shift onto the refusal direction by layer, harmful test prompts, with nulls.
        causal: the causal check of the refusal direction; None where the direction has no class distance to add.
        held_out: AUROC of refused against complied per condition at the shown layer.
        answers: one row per test prompt and arm; None when nothing was generated.
        rates: refusal rate per arm and label; None when nothing was generated.
        comparisons: paired tests between arms; None when nothing was generated.
        behaviour: aware x complied per arm; None when nothing was generated.
        splits: prompt counts and hashes by split and label.
    """

    config: StudyConfig
    model: dict[str, Any]
    condition: PromptCondition
    layers: tuple[int, ...]
    awareness_layer: int
    shown_layer: int
    shift: SafetyShift
    vector: SteeringVector
    shift_map: ShiftMap
    gap: GapResult
    separation: LayerCurve
    projected: LayerCurve
    causal: CausalCheck | None
    held_out: list[dict[str, Any]]
    answers: pd.DataFrame | None
    rates: pd.DataFrame | None
    comparisons: pd.DataFrame | None
    behaviour: pd.DataFrame | None
    splits: dict[str, dict[str, str | int]]

    @property
    def shown_site(self) -> Site:
        """The site of single-layer figures."""
        return Site(self.shown_layer)

    def summary(self) -> dict[str, Any]:
        """Return the main numbers, JSON-serialisable."""
        layer = self.shown_layer
        at = self.separation.table.set_index("layer").loc[self.awareness_layer].to_dict()
        gap = self.gap.summary("gap")
        rows = gap[gap["layer"] == layer].set_index("arm")
        return {
            "model": self.model["name"],
            "condition": self.condition.name,
            "awareness_site": str(Site(self.awareness_layer)),
            "shown_site": str(self.shown_site),
            "awareness_auroc": {k: round(float(at[k]), 4) for k in ("value", "low", "high")} | {"n": int(at["n"])},
            "gap": {
                arm: {k: round(float(row[k]), 4) for k in ("value", "low", "high")} | {"n": int(row["n"])}
                for arm, row in rows.iterrows()
            },
            "refusal_direction": {"source": self.gap.refusal.source, "validated": self.gap.refusal.validated},
            "steering": {"layers": list(self.layers), "alpha": self.config.alpha, "protocol": self.config.protocol},
            "refusal_rates": [] if self.rates is None else self.rates.to_dict("records"),
            "splits": self.splits,
        }


@dataclass(frozen=True)
class _Split:
    """One split of both classes, harmful first."""

    prompts: PromptSet
    harmful: Bool[Tensor, "prompt"]


def run_study(
    config: StudyConfig,
    loaded: LoadedModel,
    renderer: Renderer,
    harmful: PromptSet,
    harmless: PromptSet,
    run: RunDirectory,
    *,
    report: Reporter = silent,
) -> StudyResult:
    """Run a gap study; generated answers are kept in the run directory as they are finished.

    Args:
        config: the settings.
        loaded: the model.
        renderer: turns prompts into tokens.
        harmful: harmful requests; split by hash when the set has no splits of its own.
        harmless: harmless requests, likewise.
        run: where finished stages are kept.
        report: progress callback.

    Raises:
        WorkbenchError: too few prompts, prompts shared between the sets or splits, layers outside the model.
    """
    condition = config.prompt_condition()
    splits = _split(config, harmful, harmless)
    train, test = splits["train"], splits["test"]
    n_layers = loaded.identity.n_layers
    scaled = str(round(PUBLISHED_LAYER / PUBLISHED_DEPTH * n_layers))
    sites = all_sites(n_layers)
    layers = parse_layers(scaled if config.layers is None else config.layers, n_layers)

    def read(split: _Split, condition: PromptCondition | None, task: str) -> Readings:
        rendered = [renderer.render(prompt, condition) for prompt in split.prompts]
        return read_for_gap(loaded, rendered, sites, report=report, task=task)

    train_plain = read(train, None, "training prompts, plain")
    facts = training_facts(loaded, train.prompts)
    awareness = fit_awareness(train_plain, train.prompts, seed=config.seed, provenance=facts)
    shuffled_awareness = shuffled_unit_directions(
        train_plain.instruction, train.harmful.long(), n=config.n_null, seed=config.seed
    )
    train_prompted = read(train, condition, "training prompts, prompted")
    refusal, shuffled_refusal = fit_refusal(
        loaded,
        renderer,
        train.prompts,
        condition,
        train_plain,
        train_prompted,
        source=config.refusal_source,
        judge=config.judge,
        max_new_tokens=config.train_tokens,
        n_null=config.n_null,
        seed=config.seed,
        run=run,
        provenance=facts,
        report=report,
    )
    shift = shift_from_readings(
        train_plain.prompt[train.harmful],
        train_prompted.prompt[train.harmful],
        sites,
        loaded=loaded,
        renderer=renderer,
        prompts=train.prompts.harmful,
        condition=condition,
    )
    vector = (
        # The only protocol that reads elsewhere; its shift is not the one reported.
        SteeringVector.extract(loaded, renderer, train.prompts.harmful, condition, config.protocol, report=report)
        if config.protocol == "official-padded"
        else shift.steering_vector(config.protocol)
    )

    validation = splits.get("validation", train)
    curve = held_out_separation(
        read(validation, None, "validation prompts, plain").instruction,
        validation.harmful,
        awareness,
        n_null=2,
    )
    best, shown = best_layer(curve), _layer_to_show(awareness, refusal, max(layers))
    arms = four_arms(condition, vector, layers, config.alpha)
    readings: dict[str, Readings] = {}
    for arm in arms:
        with steering(loaded, arm.interventions):
            readings[arm.name] = read(test, arm.condition, f"test prompts, {arm.name}")

    causal = _check(config, loaded, renderer, condition, refusal, Site(shown), validation, report)
    held_out: list[dict[str, Any]] = []
    answers = rates = comparisons = behaviour = None
    if config.n_answers:
        answers = _answers(config, loaded, renderer, arms, test.prompts, run, report)
        rates = refusal_rates(answers)
        comparisons = comparisons_table(answers)
        held_out = held_out_table(answers, readings, refusal, shown, test.prompts)
        behaviour = aware_and_complied_table(
            answers, readings, awareness, best, train_plain, train.prompts, test.prompts
        )
    refusal = refusal.with_provenance(
        validated=None if causal is None else causal.passed,
        causal_check=None if causal is None else causal.to_dict(),
        held_out=held_out,
    )
    gap = measure_gap(
        readings,
        test.prompts,
        awareness,
        refusal,
        shuffled=NullFit(shuffled_awareness, shuffled_refusal),
        n_null=config.n_null,
        seed=config.seed,
    )
    separation = held_out_separation(
        readings["plain"].instruction, test.harmful, awareness, shuffled=shuffled_awareness, n_null=config.n_null
    )
    projected = projected_shift(
        readings["plain"].prompt[test.harmful],
        readings["prompted"].prompt[test.harmful],
        refusal,
        shuffled=shuffled_refusal,
        n_null=config.n_null,
        seed=config.seed,
    )
    mapped = test.prompts.harmful.sample(config.n_map, seed=config.seed)
    tokens = shift_map(loaded, renderer, mapped, condition, refusal, n_null=config.n_null, report=report)
    return StudyResult(
        config,
        loaded.identity.to_dict(),
        condition,
        layers,
        best,
        shown,
        shift,
        vector,
        tokens,
        gap,
        separation,
        projected,
        causal,
        held_out,
        answers,
        rates,
        comparisons,
        behaviour,
        {f"{name}/{part.name.split('/')[-1]}": part.summary() for name, part in _parts(splits)},
    )


def _parts(splits: dict[str, _Split]) -> list[tuple[str, PromptSet]]:
    return [(name, part) for name, split in splits.items() for part in (split.prompts.harmful, split.prompts.harmless)]


def _split(config: StudyConfig, harmful: PromptSet, harmless: PromptSet) -> dict[str, _Split]:
    shared = set(harmful.texts) & set(harmless.texts)
    if shared:
        raise WorkbenchError(
            f"{len(shared)} prompts are in both the harmful and the harmless set; each must have one label."
        )
    sets = []
    for prompts, label in ((harmful, "harmful"), (harmless, "harmless")):
        labelled = prompts.labelled(label)  # type: ignore[arg-type]
        if not (labelled.has_split("train") and labelled.has_split("test")):
            labelled = labelled.with_split(train=0.5, validation=0.2, seed=config.seed)
        sets.append(labelled)
    limits = {"train": config.n_train, "validation": config.n_validation, "test": config.n_test}
    splits: dict[str, _Split] = {}
    for name, limit in limits.items():
        if not all(prompts.has_split(name) for prompts in sets):  # type: ignore[arg-type]
            continue
        parts = [prompts.split(name).sample(limit, seed=config.seed) for prompts in sets]
        joined = concatenate(name, parts)
        splits[name] = _Split(joined, torch.tensor([p.label == "harmful" for p in joined]))
    texts = {name: set(split.prompts.texts) for name, split in splits.items()}
    for name in texts:
        if name != "train" and texts["train"] & texts[name]:
            raise WorkbenchError(
                f"{len(texts['train'] & texts[name])} prompts are in both train and {name}; remove the duplicates."
            )
    return splits


def _layer_to_show(awareness: Directions, refusal: Directions, lowest: int) -> int:
    """Return the layer from `lowest` on with the best weaker direction, by cross-validation on the training split."""
    areas = [d.provenance.get("cross_validated_auroc") for d in (awareness, refusal)]
    measured = [area for area in areas if area is not None]
    if not measured:
        return lowest
    weaker = np.min(np.array(measured), axis=0)
    return lowest + int(np.argmax(weaker[lowest:]))


def _check(
    config: StudyConfig,
    loaded: LoadedModel,
    renderer: Renderer,
    condition: PromptCondition,
    refusal: Directions,
    site: Site,
    validation: _Split,
    report: Reporter,
) -> CausalCheck | None:
    if bool(torch.isnan(refusal.separation[refusal.sites.index(site)])):
        return None
    prompts = validation.prompts.harmful.sample(config.n_causal, seed=config.seed)
    plain = [renderer.render(prompt) for prompt in prompts]
    prompted = [renderer.render(prompt, condition) for prompt in prompts]
    return causal_check(loaded, refusal, site, plain, prompted, seed=config.seed, report=report)


def _answers(
    config: StudyConfig,
    loaded: LoadedModel,
    renderer: Renderer,
    arms: tuple[ArmSpec, ...],
    test: PromptSet,
    run: RunDirectory,
    report: Reporter,
) -> pd.DataFrame:
    settings = GenerationSettings(max_new_tokens=config.answer_tokens)
    chosen = concatenate(
        "answered", [part.sample(config.n_answers, seed=config.seed) for part in (test.harmful, test.harmless)]
    )
    tables = [
        run.table(
            f"answers_{arm.name}",
            lambda arm=arm: answer(
                loaded, renderer, chosen, arm, settings, config.judge, report=report, task="test answers"
            ),  # type: ignore[misc]
        )
        for arm in arms
    ]
    return pd.concat(tables, ignore_index=True)
