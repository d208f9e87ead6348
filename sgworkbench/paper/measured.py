"""Our own side of the paper figures: measured once on a model, kept, and shared by all figures.

One folder a model and setting. Every table is stored when it is finished, so that a stopped command goes on and a
finished one only redraws; the model is loaded when the first missing table asks for it, not before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from sgworkbench.analysis import Directions, Site
from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.evaluation.behaviour import ArmSpec, four_arms
from sgworkbench.evaluation.costs.spec import CostSpec, MultipleChoiceSpec
from sgworkbench.evaluation.costs.summary import measure_costs
from sgworkbench.evaluation.protocol_study import WORDINGS, ProtocolStudyConfig, run_protocol_study
from sgworkbench.evaluation.study import run_study
from sgworkbench.evaluation.study_config import StudyConfig
from sgworkbench.evaluation.sweep.run import run_sweep
from sgworkbench.models import LoadedModel
from sgworkbench.paper.measuring import (
    attention_maps,
    attention_table,
    hidden_states,
    study_tables,
    trace_tables,
)
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting import PromptSet, Renderer, concatenate, load_prompts
from sgworkbench.runs import RunDirectory, config_hash
from sgworkbench.steering import SteeringVector, choose_layers
from sgworkbench.written import validated

STUDY_TABLES = (
    "shift_map",
    "gap",
    "gap_nulls",
    "shift_norms",
    "vector",
    "layer_cosines",
    "rates",
    "behaviour",
    "facts",
)
TRACE_TABLES = ("trace_tokens", "trajectories")
PROTOCOL_TABLES = ("geometry", "effects")
TABLES = (*STUDY_TABLES, *TRACE_TABLES, *PROTOCOL_TABLES, "sweep", "attention", "attention_maps", "hidden", "costs")
"""Names of the tables that can be measured."""


class Sizes(BaseModel):
    """How much is measured: prompts per class unless said otherwise.

    Attributes:
        n_train, n_validation, n_test, n_answers, n_causal, n_map, n_null: as in `StudyConfig`.
        answer_tokens: length of the study's answers.
        n_trace: harmful prompts of the traces; trace_tokens: tokens they write.
        n_attention: harmful prompts of the attention traces; attention_tokens: tokens they write.
        map_tokens: tokens written in the attention map.
        n_hidden: prompts of the map of hidden states.
        sweep_depths: layers of the sweep, besides the steered one; sweep_alphas: coefficients.
        sweep_harmful, sweep_harmless, sweep_tokens: prompts answered in every cell and their length.
        n_vectors: prompts the vectors of the protocol study are read on; n_effects: held-out prompts.
        n_choices: multiple-choice items.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_train: int = Field(80, ge=2)
    n_validation: int = Field(24, ge=2)
    n_test: int = Field(48, ge=2)
    n_answers: int = Field(40, ge=1)
    n_causal: int = Field(12, ge=1)
    n_map: int = Field(16, ge=1)
    n_null: int = Field(100, ge=2)
    answer_tokens: int = Field(32, ge=1)
    n_trace: int = Field(10, ge=2)
    trace_tokens: int = Field(32, ge=1)
    n_attention: int = Field(6, ge=2)
    attention_tokens: int = Field(32, ge=1)
    map_tokens: int = Field(20, ge=1)
    n_hidden: int = Field(40, ge=3)
    sweep_depths: tuple[str, ...] = ("20%", "40%", "80%")
    sweep_alphas: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    sweep_harmful: int = Field(12, ge=1)
    sweep_harmless: int = Field(6, ge=1)
    sweep_tokens: int = Field(28, ge=1)
    n_vectors: int = Field(60, ge=2)
    n_effects: int = Field(32, ge=2)
    n_choices: int = Field(40, ge=1)

    @classmethod
    def quick(cls) -> Sizes:
        """Return sizes that show whether everything works; their numbers mean little."""
        return cls(
            n_train=12, n_validation=6, n_test=8, n_answers=6, n_causal=4, n_map=4, n_null=20, answer_tokens=16,
            n_trace=3, trace_tokens=10, n_attention=3, attention_tokens=10, map_tokens=10, n_hidden=8,
            sweep_depths=("40%",), sweep_alphas=(0.5, 2.0), sweep_harmful=3, sweep_harmless=2, sweep_tokens=8,
            n_vectors=8, n_effects=4, n_choices=6,
        )  # fmt: skip


