"""From prompts and safety prompts to token ids with roles."""

from sgworkbench.prompting.alignment import Alignment, align
from sgworkbench.prompting.condition import PRESETS, PromptCondition
from sgworkbench.prompting.prompt_files import contrast_set, everyday_set, load_prompts
from sgworkbench.prompting.prompt_set import Prompt, PromptSet, concatenate
from sgworkbench.prompting.rendering import RenderedPrompt, Renderer
from sgworkbench.prompting.transforms import TransformedPrompts, TransformSpec, apply_transforms

__all__ = [
    "PRESETS",
    "Alignment",
    "Prompt",
    "PromptCondition",
    "PromptSet",
    "RenderedPrompt",
    "Renderer",
    "TransformSpec",
    "TransformedPrompts",
    "align",
    "apply_transforms",
    "concatenate",
    "contrast_set",
    "everyday_set",
    "load_prompts",
]
