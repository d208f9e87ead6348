"""The representational awareness-compliance gap.

For one prompt in one arm, at layer l:

    A_l = awareness projection of the last instruction token,
    R_l = refusal projection of the last prompt token,          both in separation units,
    gap = A_l - R_l.

0 means the model acts on what it knows, 1 that it knows and complies (METHOD section 5). The same prompts are measured
in every arm, so arms are compared pair by pair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgworkbench.analysis.capture import capture
from sgworkbench.analysis.directions import Directions, span
from sgworkbench.analysis.nulls import RANDOM, SHUFFLED, NullBand, null_band, random_unit_directions
from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError, require_type, unknown_name
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting import PromptSet, RenderedPrompt
from sgworkbench.statistics import Auroc, auroc, paired_bootstrap
from sgworkbench.tensor_files import atomic_path

Arm = Literal["plain", "prompted", "steered", "both"]
Quantity = Literal["awareness", "refusal", "gap"]
ARMS: tuple[Arm, ...] = ("plain", "prompted", "steered", "both")
QUANTITIES: tuple[Quantity, ...] = ("awareness", "refusal", "gap")


@dataclass(frozen=True)
class Readings:
    """What the gap needs of one arm: two tokens per prompt, at every site.

    Attributes:
        sites: order of the site axes.
        instruction: activations at the last instruction token.
        prompt: activations at the last prompt token.
    """

    sites: tuple[Site, ...]
    instruction: Float[Tensor, "prompt site d_model"]
    prompt: Float[Tensor, "prompt site d_model"]


def read_for_gap(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    sites: tuple[Site, ...],
    *,
    report: Reporter = silent,
    task: str = "reading activations",
) -> Readings:
    """Read the two tokens of the gap in one pass; steering that is active on the model is included."""
    positions = [(item.last_instruction_position, item.last_prompt_position) for item in rendered]
    values = capture(loaded, rendered, sites, positions, report=report, task=task).values
    pairs = values.reshape(len(rendered), 2, len(sites), -1)
    return Readings(sites, pairs[:, 0].contiguous(), pairs[:, 1].contiguous())


@dataclass(frozen=True)
class GapResult:
    """Awareness, refusal and gap of every prompt, arm and layer.

    Attributes:
        table: one row per prompt, arm and layer: prompt_id, label, category, arm, layer, awareness, refusal, gap.
        awareness: the awareness directions used.
        refusal: the refusal directions used.
        nulls: bands of the mean gap over harmful prompts in the plain arm, for random directions and shuffled labels.
        awareness_auroc: harmful against harmless by awareness projection, plain arm, per site, on these prompts.
        prompts: name, size and hash of the prompts measured (none of them used for fitting).
    """

    table: pd.DataFrame
    awareness: Directions
    refusal: Directions
    nulls: tuple[NullBand, ...]
    awareness_auroc: Auroc | None
    prompts: dict[str, str | int]

    @property
    def arms(self) -> list[str]:
        """The arms measured, in canonical order."""
        present = set(self.table["arm"])
        return [arm for arm in ARMS if arm in present]

    def unseparated_layers(self, quantity: Quantity = "gap") -> list[int]:
        """Return the layers where a direction does not separate its own classes in cross-validation.

        Separation units divide by the distance of these classes and mean little there.
        """
        used = {"awareness": [self.awareness], "refusal": [self.refusal], "gap": [self.awareness, self.refusal]}
        separated = [all(flags) for flags in zip(*(d.separated() for d in used[quantity]), strict=True)]
        return [site.layer for site, flag in zip(self.awareness.sites, separated, strict=True) if not flag]

    def summary(self, quantity: Quantity = "gap", label: str = "harmful", *, seed: int = 0) -> pd.DataFrame:
        """Return mean and bootstrap interval over prompts, per arm and layer.

        Columns: arm, layer, value, low, high, n. Resampling is by prompt, the same prompts in every arm.

        Raises:
            WorkbenchError: unknown quantity, or no prompt with that label.
        """
        cube, layers, _ = self._cube(quantity, label)
        boot = paired_bootstrap(cube, seed=seed, missing="omit")
        rows = []
        for a, arm in enumerate(self.arms):
            for s, layer in enumerate(layers):
                rows.append((arm, layer, boot.mean[a, s], boot.low[a, s], boot.high[a, s], boot.n))
        return pd.DataFrame(rows, columns=["arm", "layer", "value", "low", "high", "n"])

    def differences(
        self, quantity: Quantity = "gap", label: str = "harmful", *, reference: str = "plain", seed: int = 0
    ) -> pd.DataFrame:
        """Return each arm minus the reference arm, pair by pair, with bootstrap intervals, per layer."""
        cube, layers, _ = self._cube(quantity, label)
        if reference not in self.arms:
            raise unknown_name("arm", reference, self.arms)
        base = cube[:, self.arms.index(reference) : self.arms.index(reference) + 1]
        boot = paired_bootstrap(cube - base, seed=seed, missing="omit")
        rows = []
        for a, arm in enumerate(self.arms):
            if arm != reference:
                for s, layer in enumerate(layers):
                    rows.append((arm, layer, boot.mean[a, s], boot.low[a, s], boot.high[a, s], boot.n))
        return pd.DataFrame(rows, columns=["arm", "layer", "value", "low", "high", "n"])

    def _cube(self, quantity: str, label: str) -> tuple[np.ndarray, list[int], list[str]]:
        if quantity not in QUANTITIES:
            raise unknown_name("quantity", quantity, QUANTITIES)
        rows = self.table[self.table["label"] == label]
        if rows.empty:
            raise WorkbenchError(
                f"No {label} prompt was measured; labels: {', '.join(sorted(set(self.table['label'])))}."
            )
        wide = rows.pivot(index="prompt_id", columns=["arm", "layer"], values=quantity)
        layers = sorted({int(layer) for layer in rows["layer"]})
        cube = np.stack([wide[arm][layers].to_numpy(dtype=float) for arm in self.arms], axis=1)
        return cube, layers, list(wide.index)

    def nulls_dataframe(self) -> pd.DataFrame:
        """Return the null bands: name, layer, low, high, n; empty when there were no plain readings to make them of."""
        if not self.nulls:
            return pd.DataFrame(columns=["name", "layer", "low", "high", "n"])
        return pd.concat([band.to_dataframe() for band in self.nulls], ignore_index=True)

    def to_dataframe(self) -> pd.DataFrame:
        """Return the table of all prompts, arms and layers."""
        return self.table.copy()

    def save(self, folder: str | Path) -> None:
        """Write gap.parquet, gap_nulls.parquet and the two direction files into a folder."""
        target = Path(folder)
        for name, frame in (("gap", self.table), ("gap_nulls", self.nulls_dataframe())):
            with atomic_path(target / f"{name}.parquet") as temporary:
                frame.to_parquet(temporary)
        self.awareness.save(target / "awareness.safetensors")
        self.refusal.save(target / "refusal.safetensors")

    def plot(self, quantity: Quantity = "gap", label: str = "harmful") -> Any:
        """Return the plotly figure of a quantity by layer for all arms."""
        from sgworkbench.plotting.results import gap_figure

        return gap_figure(self, quantity, label)

    def plot_distributions(self, layer: int, quantity: Quantity = "awareness", arm: str = "plain") -> Any:
        """Return the plotly figure of a projection's distribution, harmful against harmless, at one layer."""
        from sgworkbench.plotting.results import projection_distribution_figure

        return projection_distribution_figure(self, layer, quantity, arm)

    def _repr_html_(self) -> str:
        counts = self.table.drop_duplicates("prompt_id")["label"].value_counts().to_dict()
        return (
            f"<b>Awareness-compliance gap</b>: {counts}, arms {', '.join(self.arms)}, "
            f"{self.table['layer'].nunique()} layers<br>{self.awareness.describe()}<br>{self.refusal.describe()}<br>"
            "next: <code>.plot()</code>, <code>.summary()</code>, <code>.differences()</code>, "
            "<code>.to_dataframe()</code>"
        )


