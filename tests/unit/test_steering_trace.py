"""Traces hold the projection of every token, computed again from scratch, with its role; and their figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plain_steering as plain
import pytest
import torch
from tiny_models import QWEN3_THINKING

from sgworkbench.analysis.directions import Directions, mean_difference_directions
from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.behaviour import four_arms
from sgworkbench.evaluation.trace_arms import trace_arms
from sgworkbench.plotting.trace import generation_trace
from sgworkbench.prompting import PromptCondition, PromptSet, Renderer
from sgworkbench.prompting.prompt_set import Prompt
from sgworkbench.steering import (
    Add,
    GenerationSettings,
    Intervention,
    Selector,
    SteeringVector,
    generate,
    join_traces,
    steering,
    trace_generation,
)
from sgworkbench.steering.trace import COLUMNS, generated_roles

D = 32
SITES = (Site(0), Site(2))
TEXTS = ("Hi", "Why is the sky blue?", "Tell me how to pick a lock, and write it to my friend.")
SETTINGS = GenerationSettings(max_new_tokens=5, stop_at_end_of_turn=False)


def directions(concept: str, seed: int) -> Directions:
    one, zero = torch.randn(2, 6, 2, D, generator=torch.Generator().manual_seed(seed))
    return mean_difference_directions(one, zero, concept=concept, source="random", read_at="last_prompt", sites=SITES)


REFUSAL, AWARENESS = directions("refusal", 1), directions("awareness", 2)


@pytest.fixture
def loaded(tiny_model: Any) -> Any:
    return tiny_model("llama")


@pytest.fixture
def rendered(loaded: Any) -> Any:
    renderer = Renderer(loaded.tokenizer)
    return [renderer.render(Prompt(text, f"p{index}")) for index, text in enumerate(TEXTS)]


class TestTrace:
    @pytest.mark.parametrize("phases", [("prefill", "decode"), ("decode",)])
    def test_every_token_has_its_projection_after_steering(self, phases: Any, loaded: Any, rendered: Any) -> None:
        vector = torch.full((D,), 0.7)
        steer = Intervention(Add({Site(0): vector}, 1.0), Selector(phases=phases))
        trace = trace_generation(loaded, rendered, [REFUSAL, AWARENESS], SETTINGS, interventions=steer)
        assert list(trace.table.columns) == list(COLUMNS)
        with steering(loaded, steer):
            assert trace.generations["plain"] == generate(loaded, rendered, SETTINGS)
        model = plain.load_plain(loaded.folder)
        step = plain.Step(0, "post", plain.add(vector, 1.0), phases)
        for item, answer in zip(rendered, trace.generations["plain"], strict=True):
            ids = [*item.token_ids, *answer.token_ids]
            _, readings = plain.plain_logits(model, ids, len(item), [step])
            mine = trace.table[trace.table["prompt_id"] == item.prompt.id]
            for fitted in (REFUSAL, AWARENESS):
                for index, site in enumerate(SITES):
                    rows = mine[(mine["concept"] == fitted.concept) & (mine["site"] == str(site))]
                    assert rows["position"].tolist() == list(range(len(ids)))
                    assert rows["step"].tolist() == [p - len(item) for p in range(len(ids))]
                    stream = readings[site.layer, "post"]
                    raw = stream @ fitted.unit[index]
                    np.testing.assert_allclose(rows["raw"], raw.numpy(), atol=1e-4)
                    units = fitted.in_separation_units(torch.stack([stream, stream], dim=1))[:, index]
                    np.testing.assert_allclose(rows["separation_units"], units.numpy(), atol=1e-4)
                    assert rows["role"].tolist() == [*item.roles, *["answer"] * 5]
                    assert rows["phase"].tolist() == ["prefill"] * len(item) + ["decode"] * 5
                    assert "".join(rows["token"].iloc[: len(item)]) == item.text

    def test_prompt_tokens_can_be_left_out_and_sites_chosen(self, loaded: Any, rendered: Any) -> None:
        trace = trace_generation(loaded, rendered, REFUSAL, SETTINGS, sites=[Site(2)], prompt_tokens=False)
        assert len(trace.table) == 3 * 5
        assert set(trace.table["layer"]) == {2}
        assert trace.table["step"].tolist() == [0, 1, 2, 3, 4] * 3

    def test_a_finished_answer_ends_before_its_end_token(
        self, loaded: Any, rendered: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from sgworkbench.steering import generation

        free = generate(loaded, rendered, SETTINGS)
        stop = free[0].token_ids[2]
        monkeypatch.setattr(generation, "end_token_ids", lambda _loaded: (stop,))
        settings = GenerationSettings(max_new_tokens=5)
        expected = generate(loaded, rendered, settings)
        assert expected[0].finished
        trace = trace_generation(loaded, rendered, REFUSAL, settings, sites=[Site(2)], prompt_tokens=False)
        assert trace.generations["plain"] == expected
        for item, answer in zip(rendered, expected, strict=True):
            rows = trace.table[trace.table["prompt_id"] == item.prompt.id]
            assert len(rows) == len(answer.token_ids) - answer.finished

    def test_a_full_context_leaves_out_the_token_that_cannot_be_read(self, loaded: Any) -> None:
        # Pictures take four tokens each, so that little of the context is left to fill.
        item = Renderer(loaded.tokenizer).render("🙈" * 115)
        room = loaded.identity.context_length - len(item)
        settings = GenerationSettings(max_new_tokens=room, stop_at_end_of_turn=False)
        trace = trace_generation(loaded, [item], REFUSAL, settings, sites=[Site(0)], prompt_tokens=False)
        assert len(trace.generations["plain"][0].token_ids) == room
        assert trace.table["step"].tolist() == list(range(room - 1))

    def test_refuses_what_cannot_be_told_apart_or_projected(self, loaded: Any, rendered: Any) -> None:
        with pytest.raises(WorkbenchError, match=r"no refusal direction at resid_post\[1\]"):
            trace_generation(loaded, rendered, REFUSAL, SETTINGS, sites=[Site(1)])
        with pytest.raises(WorkbenchError, match="Two directions of the concept 'refusal'"):
            trace_generation(loaded, rendered, [REFUSAL, REFUSAL], SETTINGS)
        with pytest.raises(WorkbenchError, match="at least one set of directions"):
            trace_generation(loaded, rendered, [], SETTINGS)
        with pytest.raises(WorkbenchError, match="by their ids"):
            trace_generation(loaded, [rendered[0], rendered[0]], REFUSAL, SETTINGS)
        trace = trace_generation(loaded, rendered, REFUSAL, SETTINGS)
        with pytest.raises(WorkbenchError, match="'plain' occurs in two"):
            join_traces([trace, trace])
        with pytest.raises(WorkbenchError, match="at least one"):
            join_traces([])
        other = trace_generation(loaded, rendered, AWARENESS, SETTINGS, arm="steered")
        with pytest.raises(WorkbenchError, match="different directions"):
            join_traces([trace, other])

    def test_four_arms(self, loaded: Any) -> None:
        prompts = PromptSet.from_texts(TEXTS)
        vector = SteeringVector((1,), torch.ones(1, D))
        arms = four_arms(PromptCondition.preset("self-reminder"), vector, 1, 2.0)
        trace = trace_arms(loaded, Renderer(loaded.tokenizer), prompts, arms, REFUSAL, SETTINGS, sites=[Site(2)])
        assert list(trace.generations) == ["plain", "prompted", "steered", "both"]
        first = trace.table[trace.table["step"] == -1].groupby("arm")["raw"].mean()
        assert first.nunique() == 4


class TestRoles:
    @pytest.fixture
    def reasoner(self, tiny_model: Any) -> Any:
        return tiny_model("qwen3", chat_template=QWEN3_THINKING)

    def roles(self, reasoner: Any, item: Any, text: str) -> list[tuple[str, str]]:
        ids = reasoner.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(
            zip(
                [reasoner.tokenizer.decode([i]) for i in ids],
                generated_roles(reasoner.tokenizer, item, ids),
                strict=True,
            )
        )

    @staticmethod
    def spelled(found: list[tuple[str, str]], role: str) -> str:
        return "".join(token for token, each in found if each == role)

    def test_reasoning_ends_with_its_closing_tag(self, reasoner: Any) -> None:
        item = Renderer(reasoner.tokenizer).render("Hi")
        found = self.roles(reasoner, item, "<think>\nIs it safe? yes</think>\n\nSure </think> a")
        assert self.spelled(found, "reasoning") == "<think>\nIs it safe? yes</think>"
        assert self.spelled(found, "answer") == "\n\nSure </think> a"

    def test_reasoning_that_the_prompt_opened(self, reasoner: Any) -> None:
        opened = PromptCondition.preset("thinking-intervention")
        item = Renderer(reasoner.tokenizer).render("Hi", opened)
        assert self.spelled(self.roles(reasoner, item, " so</think>yes"), "reasoning") == " so</think>"
        assert self.spelled(self.roles(reasoner, item, " so and so"), "answer") == ""

    @pytest.mark.parametrize("thinking", [False, None])
    def test_no_reasoning_is_all_answer(self, thinking: bool | None, reasoner: Any) -> None:
        item = Renderer(reasoner.tokenizer, thinking=thinking).render("What does <think> mean?")
        assert self.spelled(self.roles(reasoner, item, "It opens reasoning."), "reasoning") == ""

    def test_a_tag_in_several_tokens(self, loaded: Any) -> None:
        class Letters:
            @staticmethod
            def decode(ids: list[int], skip_special_tokens: bool) -> str:
                return "".join(map(chr, ids))

        item = Renderer(loaded.tokenizer).render("Hi")
        text = "<think>why</think>yes"
        found = generated_roles(Letters, item, [ord(c) for c in text])
        assert found == ["reasoning"] * len("<think>why</think>") + ["answer"] * 3


def a_table(n_prompts: int = 3) -> pd.DataFrame:
    rows = []
    for arm, shift in (("both", 1.0), ("plain", 0.0)):
        for prompt in range(n_prompts):
            for step in range(-2, 6 + prompt):
                role = "template" if step < 0 else "reasoning" if step < 3 + prompt else "answer"
                value = shift + 0.1 * step + prompt
                rows.append((arm, f"p{prompt}", step, f"<b{step}>", role, "refusal", "resid_post[2]", value, 2 * value))
    columns = ["arm", "prompt_id", "step", "token", "role", "concept", "site", "separation_units", "raw"]
    return pd.DataFrame(rows, columns=columns)


def named(figure: Any, name: str) -> Any:
    (found,) = [each for each in figure.data if each.name == name]
    return found


class TestFigure:
    def test_one_prompt_shows_every_token_and_the_end_of_reasoning(self) -> None:
        figure = generation_trace(a_table(), prompt_id="p1", prompt_tokens=2)
        line = named(figure, "both")
        assert list(line.x) == list(range(-2, 7))
        np.testing.assert_allclose(line.y, [2 + 0.1 * step for step in range(-2, 7)])
        assert line.customdata[2].tolist() == ["&lt;b0&gt;", "reasoning"]
        end = named(figure, "both end of reasoning")
        assert list(end.x) == [3.0]
        assert end.y[0] == pytest.approx(2.3)
        assert "resid_post[2]" in figure.layout.title.text
        assert "separation units" in figure.layout.yaxis.title.text
        assert [each.name for each in figure.data if each.showlegend is not False] == ["plain", "both"]

    def test_the_mean_over_prompts_holds_steps_with_enough_prompts(self) -> None:
        figure = generation_trace(a_table(), unit="raw", min_prompts=2)
        line = named(figure, "plain")
        # Prompts have 6, 7 and 8 steps; the last is reached by one prompt only.
        assert list(line.x) == list(range(7))
        expected = [2 * (0.1 * step + (1.0 if step < 6 else 1.5)) for step in range(7)]
        np.testing.assert_allclose(line.y, expected)
        half = 4.302653 * 2.0 / np.sqrt(3)
        np.testing.assert_allclose(line.customdata[0], [expected[0] - half, expected[0] + half], rtol=1e-5)
        assert list(named(figure, "plain end of reasoning").x) == [3.0]

    def test_a_running_mean_does_not_cross_the_end_of_reasoning(self) -> None:
        table = a_table(1)
        table.loc[table["role"] == "answer", "separation_units"] = 100.0
        line = named(generation_trace(table, prompt_id="p0", window=3), "plain")
        assert max(line.y[:3]) < 1
        assert min(line.y[3:]) == 100

    def test_no_reasoning_no_mark(self) -> None:
        table = a_table()
        table["role"] = "answer"
        assert not any("end of reasoning" in str(each.name) for each in generation_trace(table).data)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompt_id": "p9"}, "Unknown prompt in the trace 'p9'"),
            ({"concept": "refusl"}, "Did you mean 'refusal'"),
            ({"site": "resid_post[3]"}, "Unknown site in the trace"),
            ({"unit": "separation_unit"}, "Did you mean 'separation_units'"),
            ({"window": 0}, "window and min_prompts"),
            ({"min_prompts": 4}, "lower min_prompts"),
        ],
    )
    def test_refuses_what_it_cannot_show(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(WorkbenchError, match=message):
            generation_trace(a_table(), **options)

    def test_several_concepts_need_a_choice(self) -> None:
        table = pd.concat([a_table(), a_table().assign(concept="awareness")])
        with pytest.raises(WorkbenchError, match="several concepts"):
            generation_trace(table)
        assert "Awareness" in generation_trace(table, concept="awareness").layout.yaxis.title.text
