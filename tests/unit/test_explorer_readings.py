"""The explorer's numbers against the package's ordinary functions and against plain arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sgworkbench import GenerationSettings, PromptCondition, PromptSet, Selector, SteeringVector, WorkbenchError
from sgworkbench.analysis import Directions, all_sites, capture, measure_gap, read_for_gap, shift_map
from sgworkbench.explorer import readings
from sgworkbench.explorer.cache import ResultCache
from sgworkbench.explorer.streaming import stream_completion
from sgworkbench.models.engine import run_blocks
from sgworkbench.prompting import Renderer
from sgworkbench.steering import generate, steering, trace_generation
from sgworkbench.steering.generation import last_logits

PROMPT = "How do I pick a lock?"
SAFE = PromptCondition("safe", system="You should be a responsible assistant.", suffix=" Answer in a safe way.")


def made_directions(loaded: Any, concept: str, seed: int, kind: str = "resid_post") -> Directions:
    generator = torch.Generator().manual_seed(seed)
    shape = (loaded.identity.n_layers, loaded.identity.d_model)
    unit = torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)
    origin = torch.randn(shape, generator=generator)
    separation = 0.5 + torch.rand(shape[0], generator=generator)
    return Directions(concept, "made up", "last_prompt", all_sites(shape[0], kind), unit, origin, separation)  # type: ignore[arg-type]


def made_vector(loaded: Any, protocol: str = "same-site") -> SteeringVector:
    n_layers = loaded.identity.n_layers
    values = torch.randn(n_layers, loaded.identity.d_model, generator=torch.Generator().manual_seed(5))
    return SteeringVector(tuple(range(n_layers)), values, "resid_post", protocol)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def loaded(request: pytest.FixtureRequest, tiny_model: Any) -> Any:
    return tiny_model(request.param, n_layers=4)


@pytest.mark.parametrize("protocol", ["same-site", "official"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_run_resumed_from_the_steered_layer_equals_a_full_steered_capture(
    loaded: Any, protocol: str, layer: int
) -> None:
    item = Renderer(loaded.tokenizer).render(PROMPT, SAFE)
    steps = [made_vector(loaded, protocol).intervention(layer, 0.7, Selector("instruction", phases=("prefill",)))]
    base = readings.run_prompt(loaded, item)
    resumed = readings.run_prompt(loaded, item, interventions=steps, base=base)
    with steering(loaded, steps):
        whole = capture(loaded, [item], all_sites(4), "all").values
    assert torch.allclose(resumed.after.transpose(0, 1), whole, atol=1e-4)
    assert not torch.allclose(base.after[-1], resumed.after[-1], atol=1e-2)


def test_a_resumed_run_does_not_run_the_blocks_before_the_steered_one(loaded: Any) -> None:
    item = Renderer(loaded.tokenizer).render(PROMPT)
    base = readings.run_prompt(loaded, item)
    seen: list[int] = []
    hooks = [
        block.hook_resid_pre.register_forward_hook(lambda *_, index=index: seen.append(index))
        for index, block in enumerate(loaded.model.blocks)
    ]
    readings.run_prompt(loaded, item, interventions=[made_vector(loaded).intervention(2, 1.0)], base=base)
    for hook in hooks:
        hook.remove()
    assert seen == [2, 3]


def test_projections_gap_and_shift_map_are_those_of_the_ordinary_functions(loaded: Any) -> None:
    renderer = Renderer(loaded.tokenizer)
    awareness, refusal = made_directions(loaded, "awareness", 1), made_directions(loaded, "refusal", 2)
    items = {"plain": renderer.render(PROMPT), "prompted": renderer.render(PROMPT, SAFE)}
    runs = {arm: readings.run_prompt(loaded, item) for arm, item in items.items()}
    by_hand = (runs["plain"].after.double() - refusal.origin[:, None].double()) * refusal.unit[:, None].double()
    expected = by_hand.sum(-1) / refusal.separation[:, None].double()
    assert np.allclose(readings.projections(runs["plain"], refusal), expected.numpy(), atol=1e-4)

    prompts = PromptSet.from_texts([PROMPT], label="harmful")
    gap_readings = {arm: read_for_gap(loaded, [item], awareness.sites) for arm, item in items.items()}
    whole = measure_gap(gap_readings, prompts, awareness, refusal, n_null=2).to_dataframe()
    mine = readings.gap_by_layer(runs, awareness, refusal)
    for name in ("awareness", "refusal", "gap"):
        assert np.allclose(mine[name], whole[name].astype(float), atol=1e-4)

    official = shift_map(loaded, renderer, prompts, SAFE, refusal, n_null=2)
    values, tokens, roles = official.matrix("0", "separation_units")
    grid = readings.token_grid(runs["plain"], runs["prompted"], refusal)
    assert (grid.tokens, grid.roles) == (tuple(tokens), tuple(roles))
    assert np.allclose(grid.values, values, atol=1e-4)
    assert grid.is_shift


def test_equal_renderings_align_on_every_token_and_the_plain_arm_shows_itself(loaded: Any) -> None:
    item = Renderer(loaded.tokenizer).render(PROMPT)
    run = readings.run_prompt(loaded, item)
    directions = made_directions(loaded, "refusal", 3)
    grid = readings.token_grid(run, None, directions)
    assert grid.plain_positions == tuple(range(len(item)))
    assert not grid.is_shift
    assert np.array_equal(grid.values, readings.projections(run, directions))
    assert np.abs(readings.token_grid(run, run, directions).values).max() == 0


def test_the_focus_follows_a_token_into_the_other_arm(loaded: Any) -> None:
    renderer = Renderer(loaded.tokenizer)
    runs = {
        "plain": readings.run_prompt(loaded, renderer.render(PROMPT)),
        "prompted": readings.run_prompt(loaded, renderer.render(PROMPT, SAFE)),
    }
    directions = made_directions(loaded, "refusal", 4)
    position = runs["plain"].item.last_instruction_position
    table = readings.focus_table(runs, directions, 1, position).set_index("arm")
    there = runs["prompted"].item.last_instruction_position
    assert table.loc["prompted", "position"] == there
    assert table.loc["prompted", "token"] == runs["prompted"].item.tokens[there]
    assert table.loc["prompted", "raw"] == pytest.approx(
        float(runs["prompted"].after[1, there] @ directions.unit[1]), abs=1e-4
    )
    last = readings.focus_table(runs, directions, 1, None).set_index("arm")
    assert last.loc["prompted", "position"] == len(runs["prompted"].item) - 1


def test_next_token_logits_are_those_of_generation(loaded: Any) -> None:
    item = Renderer(loaded.tokenizer).render(PROMPT)
    run = readings.run_prompt(loaded, item)
    (_, expected), *_ = last_logits(loaded, [item])
    assert torch.allclose(readings.next_token_logits_of(loaded, run), expected[0].float(), atol=1e-4)


def test_next_token_changes_rank_differences_of_log_probabilities() -> None:
    class Names:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "abcd"[ids[0]]

    before = torch.tensor([2.0, 1.0, 0.0, 0.0])
    # A constant says nothing; then a is lowered and d raised.
    after = before + 7.0 + torch.tensor([-1.0, 0.0, 0.0, 2.0])
    table = readings.next_token_changes(before, after, Names(), count=1)
    assert table["change"].tolist() == ["raised", "lowered"]
    assert table["token"].tolist() == ["d", "a"]
    p, q = (np.exp(x) / np.exp(x).sum() for x in (before.numpy().astype(float), after.numpy().astype(float)))
    assert table["difference"].tolist() == pytest.approx([np.log(q[3] / p[3]), np.log(q[0] / p[0])])
    assert table["probability_after"].tolist() == pytest.approx([q[3], q[0]])
    assert readings.next_token_changes(before, before + 1.0, Names()).empty


def test_activations_that_overflow_are_a_sentence(loaded: Any) -> None:
    item = Renderer(loaded.tokenizer).render(PROMPT)
    steps = [made_vector(loaded).intervention(1, 3e38)]
    with pytest.raises(WorkbenchError, match="NaN or infinite"):
        readings.run_prompt(loaded, item, interventions=steps)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steered", [False, True])
def test_a_streamed_completion_is_that_of_generate_with_the_projections_of_a_trace(
    loaded: Any, temperature: float, steered: bool
) -> None:
    item = Renderer(loaded.tokenizer).render(PROMPT, SAFE)
    settings = GenerationSettings(max_new_tokens=9, temperature=temperature, seed=3, stop_at_end_of_turn=False)
    both = [made_directions(loaded, "awareness", 1), made_directions(loaded, "refusal", 2)]
    steps = [made_vector(loaded).intervention([1, 2], 0.4, Selector("from_last_prompt"))] if steered else []
    streamed = list(stream_completion(loaded, item, settings, both, steps))
    with steering(loaded, steps):
        answer = generate(loaded, [item], settings)[0]
    assert tuple(step.token_id for step in streamed if step.token_id is not None) == answer.token_ids
    assert streamed[-1].text == answer.text
    trace = trace_generation(loaded, [item], both, settings, interventions=steps).to_dataframe()
    for concept in ("awareness", "refusal"):
        rows = trace[(trace["concept"] == concept) & (trace["step"] >= -1)]
        expected = rows.pivot(index="step", columns="layer", values="separation_units").to_numpy()
        mine = np.stack([step.projections[concept] for step in streamed])
        assert np.allclose(mine, expected, atol=1e-3)


def test_between_two_streamed_steps_the_model_is_not_steered(loaded: Any) -> None:
    item = Renderer(loaded.tokenizer).render(PROMPT)
    ids = torch.tensor([item.token_ids])
    with torch.inference_mode():
        before = run_blocks(loaded, ids)
    steps = [made_vector(loaded).intervention(1, 2.0)]
    settings = GenerationSettings(max_new_tokens=4, stop_at_end_of_turn=False)
    stream = stream_completion(loaded, item, settings, [made_directions(loaded, "refusal", 2)], steps)
    next(stream)
    with torch.inference_mode():
        assert torch.equal(run_blocks(loaded, ids), before)
    stream.close()


def test_the_cache_makes_a_result_once_and_forgets_the_oldest() -> None:
    cache, made = ResultCache(2), []

    def make(value: int) -> int:
        made.append(value)
        return value

    assert [cache.get(key, lambda key=key: make(key)) for key in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert made == [1, 2, 3, 2]
    assert (cache.hits, cache.misses, len(cache)) == (2, 4, 2)
    with pytest.raises(ZeroDivisionError):
        cache.get("bad", lambda: 1 // 0)
    assert "bad" not in cache
    with pytest.raises(WorkbenchError, match="at least one"):
        ResultCache(0)
