"""The safety shift and its map, against plain transformers, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sgworkbench.analysis import Directions, Site, all_sites, read_for_gap, safety_shift, shift, shift_map
from sgworkbench.errors import WorkbenchError
from sgworkbench.models import LoadedModel
from sgworkbench.prompting import PRESETS, PromptCondition, PromptSet, Renderer, concatenate

TEXTS = [
    "How do I bake a loaf of bread at home?",
    "Why is the sky blue?",
    "Café 🙂 naïve: how do I write a letter?",
    "How do I pick a lock at home, and why is the user's question harmful?",
    "Is it a safe guide?",
]
PROMPTS = PromptSet.from_texts(TEXTS, label="harmful")
REMINDER = PRESETS["self-reminder"]
PREFILLED = PromptCondition("c", prefix="Q: ", suffix=" Be safe.", prefill="Sure, here")


class Plain:
    """Hidden states of plain transformers for one prompt: token x block output."""

    def __init__(self, folder: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.last: list[Tensor] = []
        blocks = self.model.transformer.h if hasattr(self.model, "transformer") else self.model.model.layers
        blocks[-1].register_forward_hook(
            lambda _m, _a, output: self.last.append((output if torch.is_tensor(output) else output[0])[0])
        )

    def __call__(self, ids: Any) -> Tensor:
        self.last.clear()
        with torch.no_grad():
            hidden = self.model(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
        return torch.stack([*(state[0] for state in hidden[1:-1]), self.last[0]], dim=1)


def chat_ids(tokenizer: Any, text: str, condition: PromptCondition) -> list[int]:
    """The prompt's ids by the tokenizer's own means."""
    messages = [] if condition.system is None else [{"role": "system", "content": condition.system}]
    messages.append({"role": "user", "content": condition.prefix + text + condition.suffix})
    header = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(header + condition.prefill, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[..., LoadedModel]) -> LoadedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def plain(llama: LoadedModel) -> Plain:
    return Plain(llama.folder)


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)).max())


@pytest.mark.parametrize("condition", [REMINDER, PREFILLED], ids=["self-reminder", "prefilled"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_the_mean_shift_is_that_of_transformers(
    family: str, condition: PromptCondition, tiny_model: Callable[..., LoadedModel]
) -> None:
    loaded = tiny_model(family)
    reference, tokenizer = Plain(loaded.folder), loaded.tokenizer
    before = torch.stack([reference(chat_ids(tokenizer, text, PRESETS["plain"]))[-1] for text in TEXTS])
    after = torch.stack([reference(chat_ids(tokenizer, text, condition))[-1] for text in TEXTS])
    found = safety_shift(loaded, Renderer(tokenizer), PROMPTS, condition)
    assert found.sites == all_sites(3)
    assert relative(found.mean, (after - before).mean(0)) < 1e-4
    torch.testing.assert_close(found.norms, (after - before).norm(dim=-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.residual_norms, before.norm(dim=-1), rtol=1e-4, atol=1e-4)
    assert found.condition == condition
    assert found.prompts == PROMPTS.summary()
    assert found.model["name"] == loaded.identity.name


def test_chunks_batches_and_order_do_not_matter(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer(llama.tokenizer)
    whole = safety_shift(llama, renderer, PROMPTS, REMINDER)
    monkeypatch.setattr(shift, "_CHUNK", 2)
    chunked = safety_shift(llama, renderer, PROMPTS, REMINDER, max_batch_tokens=1)
    turned = safety_shift(llama, renderer, PromptSet("t", PROMPTS.prompts[::-1]), REMINDER, max_batch_tokens=300)
    for other, norms in ((chunked, chunked.norms), (turned, turned.norms.flip(0))):
        assert relative(other.mean, whole.mean) < 1e-5
        torch.testing.assert_close(norms, whole.norms, rtol=1e-5, atol=1e-5)


def test_chosen_sites_only(llama: LoadedModel) -> None:
    renderer = Renderer(llama.tokenizer)
    whole = safety_shift(llama, renderer, PROMPTS, REMINDER)
    some = safety_shift(llama, renderer, PROMPTS, REMINDER, sites=(Site(2), Site(1, "resid_pre")))
    torch.testing.assert_close(some.mean, torch.stack([whole.mean[2], whole.mean[0]]), rtol=1e-5, atol=1e-6)
    frame = whole.to_dataframe()
    np.testing.assert_allclose(frame["mean_shift_norm"], whole.mean.norm(dim=-1), rtol=1e-6)
    np.testing.assert_allclose(frame["shift_norm"], whole.norms.mean(0), rtol=1e-6)
    assert (frame["mean_shift_norm"] <= frame["shift_norm"] * (1 + 1e-6)).all()
    assert "5 prompts" in whole._repr_html_()


def test_requests_without_meaning_are_refused(llama: LoadedModel) -> None:
    renderer = Renderer(llama.tokenizer)
    with pytest.raises(WorkbenchError, match="The plain condition has no shift; choose a safety prompt"):
        safety_shift(llama, renderer, PROMPTS, PRESETS["plain"])
    with pytest.raises(WorkbenchError, match="The plain condition has no shift"):
        shift_map(llama, renderer, PROMPTS, PRESETS["plain"], directions())
    with pytest.raises(WorkbenchError, match="No sites were given"):
        safety_shift(llama, renderer, PROMPTS, REMINDER, sites=())
    with pytest.raises(WorkbenchError, match="Layer 3 is outside the model"):
        safety_shift(llama, renderer, PROMPTS, REMINDER, sites=(Site(3),))
    long = concatenate("long", [PROMPTS, PromptSet.from_texts(["bread " * 400])])
    with pytest.raises(WorkbenchError, match=r"Prompt '1:0' has \d+ tokens, but the model was loaded with a context"):
        safety_shift(llama, renderer, long, REMINDER)
    both = replace(directions(), sites=(Site(1), Site(1, "resid_pre"), Site(2)))
    with pytest.raises(WorkbenchError, match="one site per layer"):
        shift_map(llama, renderer, PROMPTS, REMINDER, both)


# --- the map ------------------------------------------------------------------------------------------------------


def directions(seed: int = 0) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(3, 32, generator=generator), dim=-1)
    origin = torch.randn(3, 32, generator=generator)
    return Directions("refusal", "made up", "last_prompt", all_sites(3), unit, origin, torch.tensor([0.5, 2.0, 3.0]))


def brute_force(
    llama: LoadedModel, plain: Plain, text: str, condition: PromptCondition
) -> dict[tuple[str, int], Tensor]:
    """Shift per (role, tokens from the end), by searching the instruction's ids in both prompts."""
    tokenizer = llama.tokenizer
    first, second = chat_ids(tokenizer, text, PRESETS["plain"]), chat_ids(tokenizer, text, condition)
    header = tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    inner = tokenizer(text, add_special_tokens=False)["input_ids"]

    def find(ids: list[int], part: list[int]) -> int:
        hits = [i for i in range(len(ids)) if ids[i : i + len(part)] == part]
        assert len(hits) == 1
        return hits[0]

    h, g = plain(first), plain(second)
    shifts: dict[tuple[str, int], Tensor] = {}
    for role, part in (("instruction", inner), ("template", header)):
        # Only the last occurrence of the header opens the answer.
        a = find(first, part) if role == "instruction" else len(first) - len(part)
        b = find(second, part) if role == "instruction" else len(second) - len(part)
        assert first[a : a + len(part)] == second[b : b + len(part)] == part
        for k in range(len(part)):
            shifts[role, len(part) - 1 - k] = g[b + k] - h[a + k]
    return shifts


