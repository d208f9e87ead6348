"""Steering done the slow and obvious way: plain transformers, one row, no cache, everything recomputed per token.

Nothing of the package is used here. Operators are functions from one activation to another, written token by token
from the formulas in their papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

TokenChange = Callable[[Tensor], Tensor]


@dataclass
class Step:
    """One change at one place: block index, "pre" or "post", the function, the phases, and a gate on positions."""

    layer: int
    where: str
    change: TokenChange
    phases: tuple[str, ...] = ("prefill", "decode")
    is_open: Callable[[int, "Readings"], bool] = lambda _position, _readings: True
    selects: Callable[[int, int], bool] = lambda _position, _n_prompt: True


class Readings(dict[tuple[int, str], Tensor]):
    """Residual streams [pos, d_model] by (layer, "pre" or "post"), as the gates of later blocks see them."""


def load_plain(folder: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _blocks(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@torch.no_grad()
def plain_logits(model: Any, ids: Sequence[int], n_prompt: int, steps: Sequence[Step]) -> tuple[Tensor, Readings]:
    """Logits of the last token of one row, with the steps applied in order at each place."""
    readings = Readings()

    def treat(layer: int, where: str, stream: Tensor) -> Tensor:
        out = stream.clone()
        for step in steps:
            if (step.layer, step.where) != (layer, where):
                continue
            readings[layer, where] = out[0].clone()
            for position in range(out.shape[1]):
                phase = "prefill" if position < n_prompt else "decode"
                chosen = phase in step.phases and step.selects(position, n_prompt)
                if chosen and step.is_open(position, readings):
                    out[0, position] = step.change(out[0, position])
        readings[layer, where] = out[0].clone()
        return out

    handles = []
    for layer, block in enumerate(_blocks(model)):

        def before(_module: Any, inputs: Any, layer: int = layer) -> Any:
            return (treat(layer, "pre", inputs[0]), *inputs[1:])

        def after(_module: Any, _inputs: Any, output: Any, layer: int = layer) -> Any:
            if isinstance(output, tuple):
                return (treat(layer, "post", output[0]), *output[1:])
            return treat(layer, "post", output)

        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    try:
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits, readings


def plain_generate(
    model: Any, prompt: Sequence[int], steps: Sequence[Step], n_tokens: int
) -> tuple[list[int], list[Tensor], Readings]:
    """Greedy tokens, the logits each was chosen from, and the readings of the last pass."""
    ids, all_logits, readings = list(prompt), [], Readings()
    for _ in range(n_tokens):
        logits, readings = plain_logits(model, ids, len(prompt), steps)
        all_logits.append(logits)
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], all_logits, readings


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def _unit(v: Tensor) -> Tensor:
    return v / math.sqrt(_dot(v, v))


def add(v: Tensor, alpha: float) -> TokenChange:
    return lambda h: h + alpha * v


def ablate(r: Tensor) -> TokenChange:
    u = _unit(r)
    return lambda h: h - _dot(u, h) * u


def clamp(r: Tensor, low: float | None, high: float | None) -> TokenChange:
    u = _unit(r)

    def change(h: Tensor) -> Tensor:
        p = _dot(u, h)
        if low is not None and p < low:
            return h + (low - p) * u
        if high is not None and p > high:
            return h - (p - high) * u
        return h

    return change


def ace(r: Tensor, mean_zero: Tensor, mean_one: Tensor, level: float) -> TokenChange:
    """v - proj(v) + proj(mean of class 0) + level * proj(mean of class 1 - mean of class 0)."""
    u = _unit(r)

    def along(x: Tensor) -> Tensor:
        return _dot(u, x) * u

    return lambda h: h - along(h) + along(mean_zero) + level * along(mean_one - mean_zero)


def add_preserving_norm(v: Tensor, alpha: float) -> TokenChange:
    def change(h: Tensor) -> Tensor:
        moved = h + alpha * v
        return moved * math.sqrt(_dot(h, h) / _dot(moved, moved))

    return change


def rotate(first: Tensor, second: Tensor, degrees: float, relative: bool) -> TokenChange:
    """Rotation by explicit matrices: project out the plane, put the turned component back."""
    basis = torch.linalg.qr(torch.stack([first, second], dim=1).double())[0]
    basis = basis * torch.sign(basis.T @ torch.stack([first, second], dim=1).double()).diagonal()
    theta = math.radians(degrees)
    turn = torch.tensor([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]], dtype=torch.float64)

    def change(h: Tensor) -> Tensor:
        inside = basis.T @ h.double()
        start = inside if relative else torch.tensor([float(inside.norm()), 0.0], dtype=torch.float64)
        return (h.double() - basis @ inside + basis @ (turn @ start)).float()

    return change


def linear_map(matrix: Tensor, alpha: float) -> TokenChange:
    return lambda h: h + alpha * (matrix @ h.double()).float()
