"""The prompts of a calibration: fitted on, chosen on, and fresh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.calibration.spec import CalibrationSpec
from sgworkbench.prompting import PromptSet, concatenate, load_prompts
from sgworkbench.prompting.prompt_set import Label


@dataclass(frozen=True)
class CalibrationData:
    """Prompts by their use; no text is in two of them.

    Attributes:
        train: labelled, harmful first; vectors, directions and thresholds are fitted on them.
        validation: labelled, harmful first; candidates are chosen on them.
        test: fresh sets by source, held to the budgets.
        also: fresh sets by source, reported beside them.
    """

    train: PromptSet
    validation: PromptSet
    test: Mapping[str, PromptSet]
    also: Mapping[str, PromptSet]

    @classmethod
    def load(cls, spec: CalibrationSpec) -> CalibrationData:
        """Read all sources.

        Raises:
            WorkbenchError: an unreadable source, too few prompts, or texts in two places.
        """
        parts: dict[str, list[PromptSet]] = {"train": [], "validation": []}
        counts = {"train": spec.n_train, "validation": spec.n_validation}
        used = {*spec.harmful, *spec.harmless, *spec.validation_harmful, *spec.validation_harmless}
        for sources, further, label in (
            (spec.harmful, spec.validation_harmful, "harmful"),
            (spec.harmless, spec.validation_harmless, "harmless"),
        ):
            for split, found in parts.items():
                names = dict.fromkeys((*sources, *further) if split == "validation" else sources)
                own = [_split(source, label, spec.seed).split(split) for source in names]
                share = max(1, counts[split] // len(own))
                found += [each.sample(share, seed=spec.seed) for each in own]
        fresh: list[dict[str, PromptSet]] = []
        for labelled in (((spec.test_harmful, "harmful"), (spec.test_harmless, "harmless")), ((spec.also_test, None),)):
            found_sets: dict[str, PromptSet] = {}
            for sources, wanted in labelled:
                for source in sources:
                    prompts = _split(source, wanted, spec.seed, only_if=source in used)
                    chosen = prompts.split("test") if prompts.has_split("test") else prompts
                    if any(prompt.label == "unlabelled" for prompt in chosen):
                        raise WorkbenchError(
                            f"The prompts of {source!r} have no labels; give them under test_harmful or test_harmless."
                        )
                    found_sets[_name(source)] = chosen.sample(spec.n_test, seed=spec.seed)
            fresh.append(found_sets)
        # One prompt set must not be held to the budgets and reported beside them.
        test, also = fresh[0], {name: prompts for name, prompts in fresh[1].items() if name not in fresh[0]}
        data = cls(concatenate("train", parts["train"]), concatenate("validation", parts["validation"]), test, also)
        data._check()
        return data

    @property
    def sets(self) -> dict[str, PromptSet]:
        """All fresh sets."""
        return {**self.test, **self.also}

    def summary(self) -> dict[str, object]:
        """Return sizes and hashes."""
        return {
            "train": self.train.summary(),
            "validation": self.validation.summary(),
            "test": {name: prompts.summary() for name, prompts in self.sets.items()},
        }

    def _check(self) -> None:
        used = {"train": set(self.train.texts), "validation": set(self.validation.texts)}
        used["test"] = {text for prompts in self.sets.values() for text in prompts.texts}
        for one, two in (("train", "validation"), ("train", "test"), ("validation", "test")):
            shared = used[one] & used[two]
            if shared:
                raise WorkbenchError(
                    f"{len(shared)} prompts are in both {one} and {two}; remove the duplicates from the sources."
                )


def _split(source: str, label: str | None, seed: int, *, only_if: bool = True) -> PromptSet:
    chosen: Label | None = label  # type: ignore[assignment]
    prompts = load_prompts(source, label=chosen)
    complete = all(prompts.has_split(split) for split in ("train", "validation", "test"))
    return prompts if complete or not only_if else prompts.with_split(train=0.5, validation=0.2, seed=seed)


def _name(source: str) -> str:
    return source.removeprefix("builtin:").removeprefix("hub:")
