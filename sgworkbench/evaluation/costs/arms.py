"""Running a measurement under an arm of an experiment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sgworkbench.evaluation.behaviour import ArmSpec
from sgworkbench.models import LoadedModel
from sgworkbench.prompting import PromptCondition
from sgworkbench.steering import steering

VANILLA = ArmSpec("vanilla", PromptCondition.plain())
"""The model as it is: no safety prompt, no steering."""


def is_vanilla(arm: ArmSpec) -> bool:
    """Whether an arm changes nothing."""
    return arm.condition.is_plain and not arm.interventions


@contextmanager
def steered_by(loaded: LoadedModel, arm: ArmSpec) -> Iterator[None]:
    """Attach an arm's interventions inside the block.

    Raises:
        WorkbenchError: as `steering`.
    """
    with steering(loaded, arm.interventions):
        yield


def may_reuse_prompts(arm: ArmSpec) -> bool:
    """Whether one run of a prompt serves several continuations: not when an answer can latch a gate open."""
    return not any(each.gate is not None and each.gate.decided == "latched" for each in arm.interventions)
