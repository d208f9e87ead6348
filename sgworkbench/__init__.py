"""A workbench for Self-Guard: safety prompting, safety steering and the awareness-compliance gap."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgworkbench.analysis import Directions, GapResult, SafetyShift, ShiftMap, Site
    from sgworkbench.errors import WorkbenchError
    from sgworkbench.models import LoadedModel, load_model
    from sgworkbench.prompting import Prompt, PromptCondition, PromptSet, Renderer, contrast_set, load_prompts
    from sgworkbench.steering import GenerationSettings, Selector, SteeringRecipe, SteeringVector, generate
    from sgworkbench.workbench import Workbench

__version__ = "0.1.0"

# Importing the rooms takes seconds (torch, TransformerLens), so a name is imported when it is first used; that keeps
# `sgworkbench --help` and the errors of a misspelt command immediate.
_HOMES = {
    "Directions": "analysis",
    "GapResult": "analysis",
    "GenerationSettings": "steering",
    "LoadedModel": "models",
    "Prompt": "prompting",
    "PromptCondition": "prompting",
    "PromptSet": "prompting",
    "Renderer": "prompting",
    "SafetyShift": "analysis",
    "Selector": "steering",
    "ShiftMap": "analysis",
    "Site": "analysis",
    "SteeringRecipe": "steering",
    "SteeringVector": "steering",
    "Workbench": "workbench",
    "WorkbenchError": "errors",
    "contrast_set": "prompting",
    "generate": "steering",
    "load_model": "models",
    "load_prompts": "prompting",
}

__all__ = [
    "Directions",
    "GapResult",
    "GenerationSettings",
    "LoadedModel",
    "Prompt",
    "PromptCondition",
    "PromptSet",
    "Renderer",
    "SafetyShift",
    "Selector",
    "ShiftMap",
    "Site",
    "SteeringRecipe",
    "SteeringVector",
    "Workbench",
    "WorkbenchError",
    "contrast_set",
    "generate",
    "load_model",
    "load_prompts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sgworkbench' has no attribute {name!r}")
    return getattr(import_module(f"sgworkbench.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