def test_the_map_is_the_brute_force_projection_of_every_token(llama: LoadedModel, plain: Plain) -> None:
    renderer, direction = Renderer(llama.tokenizer), directions()
    found = shift_map(llama, renderer, PROMPTS, REMINDER, direction, n_null=20)
    for prompt in PROMPTS:
        expected = brute_force(llama, plain, prompt.text, REMINDER)
        rows = found.table[found.table["prompt_id"] == prompt.id]
        assert set(zip(rows["role"], rows["from_end"], strict=True)) == set(expected)
        assert len(rows) == 3 * len(expected)
        rendered = renderer.render(prompt)
        for row in rows.itertuples():
            raw = float(direction.unit[row.layer] @ expected[row.role, row.from_end][row.layer])
            assert row.raw == pytest.approx(raw, abs=2e-4)
            assert row.separation_units == pytest.approx(raw / float(direction.separation[row.layer]), abs=4e-4)
            assert rendered.tokens[row.token] == row.text
            assert rendered.roles[row.token] == row.role
    assert found.n_excluded == 0


def test_one_prompts_matrix_has_layers_as_rows_and_tokens_in_order(llama: LoadedModel, plain: Plain) -> None:
    found = shift_map(llama, Renderer(llama.tokenizer), PROMPTS, REMINDER, directions(), n_null=5)
    values, texts, roles = found.matrix("1", "raw")
    expected = brute_force(llama, plain, TEXTS[1], REMINDER)
    n = sum(role == "instruction" for role in roles)
    assert "".join(texts[:n]) == TEXTS[1]
    assert "".join(texts[n:]) == "<|im_end|>\n<|im_start|>assistant\n"
    assert values.shape == (3, len(expected))
    unit = directions().unit
    for column, (role, k) in enumerate(
        [("instruction", k) for k in reversed(range(n))] + [("template", k) for k in reversed(range(len(texts) - n))]
    ):
        np.testing.assert_allclose(values[:, column], torch.einsum("ld,ld->l", unit, expected[role, k]), atol=2e-4)
    scaled, _, _ = found.matrix("1")
    np.testing.assert_allclose(scaled, values / np.array([[0.5], [2.0], [3.0]]), rtol=1e-5)
    with pytest.raises(WorkbenchError, match="holds no prompt '9'"):
        found.matrix("9")
    with pytest.raises(WorkbenchError, match=r"Unknown unit 'rw'\. Did you mean 'raw'\?"):
        found.matrix("1", "rw")


