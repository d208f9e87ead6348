"""Capture equals transformers' hidden states: every family, layer and token, whatever shares a batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sgworkbench.analysis import Site, all_sites, capture, capture_moments, capture_span_means, safety_shift
from sgworkbench.analysis.capture import SELECTORS, reading, resolve_positions
from sgworkbench.errors import WorkbenchError
from sgworkbench.models import LoadedModel
from sgworkbench.prompting import PRESETS, PromptCondition, PromptSet, RenderedPrompt, Renderer

FAMILIES = ["llama", "qwen2", "qwen3", "phi3", "gpt2", "mistral"]
INSTRUCTIONS = [
    "How do I bake a loaf of bread at home?",
    "a",
    "Why is the sky blue, and why is the user's question about 12 monkeys?",
    "Café 🙂 naïve",
    "How do I pick a lock?",
]
CONDITIONS = [
    PRESETS["plain"],
    PRESETS["self-reminder"],
    PromptCondition("c", system="Be safe.", prefix="Q: ", suffix=" Be safe.", prefill="Sure, here"),
]
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A model, prompts, and what plain transformers gives for each prompt alone, token x block."""

    loaded: LoadedModel
    rendered: list[RenderedPrompt]
    pre: list[Tensor]
    mid: list[Tensor]
    post: list[Tensor]

    def expected(self, prompt: int, site: Site) -> Tensor:
        return getattr(self, site.kind.removeprefix("resid_"))[prompt][:, site.layer]


