"""The fast path against HookedTransformer's own forward: every family, every hook point, every padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, build_tiny_model
from torch import Tensor

from sgworkbench.errors import WorkbenchError
from sgworkbench.models import LoadedModel, load_model
from sgworkbench.models.engine import run_blocks
from sgworkbench.models.engine_checks import BLOCK_HOOK_POINTS, fast_path_reason, slow_path
from sgworkbench.models.kv_cache import PreallocatedCache, surviving_rows

FAST_FAMILIES = tuple(family for family in FAMILIES if family != "gemma2")
# Longer than every sliding window (20 for mistral, 12 for the others).
LENGTHS = (50, 9, 33, 50)
TOLERANCE = 1e-5
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "hidden_act": "gelu", "head_dim": 20}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen3", {"num_key_value_heads": 4}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 3000.0, "partial_rotary_factor": 0.5}}),
    ("phi3", {"sliding_window": 24, "num_key_value_heads": 4}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}),
    ("gpt2", {"scale_attn_weights": False}),
    ("olmo3", {"num_key_value_heads": 4}),
    ("gemma3", {"layer_types": ["sliding_attention"] * 3}),
]


@pytest.fixture(scope="module")
def get_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LoadedModel]:
    kept: dict[str, LoadedModel] = {}

    def get(family: str, **changes: Any) -> LoadedModel:
        key = f"{family} {changes}"
        if key not in kept:
            folder = build_tiny_model(family, tmp_path_factory.mktemp("model"), **changes)
            with torch.inference_mode(False):
                kept[key] = load_model(folder, self_check=False)
        return kept[key]

    return get


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def random_ids(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(6, 420, (rows, columns), generator=torch.Generator().manual_seed(seed))


def prompts() -> list[Tensor]:
    return [random_ids(1, length, seed=row)[0] for row, length in enumerate(LENGTHS)]


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask; pads hold an ordinary token, so that attending to one changes the numbers."""
    ids = torch.full((len(LENGTHS), max(LENGTHS)), 17)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts()):
        columns = slice(0, len(prompt)) if side == "right" else slice(max(LENGTHS) - len(prompt), None)
        ids[row, columns], mask[row, columns] = prompt, 1
    return ids, mask


