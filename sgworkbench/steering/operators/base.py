"""What every steering operator is: a pure function from activations to a change of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.site import Site


class Operator(ABC):
    """A change of the residual stream, with its tensors already in place.

    Subclasses are frozen dataclasses in a file of their own that opens with formula, source and caveat. They name
    themselves with `name`, which is the key under which `OPERATORS` lists them.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """Where the operator acts."""

    @property
    @abstractmethod
    def d_model(self) -> int:
        """Width of the residual stream it was made for."""

    @abstractmethod
    def change(self, stream: Float[Tensor, "batch pos d_model"], site: Site) -> Float[Tensor, "#batch #pos d_model"]:
        """Return what is to be added to the residual stream at `site`."""
