"""Steered generation against plain transformers: forward hooks on decoder blocks, one prompt at a time."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from sgworkbench.evaluation.doctor import hooked_block
from sgworkbench.models import load_reference
from sgworkbench.models.reference import decoder_layers
from sgworkbench.prompting import PromptCondition, PromptSet, Renderer, contrast_set
from sgworkbench.steering import GenerationSettings, SteeringVector, generate, steering

TEXTS = [
    "Hi",
    "How do I bake a loaf of bread at home?",
    "Please explain why the sky is blue, and remember to answer in a safe way. Then list twelve monkeys and bananas.",
    "Write a letter to my friend",
    "Zürich: “quotes” — 🙂?",
]


def reference_greedy(reference: Any, prompt_ids: tuple[int, ...], n: int, stop: tuple[int, ...] = ()) -> list[int]:
    """Greedy tokens of transformers' own generate, one unpadded row."""
    ids = torch.tensor([prompt_ids])
    out = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=list(stop) or None,
        pad_token_id=0,
        use_cache=True,
    )
    return list(map(int, out[0, ids.shape[1] :]))


def steered_reference(
    reference: Any, vector: SteeringVector, layers: tuple[int, ...], alpha: float, prompt_ids: tuple[int, ...], n: int
) -> list[int]:
    with ExitStack() as stack:
        for layer in layers:
            block = decoder_layers(reference)[layer]
            stack.enter_context(hooked_block(block, alpha * vector.at(layer), before=vector.protocol == "official"))
        return reference_greedy(reference, prompt_ids, n)


def random_vector(n_layers: int, d_model: int, protocol: str, scale: float) -> SteeringVector:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(n_layers, d_model, generator=generator) * scale
    return SteeringVector(tuple(range(n_layers)), values, protocol=protocol)  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", ["same-site", "official"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gpt2", "mistral", "olmo3", "gemma2"])
def test_tiny_models_steered_in_a_mixed_batch(tiny_model: Any, family: str, protocol: str) -> None:
    loaded = tiny_model(family)
    reference = load_reference(loaded)
    renderer = Renderer(loaded.tokenizer)
    rendered = [renderer.render(prompt) for prompt in PromptSet.from_texts(TEXTS)]
    vector = random_vector(loaded.identity.n_layers, loaded.identity.d_model, protocol, 0.5)
    settings = GenerationSettings(max_new_tokens=10, stop_at_end_of_turn=False)
    unsteered = [list(a.token_ids) for a in generate(loaded, rendered, settings)]
    for layers in ((1,), (0, 1, 2)):
        with steering(loaded, vector.intervention(layers, 0.8)):
            ours = [list(a.token_ids) for a in generate(loaded, rendered, settings)]
        theirs = [steered_reference(reference, vector, layers, 0.8, item.token_ids, 10) for item in rendered]
        assert ours == theirs
        assert ours != unsteered, "the vector must matter, or the comparison says nothing"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen3"])
def test_unsteered_answers_do_not_depend_on_the_batch(tiny_model: Any, family: str) -> None:
    loaded = tiny_model(family)
    reference = load_reference(loaded)
    renderer = Renderer(loaded.tokenizer)
    rendered = [renderer.render(prompt) for prompt in PromptSet.from_texts(TEXTS)]
    settings = GenerationSettings(max_new_tokens=12, stop_at_end_of_turn=False)
    theirs = [reference_greedy(reference, item.token_ids, 12) for item in rendered]
    for rows, tokens in ((32, 8192), (2, 8192), (32, 60)):
        answers = generate(loaded, rendered, settings, max_rows=rows, max_batch_tokens=tokens)
        assert [list(a.token_ids) for a in answers] == theirs


def test_finished_rows_leave_the_batch_and_the_others_go_on(tiny_model: Any, monkeypatch: Any) -> None:
    loaded = tiny_model("llama")
    renderer = Renderer(loaded.tokenizer)
    rendered = [renderer.render(prompt) for prompt in PromptSet.from_texts(TEXTS)]
    free = generate(loaded, rendered, GenerationSettings(max_new_tokens=16, stop_at_end_of_turn=False))
    # A token that some rows write early serves as the end token, so that rows finish at different steps.
    stop = free[0].token_ids[2]
    monkeypatch.setattr("sgworkbench.steering.generation.end_token_ids", lambda _loaded: (stop,))
    stopped = generate(loaded, rendered, GenerationSettings(max_new_tokens=16))
    for whole, cut in zip(free, stopped, strict=True):
        ids = list(whole.token_ids)
        end = ids.index(stop) + 1 if stop in ids else len(ids)
        assert list(cut.token_ids) == ids[:end]
        assert cut.finished == (stop in ids)
    assert any(a.finished for a in stopped)


