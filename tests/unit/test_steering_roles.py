"""Roles of generated tokens, as they are known while the model writes, and selectors that use them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import QWEN3_THINKING, build_tokenizer

from sgworkbench.analysis import Site
from sgworkbench.prompting import PromptCondition, Renderer
from sgworkbench.steering import GenerationSettings, generate
from sgworkbench.steering.roles import RoleTracker

THINKING = PromptCondition.preset("thinking-intervention")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = build_tokenizer(adds_bos=False, chat_template=QWEN3_THINKING)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    return tokenizer


def roles(
    tokenizer: Any, text: str, condition: PromptCondition | None = None, thinking: bool | None = None
) -> list[str]:
    item = Renderer(tokenizer, thinking=thinking).render("How do I bake bread?", condition)
    tracker = RoleTracker(tokenizer, item)
    return [tracker.role_of(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_reasoning_opened_by_the_model(tokenizer: Any) -> None:
    ids = tokenizer("<think>Well</think>Sure, here", add_special_tokens=False)["input_ids"]
    closing = ids.index(tokenizer.convert_tokens_to_ids("</think>"))
    assert roles(tokenizer, "<think>Well</think>Sure, here") == ["reasoning"] * (closing + 1) + ["answer"] * (
        len(ids) - closing - 1
    )


def test_reasoning_opened_by_a_prefill(tokenizer: Any) -> None:
    found = roles(tokenizer, " So.</think>Sure", THINKING)
    assert found[0] == "reasoning"
    assert found[-1] == "answer"


def test_an_answer_without_reasoning_and_one_whose_template_closed_it(tokenizer: Any) -> None:
    assert set(roles(tokenizer, "Sure, <think> is a tag")) == {"answer"}
    assert set(roles(tokenizer, "Sure, here", thinking=False)) == {"answer"}


def test_reasoning_that_is_never_closed(tokenizer: Any) -> None:
    assert set(roles(tokenizer, "<think>Well, I am not sure about this at all")) == {"reasoning"}


def test_a_closing_tag_spelled_in_pieces() -> None:
    tokenizer = build_tokenizer(adds_bos=False, chat_template=QWEN3_THINKING)
    ids = tokenizer("hm</think>Sure", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "hm</think>Sure"
    found = roles(tokenizer, "hm</think>Sure", THINKING)
    n_answer = len(tokenizer("Sure", add_special_tokens=False)["input_ids"])
    assert found[-n_answer:] == ["answer"] * n_answer
    assert found[-n_answer - 1] == "reasoning"


def test_a_selector_for_reasoning_acts_while_the_model_reasons(tiny_model: Any) -> None:
    from sgworkbench.prompting.token_batch import current_batch, role_index

    loaded = tiny_model("qwen3", chat_template=QWEN3_THINKING)
    item = Renderer(loaded.tokenizer).render("How do I bake bread?", THINKING)
    seen: list[int] = []

    def look(stream: torch.Tensor, hook: Any) -> None:
        batch = current_batch()
        assert batch is not None
        if batch.phase == "decode":
            seen.extend(batch.roles.flatten().tolist())

    with loaded.model.hooks([(Site(1).hook_name, look)]):
        generate(loaded, [item], GenerationSettings(max_new_tokens=5, stop_at_end_of_turn=False))
    assert seen == [role_index("reasoning")] * 4
