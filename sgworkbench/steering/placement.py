"""Moving the tensors of a spec to the model's device once, so that no hook copies them at every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Spec = TypeVar("Spec")


def placed(spec: Spec, device: torch.device | str) -> Spec:
    """Return a frozen dataclass with all its tensors on a device, those inside mappings and other specs included."""
    target = torch.device(device)
    changes = {}
    for each in fields(spec):  # type: ignore[arg-type]
        value = getattr(spec, each.name)
        moved = _moved(value, target)
        if moved is not value:
            changes[each.name] = moved
    return replace(spec, **changes) if changes else spec  # type: ignore[type-var]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values()):
        return {key: _moved(item, device) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return placed(value, device)
    return value
