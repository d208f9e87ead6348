"""The trace of several arms: plain, prompted, steered, both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgworkbench.analysis.directions import Directions
from sgworkbench.evaluation.behaviour import ArmSpec
from sgworkbench.models import LoadedModel
from sgworkbench.prompting import PromptSet, Renderer
from sgworkbench.steering import GenerationSettings, Trace, join_traces, trace_generation


def trace_arms(
    loaded: LoadedModel,
    renderer: Renderer,
    prompts: PromptSet,
    arms: Sequence[ArmSpec],
    directions: Directions | Sequence[Directions],
    settings: GenerationSettings | None = None,
    **options: Any,
) -> Trace:
    """Trace the same prompts in every arm; `options` go to `trace_generation`.

    Raises:
        WorkbenchError: no arms, or as `trace_generation`.
    """
    return join_traces(
        [
            trace_generation(
                loaded,
                [renderer.render(prompt, arm.condition) for prompt in prompts],
                directions,
                settings,
                interventions=arm.interventions,
                arm=arm.name,
                **options,
            )
            for arm in arms
        ]
    )
