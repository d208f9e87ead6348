"""The memory layout changes strides and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import build_tiny_model

from sgworkbench.models import load_model, use_fast_layout
from sgworkbench.models.layout import has_fast_layout, stored_in_order


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3"])
def test_logits_are_bit_identical_in_both_layouts(family: str, tmp_path: Path) -> None:
    model = load_model(build_tiny_model(family, tmp_path), self_check=False).model
    assert has_fast_layout(model)
    ids = torch.randint(6, 420, (4, 30), generator=torch.Generator().manual_seed(0))
    fast = model(ids)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    assert not has_fast_layout(model)
    plain = model(ids)
    use_fast_layout(model)
    assert has_fast_layout(model)
    assert torch.equal(fast, plain)
    assert torch.equal(model(ids), plain)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_no_weight_is_copied_during_a_decode_step(tmp_path: Path) -> None:
    """The largest copy of a one-token step is far smaller than the smallest weight matrix."""
    model = load_model(build_tiny_model("llama", tmp_path), self_check=False).model

    def largest_copy() -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            model(torch.tensor([[7]]))
        shapes = [event.input_shapes[0] for event in profile.events() if event.name == "aten::copy_"]
        return max((int(torch.tensor(shape).prod()) for shape in shapes if shape), default=0)

    smallest_weight = 2 * 8 * 32
    assert largest_copy() < smallest_weight
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    assert largest_copy() >= 32 * 448


def test_stored_in_order_keeps_values_and_shape_and_returns_the_same_object_when_done() -> None:
    weight = torch.arange(24.0).reshape(2, 3, 4)
    stored = stored_in_order(weight, (2, 0, 1))
    assert torch.equal(stored, weight)
    # Slowest dimension 2, then 0, then 1: strides 1 for dimension 1, 3 for dimension 0, 6 for dimension 2.
    assert stored.stride() == (3, 1, 6)
    assert stored_in_order(stored, (2, 0, 1)) is stored