@dataclass(frozen=True)
class NullFit:
    """Directions refitted to shuffled labels, for the gap's second null (see `measure_gap`)."""

    awareness: Float[Tensor, "null site d_model"]
    refusal: Float[Tensor, "null site d_model"]


def measure_gap(
    readings: Mapping[str, Readings],
    prompts: PromptSet,
    awareness: Directions,
    refusal: Directions,
    *,
    shuffled: NullFit | None = None,
    n_null: int = 200,
    seed: int = 0,
) -> GapResult:
    """Compute awareness, refusal and gap of held-out prompts in every arm.

    The nulls replace both unit directions and keep origins and separations, so that they live on the figure's scale:
    once by random directions, once by directions fitted to shuffled labels of the training items.

    Args:
        readings: arm name to activations, prompts in the order of `prompts`.
        prompts: the prompts, labelled.
        awareness: directions fitted on other prompts.
        refusal: directions fitted on other prompts.
        shuffled: directions refitted to shuffled labels; leaves out that null when None.
        n_null: number of random directions.
        seed: seed of the random directions.

    Raises:
        WorkbenchError: no or unknown arms, sites that differ between directions and readings, several sites of one
            layer, readings of other prompts, or a test prompt that was used for fitting.
    """
    require_type(prompts, PromptSet, "a PromptSet", "wrap texts with PromptSet.from_texts([...])")
    if not readings:
        raise WorkbenchError(f"No readings were given; expected at least one of the arms {', '.join(ARMS)}.")
    for name in readings:
        if name not in ARMS:
            raise unknown_name("arm", name, ARMS)
    for directions in (awareness, refusal):
        overlap = set(directions.provenance.get("train_texts_sha256", [])) & {text_hash(p.text) for p in prompts}
        if overlap:
            raise WorkbenchError(
                f"{len(overlap)} of the {len(prompts)} prompts to measure were used to fit the {directions.concept} "
                "direction; train and test must not share prompts."
            )
    frames = []
    for arm, reading in readings.items():
        if reading.sites != awareness.sites or reading.sites != refusal.sites:
            raise WorkbenchError(
                f"Readings and directions must cover the same sites; found {span(reading.sites)} for the {arm} "
                f"readings, {span(awareness.sites)} for awareness and {span(refusal.sites)} for refusal."
            )
        if len({site.layer for site in reading.sites}) < len(reading.sites):
            raise WorkbenchError(
                "The gap is measured at one site per layer; choose resid_pre, resid_mid or resid_post."
            )
        if not len(reading.instruction) == len(reading.prompt) == len(prompts):
            raise WorkbenchError(
                f"Expected {arm} readings of the {len(prompts)} prompts, found {len(reading.instruction)}."
            )
        aware = awareness.in_separation_units(reading.instruction)
        refuse = refusal.in_separation_units(reading.prompt)
        frames.append(_arm_rows(prompts, arm, reading.sites, aware, refuse))
    harmful = torch.tensor([p.label == "harmful" for p in prompts])
    harmless = torch.tensor([p.label == "harmless" for p in prompts])
    nulls: list[NullBand] = []
    area = None
    plain = readings.get("plain")
    if plain is not None and bool(harmful.any()):
        d_model = awareness.unit.shape[-1]
        drawn = random_unit_directions(2 * n_null, len(plain.sites), d_model, seed=seed)
        fits = [(RANDOM, NullFit(drawn[:n_null], drawn[n_null:]))]
        if shuffled is not None:
            fits.append((SHUFFLED, shuffled))
        for name, fit in fits:
            a = _null_projection(plain.instruction[harmful], fit.awareness, awareness)
            r = _null_projection(plain.prompt[harmful], fit.refusal, refusal)
            nulls.append(null_band(name, plain.sites, a - r))
        if bool(harmless.any()):
            scores = awareness.project(plain.instruction).double().numpy()
            area = auroc(scores[harmful.numpy()], scores[harmless.numpy()])
    table = pd.concat(frames, ignore_index=True)
    return GapResult(table, awareness, refusal, tuple(nulls), area, prompts.summary())


