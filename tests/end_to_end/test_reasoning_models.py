"""A reasoning model from end to end: a random Qwen3 with its kind of template, against plain transformers with hooks.

The model is random, so it hardly ever writes `</think>` by itself; where it has to, the unembedding of that token is
set so that it does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_steering import Step, add, load_plain, plain_generate
from tiny_models import QWEN3_THINKING, build_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgworkbench.analysis import Site, all_sites, mean_difference_directions, measure_gap, read_for_gap
from sgworkbench.evaluation.behaviour import four_arms
from sgworkbench.models import LoadedModel, load_model
from sgworkbench.prompting import PRESETS, Prompt, PromptSet, RenderedPrompt, Renderer
from sgworkbench.steering import (
    GenerationSettings,
    Selector,
    SteeringVector,
    generate,
    steering,
    trace_generation,
)

TEXTS = ["Why is the sky blue?", "How do I pick a lock at home, and why is it harmful?", "Is it a safe guide?"]
PROMPTS = PromptSet("p", tuple(Prompt(text, f"p{index}", "harmful") for index, text in enumerate(TEXTS)))
INTERVENTION = PRESETS["thinking-intervention"]
N_NEW = 8
SETTINGS = GenerationSettings(max_new_tokens=N_NEW, stop_at_end_of_turn=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("qwen3", tmp_path_factory.mktemp("reasoner") / "model", chat_template=QWEN3_THINKING)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, self_check=False, progress=lambda _line: None)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return load_plain(folder)


def by_hand(tokenizer: Any, text: str, *, thinking: bool | None = None, prefill: str = "", **turns: str) -> list[int]:
    """Token ids by the tokenizer's own means."""
    messages = [{"role": "system", "content": turns["system"]}] if "system" in turns else []
    messages.append({"role": "user", "content": text + turns.get("suffix", "")})
    switch = {} if thinking is None else {"enable_thinking": thinking}
    header = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switch)
    return list(tokenizer(header + prefill, add_special_tokens=False)["input_ids"])


def hidden(reference: Any, ids: tuple[int, ...]) -> Tensor:
    """Block outputs of plain transformers, after hooks that were attached before: token x layer x d_model."""
    outputs: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append((output if torch.is_tensor(output) else output[0])[0])

    handles = [block.register_forward_hook(keep) for block in reference.model.layers]
    with torch.no_grad():
        reference(torch.tensor([list(ids)]))
    for handle in handles:
        handle.remove()
    return torch.stack(outputs, dim=1)


class TestRendering:
    def test_thinking_on_off_and_unset(self, loaded: LoadedModel) -> None:
        for thinking in (None, True, False):
            item = Renderer(loaded.tokenizer, thinking=thinking).render(PROMPTS.prompts[0])
            assert list(item.token_ids) == by_hand(loaded.tokenizer, TEXTS[0], thinking=thinking)
            assert ("</think>" in item.text) == (thinking is False)
            assert set(item.roles[item.last_instruction_position + 1 :]) == {"template"}

    def test_a_prefilled_thought(self, loaded: LoadedModel) -> None:
        item = Renderer(loaded.tokenizer, thinking=True).render(PROMPTS.prompts[0], INTERVENTION)
        expected = by_hand(loaded.tokenizer, TEXTS[0], thinking=True, prefill=INTERVENTION.prefill)
        assert list(item.token_ids) == expected
        assert item.roles[item.last_header_position] == "template"
        assert item.text.endswith(INTERVENTION.prefill)
        prefilled = item.positions_of("prefill")
        assert prefilled == tuple(range(item.last_header_position + 1, len(item)))
        assert loaded.tokenizer.decode(item.token_ids[prefilled[0]]) == "<think>"


def forced_roles(tokenizer: Any, item: RenderedPrompt, written: tuple[int, ...]) -> list[str]:
    """Roles of written tokens from the definition: reasoning up to and with the first </think>, then answer."""
    closing = tokenizer.convert_tokens_to_ids("</think>")
    opening = tokenizer.convert_tokens_to_ids("<think>")
    ids = list(item.token_ids[item.last_instruction_position + 1 :])
    is_open = opening in ids and closing not in ids[ids.index(opening) :]
    roles = []
    for index, token in enumerate(written):
        is_open = is_open or (index == 0 and token == opening)
        roles.append("reasoning" if is_open else "answer")
        is_open = is_open and token != closing
    return roles


