"""The explorer's panel without a browser: states, the code that reproduces them, and widgets driven by hand."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("ipywidgets")
pytest.importorskip("anywidget", reason="anywidget is not installed: pip install 'sgworkbench[notebook]'")

from test_explorer_readings import PROMPT, SAFE, made_directions, made_vector

from sgworkbench import PromptSet, Workbench, WorkbenchError
from sgworkbench.explorer import ExplorerState, code_of, explore, readings
from sgworkbench.explorer import view as view_module
from sgworkbench.explorer.panel import Panel
from sgworkbench.explorer.session import Session, open_session
from sgworkbench.explorer.state import operator_control, operator_names
from sgworkbench.prompting import Renderer
from sgworkbench.steering import OPERATORS
from sgworkbench.steering.operators import Add, register_operator

LAYERS = 4


@pytest.fixture(scope="module")
def workbench(tiny_model: Any) -> Workbench:
    loaded = tiny_model("llama", n_layers=LAYERS)
    return Workbench(loaded, Renderer(loaded.tokenizer))


@pytest.fixture(scope="module")
def given(workbench: Workbench) -> dict[str, Any]:
    return {
        "awareness": made_directions(workbench.loaded, "awareness", 1),
        "refusal": made_directions(workbench.loaded, "refusal", 2),
        "vector": made_vector(workbench.loaded),
    }


@pytest.fixture
def panel(workbench: Workbench, given: dict[str, Any]) -> Panel:
    return explore(workbench, prompt=PROMPT, condition=SAFE, max_new_tokens=6, **given)


def figure_values(panel: Panel, name: str, trace: str) -> np.ndarray:
    import plotly.graph_objects as go

    figure = go.Figure(panel.view.shown[("figure", name)]["figure"])
    found = next(each for each in figure.data if each.name == trace)
    values = found.z if trace == "shift" else found.y
    if not isinstance(values, dict):
        return np.array(values, dtype=float)
    # plotly's own packing of numbers for the browser.
    flat = np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])
    shape = [int(part) for part in values.get("shape", str(len(flat))).split(",")]
    return flat.reshape(shape).astype(float)


def test_the_panel_fills_every_view_and_says_nothing(panel: Panel) -> None:
    assert panel.message.value == ""
    for key in ("map", "gap", "trajectory"):
        assert panel.view.shown[("figure", key)]["figure"] is not None
    for key in ("tokens", "focus", "next"):
        assert panel.view.shown[("html", key)]["html"]
    assert {arm for kind, arm in panel.view.shown if kind == "answer"} == {"plain", "prompted", "steered", "both"}
    assert panel.stop.disabled


def test_moving_the_slider_changes_all_views_and_agrees_with_a_fresh_run(panel: Panel, workbench: Workbench) -> None:
    old_map, old_tokens = figure_values(panel, "map", "shift"), panel.view.shown[("html", "tokens")]["html"]
    old_gap = figure_values(panel, "gap", "both")
    panel.controls.coefficient.value = 2.0
    assert panel.view.shown[("html", "tokens")]["html"] != old_tokens
    assert not np.allclose(figure_values(panel, "map", "shift"), old_map)
    assert not np.allclose(figure_values(panel, "gap", "both"), old_gap)
    state = panel.state
    item = workbench.render(PROMPT, state.condition)
    plain = readings.run_prompt(workbench.loaded, workbench.render(PROMPT))
    steps = [state.spec().build(panel.session.sources, LAYERS)]
    run = readings.run_prompt(workbench.loaded, item, interventions=steps)
    expected = readings.token_grid(plain, run, panel.session.refusal).values
    assert np.allclose(figure_values(panel, "map", "shift"), expected, atol=1e-4)


def test_repeated_settings_come_from_the_cache(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    panel.controls.coefficient.value = 1.5
    panel.controls.coefficient.value = 0.25
    monkeypatch.setattr(readings, "run_prompt", lambda *_, **__: pytest.fail("a run was repeated"))
    monkeypatch.setattr("sgworkbench.explorer.panel.stream_completion", lambda *_: pytest.fail("written again"))
    panel.controls.coefficient.value = 1.5
    panel.controls.focus_layer.value = 0
    panel.controls.concept.value = "awareness"
    assert panel.message.value == ""


def test_a_clicked_cell_becomes_the_focus(panel: Panel) -> None:
    panel.view.widget._handle_custom_msg({"kind": "cell", "layer": 1, "column": 2}, [])
    assert panel.state.focus_layer == 1
    position = panel.state.focus_token
    assert position is not None
    assert "resid_post[1]" in panel.view.shown[("title", "focus")]["html"]
    assert f"token {position} " in panel.view.shown[("title", "focus")]["html"]
    assert "layer 1" in panel.view.shown[("html", "tokens")]["html"]
    expected = readings.focus_table(panel.runs, panel.session.refusal, 1, position)
    assert f"{expected['separation_units'][0]:+.2f}" in panel.view.shown[("html", "focus")]["html"]
    before = panel.state
    panel.view.widget._handle_custom_msg({"kind": "cell", "layer": 99, "column": 2}, [])
    assert panel.state == before


def test_the_layers_shown_bound_map_and_gap_and_leave_the_numbers_alone(panel: Panel) -> None:
    whole = figure_values(panel, "map", "shift")
    written = panel.completions["both"]
    panel.controls.shown.value = (1, 2)
    assert np.array_equal(figure_values(panel, "map", "shift"), whole[1:3])
    assert len(figure_values(panel, "gap", "both")) == 2
    assert panel.completions["both"] is written


def test_choosing_prompts_and_conditions_fills_the_text_fields(panel: Panel) -> None:
    controls = panel.controls
    controls.prompt_set.value = "everyday (test)"
    assert controls.prompt.value == controls.chosen_prompt.options[1][1]
    controls.category.value = controls.category.options[1]
    assert controls.prompt.value == controls.chosen_prompt.options[1][1]
    controls.preset.value = "prompting"
    assert controls.suffix.value.startswith("You should FIRST")
    assert panel.state.condition.name == "prompting"
    controls.system.value = "Be kind."
    assert panel.state.condition.name == "custom"
    assert panel.state.condition.system == "Be kind."
    assert panel.message.value == ""
    assert panel.runs["prompted"].item.condition == panel.state.condition


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda c: setattr(c.prompt, "value", "   "), "The prompt is empty"),
        (lambda c: setattr(c.prompt, "value", "lock " * 400), "context"),
        (lambda c: setattr(c.coefficient, "value", 3e38), "NaN or infinite"),
    ],
)
def test_bad_input_is_a_message_and_the_panel_stays_usable(panel: Panel, spoil: Any, says: str) -> None:
    panel.controls.coefficient.max = 4e38
    spoil(panel.controls)
    assert says in panel.message.value
    assert "Traceback" not in panel.message.value
    assert panel.stop.disabled
    with panel.controls.together():
        panel.controls.prompt.value, panel.controls.coefficient.value = "How do I bake bread?", 1.0
    assert panel.message.value == ""
    assert panel.runs["plain"].item.prompt.text == "How do I bake bread?"


def test_a_template_that_fails_is_a_message(workbench: Workbench, given: dict[str, Any]) -> None:
    from tiny_models import NO_SYSTEM

    other = Workbench(workbench.loaded, Renderer(workbench.loaded.tokenizer, NO_SYSTEM))
    made = explore(other, prompt=PROMPT, condition=SAFE, max_new_tokens=4, **given)
    assert "no system role" in made.message.value
    made.controls.system.value = ""
    assert made.message.value == ""
    assert ("figure", "map") in made.view.shown


def test_a_fault_of_the_code_itself_is_a_message_too(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "gap_by_layer", lambda *_: 1 // 0)
    panel.controls.coefficient.value = 3.0
    assert "ZeroDivisionError" in panel.message.value
    monkeypatch.undo()
    panel.controls.coefficient.value = 2.5
    assert panel.message.value == ""


def test_completions_are_hidden_until_asked_for_and_never_widget_state(panel: Panel) -> None:
    texts = [steps[-1].text for steps in panel.completions.values()]
    assert all(texts)
    shown = [message for (kind, _), message in panel.view.shown.items() if kind == "answer"]
    assert [message["text"] for message in shown] == [None] * 4
    panel.show.value = True
    shown = [message for (kind, _), message in panel.view.shown.items() if kind == "answer"]
    assert [message["text"] for message in shown] == texts

    def every_widget(widget: Any) -> Iterator[Any]:
        yield widget
        for child in getattr(widget, "children", ()):
            yield from every_widget(child)

    states = [widget.get_state() for widget in every_widget(panel.box)]
    stored = json.dumps(states, default=str)
    assert PROMPT in stored
    telling = [text for text in texts if len(text.split()) > 1]
    assert telling
    for text in telling:
        assert text not in stored
        assert json.dumps(text)[1:-1] not in stored


def test_completions_follow_changes_only_when_asked(panel: Panel) -> None:
    panel.follow.value = False
    before = {arm: list(steps) for arm, steps in panel.completions.items()}
    panel.controls.coefficient.value = 3.5
    assert panel.completions == before
    assert "press Generate" in panel.view.shown[("title", "answers")]["html"]
    panel.generate.click()
    assert [s.token_id for s in panel.completions["plain"]] == [s.token_id for s in before["plain"]]
    assert panel.completions["both"] != before["both"]


def test_a_page_that_opens_later_gets_everything_and_its_theme(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(panel.view.widget, "send", lambda content, buffers=None: sent.append((content, buffers)))
    light = panel.view.shown[("figure", "map")]["figure"]
    panel.view.widget._handle_custom_msg({"kind": "ready", "theme": "dark", "plotly": True}, [])
    assert sent[0][0] == {"kind": "plotly"}
    assert len(sent[0][1][0]) > 100_000
    assert {("figure", "map"), ("html", "tokens")} <= {(c["kind"], c.get("name")) for c, _ in sent}
    assert panel.view.theme == "dark"
    dark = panel.view.shown[("figure", "map")]["figure"]
    assert dark["data"][-1] != light["data"][-1] or dark["layout"] != light["layout"]


def test_a_page_on_an_event_loop_can_be_stopped(workbench: Workbench, given: dict[str, Any]) -> None:
    import asyncio

    async def story() -> tuple[int, int, str]:
        made = explore(workbench, prompt=PROMPT, **given)
        while not made.completions.get("both"):
            await asyncio.sleep(0)
        assert made.scheduler.busy
        assert not made.stop.disabled
        made.stop.click()
        reached = len(made.completions["plain"])
        for _ in range(20):
            await asyncio.sleep(0)
        return reached, len(made.completions["plain"]), made.message.value

    reached, later, said = asyncio.run(story())
    assert reached == later < 48
    assert "Stopped" in said


def test_new_settings_replace_work_that_is_going_on(workbench: Workbench, given: dict[str, Any]) -> None:
    import asyncio

    async def story() -> Panel:
        made = explore(workbench, prompt=PROMPT, max_new_tokens=5, **given)
        for value in (0.75, 1.0, 1.25):
            await asyncio.sleep(0)
            made.controls.coefficient.value = value
        while made.scheduler.busy:
            await asyncio.sleep(0)
        return made

    made = asyncio.run(story())
    assert made.message.value == ""
    assert made.stop.disabled
    assert "1.25" in made.view.shown[("title", "tokens")]["html"]
    assert {len([s for s in steps if s.token_id is not None]) for steps in made.completions.values()} <= {1, 2, 3, 4, 5}


STATES = [
    {},
    {"operator": "ace", "coefficient": 1.0, "concept": "awareness", "arm": "prompted"},
    {"operator": "ablate", "tokens": "instruction", "arm": "plain"},
    {"operator": "rotate", "coefficient": 45.0, "arm": "steered"},
    {"operator": "clamp", "coefficient": 0.3},
    {"operator": "add_preserving_norm", "layers": (1, 3), "protocol": "official", "tokens": "user suffix"},
]


@pytest.mark.parametrize("changes", STATES)
def test_the_copied_code_gives_the_panels_numbers(
    workbench: Workbench, given: dict[str, Any], panel: Panel, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    controls = panel.controls
    with controls.together():
        for name, value in changes.items():
            getattr(controls, name).value = value
    # Set after the operator, which resets the coefficient.
    if "coefficient" in changes:
        controls.coefficient.value = changes["coefficient"]
    panel.copy.click()
    assert panel.message.value == ""
    monkeypatch.setattr(Workbench, "load", lambda *_, **__: workbench)
    names: dict[str, Any] = dict(given)
    exec(panel.code.value, names)
    state = panel.state
    directions = panel.session.directions(state.concept)
    shown = readings.projections(panel.runs[state.arm], directions)[state.focus_layer]
    assert np.allclose(names["tokens"].numpy(), shown, atol=1e-3)
    assert np.allclose(names["grid"].numpy(), figure_values(panel, "map", "shift"), atol=1e-3)
    table = names["gap"].to_dataframe()
    for arm in ("plain", "prompted", "steered", "both"):
        rows = table.loc[table["arm"] == arm, "gap"].to_numpy(dtype=float)
        assert np.allclose(rows, figure_values(panel, "gap", arm), atol=1e-3)
        logits = readings.next_token_logits_of(workbench.loaded, panel.runs[arm])
        assert torch.allclose(names["next_token"][arm].float(), logits, atol=1e-3)
        assert names["answers"][arm] == panel.completions[arm][-1].text


def test_code_for_fitted_directions_fits_them_again(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("llama", n_layers=2)
    workbench = Workbench(loaded, Renderer(loaded.tokenizer))
    few = _few_prompts()
    monkeypatch.setattr("sgworkbench.explorer.session.contrast_set", lambda: few)
    session = open_session(workbench)
    again = open_session(workbench)
    assert again.refusal is session.refusal
    state = ExplorerState(PROMPT, layers=(1, 1), focus_layer=1, max_new_tokens=3)
    monkeypatch.setattr(Workbench, "load", lambda *_, **__: workbench)
    monkeypatch.setattr("sgworkbench.contrast_set", lambda: few, raising=False)
    names: dict[str, Any] = {}
    exec(code_of(state, session), names)
    for name in ("awareness", "refusal"):
        assert torch.allclose(names[name].unit, getattr(session, name).unit, atol=1e-5)
    assert torch.allclose(names["vector"].values, session.vector.values, atol=1e-5)


def _few_prompts() -> PromptSet:
    from sgworkbench import contrast_set

    whole = contrast_set()
    sets = [whole.split(split).sample(12) for split in ("train", "test")]
    return PromptSet("few", tuple(prompt for part in sets for prompt in part))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": " \n"}, "prompt is empty"),
        ({"layers": (3, 1)}, "ascending order"),
        ({"layers": (0, 9)}, "Layer 9 is outside the model"),
        ({"shown": (2, 1)}, "shown layer in ascending order"),
        ({"focus_layer": 4}, "Layer 4 is outside the model"),
        ({"coefficient": float("nan")}, "finite number"),
        ({"operator": "ad"}, "Did you mean 'add'"),
        ({"protocol": "offical"}, "Did you mean 'official'"),
        ({"tokens": "instructions"}, "Did you mean 'instruction'"),
        ({"concept": "fear"}, "Unknown concept"),
        ({"arm": "stered"}, "Did you mean 'steered'"),
        ({"unit": "percent"}, "Unknown unit"),
    ],
)
def test_a_state_that_cannot_be_run_says_why(changes: dict[str, Any], says: str) -> None:
    good = ExplorerState(PROMPT, layers=(1, 2), focus_layer=3)
    good.check(LAYERS)
    with pytest.raises(WorkbenchError, match=says):
        replace(good, **changes).check(LAYERS)


def test_every_operator_but_the_fitted_one_is_offered_and_builds(workbench: Workbench, given: dict[str, Any]) -> None:
    assert set(operator_names()) == set(OPERATORS) - {"null_space"}
    for name in operator_names():
        state = ExplorerState(PROMPT, operator=name, layers=(1, 2), coefficient=operator_control(name).start)
        intervention = state.spec().build(given, LAYERS)
        assert [site.layer for site in intervention.operator.sites] == [1, 2]


def test_a_registered_operator_joins_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgworkbench.steering.operators.registry.OPERATORS", OPERATORS)

    class Doubled(Add):
        name = "doubled"

    register_operator(Doubled)
    try:
        assert operator_names()[-1] == "doubled"
        assert ExplorerState(PROMPT, operator="doubled").spec().vector == "vector"
    finally:
        del OPERATORS["doubled"]


def test_directions_that_miss_layers_or_belong_to_another_model_are_refused(
    workbench: Workbench, given: dict[str, Any], tiny_model: Any
) -> None:
    fewer = made_directions(SimpleNamespace(identity=SimpleNamespace(n_layers=2, d_model=32)), "refusal", 1)
    with pytest.raises(WorkbenchError, match="every one of the 4 layers"):
        Session(**_session(workbench, given) | {"refusal": fewer})
    wide = made_directions(SimpleNamespace(identity=SimpleNamespace(n_layers=4, d_model=48)), "refusal", 1)
    with pytest.raises(WorkbenchError, match="width 48"):
        Session(**_session(workbench, given) | {"refusal": wide})


def _session(workbench: Workbench, given: dict[str, Any]) -> dict[str, Any]:
    return {"loaded": workbench.loaded, "renderer": workbench.renderer, "condition": SAFE, **given}


def test_a_training_prompt_is_named_as_one(workbench: Workbench, given: dict[str, Any]) -> None:
    from sgworkbench.analysis.gap import text_hash

    fitted = given["refusal"].with_provenance(train_texts_sha256=[text_hash(PROMPT)])
    made = explore(workbench, prompt=PROMPT, max_new_tokens=4, **(given | {"refusal": fitted}))
    assert "not held out" in made.message.value
    made.controls.prompt.value = "Another question?"
    assert made.message.value == ""


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch, workbench: Workbench) -> None:
    monkeypatch.setattr(view_module.importlib.util, "find_spec", lambda name: None if name == "anywidget" else object())
    with pytest.raises(WorkbenchError, match=r"needs anywidget.*sgworkbench\[notebook\]"):
        explore(workbench)
