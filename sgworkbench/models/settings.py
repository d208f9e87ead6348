"""The three settings of a load: dtype, device and context length, checked."""

from __future__ import annotations

import torch

from sgworkbench.errors import WorkbenchError, unknown_name

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
"""The dtypes a model can be loaded in, by name."""

DEFAULT_CONTEXT = 4096
"""The default context in tokens, where the model allows as much: attention scores are materialised as
[batch, head, query, key], so their memory grows with the square of the prompt."""


def resolve_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a name; raises WorkbenchError for a name not in `DTYPES`."""
    if name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return DTYPES[name]


def resolve_device(name: str | None) -> str:
    """Return a usable device name: CUDA when there is one and nothing was asked for, else the CPU.

    Raises:
        WorkbenchError: when the device asked for does not exist here.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise WorkbenchError(f"Device {name!r} is not available here; use 'cpu' or leave it out.") from error
    return name


def resolve_context(asked: int | None, maximum: int) -> int:
    """Return the context length in tokens.

    Args:
        asked: what the user wants, or None for min(maximum, `DEFAULT_CONTEXT`).
        maximum: what the model's configuration allows.

    Raises:
        WorkbenchError: for a length below 1 or above the model's own maximum.
    """
    if asked is None:
        return min(maximum, DEFAULT_CONTEXT)
    if not 1 <= asked <= maximum:
        raise WorkbenchError(f"The context length must be between 1 and the model's {maximum} tokens, not {asked}.")
    return asked
