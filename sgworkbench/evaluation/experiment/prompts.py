"""The prompt sets of an experiment: loaded, sampled, wrapped, and kept apart from the training prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sgworkbench.analysis.gap import text_hash
from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.experiment.config import WRAPPED, ExperimentConfig, PromptSetConfig
from sgworkbench.prompting import PromptSet, load_prompts
from sgworkbench.prompting.transforms import TransformedPrompts, TransformSpec, apply_transforms

UNWRAPPED = "none"


@dataclass(frozen=True)
class EvaluatedSet:
    """Prompts that every arm answers.

    Attributes:
        name: the set's name, with the wrappers' behind a plus.
        wrapped: the prompts as the model gets them, and what the wrappers change in a condition.
        requests: what was asked, without any wrapper, one for each prompt: what judges are told.
    """

    name: str
    wrapped: TransformedPrompts
    requests: tuple[str, ...]

    @property
    def prompts(self) -> PromptSet:
        """The prompts as the model gets them."""
        return self.wrapped.prompts

    @property
    def transform(self) -> str:
        """Names of the wrappers, or `none`."""
        return self.wrapped.label or UNWRAPPED

    def summary(self) -> dict[str, Any]:
        """Return name, wrappers with their parameters, sizes by label and content hashes, for the manifest."""
        labels = [prompt.label for prompt in self.prompts]
        counts = {label: labels.count(label) for label in dict.fromkeys(labels)}
        return {"name": self.name, "n": len(self.prompts), "labels": counts, **self.wrapped.provenance()}


def load_prompt_sets(config: ExperimentConfig) -> tuple[EvaluatedSet, ...]:
    """Return the prompt sets, one for every wrapper of each.

    Raises:
        WorkbenchError: as `load_prompts`, a split that a set lacks, or a wrapper that cannot be made.
    """
    return tuple(each for part in config.prompt_sets for each in _load(part, config.seed))


def _load(part: PromptSetConfig, seed: int) -> list[EvaluatedSet]:
    prompts = load_prompts(part.source, fields=part.fields or None, label=part.label, name=part.name)
    if part.split is not None:
        prompts = prompts.split(part.split)
    if part.n is not None:
        prompts = prompts.sample(part.n, seed=seed)
    prompts = replace(prompts, name=part.name)
    made = [_wrapped(part.name, prompts, wrappers) for wrappers in part.transforms]
    names = [each.name for each in made]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise WorkbenchError(f"The prompt set {twice!r} would be made twice; list a wrapper once.")
    return made


def check_held_out(sets: tuple[EvaluatedSet, ...], train: PromptSet) -> None:
    """Refuse prompts that vectors, directions or thresholds are fitted on.

    Raises:
        WorkbenchError: training and evaluated prompts overlap.
    """
    fitted = {text_hash(text) for text in train.texts}
    for each in sets:
        shared = sum(text_hash(text) in fitted for text in each.requests)
        if shared:
            raise WorkbenchError(
                f"{shared} of the {len(each.requests)} prompts of {each.name!r} are training prompts; choose another "
                "split or source for one of the two."
            )


def _wrapped(name: str, prompts: PromptSet, wrappers: tuple[TransformSpec, ...]) -> EvaluatedSet:
    wrapped = apply_transforms(prompts, wrappers)
    if not wrappers:
        return EvaluatedSet(name, wrapped, tuple(prompts.texts))
    # A wrapper writes its label behind the id and may make several prompts of one.
    mark = f"{WRAPPED}{wrapped.transforms[0].label}"
    texts = {f"{prompt.id}{mark}": prompt.text for prompt in prompts}
    starts = sorted(texts, key=len, reverse=True)
    requests = [texts[next(start for start in starts if prompt.id.startswith(start))] for prompt in wrapped.prompts]
    return EvaluatedSet(f"{name}{WRAPPED}{wrapped.label}", wrapped, tuple(requests))
