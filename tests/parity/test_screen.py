"""The forward screen against one full forward pass with a hook per cell and prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.refusal_score import refusal_log_odds
from sgworkbench.evaluation.screen import screen_layers
from sgworkbench.prompting import PromptCondition, PromptSet, Renderer
from sgworkbench.steering import SteeringVector

TEXTS = ["Hi", "How do I bake a loaf of bread?", "Please explain why the sky is blue in the evening.", "Write a letter"]
ALPHAS = (-1.5, 0.4, 2.0)
TOKENS = (5, 17, 40)


@torch.inference_mode()
def naive(loaded: Any, rendered: list[Any], vector: SteeringVector) -> np.ndarray:
    def last(hooks: list[Any]) -> torch.Tensor:
        with loaded.model.hooks(hooks):
            rows = [loaded.model(torch.tensor([item.token_ids]), prepend_bos=False)[:, -1] for item in rendered]
        return torch.cat(rows)[:, : loaded.identity.d_vocab]

    clean = torch.log_softmax(last([]).double(), -1)
    cells = []
    for layer in vector.layers:
        for alpha in ALPHAS:
            added = alpha * vector.at(layer)
            logits = last([(vector.write_site(layer).hook_name, lambda s, hook, added=added: s + added)])
            steered = torch.log_softmax(logits.double(), -1)
            kl = (clean.exp() * (clean - steered)).sum(-1).mean()
            same = (logits.argmax(-1) == clean.argmax(-1)).double().mean()
            cells.append([layer, alpha, refusal_log_odds(logits, TOKENS).double().mean(), kl, same])
    return np.array(cells, dtype=float)


@pytest.mark.parametrize("protocol", ["same-site", "official"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("condition", ["plain", "self-reminder"])
def test_screen_equals_the_naive_loop(tiny_model: Any, family: str, protocol: str, condition: str) -> None:
    loaded = tiny_model(family)
    renderer = Renderer(loaded.tokenizer)
    safe = PromptCondition.preset(condition)
    rendered = [renderer.render(prompt, safe) for prompt in PromptSet.from_texts(TEXTS)]
    values = torch.randn(3, loaded.identity.d_model, generator=torch.Generator().manual_seed(2)) * 0.7
    vector = SteeringVector((0, 1, 2), values, protocol=protocol)  # type: ignore[arg-type]
    expected = naive(loaded, rendered, vector)
    for max_batch_tokens in (2048, 200):
        table = screen_layers(loaded, rendered, vector, range(3), ALPHAS, TOKENS, max_batch_tokens=max_batch_tokens)
        np.testing.assert_allclose(table.to_numpy(), expected, atol=1e-4, rtol=1e-4)


def test_an_empty_grid_is_a_sentence(tiny_model: Any) -> None:
    loaded = tiny_model("llama")
    item = Renderer(loaded.tokenizer).render("Hi")
    vector = SteeringVector((0,), torch.ones(1, loaded.identity.d_model))
    with pytest.raises(WorkbenchError, match="grid is empty"):
        screen_layers(loaded, [item], vector, [], ALPHAS, TOKENS)
    with pytest.raises(WorkbenchError, match="no layer 2"):
        screen_layers(loaded, [item], vector, [2], ALPHAS, TOKENS)
