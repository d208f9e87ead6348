"""Where in the model an activation is read or written.

A site is a layer and a place in its block. The same place has other names in other tools; every conversion is here
and nowhere else, because off-by-one errors between those names are the commonest fault in steering code.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Literal, get_args

from sgworkbench.errors import WorkbenchError, unknown_name

SiteKind = Literal["resid_pre", "resid_mid", "resid_post"]
SITE_KINDS: tuple[SiteKind, ...] = get_args(SiteKind)
_ORDER = {kind: index for index, kind in enumerate(SITE_KINDS)}


@dataclass(frozen=True)
class Site:
    """A point of the residual stream.

    Attributes:
        layer: 0-based block index.
        kind: `resid_pre` (input of the block), `resid_mid` (after attention) or `resid_post` (output of the block).
    """

    layer: int
    kind: SiteKind = "resid_post"

    def __post_init__(self) -> None:
        if self.kind not in SITE_KINDS:
            raise unknown_name("site kind", str(self.kind), SITE_KINDS)
        try:
            # NumPy's integers become Python's, so that sites compare, hash and serialise alike.
            object.__setattr__(self, "layer", operator.index(self.layer))
        except TypeError:
            raise WorkbenchError(
                f"A site's layer is a whole number, found {self.layer!r}; read text with Site.parse."
            ) from None
        if self.layer < 0:
            raise WorkbenchError(f"A site's layer counts from 0; found {self.layer}.")

    def __str__(self) -> str:
        return f"{self.kind}[{self.layer}]"

    def __lt__(self, other: Site) -> bool:
        return (self.layer, _ORDER[self.kind]) < (other.layer, _ORDER[other.kind])

    @classmethod
    def parse(cls, text: str | int) -> Site:
        """Read `resid_post[12]`, a hook name `blocks.12.hook_resid_post`, or a bare layer number (resid_post).

        Raises:
            WorkbenchError: anything else.
        """
        text = str(text)
        for pattern in (r"(?P<kind>[a-z_]+)\[(?P<layer>\d+)\]", r"blocks\.(?P<layer>\d+)\.hook_(?P<kind>[a-z_]+)"):
            found = re.fullmatch(pattern, text.strip())
            if found:
                if found["kind"] not in SITE_KINDS:
                    raise unknown_name("site kind", found["kind"], SITE_KINDS)
                return cls(int(found["layer"]), found["kind"])
        if re.fullmatch(r"\d+", text.strip()):
            return cls(int(text))
        raise WorkbenchError(f"Expected a site such as resid_post[12] or blocks.12.hook_resid_post, found {text!r}.")

    @property
    def hook_name(self) -> str:
        """Name of the TransformerLens hook point."""
        return f"blocks.{self.layer}.hook_{self.kind}"

    def same_point(self, other: Site) -> bool:
        """Whether both name the same values: the input of a block is the output of the block before it."""
        return self._canonical() == other._canonical()

    def _canonical(self) -> tuple[int, str]:
        if self.kind == "resid_pre" and self.layer > 0:
            return self.layer - 1, "resid_post"
        return self.layer, self.kind

    def hidden_states_index(self, n_layers: int) -> int:
        """Return the index into the `hidden_states` that transformers returns.

        Raises:
            WorkbenchError: resid_mid is not among them, and neither is the output of the last block, whose entry is
                taken after the final norm.
        """
        self.check(n_layers)
        if self.kind == "resid_mid":
            raise WorkbenchError(f"{self} is not among transformers' hidden_states; use resid_pre or resid_post.")
        index = self.layer + (self.kind == "resid_post")
        if index == n_layers:
            raise WorkbenchError(
                f"{self} is the last block's output; transformers' hidden_states[{n_layers}] is after the final norm."
            )
        return index

    @classmethod
    def from_hidden_states_index(cls, index: int, n_layers: int) -> Site:
        """Return the site of `hidden_states[index]`.

        Raises:
            WorkbenchError: the index is outside the model, or is the last one, which is after the final norm.
        """
        if not 0 <= index < n_layers:
            raise WorkbenchError(
                f"hidden_states[{index}] of a model with {n_layers} layers is not a residual-stream site; "
                f"expected 0 to {n_layers - 1}."
            )
        return cls(0, "resid_pre") if index == 0 else cls(index - 1)

    def svec_key(self, n_layers: int) -> str:
        """Return the key of a `.svec` file (activation-steering): block outputs by 0-based block.

        Raises:
            WorkbenchError: other kinds cannot be expressed; the last key is after the final norm.
        """
        self.check(n_layers)
        if self.kind != "resid_post" or self.layer == n_layers - 1:
            raise WorkbenchError(
                f"{self} cannot be a .svec key: keys are block outputs, and the last one ({n_layers - 1}) is taken "
                "after the final norm."
            )
        return str(self.layer)

    @classmethod
    def from_svec_key(cls, key: str | int, n_layers: int) -> Site:
        """Return the site a `.svec` key was read at.

        Raises:
            WorkbenchError: not a layer number of the model, or the last key, which is after the final norm.
        """
        if not re.fullmatch(r"\d+", str(key)) or int(key) >= n_layers:
            raise WorkbenchError(f"Expected a .svec key from 0 to {n_layers - 1}, found {key!r}.")
        if int(key) == n_layers - 1:
            raise WorkbenchError(f".svec key {key} was taken after the final norm and is not a residual-stream site.")
        return cls(int(key))

    def gguf_layer(self) -> int:
        """Return k of a GGUF control vector's `direction.k`, which is added at the output of 0-based block k.

        Raises:
            WorkbenchError: other kinds, and block 0, cannot be expressed.
        """
        layer, kind = self._canonical()
        if kind != "resid_post" or layer == 0:
            raise WorkbenchError(f"{self} cannot be written as a GGUF control vector: only outputs of blocks >= 1 can.")
        return layer

    @classmethod
    def from_gguf_layer(cls, layer: int) -> Site:
        """Return the site at which a GGUF control vector adds `direction.layer`.

        Raises:
            WorkbenchError: layers count from 1.
        """
        if layer < 1:
            raise WorkbenchError(f"GGUF control vectors start at direction.1, found direction.{layer}.")
        return cls(layer)

    def check(self, n_layers: int) -> None:
        """Raise a WorkbenchError when the site is not in a model with `n_layers` layers."""
        if self.layer >= n_layers:
            raise WorkbenchError(
                f"Layer {self.layer} is outside the model, which has {n_layers} layers (0 to {n_layers - 1})."
            )


def all_sites(n_layers: int, kind: SiteKind = "resid_post") -> tuple[Site, ...]:
    """Return the sites of one kind at every layer."""
    return tuple(Site(layer, kind) for layer in range(n_layers))


def parse_layers(text: str | int, n_layers: int) -> tuple[int, ...]:
    """Read a layer list such as `20`, `30,31,32` or `10-14,20`; both ends of a range count.

    Raises:
        WorkbenchError: not such a list, or a layer outside the model.
    """
    layers: set[int] = set()
    for part in str(text).split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not found:
            raise WorkbenchError(f"Expected layers such as 20 or 10-14,20; found {text!r}.")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise WorkbenchError(f"The layer range {part.strip()!r} runs backwards.")
        Site(last).check(n_layers)
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))