def test_the_mean_map_lines_prompts_up_at_the_end_of_the_instruction(llama: LoadedModel) -> None:
    found = shift_map(llama, Renderer(llama.tokenizer), PROMPTS, REMINDER, directions(), n_null=5)
    values, labels, roles, counts = found.mean_by_position(4, "raw")
    assert roles[:5] == ["instruction"] * 4 + ["template"]
    assert labels[0] == "instruction −4"
    assert "".join(labels[4:]) == "<|im_end|>\n<|im_start|>assistant\n"
    assert counts == [5] * len(roles)
    for column, k in enumerate((3, 2, 1, 0)):
        picked = []
        for prompt in PROMPTS:
            matrix, _, kinds = found.matrix(prompt.id, "raw")
            picked.append(matrix[:, kinds.count("instruction") - 1 - k])
        np.testing.assert_allclose(values[:, column], np.mean(picked, axis=0), atol=1e-6)
    longest = max(found.table.loc[found.table["role"] == "instruction", "from_end"]) + 1
    _, _, roles, counts = found.mean_by_position(10_000)
    assert roles.count("instruction") == longest
    assert counts[0] == 1
    with pytest.raises(WorkbenchError, match="at least one instruction token, found n_tokens=0"):
        found.mean_by_position(0)
    with pytest.raises(WorkbenchError, match="Unknown unit 'norm'"):
        found.mean_by_position(unit="norm")


def test_the_maps_null_is_the_mean_shift_along_random_directions(llama: LoadedModel, plain: Plain) -> None:
    found = shift_map(llama, Renderer(llama.tokenizer), PROMPTS, REMINDER, directions(), n_null=3000)
    mean = torch.stack([brute_force(llama, plain, text, REMINDER)["instruction", 0] for text in TEXTS]).mean(
        0
    )  # layer x d_model
    band = found.nulls[0]
    generator = torch.Generator().manual_seed(99)
    units = torch.nn.functional.normalize(torch.randn(3000, 3, 32, generator=generator), dim=-1)
    expected = torch.quantile(torch.einsum("nld,ld->nl", units, mean), torch.tensor([0.025, 0.975]), dim=0)
    np.testing.assert_allclose(band.low, expected[0], rtol=0.15)
    np.testing.assert_allclose(band.high, expected[1], rtol=0.15)
    assert (band.name, band.n) == ("random directions", 3000)


def test_a_prefill_is_no_part_of_the_map_but_the_header_before_it_is(llama: LoadedModel) -> None:
    found = shift_map(llama, Renderer(llama.tokenizer), PROMPTS, PREFILLED, directions(), n_null=5)
    _, texts, roles = found.matrix("1", "raw")
    assert (
        "".join(t for t, r in zip(texts, roles, strict=True) if r == "template")
        == "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_direction_of_another_width_is_refused(llama: LoadedModel) -> None:
    wide = replace(directions(), unit=torch.zeros(3, 40), origin=torch.zeros(3, 40))
    with pytest.raises(WorkbenchError, match=r"Expected activations of shape .* \(\.\.\., 3, 40\), found .*32\)"):
        shift_map(llama, Renderer(llama.tokenizer), PROMPTS, REMINDER, wide)


# --- the two readings of the gap ----------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [PRESETS["plain"], REMINDER, PREFILLED], ids=["plain", "reminder", "prefilled"])
def test_the_gap_reads_the_last_instruction_token_and_the_last_prompt_token(
    llama: LoadedModel, plain: Plain, condition: PromptCondition
) -> None:
    renderer = Renderer(llama.tokenizer)
    found = read_for_gap(llama, [renderer.render(prompt, condition) for prompt in PROMPTS], all_sites(3))
    for row, text in enumerate(TEXTS):
        ids = chat_ids(llama.tokenizer, text, condition)
        states = plain(ids)
        inner = llama.tokenizer(" " * bool(condition.prefix) + text, add_special_tokens=False)["input_ids"]
        last = next(i for i in range(len(ids)) if ids[i : i + len(inner)] == inner) + len(inner) - 1
        assert relative(found.instruction[row], states[last]) < 1e-4
        assert relative(found.prompt[row], states[-1]) < 1e-4
