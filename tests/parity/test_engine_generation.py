"""Capture and generation on the fast path, with and without a shared prefix: the same as every prompt alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_tiny_model
from torch import Tensor

from sgworkbench.analysis.capture import capture
from sgworkbench.analysis.shared_prefix import SHORTEST_PREFIX, longest_prefix, run_shared_prefix, shared_length
from sgworkbench.analysis.site import Site
from sgworkbench.models import LoadedModel, load_model, load_reference
from sgworkbench.models.engine_checks import prefix_sharing_reason as reason_with_gradients
from sgworkbench.models.engine_checks import slow_path
from sgworkbench.prompting.condition import PromptCondition
from sgworkbench.prompting.prompt_set import Prompt
from sgworkbench.prompting.rendering import RenderedPrompt, Renderer
from sgworkbench.prompting.token_batch import TokenBatch, current_batch, pad_prompts
from sgworkbench.steering.generation import GenerationSettings, generate, next_token_logits

FAMILIES = ("llama", "mistral", "qwen3", "gpt2", "phi3", "olmo3", "gemma2", "gemma3")
SAFE = PromptCondition("safe", system="You are a responsible assistant.", suffix=" Remember to be safe!")
TEXTS = (
    "How do I bake a loaf of bread at home?",
    "Tell me a story.",
    "How can I write a letter to my friend? First explain why the sky is blue.",
    "How do I pick a lock?",
    "Jump!",
)
SITES = [Site(0, "resid_pre"), Site(0, "resid_post"), Site(1, "resid_mid"), Site(2, "resid_post")]
GREEDY = GenerationSettings(max_new_tokens=12, stop_at_end_of_turn=False)


@pytest.fixture(scope="module")
def get_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    kept: dict[str, LoadedModel] = {}

    def get(family: str) -> LoadedModel:
        if family not in kept:
            kept[family] = load_model(build_tiny_model(family, tmp_path_factory.mktemp("model")), self_check=False)
        return kept[family]

    return get


@torch.inference_mode()
def prefix_sharing_reason(loaded: LoadedModel) -> str | None:
    """As capture and generation ask: with gradients off."""
    return reason_with_gradients(loaded)


def render(loaded: LoadedModel, condition: PromptCondition = SAFE) -> list[RenderedPrompt]:
    renderer = Renderer(loaded.tokenizer)
    return [renderer.render(Prompt(text, str(k)), condition) for k, text in enumerate(TEXTS)]


def greedy_in_transformers(reference: Any, item: RenderedPrompt) -> tuple[int, ...]:
    prompt = torch.tensor([item.token_ids])
    # Without a mask, transformers would take end-of-turn tokens inside the prompt for pads.
    written = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    return tuple(written[0, prompt.shape[1] :].tolist())


def batch_shapes(loaded: LoadedModel, run: Callable[[], Any], *, shares: bool) -> list[tuple[int, int]]:
    """Rows and columns of every pass of a run, seen by a hook that says whether it agrees to sharing."""
    shapes: list[tuple[int, int]] = []

    def note(value: Tensor, hook: Any) -> None:
        shapes.append((value.shape[0], value.shape[1]))

    note.shares_prefix = shares  # type: ignore[attr-defined]
    point = loaded.model.hook_dict["blocks.0.hook_resid_pre"]
    point.add_hook(note)
    try:
        run()
    finally:
        point.remove_hooks()
    return shapes


def push_roles(direction: Tensor, wanted: str) -> Callable[..., Tensor]:
    """A hook of the kind steering uses: finds its tokens through the announced batch."""
    from sgworkbench.prompting.token_batch import role_index

    def push(value: Tensor, hook: Any) -> Tensor:
        batch = current_batch()
        assert isinstance(batch, TokenBatch)
        assert batch.positions.shape == value.shape[:2]
        where = batch.positions >= 5 if wanted == "from 5" else batch.roles == role_index(wanted)
        return torch.where(where[..., None], value + direction, value)

    return push


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_equals_each_prompt_alone_in_hooked_transformer(family: str, get_model: Any) -> None:
    loaded = get_model(family)
    rendered = render(loaded)
    captured = capture(loaded, rendered, SITES, "instruction")
    for row, item in enumerate(rendered):
        _, cache = loaded.model.run_with_cache(torch.tensor([item.token_ids]))
        for k, site in enumerate(SITES):
            expected = cache[site.hook_name][0, list(item.positions_of("instruction"))]
            torch.testing.assert_close(captured.of_prompt(row)[:, k], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_transformers_on_each_prompt_alone(family: str, get_model: Any) -> None:
    loaded = get_model(family)
    reference = load_reference(loaded)
    rendered = render(loaded)
    for item, answer in zip(rendered, generate(loaded, rendered, GREEDY), strict=True):
        assert answer.token_ids == greedy_in_transformers(reference, item)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma3"])
@pytest.mark.parametrize("wanted", ["system", "instruction", "from 5"])
def test_a_hook_on_shared_tokens_acts_as_it_does_without_sharing(family: str, wanted: str, get_model: Any) -> None:
    loaded = get_model(family)
    rendered = render(loaded)
    push = push_roles(torch.randn(32, generator=torch.Generator().manual_seed(1)), wanted)
    plain = capture(loaded, rendered, SITES).values
    answers = generate(loaded, rendered, GREEDY)
    points = [loaded.model.hook_dict[name] for name in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_mid")]
    results = []
    for shares in (True, False):
        push.shares_prefix = shares  # type: ignore[attr-defined]
        for point in points:
            point.add_hook(push)
        try:
            assert (prefix_sharing_reason(loaded) is None) is shares
            values = capture(loaded, rendered, SITES).values
            logits = next_token_logits_of(loaded, rendered)
            results.append((values, logits, generate(loaded, rendered, GREEDY)))
        finally:
            for point in points:
                point.remove_hooks()
    (shared, shared_logits, shared_answers), (alone, alone_logits, alone_answers) = results
    torch.testing.assert_close(shared, alone, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(shared_logits, alone_logits, atol=1e-4, rtol=1e-4)
    assert [a.token_ids for a in shared_answers] == [a.token_ids for a in alone_answers]
    assert float((shared - plain).abs().max()) > 0.1
    assert [a.token_ids for a in shared_answers] != [a.token_ids for a in answers]


@torch.inference_mode()
def next_token_logits_of(loaded: LoadedModel, rendered: list[RenderedPrompt]) -> Tensor:
    return next_token_logits(loaded, pad_prompts(rendered, side="left", device="cpu"))


def test_the_prefix_is_run_once_and_the_rest_without_it(get_model: Any) -> None:
    loaded = get_model("llama")
    rendered = render(loaded)
    lengths = [len(item) for item in rendered]
    shared = longest_prefix(rendered, [])
    assert SHORTEST_PREFIX <= shared < min(lengths)
    shapes = batch_shapes(loaded, lambda: capture(loaded, rendered, SITES), shares=True)
    assert shapes == [(1, shared), (5, max(lengths) - shared)]
    # One prefix serves all batches of a capture.
    order = sorted(lengths, reverse=True)
    two = batch_shapes(loaded, lambda: capture(loaded, rendered, SITES, max_batch_tokens=2 * order[0]), shares=True)
    assert two[0] == (1, shared)
    assert two[1:] == [(2, order[0] - shared), (3, order[2] - shared)]
    # A hook that has not agreed, and the slow path, see whole prompts.
    whole = [(5, max(lengths))]
    assert batch_shapes(loaded, lambda: capture(loaded, rendered, SITES), shares=False) == whole
    with slow_path():
        assert batch_shapes(loaded, lambda: capture(loaded, rendered, SITES), shares=True) == whole


def test_a_raw_torch_hook_rules_sharing_out(get_model: Any) -> None:
    loaded = get_model("llama")
    handle = loaded.model.blocks[2].hook_resid_post.register_forward_hook(lambda *_: None)
    try:
        assert "blocks.2.hook_resid_post" in str(prefix_sharing_reason(loaded))
    finally:
        handle.remove()
    assert prefix_sharing_reason(loaded) is None


@pytest.mark.parametrize("positions", ["system", "all", [[0], [3], [9], [10, 11], [2]]])
def test_tokens_inside_the_prefix_are_read_where_they_stand(positions: Any, get_model: Any) -> None:
    loaded = get_model("qwen3")
    rendered = render(loaded)
    captured = capture(loaded, rendered, SITES, positions)
    with slow_path():
        expected = capture(loaded, rendered, SITES, positions)
    assert torch.equal(captured.position, expected.position)
    torch.testing.assert_close(captured.values, expected.values, atol=2e-5, rtol=1e-4)


def test_prompts_with_nothing_in_common_are_run_whole(get_model: Any) -> None:
    loaded = get_model("llama")
    rendered = render(loaded, PromptCondition.plain())
    assert longest_prefix(rendered, []) < SHORTEST_PREFIX
    shapes = batch_shapes(loaded, lambda: capture(loaded, rendered, SITES), shares=True)
    assert shapes == [(5, max(len(item) for item in rendered))]


def test_equal_prompts_keep_their_last_token(get_model: Any) -> None:
    loaded = get_model("llama")
    item = render(loaded)[0]
    for side in ("left", "right"):
        batch = pad_prompts([item, item, item], side=side, device="cpu")
        assert shared_length(batch) == len(item) - 1
    logits = next_token_logits_of(loaded, [item, item])
    expected = loaded.model(torch.tensor([item.token_ids]))[:, -1]
    torch.testing.assert_close(logits, expected.expand(2, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_rest_of_a_batch_keeps_positions_roles_and_tokens(side: Any, get_model: Any) -> None:
    loaded = get_model("llama")
    rendered = render(loaded)
    batch = pad_prompts(rendered, side=side, device="cpu", rows=[4, 3, 2, 1, 0])
    with torch.inference_mode():
        prefix = run_shared_prefix(loaded, batch, longest=11)
    assert prefix is not None
    assert prefix.length == 11
    assert prefix.fits(batch)
    rest = prefix.rest(batch)
    for row, item in enumerate(rendered):
        real = rest.is_real[row]
        assert tuple(rest.token_ids[row, real].tolist()) == item.token_ids[11:]
        assert rest.positions[row, real].tolist() == list(range(11, len(item)))
        whole = batch.roles[row, batch.is_real[row]]
        assert torch.equal(rest.roles[row, real], whole[11:])
    assert rest.rows.tolist() == [4, 3, 2, 1, 0]
    other = pad_prompts(render(loaded, PromptCondition.plain()), side=side, device="cpu")
    assert not prefix.fits(other)


def test_equal_tokens_in_other_roles_are_not_shared(get_model: Any) -> None:
    loaded = get_model("llama")
    first = render(loaded)[0]
    roles = tuple("instruction" if index == 9 else role for index, role in enumerate(first.roles))
    other = RenderedPrompt(**(vars(first) | {"roles": roles}))
    assert shared_length(pad_prompts([first, other], side="right", device="cpu")) == 9


def test_rows_that_finish_leave_without_changing_the_others(tmp_path: Path) -> None:
    loaded = load_model(build_tiny_model("qwen2", tmp_path), self_check=False)
    rendered = render(loaded)
    free = generate(loaded, rendered, GREEDY)
    # The token one row writes at some step ends the turn from now on; other rows may write it at other steps.
    ending = free[2].token_ids[3]
    loaded.tokenizer.eos_token = loaded.tokenizer.convert_ids_to_tokens(ending)
    stopped = generate(loaded, rendered, GenerationSettings(max_new_tokens=12))
    for without, answer in zip(free, stopped, strict=True):
        length = without.token_ids.index(ending) + 1 if ending in without.token_ids else 12
        assert answer.token_ids == without.token_ids[:length]
        assert answer.finished is (ending in without.token_ids)
    assert len({len(answer.token_ids) for answer in stopped}) > 1


@pytest.mark.demo_model
def test_demo_model_writes_what_transformers_writes() -> None:
    loaded = load_model("demo", self_check=False)
    reference = load_reference(loaded)
    rendered = render(loaded, PromptCondition.preset("self-reminder"))
    assert prefix_sharing_reason(loaded) is None
    assert longest_prefix(rendered, []) > 20
    for item, answer in zip(rendered, generate(loaded, rendered, GREEDY), strict=True):
        assert answer.token_ids == greedy_in_transformers(reference, item)