def text_hash(text: str) -> str:
    """Return a short hash of a prompt's text, with which directions remember what they were fitted on."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _null_projection(
    values: Float[Tensor, "prompt site d_model"], units: Float[Tensor, "null site d_model"], real: Directions
) -> Float[Tensor, "null site"]:
    """Mean projection of the prompts onto null directions, from the real origin, in real separation units."""
    centred = values.mean(0) - real.origin
    return torch.einsum("nsd,sd->ns", units, centred) / real.separation


def _arm_rows(
    prompts: PromptSet,
    arm: str,
    sites: tuple[Site, ...],
    aware: Float[Tensor, "prompt site"],
    refuse: Float[Tensor, "prompt site"],
) -> pd.DataFrame:
    n_sites = len(sites)

    def repeated(values: list[str]) -> np.ndarray:
        return np.repeat(np.array(values, dtype=object), n_sites)

    return pd.DataFrame(
        {
            "prompt_id": repeated([p.id for p in prompts]),
            "label": repeated([p.label for p in prompts]),
            "category": repeated([p.category for p in prompts]),
            "arm": arm,
            "layer": [site.layer for site in sites] * len(prompts),
            "awareness": aware.reshape(-1).numpy(),
            "refusal": refuse.reshape(-1).numpy(),
            "gap": (aware - refuse).reshape(-1).numpy(),
        }
    )


def strata_index(condition: Int[Tensor, "item"], content: Int[Tensor, "item"]) -> Int[Tensor, "item"]:
    """Return one group number per condition x content class."""
    return condition * 2 + content
