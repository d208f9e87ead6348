"""The protocol study: what the choices behind a published vector change, in the vectors and in what they do.

A reference vector (first prompt set, first wording, protocol `same-site`, mean difference) is compared with vectors
that differ from it in one factor only:

- protocol: where it is written (`official`) and how it was read (`official-padded`, with its own norms and with those
  of the reference, because pads can have activations of another size);
- wording of the safety prompt;
- data set it was read on;
- method: mean difference against the first principal component of the centred differences, scaled to the same norm;
- control: a random direction of equal norm.

Geometry is reported per layer (norm, norm ratio, cosine with the reference), effects per layer and coefficient on
held-out prompts: shift of the first-token refusal log-odds on harmful ones, KL divergence and unchanged likeliest
token on harmless ones, each beside the reference, prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from sgworkbench.analysis import all_sites, capture
from sgworkbench.analysis.direction_methods import fit_directions
from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.refusal_score import REFUSAL_OPENINGS, first_tokens
from sgworkbench.evaluation.sweep.engine import ScreenEngine, Variant
from sgworkbench.evaluation.sweep.measures import ScreenSetup
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting import PromptCondition, PromptSet, Renderer, concatenate
from sgworkbench.runs import RunDirectory
from sgworkbench.statistics import paired_bootstrap
from sgworkbench.steering import SteeringVector, choose_layers
from sgworkbench.written import validated

REFERENCE = "reference"
NORM_MATCHED = "official-padded, norms of the reference"
WORDINGS = ("self-reminder", "self-reminder-assistant", "self-reminder-ai", "self-reminder-utility")
_METRICS = ("refusal_log_odds", "kl", "top1")
# Makes a vector; is handed the reference once there is one.
_Maker = Callable[[SteeringVector | None], SteeringVector]


class ProtocolStudyConfig(BaseModel):
    """Settings of a protocol study.

    Attributes:
        model: any source `load_model` takes.
        sources: prompt sources the vectors are read on; the first is the reference's, and its test split gives the
            held-out harmful prompts.
        harmless: prompt source of the harmless prompts.
        wordings: safety prompts; the first is the reference's.
        layers: layers steered, one at a time; see `choose_layers`.
        alphas: raw coefficients.
        prompted: steer on top of the reference's safety prompt instead of the plain prompt.
        n_train: prompts each vector is read on at most.
        n_test: held-out prompts per class at most.
        seed: seed of samples, splits, the control and intervals.
        thinking: the chat template's thinking switch.
        chat_template: Jinja file used instead of the tokenizer's template.
        dtype: of the weights.
        device: torch device, or None to choose.
        context_length: tokens to load the model for, or None for its default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "demo"
    sources: tuple[str, ...] = Field(("builtin:contrast/harmful", "builtin:contrast/harmless"), min_length=1)
    harmless: str = "builtin:contrast/harmless"
    wordings: tuple[str, ...] = Field(WORDINGS, min_length=1)
    layers: str = "40%,60%,80%"
    alphas: tuple[float, ...] = Field((0.5, 1.0), min_length=1)
    prompted: bool = False
    n_train: int = Field(100, ge=2)
    n_test: int = Field(60, ge=2)
    seed: int = 0
    thinking: bool | None = None
    chat_template: str | None = None
    dtype: str = "float32"
    device: str | None = None
    context_length: int | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @field_validator("alphas")
    @classmethod
    def _finite_and_not_zero(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(np.isfinite(alpha) and alpha != 0 for alpha in value):
            raise ValueError("coefficients must be finite and not 0")
        return value

    @field_validator("sources", "wordings", "alphas")
    @classmethod
    def _no_repeats(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(value)) < len(value):
            raise ValueError("an entry occurs twice")
        return value

    @classmethod
    def build(cls, **values: Any) -> ProtocolStudyConfig:
        """Validate settings.

        Raises:
            WorkbenchError: unknown field or a value out of range, in one sentence.
        """
        return validated(cls, values, "protocol study")


@dataclass(frozen=True)
class ProtocolStudy:
    """What a protocol study found.

    Attributes:
        config: what was asked.
        model: identity of the model.
        vectors: the vectors by name, the reference first.
        factors: the factor in which each differs from the reference.
        geometry: one row per vector and layer: vector, factor, layer, read_site, write_site, norm, norm_ratio,
            cosine (both with the reference at that layer).
        cosines: one row per pair of vectors and layer: first, second, layer, cosine.
        effects: one row per vector, layer, alpha and metric: mean with bootstrap interval, n, and the paired
            difference from the reference with its interval. Metrics: refusal_shift (harmful prompts, log-odds),
            kl (harmless, nats), top1 (harmless, share of prompts whose likeliest token stays).
        prompts: prompt sets by their part in the study, with size and hash.
    """

    config: ProtocolStudyConfig
    model: dict[str, Any]
    vectors: dict[str, SteeringVector]
    factors: dict[str, str]
    geometry: pd.DataFrame
    cosines: pd.DataFrame
    effects: pd.DataFrame
    prompts: dict[str, dict[str, str | int]]

    def to_dataframe(self) -> pd.DataFrame:
        """Return effects with the geometry of the steered layers beside them."""
        return self.effects.merge(self.geometry.drop(columns="factor"), on=["vector", "layer"], how="left")

    def plot_geometry(self, value: str = "cosine", *, theme: str = "light") -> Any:
        """Return `cosine` or `norm_ratio` with the reference by layer, one line per vector."""
        from sgworkbench.plotting.protocols import geometry_figure

        return geometry_figure(self, value, theme=theme)

    def plot_effects(self, metric: str = "refusal_shift", *, theme: str = "light") -> Any:
        """Return one metric per vector, layer and coefficient, with intervals."""
        from sgworkbench.plotting.protocols import effects_figure

        return effects_figure(self, metric, theme=theme)

    def _repr_html_(self) -> str:
        strongest = self.effects[self.effects["alpha"] == max(self.config.alphas)]
        shown = strongest[strongest["metric"] == "refusal_shift"].drop(columns="metric")
        return (
            f"<b>Protocol study</b> of {self.model['name']}: {len(self.vectors)} vectors<br>"
            f"next: <code>.plot_geometry()</code>, <code>.plot_effects()</code>{shown.to_html(index=False)}"
        )


def run_protocol_study(
    config: ProtocolStudyConfig,
    loaded: LoadedModel,
    renderer: Renderer,
    sources: Mapping[str, PromptSet],
    harmless: PromptSet,
    run: RunDirectory,
    *,
    report: Reporter = silent,
) -> ProtocolStudy:
    """Read all vectors, compare them, and steer with each; finished stages are kept in the run directory.

    Args:
        config: the settings.
        loaded: the model.
        renderer: turns prompts into tokens.
        sources: the prompt sets of `config.sources`, in that order.
        harmless: harmless prompts for KL and top-1.
        run: where finished stages are kept.
        report: progress callback.

    Raises:
        WorkbenchError: held-out prompts that a vector was read on, unknown wordings, or layers outside the model.
    """
    conditions = [PromptCondition.load(name) for name in config.wordings]
    layers = choose_layers(config.layers, loaded.identity.n_layers)
    train = {name: _part(prompts, "train", config.n_train, config.seed) for name, prompts in sources.items()}
    base = next(iter(sources))
    tests = {
        "harmful": _part(sources[base], "test", config.n_test, config.seed).labelled("harmful"),
        "harmless": _part(harmless, "test", config.n_test, config.seed).labelled("harmless"),
    }
    read_on = {text for prompts in train.values() for text in prompts.texts}
    shared = read_on & {text for prompts in tests.values() for text in prompts.texts}
    if shared:
        raise WorkbenchError(
            f"{len(shared)} held-out prompts are also among those a vector is read on; give sets that share none."
        )
    plans = _plans(loaded, renderer, train, conditions, config, report)
    vectors: dict[str, SteeringVector] = {}
    factors: dict[str, str] = {}
    for index, (name, (factor, make)) in enumerate(plans.items()):
        report("vectors", index, len(plans))
        vectors[name] = _kept_vector(run, f"vector_{index:02d}", lambda make=make: make(vectors.get(REFERENCE)))  # type: ignore[misc]
        factors[name] = factor
    report("vectors", len(plans), len(plans))
    geometry, cosines = _geometry(vectors, factors)
    items = run.table(
        "effects", lambda: _effects(loaded, renderer, vectors, layers, tests, conditions[0], config, report)
    )
    effects = _summary(items, vectors, factors, layers, config)
    sets = {f"train {name}": prompts.summary() for name, prompts in train.items()}
    sets |= {f"test {name}": prompts.summary() for name, prompts in tests.items()}
    return ProtocolStudy(config, loaded.identity.to_dict(), vectors, factors, geometry, cosines, effects, sets)


def _part(prompts: PromptSet, split: str, limit: int, seed: int) -> PromptSet:
    """Return train or test prompts; a set without splits is halved by hash, so that a text never changes sides."""
    has_both = prompts.has_split("train") and prompts.has_split("test")
    divided = prompts if has_both else prompts.with_split(train=0.5, seed=seed)
    return divided.split(split).sample(limit, seed=seed)


def _plans(
    loaded: LoadedModel,
    renderer: Renderer,
    train: Mapping[str, PromptSet],
    conditions: list[PromptCondition],
    config: ProtocolStudyConfig,
    report: Reporter,
) -> dict[str, tuple[str, _Maker]]:
    """Return name -> factor and the function that makes the vector, the reference first."""
    (base, prompts), condition = next(iter(train.items())), conditions[0]

    def extract(on: PromptSet, under: PromptCondition, protocol: str = "same-site") -> _Maker:
        return lambda _: SteeringVector.extract(loaded, renderer, on, under, protocol, report=report)

    plans: dict[str, tuple[str, _Maker]] = {
        REFERENCE: ("reference", extract(prompts, condition)),
        "protocol official": ("protocol", lambda reference: _made(reference).with_protocol("official")),
        "protocol official-padded": ("protocol", extract(prompts, condition, "official-padded")),
    }
    for other in conditions[1:]:
        plans[f"wording {other.name}"] = ("wording", extract(prompts, other))
    for name, on in train.items():
        if name != base:
            plans[f"data {name.removeprefix('builtin:')}"] = ("data set", extract(on, condition))
    plans["method pca_diff"] = (
        "method",
        lambda reference: pca_diff_vector(loaded, renderer, prompts, condition, _made(reference), report=report),
    )
    padded = plans["protocol official-padded"][1]
    plans[NORM_MATCHED] = ("protocol", lambda reference: with_norms_of(_made(reference), padded(reference)))
    plans["random direction"] = ("control", lambda reference: _made(reference).random_like(seed=config.seed))
    return plans


def with_norms_of(like: SteeringVector, vector: SteeringVector) -> SteeringVector:
    """Return a vector with the norms of another at every layer: its directions, at the other's dose."""
    unit = torch.nn.functional.normalize(vector.values, dim=-1)
    facts = {**vector.provenance, "scaled": "to the norms of another vector"}
    return replace(vector, values=unit * like.values.norm(dim=-1, keepdim=True), provenance=facts)


def _made(reference: SteeringVector | None) -> SteeringVector:
    if reference is None:
        raise WorkbenchError("The reference vector is made first.")
    return reference


def pca_diff_vector(
    loaded: LoadedModel,
    renderer: Renderer,
    prompts: PromptSet,
    condition: PromptCondition,
    like: SteeringVector,
    *,
    report: Reporter = silent,
) -> SteeringVector:
    """Return the first principal component of the centred differences, with the norms of another vector.

    Not the safety shift (see `fit_directions`): an ablation. Equal norms make one coefficient one dose.
    """
    sites = all_sites(loaded.identity.n_layers)
    prompted, plain = (
        capture(loaded, [renderer.render(p, each) for p in prompts], sites, report=report).per_prompt()
        for each in (condition, None)
    )
    directions = fit_directions("pca_diff", prompted, plain, sites=sites, concept="shift", read_at="last_prompt")
    values = directions.unit * like.values.norm(dim=-1, keepdim=True)
    facts = {**like.provenance, "method": "pca_diff, last prompt token, norms of the mean difference"}
    return SteeringVector(like.layers, values, like.read_kind, like.protocol, facts)


def _kept_vector(run: RunDirectory, stage: str, make: Callable[[], SteeringVector]) -> SteeringVector:
    """Return a vector from the run directory, or make it and keep it there."""
    file = run.path / "vectors" / f"{stage}.safetensors"

    def compute() -> pd.DataFrame:
        vector = make()
        vector.save(file)
        return vector.to_dataframe()

    run.table(stage, compute)
    return SteeringVector.load(file)


def _geometry(vectors: Mapping[str, SteeringVector], factors: Mapping[str, str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    reference = vectors[REFERENCE]
    unit = {name: torch.nn.functional.normalize(v.values.double(), dim=-1) for name, v in vectors.items()}
    norms = reference.values.double().norm(dim=-1)
    parts, pairs = [], []
    for name, vector in vectors.items():
        table = vector.to_dataframe().drop(columns="cosine_with_previous")
        table.insert(0, "vector", name)
        table.insert(1, "factor", factors[name])
        table["norm_ratio"] = (vector.values.double().norm(dim=-1) / norms).tolist()
        table["cosine"] = (unit[name] * unit[REFERENCE]).sum(-1).tolist()
        parts.append(table)
        for other in vectors:
            cosine = (unit[name] * unit[other]).sum(-1).tolist()
            pairs.append(pd.DataFrame({"first": name, "second": other, "layer": vector.layers, "cosine": cosine}))
    return pd.concat(parts, ignore_index=True), pd.concat(pairs, ignore_index=True)


def _effects(
    loaded: LoadedModel,
    renderer: Renderer,
    vectors: Mapping[str, SteeringVector],
    layers: tuple[int, ...],
    tests: Mapping[str, PromptSet],
    condition: PromptCondition,
    config: ProtocolStudyConfig,
    report: Reporter,
) -> pd.DataFrame:
    """Return one row per vector, layer, alpha and held-out prompt; alpha 0 is the unsteered run."""
    prompts = concatenate("held out", list(tests.values()))
    under = condition if config.prompted else None
    rendered = [renderer.render(prompt, under) for prompt in prompts]
    labels = [prompt.label for prompt in prompts]
    setup = ScreenSetup(_METRICS, first_tokens(loaded, REFUSAL_OPENINGS))
    engine = ScreenEngine(loaded, rendered, labels, setup)
    cells = [(name, layer, alpha) for name in vectors for layer in layers for alpha in config.alphas]
    variants = [
        Variant(str(index), (vectors[name].intervention(layer, alpha),))
        for index, (name, layer, alpha) in enumerate(cells)
    ]
    items = engine.run([Variant("plain"), *variants], lambda done: report("steering", done, len(variants) + 1))
    facts = pd.DataFrame([("", -1, 0.0), *cells], columns=["vector", "layer", "alpha"])
    facts.insert(0, "key", ["plain", *(variant.key for variant in variants)])
    return facts.merge(items, on="key").drop(columns="key")


def _summary(
    items: pd.DataFrame,
    vectors: Mapping[str, SteeringVector],
    factors: Mapping[str, str],
    layers: tuple[int, ...],
    config: ProtocolStudyConfig,
) -> pd.DataFrame:
    by_cell = dict(tuple(items.groupby(["vector", "layer", "alpha"], sort=False)))
    plain = by_cell["", -1, 0.0]
    rows = []
    for layer in layers:
        for alpha in config.alphas:
            reference = _scores(by_cell[REFERENCE, layer, alpha], plain)
            for name in vectors:
                scores = _scores(by_cell[name, layer, alpha], plain)
                for metric, values in scores.items():
                    boot = paired_bootstrap(np.stack([values, values - reference[metric]], -1), seed=config.seed)
                    (mean, change), (low, change_low), (high, change_high) = boot.mean, boot.low, boot.high
                    row = (name, factors[name], layer, alpha, metric, mean, low, high, len(values))
                    rows.append((*row, change, change_low, change_high))
    columns = ["vector", "factor", "layer", "alpha", "metric", "value", "low", "high", "n"]
    return pd.DataFrame(rows, columns=[*columns, "change", "change_low", "change_high"])


def _scores(cell: pd.DataFrame, plain: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return the values per held-out prompt: refusal shift of the harmful ones, KL and top-1 of the harmless ones."""
    harmful, harmless = cell[cell["label"] == "harmful"], cell[cell["label"] == "harmless"]
    before = plain[plain["label"] == "harmful"]
    if list(before["prompt_id"]) != list(harmful["prompt_id"]):
        raise WorkbenchError("The stored effects do not list the same prompts for every cell; remove the run.")
    return {
        "refusal_shift": harmful["refusal_log_odds"].to_numpy(float) - before["refusal_log_odds"].to_numpy(float),
        "kl": harmless["kl"].to_numpy(float),
        "top1": harmless["top1"].to_numpy(float),
    }