class FigureSettings(BaseModel):
    """What is measured for the figures; see `StudyConfig` for the fields both have.

    Attributes:
        sizes: how much.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "demo"
    harmful: str = "builtin:contrast/harmful"
    harmless: str = "builtin:contrast/harmless"
    condition: str = "self-reminder"
    system_in_user: bool = False
    layers: str | None = None
    alpha: float = Field(0.5, allow_inf_nan=False)
    judge: str = "arditi-substrings"
    seed: int = 0
    thinking: bool | None = None
    chat_template: str | None = None
    dtype: str = "float32"
    device: str | None = None
    context_length: int | None = None
    sizes: Sizes = Field(default_factory=lambda: Sizes.model_validate({}))

    @classmethod
    def build(cls, **values: Any) -> FigureSettings:
        """Validate settings.

        Raises:
            WorkbenchError: unknown field or a value out of range, in one sentence.
        """
        return validated(cls, values, "figure")

    def study(self) -> StudyConfig:
        """Return the settings of the gap study that most figures come from."""
        sizes = self.sizes
        names = ("n_train", "n_validation", "n_test", "n_answers", "n_causal", "n_map", "n_null", "answer_tokens")
        return StudyConfig.build(**self.model_dump(exclude={"sizes"}), **{name: getattr(sizes, name) for name in names})


class Measured:
    """The tables of one model, read from its folder or measured now.

    Args:
        settings: what is asked.
        runs: folder of all runs; this one gets a folder of its own, named after model and settings.
        open_model: loads the model and makes its renderer; called at most once, when something is missing.
        report: progress callback.

    Raises:
        WorkbenchError: unreadable prompts, an unknown condition, or a folder that cannot be written.
    """

    def __init__(
        self,
        settings: FigureSettings,
        runs: str | Path,
        open_model: Callable[[], tuple[LoadedModel, Renderer]],
        *,
        report: Reporter = silent,
    ) -> None:
        self.settings = settings
        self._open, self._report = open_model, report
        study = settings.study()
        study.prompt_condition()  # a misspelt preset should not cost the loading of a model
        self._harmful = load_prompts(settings.harmful).labelled("harmful")
        self._harmless = load_prompts(settings.harmless).labelled("harmless")
        hashes = {"harmful": self._harmful.content_hash, "harmless": self._harmless.content_hash}
        config = {**settings.model_dump(mode="json"), "prompts_sha256": hashes}
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", Path(settings.model).name).strip("-.") or "model"
        self.folder = Path(runs) / f"{slug}-{config_hash(config)[:8]}"
        self._run = RunDirectory.open(self.folder, config)

    def table(self, name: str) -> pd.DataFrame:
        """Return a table; see `TABLES`.

        Raises:
            WorkbenchError: unknown name, or as the measurement raises.
        """
        if name not in TABLES:
            raise unknown_name("measured table", name, TABLES)
        if name in STUDY_TABLES:
            return self._run.table(name, lambda: self._study[name])
        if name in TRACE_TABLES:
            return self._run.table(name, lambda: self._traces[name])
        if name in PROTOCOL_TABLES:
            return self._run.table(name, lambda: self._protocols[name])
        single: dict[str, Callable[[], pd.DataFrame]] = {
            "sweep": self._sweep,
            "attention": self._attention,
            "attention_maps": self._attention_maps,
            "hidden": self._hidden,
            "costs": self._costs,
        }
        return self._run.table(name, single[name])

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Model, layers, sites, judge, splits and what else captions name."""
        table = self.table("facts")
        return {name: json.loads(value) for name, value in zip(table["name"], table["value"], strict=True)}

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.facts["model"]["name"])

    @cached_property
    def _session(self) -> tuple[LoadedModel, Renderer]:
        loaded, renderer = self._open()
        # A folder or file can be replaced under its name; results of two models must not share a folder.
        known = self._run.path / "stages" / "facts.parquet"
        if known.is_file():
            stored = self.facts["model"].get("weights_sha256")
            if stored != loaded.identity.weights_sha256:
                raise WorkbenchError(
                    f"{str(self.folder)!r} was measured on other weights under the name {self.settings.model!r}; "
                    "choose another folder with --runs, or remove it."
                )
        return loaded, renderer

    @cached_property
    def _study(self) -> dict[str, pd.DataFrame]:
        loaded, renderer = self._session
        config = self.settings.study()
        run = RunDirectory.open(self.folder / "study", config.model_dump(mode="json"))
        result = run_study(config, loaded, renderer, self._harmful, self._harmless, run, report=self._report)
        result.vector.save(run.path / "vector.safetensors")
        result.gap.awareness.save(run.path / "awareness.safetensors")
        result.gap.refusal.save(run.path / "refusal.safetensors")
        tables = study_tables(result)
        for name, table in tables.items():
            self._run.table(name, lambda table=table: table)  # type: ignore[misc]
        self._run.write_manifest({"model": result.model, "splits": result.splits, "seed": config.seed})
        return tables

    def _fitted(self) -> tuple[SteeringVector, Directions, Directions]:
        folder = self.folder / "study"
        if not (folder / "refusal.safetensors").is_file():
            self._study  # noqa: B018
        return (
            SteeringVector.load(folder / "vector.safetensors"),
            Directions.load(folder / "awareness.safetensors"),
            Directions.load(folder / "refusal.safetensors"),
        )

    def _arms(self) -> tuple[ArmSpec, ...]:
        vector, *_ = self._fitted()
        return four_arms(self.settings.study().prompt_condition(), vector, self.facts["layers"], self.settings.alpha)

    def _part(self, prompts: PromptSet, split: str, limit: int) -> PromptSet:
        """Return some prompts of a split, as the study divides them."""
        seed = self.settings.seed
        if not (prompts.has_split("train") and prompts.has_split("test")):
            prompts = prompts.with_split(train=0.5, validation=0.2, seed=seed)
        return prompts.split(split).sample(limit, seed=seed)

    @cached_property
    def _traces(self) -> dict[str, pd.DataFrame]:
        sizes = self.settings.sizes
        _, awareness, refusal = self._fitted()
        prompts = self._part(self._harmful, "test", sizes.n_trace)
        tables = trace_tables(
            *self._session,
            prompts,
            self._arms(),
            awareness,
            refusal,
            self.facts["shown_layer"],
            sizes.trace_tokens,
            report=self._report,
        )
        for name, table in tables.items():
            self._run.table(name, lambda table=table: table)  # type: ignore[misc]
        return tables

    def _attention(self) -> pd.DataFrame:
        sizes = self.settings.sizes
        arms = [arm for arm in self._arms() if arm.name in ("prompted", "both")]
        n_layers = self._session[0].identity.n_layers
        layers = sorted(set(choose_layers("25%,50%,75%,100%", n_layers)))
        prompts = self._part(self._harmful, "test", sizes.n_attention)
        return attention_table(*self._session, prompts, arms, layers, sizes.attention_tokens, report=self._report)

    def _attention_maps(self) -> pd.DataFrame:
        loaded, renderer = self._session
        sizes = self.settings.sizes
        # The shortest harmless prompt of a sample: its tokens have to be readable, and its answer may be shown.
        chosen = min(self._part(self._harmless, "test", 20), key=lambda prompt: len(prompt.text))
        arms = [arm for arm in self._arms() if arm.name in ("prompted", "both")]
        rendered = [(arm, renderer.render(chosen, arm.condition)) for arm in arms]
        return attention_maps(
            loaded, rendered, self.facts["shown_layer"], sizes.map_tokens, ("instruction", "user_suffix")
        )

    def _hidden(self) -> pd.DataFrame:
        n = self.settings.sizes.n_hidden
        prompts = concatenate("shown", [self._part(each, "test", n) for each in (self._harmful, self._harmless)])
        return hidden_states(
            *self._session,
            prompts,
            self._arms(),
            Site(self.facts["shown_layer"]),
            seed=self.settings.seed,
            report=self._report,
        )

    def _sweep(self) -> pd.DataFrame:
        sizes, settings = self.settings.sizes, self.settings
        vector, *_ = self._fitted()
        n_layers = self._session[0].identity.n_layers
        layers = sorted({*choose_layers(",".join(sizes.sweep_depths), n_layers), *self.facts["layers"]})
        result = run_sweep(
            {
                "model": settings.model,
                "system_in_user": settings.system_in_user,
                "vectors": [{"method": "given", "name": "safety-shift", "condition": settings.condition}],
                "layers": layers,
                "coefficients": list(sizes.sweep_alphas),
                "conditions": ["plain"],
                "metrics": ["refusal_log_odds", "kl"],
                "n_harmful": sizes.sweep_harmful,
                "n_harmless": sizes.sweep_harmless,
                "answers": {"cells": "all", "judge": settings.judge, "max_new_tokens": sizes.sweep_tokens},
                "sample_seed": settings.seed,
            },
            *self._session,
            self.folder / "sweep",
            harmful=self._harmful,
            harmless=self._harmless,
            vectors={"safety-shift": vector},
            report=self._report,
        )
        return result.to_dataframe()

    @cached_property
    def _protocols(self) -> dict[str, pd.DataFrame]:
        sizes, settings = self.settings.sizes, self.settings
        layer = ",".join(map(str, self.facts["layers"]))
        config = ProtocolStudyConfig.build(
            model=settings.model,
            sources=(settings.harmful, settings.harmless),
            harmless=settings.harmless,
            wordings=tuple(dict.fromkeys((settings.condition, *WORDINGS))),
            layers=layer,
            alphas=(settings.alpha, 2 * settings.alpha),
            n_train=sizes.n_vectors,
            n_test=sizes.n_effects,
            seed=settings.seed,
        )
        run = RunDirectory.open(self.folder / "protocols", config.model_dump(mode="json"))
        sources = {settings.harmful: self._harmful, settings.harmless: self._harmless}
        study = run_protocol_study(config, *self._session, sources, self._harmless, run, report=self._report)
        return {"geometry": study.geometry, "effects": study.effects}

    def _costs(self) -> pd.DataFrame:
        spec = CostSpec.build(
            divergence=None,
            perplexity=None,
            multiple_choice=MultipleChoiceSpec(n=self.settings.sizes.n_choices).model_dump(),
            seed=self.settings.seed,
        )
        return measure_costs(*self._session, self._arms(), spec, self._report).table
