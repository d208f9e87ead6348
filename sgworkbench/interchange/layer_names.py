"""Layer numbers in the keys of dictionaries: `12`, `layer_12`, `layers.12`, `direction.12`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from sgworkbench.errors import WorkbenchError

_KEY = re.compile(r"(?:(?:model\.)?(?:layers?|blocks?|h|direction|v)[._-]?)?(0|[1-9]\d{0,4})")


def layer_keys(keys: Iterable[Any], where: str) -> dict[int, Any]:
    """Return the key of each layer.

    Raises:
        WorkbenchError: a key that is no layer, or two keys for one layer.
    """
    found: dict[int, Any] = {}
    for key in keys:
        match = None if isinstance(key, bool) or not isinstance(key, int | str) else _KEY.fullmatch(str(key))
        if match is None:
            raise WorkbenchError(
                f"Expected layers such as 12 or layer_12 as the keys of {where}, found {str(key)[:60]!r}."
            )
        layer = int(match[1])
        if layer in found:
            raise WorkbenchError(f"{where} holds layer {layer} twice, as {found[layer]!r} and as {key!r}.")
        found[layer] = key
    return found
