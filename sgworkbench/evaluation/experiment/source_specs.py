"""The vectors and directions an experiment may name: where each comes from, as people write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sgworkbench.errors import unknown_name
from sgworkbench.evaluation.direction_fitting import RefusalSource
from sgworkbench.steering.vector import Protocol

PLAIN, SAFETY = "plain", "safety"
"""Words for conditions in a configuration: no safety prompt, and the configuration's own."""


class Part(BaseModel):
    """A part of the configuration; a key it does not know is answered with the nearest one it does."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    what: ClassVar[str] = "experiment"

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for name in values:
                if name not in cls.model_fields:
                    raise unknown_name(f"{cls.what} setting", str(name), cls.model_fields)
        return values


class SafetyShiftSource(Part):
    """The mean shift a safety prompt causes: Self-Guard's vector.

    Attributes:
        condition: whose shift; the experiment's safety prompt by default.
        protocol: how it is read and written.
        prompts: training prompts it is read on.
    """

    what: ClassVar[str] = "safety-shift source"
    kind: Literal["safety-shift"] = "safety-shift"
    condition: str = SAFETY
    protocol: Protocol = "same-site"
    prompts: Literal["harmful", "harmless", "both"] = "harmful"


class RandomSource(Part):
    """A random vector with, at every layer, the norm of another one."""

    what: ClassVar[str] = "random source"
    kind: Literal["random"] = "random"
    of: str = "safety"
    seed: int | None = None


class ShuffledSource(Part):
    """The same fit to shuffled labels: for a safety shift, half of the pairs have plain and prompted exchanged."""

    what: ClassVar[str] = "shuffled-labels source"
    kind: Literal["shuffled-labels"] = "shuffled-labels"
    of: str = "safety"
    seed: int | None = None


class AwarenessSource(Part):
    """Awareness directions: harmful minus harmless training instructions, plain condition, last instruction token."""

    what: ClassVar[str] = "awareness source"
    kind: Literal["awareness"] = "awareness"


class RefusalDirectionSource(Part):
    """Refusal directions.

    Attributes:
        source: `judged` fits them to the model's own answers, with the stated fallbacks; `content` and
            `unembedding` choose those by name.
        condition: safety prompt of the second half of the judged answers.
        judge: judge of these answers.
        tokens: length of these answers.
    """

    what: ClassVar[str] = "refusal source"
    kind: Literal["refusal"] = "refusal"
    source: RefusalSource = "judged"
    condition: str = SAFETY
    judge: str = "refusal"
    tokens: int = Field(default=32, ge=1)


class AlongSource(Part):
    """A vector along fitted directions, with the norm of another vector at every layer.

    Attributes:
        directions: name of the directions.
        norm_of: name of the vector whose norm it takes.
    """

    what: ClassVar[str] = "along source"
    kind: Literal["along"] = "along"
    directions: str = "refusal"
    norm_of: str = "safety"


class FileSource(Part):
    """A vector or directions from a file of this package, or one of those inside a recipe file.

    Attributes:
        path: the file.
        name: which of a recipe's vectors and directions.
    """

    what: ClassVar[str] = "file source"
    kind: Literal["file"] = "file"
    path: str
    name: str | None = None


SourceConfig = Annotated[
    SafetyShiftSource
    | RandomSource
    | ShuffledSource
    | AwarenessSource
    | RefusalDirectionSource
    | AlongSource
    | FileSource,
    Field(discriminator="kind"),
]

DEFAULT_SOURCES: Mapping[str, SourceConfig] = {
    "safety": SafetyShiftSource(),
    "random": RandomSource(),
    "shuffled": ShuffledSource(),
    "awareness": AwarenessSource(),
    "refusal": RefusalDirectionSource(),
    "refusal-vector": AlongSource(),
}
"""Sources that every experiment has unless it defines others under these names; only those in use are fitted."""
