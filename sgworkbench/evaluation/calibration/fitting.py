"""What candidates are made of, fitted on the training split: vectors, awareness directions and gate thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sgworkbench.analysis import Directions, Readings, all_sites, read_for_gap, safety_shift
from sgworkbench.analysis.direction_methods import fit_directions
from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.calibration.candidates import GateChoice
from sgworkbench.evaluation.calibration.data import CalibrationData
from sgworkbench.evaluation.calibration.spec import CalibrationSpec
from sgworkbench.evaluation.direction_fitting import training_facts
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting import PromptCondition, PromptSet, Renderer
from sgworkbench.steering import Condition, SteeringVector, choose_layers, fit_threshold

# Fewer prompts make a mean of activations of little use; a vector from fewer is left out, by name.
LEAST_PROMPTS = 3


class Fitting:
    """Readings of the training prompts, and everything fitted on them.

    Args:
        spec: what was asked.
        loaded: the model, without active steering.
        renderer: turns prompts into tokens.
        condition: the safety prompt.
        data: the prompts.
        train_answers: answers to the training prompts by prompted (False, True), with `refused`.
        report: progress callback.
    """

    def __init__(
        self,
        spec: CalibrationSpec,
        loaded: LoadedModel,
        renderer: Renderer,
        condition: PromptCondition,
        data: CalibrationData,
        train_answers: dict[bool, pd.DataFrame],
        report: Reporter = silent,
    ) -> None:
        self.spec, self.loaded, self.renderer = spec, loaded, renderer
        self.condition, self.data, self.train_answers, self.report = condition, data, train_answers, report
        self.vectors: dict[str, SteeringVector] = {}
        self.directions: dict[str, Directions] = {}
        self.notes: list[str] = []
        self._readings: dict[tuple[str, bool], Readings] = {}
        self._harmful = torch.tensor([prompt.label == "harmful" for prompt in data.train])

    @property
    def sources(self) -> dict[str, SteeringVector | Directions]:
        """Everything that interventions can name."""
        return {**self.vectors, **self.directions}

    def readings(self, prompts: PromptSet, prompted: bool) -> Readings:
        """Return activations of prompts at the output of every block, read once."""
        key = (prompts.content_hash, prompted)
        if key not in self._readings:
            chosen = self.condition if prompted else None
            rendered = [self.renderer.render(prompt, chosen) for prompt in prompts]
            sites = all_sites(self.loaded.identity.n_layers)
            task = f"reading {prompts.name} prompts, {'prompted' if prompted else 'plain'}"
            self._readings[key] = read_for_gap(self.loaded, rendered, sites, report=self.report, task=task)
        return self._readings[key]

    def fit_vectors(self) -> tuple[str, ...]:
        """Fit the vectors asked for and return the names of those that could be fitted."""
        refused = {prompted: _outcome(table) for prompted, table in self.train_answers.items()}
        for name in self.spec.vectors:
            harmful = self._harmful.numpy()
            if name == "refused_minus_complied":
                one, zero = harmful & (refused[True] == 1), harmful & (refused[False] == 0)
                self._from_runs(name, one, zero)
                continue
            chosen = ~harmful if name == "harmless_shift" else harmful
            self.shift_of(name, chosen & (refused[True] == 1) if name == "refused_shift" else chosen)
        if not self.vectors:
            raise WorkbenchError(
                f"No vector could be fitted: {'; '.join(self.notes)}; give more training prompts or other vectors."
            )
        return tuple(self.vectors)

    def shift_of(self, name: str, chosen: Bool[np.ndarray, " prompt"]) -> bool:
        """Fit the mean shift of some training prompts under a name; return whether there were enough of them."""
        if chosen.sum() < LEAST_PROMPTS:
            self.notes.append(f"{name} left out, only {int(chosen.sum())} training prompts for it")
            return False
        prompts = PromptSet(name, tuple(p for p, keep in zip(self.data.train, chosen, strict=True) if keep))
        found = safety_shift(self.loaded, self.renderer, prompts, self.condition, report=self.report)
        self.vectors[name] = found.steering_vector()
        return True

    def _from_runs(self, name: str, one: Bool[np.ndarray, " prompt"], zero: Bool[np.ndarray, " prompt"]) -> None:
        if min(one.sum(), zero.sum()) < LEAST_PROMPTS:
            self.notes.append(
                f"{name} left out, only {int(one.sum())} prompted refusals and {int(zero.sum())} plain compliances"
            )
            return
        prompted, plain = (self.readings(self.data.train, each).prompt for each in (True, False))
        values = prompted[torch.from_numpy(one)].mean(0) - plain[torch.from_numpy(zero)].mean(0)
        facts = {
            "method": "mean of prompted runs that refuse minus mean of plain runs that comply, last prompt token",
            "condition": self.condition.to_dict(),
            "model": self.loaded.identity.to_dict(),
            "prompts": self.data.train.summary(),
            "n": [int(one.sum()), int(zero.sum())],
            "template_sha256": self.renderer.template_sha256,
        }
        self.vectors[name] = SteeringVector(tuple(range(len(values))), values, provenance=facts)

    def fit_gates(self, prompted: bool, *, weights: Sequence[int] | None = None, suffix: str = "") -> list[GateChoice]:
        """Fit awareness directions and thresholds in the condition in which the gate is used.

        Args:
            prompted: whether that is under the safety prompt.
            weights: how often each training prompt counts; refinement repeats those that went wrong.
            suffix: added to the names of the directions.
        """
        spec, train = self.spec, self.readings(self.data.train, prompted)
        repeats = torch.ones(len(self._harmful)).long() if weights is None else torch.tensor(weights)
        index = torch.arange(len(repeats)).repeat_interleave(repeats)
        harmful = self._harmful[index]
        layers = dict.fromkeys(choose_layers(each, self.loaded.identity.n_layers)[-1] for each in spec.gate_layers)
        gates = []
        for at in spec.gate_tokens:
            values = _token(train, at)
            for layer in layers:
                for method in spec.gate_methods:
                    name = f"awareness {method} {layer} {at}{' prompted' if prompted else ''}{suffix}"
                    site = Site(layer)
                    here = values[index][:, [layer]]
                    found = fit_directions(
                        method,
                        here[harmful],
                        here[~harmful],
                        sites=(site,),
                        concept="awareness",
                        read_at=at,
                        provenance=training_facts(self.loaded, self.data.train),
                    )
                    if not torch.isfinite(found.separation).all():
                        continue
                    self.directions[name] = found
                    gates += self._thresholds(name, method, layer, at, values[:, layer], prompted)
        return gates

    def _thresholds(
        self, name: str, method: str, layer: int, at: str, values: Float[Tensor, "prompt d_model"], prompted: bool
    ) -> list[GateChoice]:
        condition = Condition(self.directions[name], Site(layer))
        found: list[GateChoice] = []
        for allowed in self.spec.false_positive_rates:
            fitted = fit_threshold(
                condition, values[self._harmful], values[~self._harmful], false_positive_rate=allowed
            )
            gate = GateChoice(name, method, layer, at, allowed, fitted.threshold, prompted, fitted.sensitivity)
            # Several rates can lead to one threshold, when the training prompts separate.
            if not any(gate.threshold == other.threshold for other in found):
                found.append(gate)
        return found

    def aware(self, gate: GateChoice, prompts: PromptSet) -> Bool[np.ndarray, " prompt"]:
        """Return for which prompts a gate says that the model is aware of a risk."""
        values = _token(self.readings(prompts, gate.prompted), gate.at)[:, gate.layer]
        scores = Condition(self.directions[gate.directions], Site(gate.layer)).scores(values)
        return np.asarray((scores >= gate.threshold).numpy())

    def best_gates(self, gates: Sequence[GateChoice], prompts: PromptSet, wanted: Bool[np.ndarray, " prompt"],
                   count: int) -> list[GateChoice]:  # fmt: skip
        """Return the gates that best tell prompts to refuse from harmless ones.

        Args:
            gates: all of one condition.
            prompts: labelled prompts to compare them on.
            wanted: the prompts it should open for.
            count: how many to return.
        """
        harmless = np.array([prompt.label == "harmless" for prompt in prompts])
        scored = []
        for gate in gates:
            aware = self.aware(gate, prompts)
            score = float(aware[wanted].mean()) - float(aware[harmless].mean()) if wanted.any() else 0.0
            scored.append((-score, gate.key, gate))
        return [gate for _, _, gate in sorted(scored, key=lambda each: each[:2])[:count]]


def _token(readings: Readings, at: str) -> Float[Tensor, "prompt site d_model"]:
    return readings.prompt if at == "last_prompt" else readings.instruction


def _outcome(table: pd.DataFrame) -> Float[np.ndarray, " prompt"]:
    return np.asarray(table["refused"].astype("Float64").to_numpy(dtype=float, na_value=np.nan))
