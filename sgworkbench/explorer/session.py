"""What the explorer projects onto and steers with: given by the user, or fitted once per model on training prompts."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sgworkbench.analysis import Directions, all_sites, read_for_gap, safety_shift
from sgworkbench.analysis.directions import span
from sgworkbench.errors import WorkbenchError, require_type
from sgworkbench.evaluation.direction_fitting import RefusalSource, fit_awareness, fit_refusal, training_facts
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter
from sgworkbench.prompting import PromptCondition, Renderer, concatenate, contrast_set
from sgworkbench.steering import PROTOCOLS, SteeringVector
from sgworkbench.steering.recipe import Sources


@runtime_checkable
class HasModel(Protocol):
    """What the explorer needs of a workbench."""

    @property
    def loaded(self) -> LoadedModel:
        """The model."""

    @property
    def renderer(self) -> Renderer:
        """What turns prompts into tokens."""

    @property
    def report(self) -> Reporter:
        """Progress callback of long work."""


@dataclass(frozen=True)
class Session:
    """A model with the directions and the vector that the panel uses.

    Attributes:
        loaded: the model.
        renderer: turns prompts into tokens.
        awareness: awareness directions, one per layer.
        refusal: refusal directions, one per layer, at the same sites.
        vector: the steering vector.
        condition: the safety prompt the vector was fitted with, and the panel starts with.
        fitted: names of those of `awareness`, `refusal` and `vector` that were fitted here.
        refusal_source: where a fitted refusal direction comes from.
    """

    loaded: LoadedModel
    renderer: Renderer
    awareness: Directions
    refusal: Directions
    vector: SteeringVector
    condition: PromptCondition
    fitted: tuple[str, ...] = ()
    refusal_source: RefusalSource = "content"

    def __post_init__(self) -> None:
        n_layers = self.loaded.identity.n_layers
        for name in ("awareness", "refusal"):
            directions = getattr(self, name)
            require_type(directions, Directions, f"fitted directions as {name}", "fit them with wb.refusal_direction")
            kind = directions.sites[0].kind
            if directions.sites != all_sites(n_layers, kind) or directions.sites != self.awareness.sites:
                raise WorkbenchError(
                    "The explorer needs awareness and refusal directions at the same site of every one of the "
                    f"{n_layers} layers; the {name} directions are at {span(directions.sites)}, the awareness "
                    f"directions at {span(self.awareness.sites)}."
                )
            if directions.unit.shape[-1] != self.loaded.identity.d_model:
                raise WorkbenchError(
                    f"The {name} directions have width {directions.unit.shape[-1]}, but the model's residual stream "
                    f"has width {self.loaded.identity.d_model}; they belong to another model."
                )
        require_type(self.vector, SteeringVector, "a steering vector", "load one with SteeringVector.load")
        self.vector.check_model(self.loaded)

    @property
    def n_layers(self) -> int:
        """Number of blocks of the model."""
        return self.loaded.identity.n_layers

    @property
    def sources(self) -> Sources:
        """Vector and directions by the names that specifications use."""
        return {"vector": self.vector, "refusal": self.refusal, "awareness": self.awareness}

    @property
    def protocols(self) -> tuple[str, ...]:
        """Protocols by which the vector can be written; the padded one is another reading, not another place."""
        padded = "official-padded"
        if self.vector.protocol == padded:
            return (padded,)
        kept = tuple(name for name in PROTOCOLS if name != padded)
        return kept if self.vector.read_kind == "resid_post" else (self.vector.protocol,)

    def directions(self, concept: str) -> Directions:
        """Return the directions of a concept."""
        return self.refusal if concept == "refusal" else self.awareness


N_TRAIN = 96
"""Training prompts of a quick fit, look-alikes included: enough for a mean, few enough to wait for."""

_FITTED: dict[Hashable, tuple[Directions, Directions, SteeringVector]] = {}


def open_session(
    workbench: HasModel,
    *,
    awareness: Directions | None = None,
    refusal: Directions | None = None,
    vector: SteeringVector | None = None,
    condition: PromptCondition | None = None,
    refusal_source: RefusalSource = "content",
    report: Reporter | None = None,
) -> Session:
    """Return a session, with what was not given fitted on training prompts of the built-in contrast set.

    What was fitted is remembered for as long as Python runs, by the hashes of model, template and prompts.

    Args:
        workbench: model and renderer.
        awareness: awareness directions.
        refusal: refusal directions.
        vector: steering vector.
        condition: safety prompt of a fitted vector; self-reminder by default.
        refusal_source: `content` (quick) or `judged` (the model answers the training prompts first).
        report: progress callback; the workbench's own by default.

    Raises:
        WorkbenchError: directions that do not cover every layer, or something that belongs to another model.
    """
    loaded, renderer = workbench.loaded, workbench.renderer
    chosen = condition or PromptCondition.preset("self-reminder")
    given = {"awareness": awareness, "refusal": refusal, "vector": vector}
    missing = tuple(name for name, value in given.items() if value is None)
    if awareness is None or refusal is None or vector is None:
        made = _fit(loaded, renderer, chosen, refusal_source, workbench.report if report is None else report)
        awareness = made[0] if awareness is None else awareness
        refusal = made[1] if refusal is None else refusal
        vector = made[2] if vector is None else vector
    return Session(loaded, renderer, awareness, refusal, vector, chosen, missing, refusal_source)


def _fit(
    loaded: LoadedModel, renderer: Renderer, condition: PromptCondition, source: RefusalSource, report: Reporter
) -> tuple[Directions, Directions, SteeringVector]:
    train = contrast_set().split("train").sample(N_TRAIN)
    both = concatenate("train", [train.harmful.labelled("harmful"), train.harmless.labelled("harmless")])
    identity = loaded.identity
    key = (
        identity.weights_sha256,
        identity.tokenizer_sha256,
        identity.dtype,
        renderer.template_sha256,
        renderer.thinking,
        condition,
        source,
        both.content_hash,
    )
    if key not in _FITTED:
        sites = all_sites(identity.n_layers)
        facts = training_facts(loaded, both)
        rendered = [renderer.render(prompt) for prompt in both]
        plain = read_for_gap(loaded, rendered, sites, report=report, task="reading training prompts")
        awareness = fit_awareness(plain, both, provenance=facts)
        prompted = plain
        if source == "judged":
            safe = [renderer.render(prompt, condition) for prompt in both]
            prompted = read_for_gap(loaded, safe, sites, report=report, task="reading them with the safety prompt")
        refusal, _ = fit_refusal(
            loaded, renderer, both, condition, plain, prompted, source=source, provenance=facts, report=report
        )
        shift = safety_shift(loaded, renderer, train.harmful, condition, report=report)
        _FITTED[key] = (awareness, refusal, shift.steering_vector())
    return _FITTED[key]