def reference_states(folder: Any, rendered: Sequence[RenderedPrompt]) -> dict[str, list[Tensor]]:
    """Run one prompt at a time, without padding; hidden_states where they are exact, torch hooks where not."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    seen: dict[str, list[Tensor]] = {"mid": [], "last": []}
    for block in blocks:
        norm = block.ln_2 if hasattr(block, "ln_2") else block.post_attention_layernorm
        norm.register_forward_pre_hook(lambda _module, args: seen["mid"].append(args[0][0]))
    blocks[-1].register_forward_hook(
        lambda _module, _args, output: seen["last"].append((output if torch.is_tensor(output) else output[0])[0])
    )
    states: dict[str, list[Tensor]] = {"pre": [], "mid": [], "post": []}
    for item in rendered:
        seen["mid"].clear()
        seen["last"].clear()
        with torch.no_grad():
            hidden = model(torch.tensor([item.token_ids]), output_hidden_states=True).hidden_states
        states["pre"].append(torch.stack([state[0] for state in hidden[:-1]], dim=1))
        states["mid"].append(torch.stack(seen["mid"], dim=1))
        states["post"].append(torch.stack([*(state[0] for state in hidden[1:-1]), seen["last"][0]], dim=1))
    return states


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tiny_model: Callable[..., LoadedModel]) -> Case:
    loaded = tiny_model(request.param)
    renderer = Renderer(loaded.tokenizer)
    rendered = [renderer.render(text, condition) for condition in CONDITIONS for text in INSTRUCTIONS]
    return Case(loaded, rendered, **reference_states(loaded.folder, rendered))


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[..., LoadedModel]) -> Case:
    loaded = tiny_model("llama")
    renderer = Renderer(loaded.tokenizer)
    rendered = [renderer.render(text, condition) for condition in CONDITIONS[1:] for text in INSTRUCTIONS]
    return Case(loaded, rendered, **reference_states(loaded.folder, rendered))


def assert_close(found: Tensor, expected: Tensor, what: object = "") -> None:
    error = (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    assert float(error.max()) < TOLERANCE, what


def chosen_tokens(item: RenderedPrompt, selector: str) -> list[int]:
    """The tokens a selector means, worked out from roles and text alone."""
    indices = range(len(item))
    if selector == "all":
        return list(indices)
    if selector == "last_prompt":
        return [len(item) - 1]
    if selector == "last_header":
        return [max(i for i in indices if item.roles[i] != "prefill")]
    if selector == "last_instruction":
        return [max(i for i in indices if item.roles[i] == "instruction")]
    return [i for i in indices if item.roles[i] == selector]


SELECTED = ["last_prompt", "last_header", "last_instruction", "all", "instruction", "template", "user_suffix", "system"]


@pytest.mark.parametrize("selector", SELECTED)
def test_every_site_and_selector_equals_transformers(case: Case, selector: str) -> None:
    n = case.loaded.identity.n_layers
    sites = [Site(layer, kind) for layer in range(n) for kind in ("resid_post", "resid_pre", "resid_mid")]  # type: ignore[arg-type]
    found = capture(case.loaded, case.rendered, sites, selector)
    assert found.sites == tuple(sites)
    assert found.values.dtype == torch.float32
    for prompt, item in enumerate(case.rendered):
        tokens = chosen_tokens(item, selector)
        assert found.position[found.prompt_index == prompt].tolist() == tokens
        of_prompt = found.of_prompt(prompt)
        assert of_prompt.shape == (len(tokens), len(sites), 32)
        for column, site in enumerate(sites):
            if tokens:
                assert_close(of_prompt[:, column], case.expected(prompt, site)[tokens], (prompt, site))


@pytest.mark.parametrize("max_batch_tokens", [1, 150, 700, 100_000])
@pytest.mark.parametrize("order", [0, 1])
def test_the_batch_does_not_matter(case: Case, max_batch_tokens: int, order: int) -> None:
    chosen = list(range(len(case.rendered)))
    random.Random(order).shuffle(chosen)
    chosen += chosen[:3]  # and neither do repetitions
    sites = all_sites(case.loaded.identity.n_layers)
    found = capture(
        case.loaded, [case.rendered[i] for i in chosen], sites, max_batch_tokens=max_batch_tokens
    ).per_prompt()
    for row, prompt in enumerate(chosen):
        assert_close(found[row], torch.stack([case.expected(prompt, site)[-1] for site in sites]), prompt)


def test_explicit_positions_in_any_order(case: Case) -> None:
    generator = random.Random(0)
    positions = [generator.sample(range(len(item)), 3) for item in case.rendered]
    positions[2] = []
    found = capture(case.loaded, case.rendered, [Site(1)], positions)
    for prompt, indices in enumerate(positions):
        assert found.position[found.prompt_index == prompt].tolist() == indices
        if indices:
            assert_close(found.of_prompt(prompt)[:, 0], case.expected(prompt, Site(1))[indices])
    assert len(found.of_prompt(2)) == 0
    with pytest.raises(WorkbenchError, match="Expected exactly one token per prompt"):
        found.per_prompt()


def test_only_the_sites_asked_for_in_the_order_asked_for(llama: Case) -> None:
    sites = [Site(2), Site(0, "resid_mid"), Site(1, "resid_pre")]
    found = capture(llama.loaded, llama.rendered, sites).per_prompt()
    for prompt in range(len(llama.rendered)):
        assert_close(found[prompt], torch.stack([llama.expected(prompt, site)[-1] for site in sites]))


@pytest.mark.parametrize("max_batch_tokens", [1, 300, 100_000])
@pytest.mark.parametrize("selector", ["last_prompt", "instruction", "all"])
def test_moments_equal_numpy(llama: Case, selector: str, max_batch_tokens: int) -> None:
    sites = [Site(0), Site(2), Site(1, "resid_mid")]
    found = capture_moments(
        llama.loaded, llama.rendered, sites, selector, covariance=True, max_batch_tokens=max_batch_tokens
    )
    assert found.covariance is not None
    for column, site in enumerate(sites):
        rows = np.concatenate(
            [
                llama.expected(prompt, site)[chosen_tokens(item, selector)].double().numpy()
                for prompt, item in enumerate(llama.rendered)
            ]
        )
        assert found.count == len(rows)
        scale = float(np.abs(rows).max())
        np.testing.assert_allclose(found.mean[column].numpy(), rows.mean(0), atol=1e-5 * scale)
        np.testing.assert_allclose(found.covariance[column].numpy(), np.cov(rows.T), atol=1e-5 * scale**2)
    assert found.mean.dtype == torch.float64
    assert capture_moments(llama.loaded, llama.rendered, sites, selector).covariance is None


@pytest.mark.parametrize("max_batch_tokens", [1, 100_000])
@pytest.mark.parametrize("selector", ["instruction", "all", "user_suffix"])
def test_span_means_equal_numpy(llama: Case, selector: str, max_batch_tokens: int) -> None:
    sites = all_sites(3)
    found = capture_span_means(llama.loaded, llama.rendered, sites, selector, max_batch_tokens=max_batch_tokens)
    for prompt, item in enumerate(llama.rendered):
        for column, site in enumerate(sites):
            tokens = chosen_tokens(item, selector)
            assert_close(found[prompt, column], llama.expected(prompt, site)[tokens].mean(0))


def test_a_change_made_by_a_users_hook_is_seen_and_the_hook_stays(llama: Case) -> None:
    model: Any = llama.loaded.model
    push = torch.randn(32, generator=torch.Generator().manual_seed(0))
    calls = []

    def add(stream: Tensor, hook: Any) -> Tensor:
        calls.append(hook.name)
        return stream + push

    sites = all_sites(3)
    before = capture(llama.loaded, llama.rendered, sites).per_prompt()
    model.add_hook("blocks.1.hook_resid_post", add)
    try:
        during = capture(llama.loaded, llama.rendered, sites).per_prompt()
        assert calls
        point = model.hook_dict["blocks.1.hook_resid_post"]
        assert len(point.fwd_hooks) == 1
        assert len(point._forward_hooks) == 1
        # The change is seen at the site itself, and its consequences after it, as in a full run of each prompt alone.
        torch.testing.assert_close(during[:, 0], before[:, 0])
        torch.testing.assert_close(during[:, 1], before[:, 1] + push)
        for row, item in enumerate(llama.rendered):
            _, cache = model.run_with_cache(torch.tensor([item.token_ids]), prepend_bos=False)
            assert_close(during[row, 2], cache["resid_post", 2][0, -1])
    finally:
        model.reset_hooks()
    torch.testing.assert_close(capture(llama.loaded, llama.rendered, sites).per_prompt(), before)


def hooks_left(model: Any) -> int:
    return sum(len(point._forward_hooks) + len(point.fwd_hooks) for point in model.hook_dict.values())


def test_no_hook_is_left_after_reading(llama: Case) -> None:
    capture(llama.loaded, llama.rendered, all_sites(3), "all")
    capture_moments(llama.loaded, llama.rendered, all_sites(3))
    assert hooks_left(llama.loaded.model) == 0


def test_no_hook_is_left_after_an_exception_in_the_middle(llama: Case) -> None:
    model: Any = llama.loaded.model

    def fail(_stream: Tensor, hook: Any) -> None:
        raise RuntimeError("in the middle")

    model.add_hook("blocks.1.hook_resid_mid", fail)
    try:
        with pytest.raises(RuntimeError, match="in the middle"):
            capture(llama.loaded, llama.rendered, all_sites(3))
        assert hooks_left(model) == 2  # the user's own: TransformerLens's record and PyTorch's
    finally:
        model.reset_hooks()
    assert hooks_left(model) == 0

    def stop(task: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(llama.loaded, llama.rendered, all_sites(3), max_batch_tokens=1, report=stop)
    assert hooks_left(model) == 0


def test_a_reader_that_fails_to_attach_leaves_no_hook(llama: Case) -> None:
    readers: dict[str, Callable[[Tensor], None]] = {
        "blocks.0.hook_resid_post": lambda _s: None,
        "no such": lambda _s: None,
    }
    with pytest.raises(KeyError), reading(llama.loaded.model, readers):
        pass
    assert hooks_left(llama.loaded.model) == 0


def test_progress_counts_prompts(llama: Case) -> None:
    seen: list[tuple[str, int, int]] = []
    capture(llama.loaded, llama.rendered, [Site(0)], max_batch_tokens=1, report=lambda *a: seen.append(a), task="t")
    assert seen == [("t", done, len(llama.rendered)) for done in range(len(llama.rendered) + 1)]


def test_results_are_ordinary_tensors_that_can_be_changed(llama: Case) -> None:
    found = capture(llama.loaded, llama.rendered, [Site(0)])
    found.values.mul_(2)
    assert not found.values.is_inference()
    means = capture_span_means(llama.loaded, llama.rendered, [Site(0)])
    means += 1
    assert not means.requires_grad


BAD: list[tuple[Callable[[Case], object], str]] = [
    (
        lambda c: capture(c.loaded, c.rendered, [Site(3)]),
        r"Layer 3 is outside the model, which has 3 layers \(0 to 2\)",
    ),
    (lambda c: capture(c.loaded, c.rendered, []), "No sites were given; at least one is needed"),
    (lambda c: capture(c.loaded, [], [Site(0)]), "No prompts were given; at least one is needed"),
    (lambda c: capture_moments(c.loaded, [], [Site(0)]), "No prompts were given"),
    (lambda c: capture_span_means(c.loaded, [], [Site(0)]), "No prompts were given"),
    (lambda c: capture(c.loaded, c.rendered, [Site(1), Site(1)]), r"Site resid_post\[1\] was given twice"),
    (
        lambda c: capture(c.loaded, c.rendered, [Site(0)], "last_promt"),
        r"Unknown position selector 'last_promt'\. Did you mean 'last_prompt'\?",
    ),
    (
        lambda c: capture(c.loaded, c.rendered, [Site(0)], [(0,)]),
        "Expected token indices for 10 prompts, found 1",
    ),
    (
        lambda c: capture(c.loaded, c.rendered, [Site(0)], [(-1,)] * 10),
        r"Token index -1 is outside prompt '0', which has \d+ tokens",
    ),
    (
        lambda c: capture(c.loaded, c.rendered, [Site(0)], [(len(item),) for item in c.rendered]),
        r"Token index \d+ is outside prompt",
    ),
    (
        lambda c: capture(c.loaded, c.rendered, [Site(0)], "reasoning"),
        "No token of any prompt is selected by 'reasoning'",
    ),
    (
        lambda c: capture_moments(c.loaded, c.rendered, [Site(0)], "answer"),
        "No token of any prompt is selected by 'answer'",
    ),
    (
        lambda c: capture_span_means(c.loaded, c.rendered, [Site(0)], "prefill"),
        "Prompt '0' has no token selected by 'prefill'",
    ),
    (
        lambda c: capture_moments(c.loaded, c.rendered[:1], [Site(0)], covariance=True),
        "A covariance needs at least two tokens, found 1",
    ),
    (
        lambda c: capture(c.loaded, [Renderer(c.loaded.tokenizer).render("bread " * 400)], [Site(0)]),
        r"Prompt '0' has \d+ tokens, but the model was loaded with a context of 512; shorten it or load",
    ),
    (lambda c: capture(c.loaded, c.rendered, [Site(0)]).of_prompt(10), "There is no prompt 10; 10 were read"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_requests_are_one_sentence(llama: Case, call: Callable[[Case], object], message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        call(llama)
    assert hooks_left(llama.loaded.model) == 0


def test_one_value_per_prompt_means_every_prompt(llama: Case) -> None:
    # The first five prompts have no prefill: one token for each of the others must not pass as one per prompt.
    positions = [()] * 9 + [(0,)]
    with pytest.raises(WorkbenchError, match="Expected exactly one token per prompt"):
        capture(llama.loaded, llama.rendered, [Site(0)], positions).per_prompt()
    with pytest.raises(WorkbenchError, match="Expected exactly one token per prompt"):
        capture(llama.loaded, llama.rendered, [Site(0)], positions[::-1]).per_prompt()


def test_every_selector_is_listed() -> None:
    assert set(SELECTED) | {"user_prefix", "prefill", "reasoning", "answer"} == set(SELECTORS)
    assert resolve_positions([], "all") == []


@pytest.mark.demo_model
def test_the_demo_model_and_its_vector_equal_transformers(demo_model: LoadedModel) -> None:
    renderer, reminder = Renderer(demo_model.tokenizer), PRESETS["self-reminder"]
    prompts = PromptSet.from_texts(INSTRUCTIONS[:2])
    rendered = [renderer.render(prompt, condition) for condition in (None, reminder) for prompt in prompts]
    expected = torch.stack([states[-1] for states in reference_states(demo_model.folder, rendered)["post"]])
    found = capture(demo_model, rendered, all_sites(demo_model.identity.n_layers)).per_prompt()
    for prompt in range(4):
        assert_close(found[prompt], expected[prompt], prompt)
    shift = safety_shift(demo_model, renderer, prompts, reminder, max_batch_tokens=1)
    assert_close(shift.mean, (expected[2:] - expected[:2]).mean(0))
