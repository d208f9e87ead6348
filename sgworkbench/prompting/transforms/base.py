"""What every prompt transform has in common: parameters that are checked, prompts in, prompts out."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.prompting.condition import PromptCondition
from sgworkbench.prompting.prompt_set import Prompt, PromptSet


class PromptTransform(BaseModel):
    """A way of wrapping a request that may get it past a model's safety training; robustness is measured over them.

    Subclasses are frozen pydantic models: their fields are the parameters a config can set. Most of them implement
    `rewrite`; one that makes several prompts of one, or changes the condition, overrides `apply` or `condition`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    family: ClassVar[str]

    @property
    def label(self) -> str:
        """What ids, arms and tables call this transform with these parameters."""
        return self.name

    @abstractmethod
    def rewrite(self, prompt: Prompt, prompts: PromptSet) -> str:
        """Return the text of one prompt, wrapped.

        Args:
            prompt: the prompt.
            prompts: the set it belongs to.
        """

    def apply(self, prompts: PromptSet) -> PromptSet:
        """Return the wrapped prompts: new texts and ids, everything else (label, category, pair, split) kept.

        An id is the old one followed by "+" and the label, so that an item can be traced to what it was made from.
        The content hash of the set changes with the texts.
        """
        wrapped = (
            replace(prompt, text=self.rewrite(prompt, prompts), id=f"{prompt.id}+{self.label}") for prompt in prompts
        )
        return PromptSet(f"{prompts.name}+{self.label}", tuple(wrapped))

    def condition(self, condition: PromptCondition) -> PromptCondition:
        """Return the condition the wrapped prompts are to be rendered under; the same one unless overridden."""
        return condition


TRANSFORMS: dict[str, type[PromptTransform]] = {}
"""Every registered transform class by its `name`."""

ATransform = TypeVar("ATransform", bound=type[PromptTransform])


def register_transform(transform: ATransform) -> ATransform:
    """Class decorator: list a transform in `TRANSFORMS` under its `name`.

    Raises:
        WorkbenchError: not a `PromptTransform`, no name, or a name that is taken.
    """
    if not (isinstance(transform, type) and issubclass(transform, PromptTransform)):
        raise WorkbenchError(f"Expected a subclass of PromptTransform to register, found {transform!r}.")
    name = getattr(transform, "name", None)
    if not isinstance(name, str) or not name:
        raise WorkbenchError(f"The transform class {transform.__name__} needs a class attribute `name`.")
    taken = TRANSFORMS.get(name)
    # A notebook cell that is run again defines its class again; that replaces the old one.
    if taken is not None and (taken.__module__, taken.__qualname__) != (transform.__module__, transform.__qualname__):
        raise WorkbenchError(f"The transform name {name!r} is taken by {taken.__qualname__}; choose another name.")
    TRANSFORMS[name] = transform
    return transform


def get_transform(name: str) -> type[PromptTransform]:
    """Return the transform class of a name.

    Raises:
        WorkbenchError: no transform has that name.
    """
    if name not in TRANSFORMS:
        raise unknown_name("prompt transform", str(name), TRANSFORMS)
    return TRANSFORMS[name]
