"""Weight memory layout: the same values, stored so that no matrix is copied before it is multiplied.

TransformerLens keeps weights as [head, d_model, d_head] and [in, out] but multiplies with the transposed, contiguous
matrix (to match the accumulation order of nn.Linear). Stored the obvious way, every weight is copied at every
forward pass, which for one-token decode steps costs more than the arithmetic. Stored with the strides below, the
transposition is a view and `.contiguous()` returns it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_TRANSPOSED = (1, 0)
# The memory order of the dimensions that the matmul reads without a copy.
_ATTENTION_ORDERS = {
    "W_Q": (0, 2, 1),
    "W_K": (0, 2, 1),
    "W_V": (0, 2, 1),
    "_W_K": (0, 2, 1),
    "_W_V": (0, 2, 1),
    "W_O": (2, 0, 1),
}
_GATED_MLP_WEIGHTS = ("W_in", "W_gate", "W_out")


def stored_in_order(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return a tensor of equal shape and values whose memory follows `order`, slowest dimension first.

    The tensor itself is returned when its memory is already in that order.
    """
    permuted = weight.permute(order)
    if permuted.is_contiguous():
        return weight
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return permuted.contiguous().permute(inverse)


def use_fast_layout(model: Any) -> None:
    """Store a HookedTransformer's weights in place in the memory order its forward pass multiplies with.

    Values, shapes and results do not change; weights that are already stored so are left alone. Loading a state
    dict into the model keeps the layout.

    Args:
        model: a HookedTransformer.
    """
    with torch.no_grad():
        for parameter, order in _weights_with_order(model):
            parameter.data = stored_in_order(parameter.data, order)


def has_fast_layout(model: Any) -> bool:
    """Say whether every weight of a HookedTransformer is stored as `use_fast_layout` stores it."""
    return all(parameter.permute(order).is_contiguous() for parameter, order in _weights_with_order(model))


def _weights_with_order(model: Any) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    for block in model.blocks:
        parameters = dict(block.attn.named_parameters(recurse=False))
        for name, order in _ATTENTION_ORDERS.items():
            if name in parameters:
                yield parameters[name], order
        if model.cfg.gated_mlp:
            for name in _GATED_MLP_WEIGHTS:
                yield getattr(block.mlp, name), _TRANSPOSED
        # The ungated MLP multiplies with torch.addmm in [in, out] order and copies nothing.
    yield model.unembed.W_U, _TRANSPOSED