def run_with_sites(loaded: LoadedModel, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Everything the hook points of the stream see, and what comes out."""
    seen: dict[str, Tensor] = {}
    points = {name: point for name, point in loaded.model.hook_dict.items() if _is_stream_point(name)}
    with ExitStack() as stack:
        for name, point in points.items():

            def keep(_module: Any, _inputs: Any, output: Tensor, name: str = name) -> None:
                assert name not in seen, f"{name} ran twice"
                seen[name] = output

            stack.callback(point.register_forward_hook(keep).remove)
        seen["output"] = run()
    return seen


def _is_stream_point(name: str) -> bool:
    parts = name.split(".")
    return (len(parts) == 3 and parts[-1] in BLOCK_HOOK_POINTS) or name in ("hook_embed", "hook_pos_embed")


def assert_same(ours: Tensor, theirs: Tensor, what: str = "", where: Tensor | None = None) -> None:
    ours, theirs = (value if where is None else value[where] for value in (ours, theirs))
    difference = (ours.double() - theirs.double()).norm(dim=-1) / theirs.double().norm(dim=-1)
    assert float(difference.max()) < TOLERANCE, (what, float(difference.max()))


def assert_same_sites(fast: dict[str, Tensor], slow: dict[str, Tensor], where: Tensor | None = None) -> None:
    assert fast.keys() == slow.keys()
    for name, value in slow.items():
        assert_same(fast[name], value, name, where)


def logits_of(loaded: LoadedModel, stream: Tensor) -> Tensor:
    return loaded.model.unembed(loaded.model.ln_final(stream))


@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_right_padded_prompts_give_the_same_values_at_every_hook_point(family: str, get_model: Any) -> None:
    loaded = get_model(family)
    assert fast_path_reason(loaded) is None
    ids, mask = padded("right")
    fast = run_with_sites(loaded, lambda: run_blocks(loaded, ids))
    slow = run_with_sites(loaded, lambda: loaded.model(ids, stop_at_layer=3, padding_side="right"))
    n_points = 3 * len(BLOCK_HOOK_POINTS) + (2 if family == "gpt2" else 1)
    assert len(fast) == n_points + 1
    assert_same_sites(fast, slow)
    logits = logits_of(loaded, fast["output"])
    assert_same(logits, loaded.model(ids, padding_side="right"))
    # The mask of right-padded prompts changes nothing at real tokens.
    masked = run_blocks(loaded, ids, attention_mask=mask)
    assert_same(masked, slow["output"], where=mask.bool())


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_variants_of_the_families(family: str, changes: dict[str, Any], get_model: Any) -> None:
    loaded = get_model(family, **changes)
    assert fast_path_reason(loaded) is None
    ids, mask = padded("left")
    assert_same(run_blocks(loaded, ids[:1]), loaded.model(ids[:1], stop_at_layer=3))
    assert_same(
        run_blocks(loaded, ids, attention_mask=mask),
        loaded.model(ids, attention_mask=mask, stop_at_layer=3),
        where=mask.bool(),
    )


@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_left_padded_rows_equal_each_prompt_alone(family: str, get_model: Any) -> None:
    loaded = get_model(family)
    ids, mask = padded("left")
    fast = run_with_sites(loaded, lambda: run_blocks(loaded, ids, attention_mask=mask))
    assert all(bool(value.isfinite().all()) for value in fast.values())
    for row, prompt in enumerate(prompts()):
        alone = loaded.model(prompt[None], stop_at_layer=3, padding_side="right")
        assert_same(fast["output"][row, mask[row].bool()], alone[0])
    slow = run_with_sites(loaded, lambda: loaded.model(ids, attention_mask=mask, stop_at_layer=3))
    assert_same_sites(fast, slow, where=mask.bool())


@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_pads_may_stand_between_tokens(family: str, get_model: Any) -> None:
    """As between a shared prefix and the rest of a shorter prompt; windows count tokens, not columns."""
    loaded = get_model(family)
    prompt = random_ids(1, 40, seed=5)
    ids = torch.cat([prompt[:, :15], torch.full((1, 18), 17), prompt[:, 15:]], dim=1)
    mask = torch.ones_like(ids)
    mask[:, 15:33] = 0
    stream = run_blocks(loaded, ids, attention_mask=mask)
    assert_same(stream[mask.bool()][None], loaded.model(prompt, stop_at_layer=3))


@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_cached_steps_equal_hooked_transformer_with_its_cache_and_a_full_pass(family: str, get_model: Any) -> None:
    loaded = get_model(family)
    ids, mask = padded("left")
    ids, mask = torch.cat([ids, random_ids(4, 8, seed=9)], 1), torch.cat([mask, torch.ones(4, 8, dtype=torch.long)], 1)
    full = loaded.model(ids, attention_mask=mask, stop_at_layer=3)
    steps = [0, 50, 51, 52, 57, 58]

    def decode() -> list[Tensor]:
        cache = PreallocatedCache(loaded.model.cfg, 4, 58, "cpu")
        return [
            run_blocks(loaded, ids[:, start:end], attention_mask=mask[:, :end], cache=cache)
            for start, end in pairwise(steps)
        ]

    fast = torch.cat(decode(), dim=1)
    with slow_path():
        slow = torch.cat(decode(), dim=1)
    assert_same(fast, full, "full", mask.bool())
    assert_same(fast, slow, "slow", mask.bool())
    # Without pads no mask is needed, on either path.
    prompt = prompts()[0][None]
    for path in (ExitStack, slow_path):
        with path():
            cache = PreallocatedCache(loaded.model.cfg, 1, 50, "cpu")
            parts = [run_blocks(loaded, prompt[:, s:e], cache=cache) for s, e in ((0, 30), (30, 31), (31, 50))]
        assert_same(torch.cat(parts, 1), loaded.model(prompt, stop_at_layer=3))


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo3", "gemma3"])
@pytest.mark.parametrize("kind", BLOCK_HOOK_POINTS)
def test_hooks_change_the_stream_as_they_do_in_hooked_transformer(family: str, kind: str, get_model: Any) -> None:
    loaded = get_model(family)
    ids, mask = padded("left")
    push = torch.randn(32, generator=torch.Generator().manual_seed(3))
    plain = run_blocks(loaded, ids, attention_mask=mask)
    loaded.model.add_hook(f"blocks.1.{kind}", lambda value, hook: value + push)
    try:
        assert fast_path_reason(loaded) is None
        fast = run_with_sites(loaded, lambda: run_blocks(loaded, ids, attention_mask=mask))
        slow = run_with_sites(loaded, lambda: loaded.model(ids, attention_mask=mask, stop_at_layer=3))
    finally:
        loaded.model.reset_hooks()
    assert_same_sites(fast, slow, where=mask.bool())
    assert float((fast["output"] - plain)[mask.bool()].abs().min(dim=0).values.max()) > 0.01


def test_plain_torch_hooks_on_the_embedding_change_the_stream(get_model: Any) -> None:
    for family in ("llama", "gpt2"):
        loaded = get_model(family)
        ids = random_ids(2, 20)
        for name in ("embed", "hook_embed") + (("pos_embed", "hook_pos_embed") if family == "gpt2" else ()):
            handle = loaded.model.mod_dict[name].register_forward_hook(lambda _m, _i, output: 2 * output)
            try:
                assert fast_path_reason(loaded) is None
                assert_same(run_blocks(loaded, ids), loaded.model(ids, stop_at_layer=3), name)
            finally:
                handle.remove()


def test_values_a_hook_has_kept_are_not_changed_afterwards(get_model: Any) -> None:
    loaded = get_model("llama")
    ids = random_ids(3, 40)
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(value: Tensor, hook: Any) -> None:
        kept[hook.name] = (value, value.clone())

    loaded.model.add_hook(_is_stream_point, keep)
    try:
        run_blocks(loaded, ids)
    finally:
        loaded.model.reset_hooks()
    assert len(kept) == 16
    assert all(torch.equal(value, copy) for value, copy in kept.values())


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (1, None), (2, 3), (1, 1), (-1, None), (None, -1), (None, 0)])
def test_start_and_stop_layers_mean_what_they_mean_in_hooked_transformer(
    start: int | None, stop: int | None, get_model: Any
) -> None:
    loaded = get_model("mistral")
    ids, mask = padded("left")
    stream = torch.randn(4, 50, 32, generator=torch.Generator().manual_seed(4))
    inputs = ids if start is None else stream
    fast = run_blocks(loaded, inputs, attention_mask=mask, start_at_layer=start, stop_at_layer=stop)
    with slow_path():
        slow = run_blocks(loaded, inputs, attention_mask=mask, start_at_layer=start, stop_at_layer=stop)
    assert_same(fast, slow, where=mask.bool())


def test_a_pass_resumed_at_a_layer_equals_the_whole_pass_with_a_cache_too(get_model: Any) -> None:
    loaded = get_model("qwen3")
    ids, mask = padded("left")
    below = run_blocks(loaded, ids, attention_mask=mask, stop_at_layer=1)
    whole = loaded.model(ids, attention_mask=mask, stop_at_layer=3)
    for path in (ExitStack, slow_path):
        with path():
            cache = PreallocatedCache(loaded.model.cfg, 4, 50, "cpu")
            first = run_blocks(loaded, below[:, :45], attention_mask=mask[:, :45], cache=cache, start_at_layer=1)
            second = run_blocks(loaded, below[:, 45:], attention_mask=mask, cache=cache, start_at_layer=1)
        assert_same(torch.cat([first, second], 1), whole, where=mask.bool())


def test_biases_edited_in_place_are_seen(get_model: Any) -> None:
    """Zero biases are skipped; the check may not be remembered from an earlier pass."""
    loaded = get_model("llama")
    ids = random_ids(4, 40)
    before = run_blocks(loaded, ids)
    block = loaded.model.blocks[1]
    edited = [block.attn.b_Q, block.attn._b_K, block.attn._b_V, block.attn.b_O, block.mlp.b_in, block.mlp.b_out]
    for bias in edited:
        bias.data += torch.linspace(-1, 1, bias.numel()).view(bias.shape)
        assert_same(run_blocks(loaded, ids), loaded.model(ids, stop_at_layer=3))
        assert_same(run_blocks(loaded, ids[:, :1]), loaded.model(ids[:, :1], stop_at_layer=3))
        bias.data.zero_()
    assert torch.equal(run_blocks(loaded, ids), before)


def test_rotary_tables_grow_with_the_prompt(tmp_path: Path) -> None:
    folder = build_tiny_model("llama", tmp_path, n_layers=1, max_position_embeddings=4096)
    loaded = load_model(folder, self_check=False)
    assert loaded.model.blocks[0].attn.rotary_cos.shape[0] == 2048
    ids = random_ids(1, 2100)
    fast = run_blocks(loaded, ids)
    assert loaded.model.blocks[0].attn.rotary_cos.shape[0] == 4096
    assert_same(fast, loaded.model(ids, stop_at_layer=1))


def test_half_precision_agrees_within_its_rounding(tmp_path: Path) -> None:
    for family in ("qwen3", "gpt2"):
        folder = build_tiny_model(family, tmp_path / family)
        exact = load_model(folder, self_check=False)
        rounded = load_model(folder, self_check=False, dtype="bfloat16")
        ids, mask = padded("left")
        expected = exact.model(ids, attention_mask=mask, stop_at_layer=3)[mask.bool()]
        fast = run_blocks(rounded, ids, attention_mask=mask)
        slow = rounded.model(ids, attention_mask=mask, stop_at_layer=3)
        assert fast.dtype == torch.bfloat16
        errors = [float((value[mask.bool()] - expected).norm() / expected.norm()) for value in (fast, slow)]
        assert errors[0] < 1.5 * errors[1] < 0.05


def test_soft_capped_scores_run_in_hooked_transformer(get_model: Any) -> None:
    loaded = get_model("gemma2")
    assert fast_path_reason(loaded) == "attention scores have a soft cap"
    ids, mask = padded("left")
    assert torch.equal(
        run_blocks(loaded, ids, attention_mask=mask), loaded.model(ids, attention_mask=mask, stop_at_layer=3)
    )


@pytest.mark.parametrize(
    "name",
    [
        "blocks.1.attn.hook_q",
        "blocks.1.attn.hook_rot_k",
        "blocks.0.attn.hook_pattern",
        "blocks.2.attn.hook_z",
        "blocks.1.ln1.hook_normalized",
        "blocks.1.ln2.hook_scale",
        "blocks.1.mlp.hook_post",
    ],
)
def test_a_hook_on_any_other_point_is_obeyed(name: str, get_model: Any) -> None:
    loaded = get_model("llama")
    ids = random_ids(2, 20)
    plain = run_blocks(loaded, ids)
    loaded.model.add_hook(name, lambda value, hook: 1.5 * value)
    try:
        assert name in str(fast_path_reason(loaded))
        hooked = run_blocks(loaded, ids)
        expected = loaded.model(ids, stop_at_layer=3)
    finally:
        loaded.model.reset_hooks()
    assert torch.equal(hooked, expected)
    assert float((hooked - plain).abs().max()) > 0.01
    assert fast_path_reason(loaded) is None


@pytest.mark.parametrize("where", ["blocks.1", "blocks.1.attn", "blocks.2.mlp", "blocks.0.ln1", ""])
@pytest.mark.parametrize("kind", ["forward", "pre", "patched", "global"])
def test_raw_torch_hooks_and_patched_forwards_are_obeyed(where: str, kind: str, get_model: Any) -> None:
    loaded = get_model("llama")
    module = loaded.model.get_submodule(where)
    ids = random_ids(2, 20)
    calls: list[str] = []
    own_forward = module.forward

    def note(hooked: Any, *_: Any) -> None:
        if hooked is module:
            calls.append(kind)

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(kind)
        return own_forward(*args, **kwargs)

    with ExitStack() as stack:
        if kind == "forward":
            stack.callback(module.register_forward_hook(note).remove)
        elif kind == "pre":
            stack.callback(module.register_forward_pre_hook(note).remove)
        elif kind == "global":
            stack.callback(torch.nn.modules.module.register_module_forward_hook(note).remove)
        else:
            module.forward = patched
            stack.callback(module.__dict__.pop, "forward")
        assert fast_path_reason(loaded) is not None
        run_blocks(loaded, ids)
    assert calls
    assert fast_path_reason(loaded) is None


def test_settings_and_replaced_modules_are_noticed(get_model: Any) -> None:
    loaded = get_model("llama")
    model = loaded.model
    model.set_use_attn_result(True)
    assert fast_path_reason(loaded) == "the configuration sets use_attn_result"
    model.set_use_attn_result(False)
    original = model.blocks[1].mlp
    model.blocks[1].mlp = torch.nn.Identity()
    assert fast_path_reason(loaded) == "blocks.1.mlp is a Identity"
    model.blocks[1].mlp = original
    with slow_path():
        assert fast_path_reason(loaded) == "slow_path() is active"
    with torch.inference_mode(False), torch.enable_grad():
        assert "gradients" in str(fast_path_reason(loaded))
    assert fast_path_reason(loaded) is None


def test_gradients_flow_through_hooks_because_the_slow_path_takes_over(get_model: Any) -> None:
    loaded = get_model("llama")
    with torch.inference_mode(False):
        ids = random_ids(1, 10)
        push = torch.zeros(32, requires_grad=True)
        loaded.model.add_hook("blocks.0.hook_resid_post", lambda value, hook: value + push)
        try:
            run_blocks(loaded, ids).square().sum().backward()
        finally:
            loaded.model.reset_hooks()
    assert push.grad is not None
    assert float(push.grad.abs().sum()) > 0


def test_a_hook_attached_in_the_middle_of_a_generation(get_model: Any) -> None:
    loaded = get_model("llama")
    ids = random_ids(2, 20)
    hook = ("blocks.1.attn.hook_z", lambda value, hook: 0 * value)
    cache = PreallocatedCache(loaded.model.cfg, 2, 21, "cpu")
    run_blocks(loaded, ids, cache=cache)
    with loaded.model.hooks([hook]), pytest.raises(WorkbenchError, match=r"hook_z.*before the first token"):
        run_blocks(loaded, ids[:, :1], cache=cache)
    # The other way round goes on where it began: the keys of that cache are not rotated.
    cache = PreallocatedCache(loaded.model.cfg, 2, 21, "cpu")
    with loaded.model.hooks([hook]):
        run_blocks(loaded, ids, cache=cache)
        with_hook = loaded.model(torch.cat([ids, ids[:, :1]], 1), stop_at_layer=1)
    assert fast_path_reason(loaded) is None
    after = run_blocks(loaded, ids[:, :1], cache=cache, stop_at_layer=1)
    assert_same(after, with_hook[:, -1:])


def test_a_mask_of_the_wrong_length_is_refused(get_model: Any) -> None:
    loaded = get_model("llama")
    cache = PreallocatedCache(loaded.model.cfg, 2, 12, "cpu")
    run_blocks(loaded, random_ids(2, 10), cache=cache)
    with pytest.raises(WorkbenchError, match=r"expected \(2, 11\), found \(2, 1\)"):
        run_blocks(loaded, random_ids(2, 1), attention_mask=torch.ones(2, 1, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("path", [ExitStack, slow_path])
def test_rows_leave_the_cache_without_touching_the_others(path: Any, get_model: Any) -> None:
    loaded = get_model("qwen2")
    ids, mask = padded("left")
    one = torch.ones(4, 1, dtype=torch.long)
    with path():
        cache = PreallocatedCache(loaded.model.cfg, 4, 52, "cpu")
        run_blocks(loaded, ids, attention_mask=mask, cache=cache)
        kept = surviving_rows(4, [0, 2])
        cache.keep_rows(kept)
        steps = [
            run_blocks(loaded, ids[kept, k : k + 1], attention_mask=cache.whole_mask(one[kept]), cache=cache)
            for k in range(2)
        ]
    whole_mask = torch.cat([mask, one, one], 1)
    whole = loaded.model(torch.cat([ids, ids[:, :2]], 1), attention_mask=whole_mask, stop_at_layer=3)
    assert_same(torch.cat(steps, 1), whole[kept, -2:])


def test_surviving_rows_fill_holes_from_the_end() -> None:
    assert surviving_rows(5, []) == [0, 1, 2, 3, 4]
    assert surviving_rows(5, [4]) == [0, 1, 2, 3]
    assert surviving_rows(6, [0, 2, 5]) == [4, 1, 3]
    assert surviving_rows(3, [0, 1, 2]) == []


def test_a_frozen_prefix_of_one_row_serves_a_batch(get_model: Any) -> None:
    for family in ("mistral", "gpt2"):
        loaded = get_model(family)
        prefix = random_ids(1, 15, seed=7)
        ids, mask = padded("left")
        cache = PreallocatedCache(loaded.model.cfg, 1, 15, "cpu")
        run_blocks(loaded, prefix, cache=cache)
        cache.freeze()
        for _ in range(2):  # nothing is added to a frozen cache
            stream = run_blocks(loaded, ids, attention_mask=cache.whole_mask(mask), cache=cache)
            for row, prompt in enumerate(prompts()):
                alone = loaded.model(torch.cat([prefix, prompt[None]], 1), stop_at_layer=3)
                assert_same(stream[row, mask[row].bool()], alone[0, 15:])


@pytest.mark.demo_model
def test_demo_model_agrees_with_hooked_transformer() -> None:
    loaded = load_model("demo", self_check=False)
    assert fast_path_reason(loaded) is None
    ids = random_ids(3, 40)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    fast = run_with_sites(loaded, lambda: run_blocks(loaded, ids, attention_mask=mask))
    slow = run_with_sites(loaded, lambda: loaded.model(ids, attention_mask=mask, stop_at_layer=30))
    assert_same_sites(fast, slow, where=mask.bool())
    difference = logits_of(loaded, fast["output"]) - logits_of(loaded, slow["output"])
    assert float(difference[mask.bool()].abs().max()) < 1e-3
