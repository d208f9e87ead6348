"""Jailbreak wrappers as transforms of prompt sets, so that robustness is one more axis of an experiment."""

from sgworkbench.prompting.transforms.base import (
    TRANSFORMS,
    PromptTransform,
    get_transform,
    register_transform,
)
from sgworkbench.prompting.transforms.encoding import Encoding
from sgworkbench.prompting.transforms.many_shot import DEMONSTRATIONS, ManyShot
from sgworkbench.prompting.transforms.past_tense import PastTense, past_tense
from sgworkbench.prompting.transforms.prefill import Prefill
from sgworkbench.prompting.transforms.spec import TransformedPrompts, TransformSpec, apply_transforms
from sgworkbench.prompting.transforms.suffix_file import SuffixFile
from sgworkbench.prompting.transforms.wording import Persona, RefusalSuppression, RolePlay

__all__ = [
    "DEMONSTRATIONS",
    "TRANSFORMS",
    "Encoding",
    "ManyShot",
    "PastTense",
    "Persona",
    "Prefill",
    "PromptTransform",
    "RefusalSuppression",
    "RolePlay",
    "SuffixFile",
    "TransformSpec",
    "TransformedPrompts",
    "apply_transforms",
    "get_transform",
    "past_tense",
    "register_transform",
]
