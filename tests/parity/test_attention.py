"""Attention masses against transformers' own attention weights (eager), steering and decoding included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_steering import _blocks, load_plain
from tiny_models import build_tiny_model

from sgworkbench.analysis.attention import GENERATED, OTHER, AttentionRecorder, attention_to_spans
from sgworkbench.analysis.capture import reading
from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.models import load_model
from sgworkbench.models.engine_checks import fast_path_reason
from sgworkbench.prompting import PromptCondition, PromptSet, RenderedPrompt, Renderer
from sgworkbench.steering import Add, GenerationSettings, Intervention, Selector, generate, generation, steering
from sgworkbench.steering.attention_trace import attention_map, join_attention, trace_attention

TEXTS = ["How do I bake a loaf of bread?", "Sky?", "Tell me how to pick a lock at home, please."]
SAFE = PromptCondition("safe", system="You should be a responsible assistant.", suffix=" Answer in a safe way!")
SETTINGS = GenerationSettings(max_new_tokens=5, stop_at_end_of_turn=False)
LAYERS = (0, 2)
TOLERANCE = 1e-5
FAMILIES = ("llama", "qwen3", "gpt2", "gemma2", "gemma3", "olmo3")


@pytest.fixture(scope="module")
def get_both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    kept: dict[str, tuple[Any, Any]] = {}

    def get(family: str) -> tuple[Any, Any]:
        if family not in kept:
            folder: Path = build_tiny_model(family, tmp_path_factory.mktemp("attention"))
            kept[family] = (load_model(folder, self_check=False, progress=lambda _line: None), load_plain(folder))
        return kept[family]

    return get


def prompts(loaded: Any) -> list[RenderedPrompt]:
    return [Renderer(loaded.tokenizer).render(prompt, SAFE) for prompt in PromptSet.from_texts(TEXTS, label="harmful")]


@torch.no_grad()
def reference(model: Any, ids: list[int], push: torch.Tensor | None = None, layer: int = 0) -> list[np.ndarray]:
    """Attention [head, query, key] of every layer, with a vector added to a block's output at all tokens."""
    handles = []
    if push is not None:

        def write(_module: Any, _inputs: Any, output: Any) -> Any:
            return (output[0] + push, *output[1:]) if isinstance(output, tuple) else output + push

        handles.append(_blocks(model)[layer].register_forward_hook(write))
    found = model(torch.tensor([ids]), use_cache=False, output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    return [each[0].numpy() for each in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_masses_of_prompt_tokens_by_role(get_both: Callable[[str], tuple[Any, Any]], family: str) -> None:
    loaded, model = get_both(family)
    rendered = prompts(loaded)
    table = attention_to_spans(loaded, rendered, LAYERS, "instruction", heads="each").to_dataframe()
    for item in (rendered[0], rendered[2]):
        expected = reference(model, list(item.token_ids))
        mine = [row for row in table.itertuples() if row.prompt_id == item.prompt.id and row.position % 3 == 0]
        text = [row for row in mine if row.span in ("system", "instruction")]
        assert text
        for row in text:
            keys = [k for k in item.positions_of(row.span) if k <= row.position]
            assert np.isclose(row.mass, expected[row.layer][row.head, row.position, keys].sum(), atol=TOLERANCE)
            assert row.n_tokens == len(keys)
    sums = table.groupby(["prompt_id", "position", "layer", "head"])["mass"].sum()
    assert np.allclose(sums, 1.0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_masses_along_a_steered_generation(get_both: Callable[[str], tuple[Any, Any]], family: str) -> None:
    """Batched, left-padded, cached and steered, against full recomputes of one row."""
    loaded, model = get_both(family)
    rendered = prompts(loaded)
    push = 2 * torch.randn(loaded.identity.d_model, generator=torch.Generator().manual_seed(3))
    steer = Intervention(Add({Site(0): push}, 1.0))
    mass, answers = trace_attention(loaded, rendered, LAYERS, SETTINGS, interventions=steer, arm="steered")
    with steering(loaded, steer):
        assert [a.token_ids for a in answers] == [a.token_ids for a in generate(loaded, rendered, SETTINGS)]
    unsteered = 0.0
    for item, answer in zip(rendered, answers, strict=True):
        ids = [*item.token_ids, *answer.token_ids]
        expected, without = reference(model, ids, push), reference(model, ids)
        rows = mass.table[mass.table["prompt_id"] == item.prompt.id]
        # The last written token is never fed back.
        assert sorted(set(rows["step"])) == list(range(-1, len(answer.token_ids) - 1))
        for row in rows.itertuples():
            roles = [*item.roles, *["answer"] * len(answer.token_ids)]
            keys = [k for k in range(row.position + 1) if roles[k] == row.span]
            assert np.isclose(row.mass, expected[row.layer][:, row.position, keys].sum(-1).mean(), atol=TOLERANCE)
            assert row.n_tokens == len(keys)
            assert row.position == len(item) + row.step
            unsteered = max(unsteered, abs(row.mass - without[row.layer][:, row.position, keys].sum(-1).mean()))
    assert unsteered > 0.01


def test_hooks_on_patterns_force_the_slow_path(get_both: Callable[[str], tuple[Any, Any]]) -> None:
    loaded, _ = get_both("llama")
    rendered = prompts(loaded)
    recorder = AttentionRecorder(loaded, rendered, LAYERS, [(0,)] * 3)
    with torch.inference_mode():
        assert fast_path_reason(loaded) is None
        with reading(loaded.model, recorder.readers()):
            assert "hook_pattern" in str(fast_path_reason(loaded))
        assert fast_path_reason(loaded) is None


def test_named_spans_and_rows_that_finish_early(
    get_both: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, model = get_both("qwen3")
    rendered = prompts(loaded)
    spans = [{"reminder": item.positions_of("user_suffix")[1:3]} for item in rendered]
    # What the first row writes second ends an answer, so that it leaves the batch and the others move up.
    second = generate(loaded, rendered, SETTINGS)[0].token_ids[1]
    monkeypatch.setattr(generation, "end_token_ids", lambda _loaded: (second,))
    settings = GenerationSettings(max_new_tokens=6)
    mass, answers = trace_attention(loaded, rendered, [1], settings, spans=spans, heads="each")
    assert len(answers[0].token_ids) < max(len(answer.token_ids) for answer in answers)
    assert set(mass.table["span"]) == {"reminder", GENERATED, OTHER}
    for item, answer, span in zip(rendered, answers, spans, strict=True):
        expected = reference(model, [*item.token_ids, *answer.token_ids])[1]
        rows = mass.table[(mass.table["prompt_id"] == item.prompt.id) & (mass.table["span"] != OTHER)]
        for row in rows.itertuples():
            keys = span["reminder"] if row.span == "reminder" else list(range(len(item), row.position + 1))
            assert np.isclose(row.mass, expected[row.head, row.position, list(keys)].sum(), atol=TOLERANCE)
    per_token = mass.mean_by_layer(per_token=True)
    whole = mass.mean_by_layer()
    reminder = per_token["span"] == "reminder"
    assert np.allclose(per_token[reminder]["mass"] * 2, whole[whole["span"] == "reminder"]["mass"])


def test_selectors_still_see_their_tokens(get_both: Callable[[str], tuple[Any, Any]]) -> None:
    loaded, _ = get_both("llama")
    rendered = prompts(loaded)
    push = torch.full((loaded.identity.d_model,), 5.0)
    only = Intervention(Add({Site(1): push}, 1.0), Selector(tokens="generated", phases=("decode",)))
    plain, _ = trace_attention(loaded, rendered, [2], SETTINGS, arm="plain")
    steered, _ = trace_attention(loaded, rendered, [2], SETTINGS, interventions=only, arm="steered")
    both = join_attention([plain, steered]).to_dataframe()
    wide = both[both["span"] == "system"].pivot(index=["prompt_id", "step"], columns="arm", values="mass")
    prefill = wide.index.get_level_values("step") == -1
    assert np.allclose(wide[prefill]["plain"], wide[prefill]["steered"], atol=1e-6)
    assert not np.allclose(wide[~prefill]["plain"], wide[~prefill]["steered"], atol=1e-3)
    with pytest.raises(WorkbenchError, match="name every arm once"):
        join_attention([plain, plain])


def test_the_map_holds_every_written_token_and_prompt_token(get_both: Callable[[str], tuple[Any, Any]]) -> None:
    loaded, model = get_both("gemma3")
    item = prompts(loaded)[0]
    push = torch.randn(loaded.identity.d_model, generator=torch.Generator().manual_seed(1))
    shown, answer = attention_map(
        loaded, item, [2, 1], SETTINGS, roles=("instruction", "user_suffix"), interventions=Intervention(
            Add({Site(0): push}, 1.0)
        )
    )  # fmt: skip
    expected = reference(model, [*item.token_ids, *answer.token_ids], push)
    positions = list(item.positions_of("instruction", "user_suffix"))
    queries = range(len(item) - 1, len(item) + 4)
    for index, layer in enumerate((1, 2)):
        theirs = expected[layer].mean(0)[np.ix_(list(queries), positions)]
        assert np.allclose(shown.values[index], theirs, atol=TOLERANCE)
    assert shown.layers == (1, 2)
    assert shown.queries[1] == loaded.tokenizer.decode([answer.token_ids[0]])
    frame = shown.to_dataframe()
    cell = frame[(frame["layer"] == 2) & (frame["step"] == 1) & (frame["position"] == positions[3])]
    assert cell["attention"].item() == pytest.approx(shown.values[1, 2, 3])
    assert cell["key"].item() == item.tokens[positions[3]]


def test_mistakes_are_refused(get_both: Callable[[str], tuple[Any, Any]]) -> None:
    loaded, _ = get_both("llama")
    rendered = prompts(loaded)
    with pytest.raises(WorkbenchError, match="Layer 7"):
        attention_to_spans(loaded, rendered, [7])
    with pytest.raises(WorkbenchError, match="at least one layer"):
        attention_to_spans(loaded, rendered, [])
    with pytest.raises(WorkbenchError, match="named spans for 3 prompts, found 1"):
        attention_to_spans(loaded, rendered, [0], spans=[{"a": [0]}])
    with pytest.raises(WorkbenchError, match="by their ids"):
        attention_to_spans(loaded, [rendered[0], rendered[0]], [0])
    with pytest.raises(WorkbenchError, match="in two spans"):
        attention_to_spans(loaded, rendered[:1], [0], spans=[{"a": [0], "b": [0]}])
    with pytest.raises(WorkbenchError, match="outside prompt"):
        attention_to_spans(loaded, rendered[:1], [0], spans=[{"a": [999]}])
    with pytest.raises(WorkbenchError, match="choose another"):
        attention_to_spans(loaded, rendered[:1], [0], spans=[{GENERATED: [0]}])
    with pytest.raises(WorkbenchError, match="Unknown role"):
        attention_map(loaded, rendered[0], [0], SETTINGS, roles=("prefill",))