class TestSteeringByRole:
    """Selector roles against full recomputation, with the roles known from the tokens written."""

    @pytest.mark.parametrize("closed", [False, True])
    @pytest.mark.parametrize("role", ["reasoning", "answer"])
    @pytest.mark.parametrize("protocol", ["same-site", "official"])
    def test_tokens_equal_plain_transformers(
        self, loaded: LoadedModel, reference: Any, role: str, protocol: str, closed: bool
    ) -> None:
        renderer = Renderer(loaded.tokenizer, thinking=True)
        vector = SteeringVector.extract(loaded, renderer, PROMPTS, INTERVENTION, protocol)
        condition = replace(INTERVENTION, prefill=INTERVENTION.prefill + "</think>") if closed else INTERVENTION
        rendered = [renderer.render(prompt, condition) for prompt in PROMPTS]
        alpha, layer = 1.5, 1
        intervention = vector.intervention(layer, alpha, Selector("roles", roles=(role,), phases=("decode",)))  # type: ignore[arg-type]
        with steering(loaded, intervention):
            answers = generate(loaded, rendered, SETTINGS)
        where = "pre" if protocol == "official" else "post"
        for item, answer in zip(rendered, answers, strict=True):
            expected_roles = forced_roles(loaded.tokenizer, item, answer.token_ids)

            def selects(position: int, n_prompt: int, roles: list[str] = expected_roles) -> bool:
                return position >= n_prompt and roles[position - n_prompt] == role

            step = Step(layer, where, add(vector.at(layer), alpha), ("decode",), selects=selects)
            expected, _, _ = plain_generate(reference, item.token_ids, [step], N_NEW)
            assert list(answer.token_ids) == expected
        steered_somewhere = any(
            role in forced_roles(loaded.tokenizer, item, answer.token_ids[:-1])
            for item, answer in zip(rendered, answers, strict=True)
        )
        assert steered_somewhere is (role == ("answer" if closed else "reasoning"))

    def test_roles_change_within_an_answer(self, folder: Path, tmp_path: Path) -> None:
        """A model made to close its reasoning at once: the first token is reasoning, all others answer."""
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        closing = tokenizer.convert_tokens_to_ids("</think>")
        item = Renderer(tokenizer, thinking=True).render(PROMPTS.prompts[0], INTERVENTION)
        with torch.no_grad():
            last = model.model(torch.tensor([list(item.token_ids)])).last_hidden_state[0, -1]
            # The closing tag's logit is large exactly along the state that ends this prompt.
            model.lm_head.weight[closing] = 40 * last / last.square().sum()
        model.save_pretrained(tmp_path / "closing")
        tokenizer.save_pretrained(tmp_path / "closing")
        loaded = load_model(tmp_path / "closing", self_check=False, progress=lambda _line: None)
        plain = load_plain(tmp_path / "closing")
        direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
        vector = SteeringVector((1,), direction[None])
        for role, first in (("reasoning", True), ("answer", False)):
            selector = Selector("roles", roles=(role,), phases=("decode",))  # type: ignore[arg-type]
            with steering(loaded, vector.intervention(1, 4.0, selector)):
                (answer,) = generate(loaded, [item], SETTINGS)
            assert answer.token_ids[0] == closing
            n = len(item)
            step = Step(
                1,
                "post",
                add(direction, 4.0),
                ("decode",),
                selects=lambda position, _n, n=n, first=first: (position == n) == first,
            )
            assert list(answer.token_ids) == plain_generate(plain, item.token_ids, [step], N_NEW)[0]
        directions = mean_difference_directions(
            torch.randn(4, 3, 32),
            torch.randn(4, 3, 32),
            concept="c",
            source="s",
            read_at="last_prompt",
            sites=all_sites(3),
        )
        trace = trace_generation(loaded, [item], directions, SETTINGS)
        written = trace.table[(trace.table["step"] >= 0) & (trace.table["layer"] == 1)].sort_values("step")
        assert list(written["role"]) == ["reasoning"] + ["answer"] * (len(written) - 1)
        assert trace.end_of_reasoning()["step"].tolist() == [1.0]
        # Raw projections equal those of a full recomputation over prompt and answer.
        ids = (*item.token_ids, *trace.generations["plain"][0].token_ids)
        expected = hidden(plain, ids)[len(item) :, 1] @ directions.at(Site(1))
        torch.testing.assert_close(
            torch.tensor(written["raw"].to_numpy()).float(), expected[: len(written)], atol=2e-3, rtol=1e-3
        )


