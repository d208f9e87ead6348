"""Costs against plain transformers: one row, no cache, no padding, steering by a forward hook."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plain_steering as plain
import pytest
import torch
from torch import Tensor

from sgworkbench.analysis.directions import mean_difference_directions
from sgworkbench.analysis.site import Site
from sgworkbench.evaluation.behaviour import ArmSpec
from sgworkbench.evaluation.costs.arms import VANILLA, may_reuse_prompts, steered_by
from sgworkbench.evaluation.costs.choice_items import ChoiceItem
from sgworkbench.evaluation.costs.divergence import divergence, vanilla_answers
from sgworkbench.evaluation.costs.forced import forced_streams, token_log_probabilities
from sgworkbench.evaluation.costs.multiple_choice import letter_question, multiple_choice
from sgworkbench.evaluation.costs.perplexity import REQUEST, perplexity
from sgworkbench.evaluation.costs.texts import Text
from sgworkbench.prompting import PromptCondition, PromptSet, Renderer
from sgworkbench.steering import Add, Condition, Gate, Intervention, Selector, SteeringVector

D = 32
VECTOR = SteeringVector((0, 1, 2), torch.randn(3, D, generator=torch.Generator().manual_seed(4)))
SAFE = PromptCondition("safe", system="Answer in a safe way.", suffix=" Remember it.")
PROMPTS = PromptSet.from_texts(["Hi", "Why is the sky blue?", "How do I bake a loaf of bread at home, please?"])
ITEMS = [
    ChoiceItem("a", "Why is the sky blue?", ("bread", "the sun and the air", "monkeys"), 1),
    ChoiceItem("b", "How do I write a letter to my friend who lives in Zürich?", ("first", "twice"), 0),
    ChoiceItem("c", "Twelve?", ("one", "the fox", "salt"), 2),
]
TEXTS = [
    Text("long", "The quick brown fox jumps over the lazy dog while 12 monkeys count bananas. " * 4),
    Text("short", "Gardening, cooking — and music."),
]


def steered(name: str, condition: PromptCondition, selector: Selector | None = None) -> ArmSpec:
    return ArmSpec(name, condition, (VECTOR.intervention(1, 0.7, selector),))


ARMS = [
    VANILLA,
    ArmSpec("prompted", SAFE),
    steered("both", SAFE),
    steered("generated", VANILLA.condition, Selector("generated")),
    steered("prefill", SAFE, Selector(phases=("prefill",))),
]


@torch.no_grad()
def reference_log_p(model: Any, arm: ArmSpec, prompt: Sequence[int], continuation: Sequence[int]) -> Tensor:
    """Log-probabilities before each continuation token: one pass over one row of plain transformers.

    A forward hook adds the vector at the positions that the arm's selector means.
    """
    position = torch.arange(len(prompt) + len(continuation))
    chosen = torch.ones_like(position, dtype=torch.bool)
    for each in arm.interventions:
        if each.selector.tokens == "generated":
            chosen &= position >= len(prompt)
        if each.selector.phases == ("prefill",):
            chosen &= position < len(prompt)
    scale = 0.7 * chosen[:, None].float() if arm.interventions else 0.0

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        stream = (output[0] if isinstance(output, tuple) else output) + scale * VECTOR.at(1)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    handle = blocks[1].register_forward_hook(hook)
    try:
        logits = model(torch.tensor([[*prompt, *continuation]]), use_cache=False).logits[0]
    finally:
        handle.remove()
    log_p = torch.log_softmax(logits.double(), -1)
    if prompt:
        return log_p[len(prompt) - 1 : -1]
    # Nothing predicts the first token.
    return torch.cat([torch.full_like(log_p[:1], float("nan")), log_p[:-1]])


@pytest.fixture
def loaded(tiny_model: Any) -> Any:
    return tiny_model("llama")


@pytest.fixture
def model(loaded: Any) -> Any:
    return plain.load_plain(loaded.folder)


@pytest.fixture
def renderer(loaded: Any) -> Renderer:
    return Renderer(loaded.tokenizer)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_divergence_equals_a_full_recompute(arm: ArmSpec, loaded: Any, model: Any, renderer: Renderer) -> None:
    vanilla = vanilla_answers(loaded, renderer, PROMPTS, n_tokens=5)
    table = divergence(loaded, renderer, vanilla, arm).table
    for row, prompt in enumerate(PROMPTS):
        answer = vanilla.token_ids[row]
        log_p = reference_log_p(model, VANILLA, renderer.render(prompt).token_ids, answer)
        log_q = reference_log_p(model, arm, renderer.render(prompt, arm.condition).token_ids, answer)
        assert list(answer) == log_p.argmax(-1).tolist(), "greedy"
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        same = (log_p.argmax(-1) == log_q.argmax(-1)).double()
        found = table.iloc[row]
        assert found["first_kl"] == pytest.approx(float(kl[0]), rel=1e-3, abs=1e-8)
        assert found["answer_kl"] == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-8)
        assert found["first_top1"] == bool(same[0])
        assert found["answer_top1"] == pytest.approx(float(same.mean()))
        assert found["n_tokens"] == len(answer)
    assert (table["answer_kl"] > 1e-4).all() or arm is VANILLA


@pytest.mark.parametrize("arm", ARMS[2:4], ids=lambda arm: arm.name)
def test_option_log_probabilities_equal_a_full_recompute(
    arm: ArmSpec, loaded: Any, model: Any, renderer: Renderer
) -> None:
    table = multiple_choice(loaded, renderer, ITEMS, arm).table
    for row, item in enumerate(ITEMS):
        found = table.iloc[row]

        def scores(question: str, options: Sequence[str]) -> np.ndarray:
            prompt = renderer.render(question, arm.condition).token_ids
            ids = [loaded.tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]
            return np.array(
                [
                    float(reference_log_p(model, arm, prompt, tokens).gather(1, torch.tensor(tokens)[:, None]).sum())
                    for tokens in ids
                ]
            )

        letters = scores(letter_question(item), "ABCD"[: len(item.options)])
        options = scores(item.question, item.options)
        assert found["letter_choice"] == letters.argmax()
        assert found["option_choice"] == options.argmax()
        normalised = options / [len(option.encode()) for option in item.options]
        assert found["option_normalised_choice"] == normalised.argmax()
        assert found["option_normalised_right"] == (normalised.argmax() == item.answer)
        assert found["letter_mass"] == pytest.approx(float(np.exp(letters).sum()), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("framing", ["read", "written"])
def test_perplexity_equals_a_full_recompute(family: str, framing: Any, tiny_model: Any) -> None:
    loaded = tiny_model(family)
    model, renderer = plain.load_plain(loaded.folder), Renderer(loaded.tokenizer)
    arm = steered("steered", SAFE)
    found = perplexity(loaded, renderer, TEXTS, arm, framing=framing, window=24, stride=16)
    adds_bos = loaded.tokenizer("a")["input_ids"][0] == loaded.tokenizer.bos_token_id
    assert adds_bos == (family == "llama")
    for row, text in enumerate(TEXTS):
        ids = loaded.tokenizer(text.text, add_special_tokens=False)["input_ids"]
        before = [loaded.tokenizer.bos_token_id] if adds_bos else []
        if framing == "written":
            before = list(renderer.render(REQUEST, SAFE).token_ids)
        nats, scored, start = 0.0, 0 if before else 1, 0
        first = scored
        while scored < len(ids):
            window = ids[start : start + 24]
            log_p = reference_log_p(model, arm, before, window).gather(1, torch.tensor(window)[:, None])
            nats -= float(log_p[scored - start :].sum())
            start, scored = start + 16, start + len(window)
        entry = found.table.iloc[row]
        assert entry["nats"] == pytest.approx(nats, rel=1e-4)
        assert entry["n_tokens"] == len(ids) - first
        unscored = loaded.tokenizer.decode(ids[:first])
        assert entry["n_bytes"] == len(text.text.encode()) - len(unscored.encode())
    total = found.table[["nats", "n_tokens", "n_bytes"]].sum()
    assert found.value() == pytest.approx(math.exp(total["nats"] / total["n_tokens"]))
    assert found.value("bits_per_byte") == pytest.approx(total["nats"] / math.log(2) / total["n_bytes"])


def test_reading_has_no_place_for_a_prompt_and_no_generated_tokens(loaded: Any, renderer: Renderer) -> None:
    arms = [VANILLA, ArmSpec("prompted", SAFE), steered("generated", SAFE, Selector("generated")), steered("all", SAFE)]
    values = [perplexity(loaded, renderer, TEXTS, arm, window=64, stride=32).value() for arm in arms]
    assert values[0] == values[1] == pytest.approx(values[2])
    assert values[3] != pytest.approx(values[0], rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_batch_equals_single(family: str, tiny_model: Any) -> None:
    loaded = tiny_model(family)
    renderer = Renderer(loaded.tokenizer)
    arm = steered("both", VANILLA.condition)
    texts = ["Hi", "Why is the sky blue?", "Tell me how to pick a lock, and write it to my friend in Zürich. " * 2]
    rendered = [renderer.render(text) for text in texts]
    ids = [
        [loaded.tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]
        for options in (["Sure", "I'm sorry, but I cannot"], ["a"], ["12 monkeys", "b", "The sun and the air"])
    ]

    def scores(rows: Sequence[int], **options: Any) -> dict[tuple[int, int], Tensor]:
        found = {}
        chosen, wanted = [rendered[row] for row in rows], [ids[row] for row in rows]
        with steered_by(loaded, arm):
            for local, streams in forced_streams(loaded, chosen, wanted, **options):
                parts = token_log_probabilities(loaded, streams, wanted[local], "test")
                found |= {(rows[local], index): part for index, part in enumerate(parts)}
        return found

    together = scores([0, 1, 2])
    assert sorted(together) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    for rows, options in (([0], {}), ([1], {}), ([2], {}), ([2, 0, 1], {"max_rows": 2, "reuse_prompts": False})):
        for key, values in scores(rows, **options).items():
            torch.testing.assert_close(values, together[key], rtol=1e-4, atol=1e-5)


def test_a_latched_gate_forgets_one_option_before_the_next(loaded: Any, renderer: Renderer) -> None:
    """The option that opens the gate stands first; the second must be scored as if it were alone."""
    generator = torch.Generator().manual_seed(1)
    one, zero = torch.randn(2, 6, 1, D, generator=generator)
    directions = mean_difference_directions(
        one, zero, concept="test", source="random", read_at="last_prompt", sites=(Site(0),)
    )
    question, options = "Why is the sky blue?", ("bread, monkeys and bananas", "salt")
    item = renderer.render(question)
    ids = [loaded.tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]
    condition = Condition(directions, Site(0), "raw")
    _, cache = loaded.model.run_with_cache(torch.tensor([[*item.token_ids, *ids[0][:-1]]]), prepend_bos=False)
    # Some token of the first option passes the threshold.
    threshold = float(condition.scores(cache["blocks.0.hook_resid_post"][0])[len(item) :].max()) - 1e-4
    gate = Gate(condition, threshold, decided="latched", watch=Selector("generated"))
    arm = ArmSpec("latched", VANILLA.condition, (Intervention(Add({Site(1): VECTOR.at(1)}, 3.0), Selector(), gate),))
    scored = {}
    for options_given in (options, options[1:]):
        tokens = ids[-len(options_given) :]
        with steered_by(loaded, arm):
            ((_, streams),) = forced_streams(loaded, [item], [tokens], reuse_prompts=False)
        scored[len(options_given)] = token_log_probabilities(loaded, streams, tokens, "test")
    torch.testing.assert_close(scored[2][1], scored[1][0])
    with steered_by(loaded, VANILLA):
        ((_, streams),) = forced_streams(loaded, [item], [ids])
    unsteered = token_log_probabilities(loaded, streams, ids, "test")
    assert not torch.allclose(unsteered[0], scored[2][0], atol=1e-3), "the first option opens the gate"
    assert not may_reuse_prompts(arm)
    assert may_reuse_prompts(ARMS[2])