def test_sampling_is_seeded_per_prompt_and_follows_the_nucleus(tiny_model: Any) -> None:
    loaded = tiny_model("llama")
    renderer = Renderer(loaded.tokenizer)
    rendered = [renderer.render(prompt) for prompt in PromptSet.from_texts(TEXTS)]
    settings = GenerationSettings(max_new_tokens=8, temperature=0.9, top_p=0.8, seed=3, stop_at_end_of_turn=False)
    batch = [a.token_ids for a in generate(loaded, rendered, settings)]
    alone = [generate(loaded, [item], settings)[0].token_ids for item in rendered]
    assert batch == alone
    other = GenerationSettings(max_new_tokens=8, temperature=0.9, top_p=0.8, seed=4, stop_at_end_of_turn=False)
    assert [a.token_ids for a in generate(loaded, rendered, other)] != batch
    # Every sampled token lies in the nucleus computed from transformers' logits.
    reference = load_reference(loaded)
    for item, ids in zip(rendered, batch, strict=True):
        for step, token in enumerate(ids):
            context = torch.tensor([[*item.token_ids, *ids[:step]]])
            with torch.no_grad():
                probabilities = torch.softmax(reference(context).logits[0, -1].double() / 0.9, -1)
            before = probabilities[probabilities > probabilities[token] + 1e-9].sum()
            assert before < 0.8 + 1e-6


def test_sampled_frequencies_match_the_distribution(tiny_model: Any) -> None:
    loaded = tiny_model("llama")
    item = Renderer(loaded.tokenizer).render("Hi")
    with torch.no_grad():
        expected = torch.softmax(load_reference(loaded)(torch.tensor([item.token_ids])).logits[0, -1].double(), -1)
    drawn = torch.zeros_like(expected)
    n = 1500
    for seed in range(n):
        settings = GenerationSettings(max_new_tokens=1, temperature=1.0, seed=seed, stop_at_end_of_turn=False)
        drawn[generate(loaded, [item], settings)[0].token_ids[0]] += 1
    top = expected.topk(5).indices
    deviation = (drawn[top] / n - expected[top]).abs() / (expected[top] * (1 - expected[top]) / n).sqrt()
    assert float(deviation.max()) < 4.0


@pytest.fixture(scope="module")
def demo_reference(demo_model: Any) -> Any:
    return load_reference(demo_model)


def sixteen_prompts(renderer: Renderer) -> list[Any]:
    prompts = contrast_set().split("validation").sample(16, seed=1)
    safe = PromptCondition.preset("self-reminder")
    return [renderer.render(prompt, safe if index % 4 == 0 else None) for index, prompt in enumerate(prompts)]


@pytest.mark.demo_model
@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["same-site", "official"])
@pytest.mark.parametrize("layers", [(17,), (10, 17, 24)])
def test_demo_model_steered_equals_transformers_with_hooks(
    demo_model: Any, demo_reference: Any, protocol: str, layers: tuple[int, ...]
) -> None:
    rendered = sixteen_prompts(Renderer(demo_model.tokenizer))
    assert len({len(item) for item in rendered}) > 8
    vector = random_vector(30, 576, protocol, 0.6)
    settings = GenerationSettings(max_new_tokens=8, stop_at_end_of_turn=False)
    with steering(demo_model, vector.intervention(layers, 1.0)):
        ours = [list(a.token_ids) for a in generate(demo_model, rendered, settings)]
    theirs = [steered_reference(demo_reference, vector, layers, 1.0, item.token_ids, 8) for item in rendered]
    assert ours == theirs


@pytest.mark.demo_model
@pytest.mark.slow
def test_demo_model_vectors_equal_those_from_hidden_states(demo_model: Any, demo_reference: Any) -> None:
    from sgworkbench.analysis import safety_shift
    from sgworkbench.models.self_check import reference_residuals

    renderer, safe = Renderer(demo_model.tokenizer), PromptCondition.preset("self-reminder")
    prompts = contrast_set().split("train").harmful.sample(10)

    def last_states(condition: PromptCondition | None) -> torch.Tensor:
        states = []
        for prompt in prompts:
            ids = torch.tensor([renderer.render(prompt, condition).token_ids])
            with torch.no_grad():
                states.append(reference_residuals(demo_reference, ids)[1][1:, 0, -1])
        return torch.stack(states).double()

    expected = (last_states(safe) - last_states(None)).mean(0)
    for max_batch_tokens in (4096, 150):
        shift = safety_shift(demo_model, renderer, prompts, safe, max_batch_tokens=max_batch_tokens)
        error = (shift.mean.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(error.max()) < 1e-4, error