class TestReading:
    @pytest.mark.parametrize(
        ("name", "thinking"),
        [
            ("thinking-intervention", True),
            ("reasoning-guard", True),
            ("self-reminder", True),
            ("self-reminder", False),
        ],
    )
    def test_extraction(self, loaded: LoadedModel, reference: Any, name: str, thinking: bool) -> None:
        condition = PRESETS[name]
        renderer = Renderer(loaded.tokenizer, thinking=thinking)
        vector = SteeringVector.extract(loaded, renderer, PROMPTS, condition)
        turns = {"suffix": condition.suffix} | ({} if condition.system is None else {"system": condition.system})
        differences = []
        for text in TEXTS:
            safe = by_hand(loaded.tokenizer, text, thinking=thinking, prefill=condition.prefill, **turns)
            plain = by_hand(loaded.tokenizer, text, thinking=thinking)
            differences.append(hidden(reference, tuple(safe))[-1] - hidden(reference, tuple(plain))[-1])
        torch.testing.assert_close(vector.values, torch.stack(differences).mean(0), atol=2e-4, rtol=1e-4)

    def test_gap_readings_stand_at_the_right_tokens(self, loaded: LoadedModel, reference: Any) -> None:
        renderer = Renderer(loaded.tokenizer, thinking=True)
        vector = SteeringVector.extract(loaded, renderer, PROMPTS, INTERVENTION)
        one, zero = torch.randn(2, 6, 3, 32, generator=torch.Generator().manual_seed(3))
        fitted = {
            concept: mean_difference_directions(
                one, zero, concept=concept, source="random", read_at=position, sites=all_sites(3)
            )
            for concept, position in (("awareness", "last_instruction"), ("refusal", "last_prompt"))
        }
        readings = {}
        for arm in four_arms(INTERVENTION, vector, [1], 0.5):
            rendered = [renderer.render(prompt, arm.condition) for prompt in PROMPTS]
            with steering(loaded, arm.interventions):
                readings[arm.name] = read_for_gap(loaded, rendered, all_sites(3))
            for index, item in enumerate(rendered):
                handle = None
                if arm.interventions:
                    added = 0.5 * vector.at(1)
                    handle = reference.model.layers[1].register_forward_hook(
                        lambda _m, _a, out, added=added: (
                            out + added if torch.is_tensor(out) else (out[0] + added, *out[1:])
                        )
                    )
                states = hidden(reference, item.token_ids)
                if handle is not None:
                    handle.remove()
                header = item.text.index("<|im_start|>assistant")
                instruction_end = item.text.index(TEXTS[index]) + len(TEXTS[index])
                ends = [k for k, (_, end) in enumerate(item.offsets) if end <= instruction_end]
                torch.testing.assert_close(
                    readings[arm.name].instruction[index], states[ends[-1]], atol=2e-4, rtol=1e-4
                )
                assert item.offsets[ends[-1]][1] <= header
                found = readings[arm.name].prompt[index]
                matches = (states - found).abs().amax((1, 2)) < 1e-3
                assert matches.nonzero()[:, 0].tolist() == [len(item) - 1]
        gap = measure_gap(readings, PROMPTS, fitted["awareness"], fitted["refusal"])
        assert set(gap.to_dataframe()["arm"]) == {"plain", "prompted", "steered", "both"}
